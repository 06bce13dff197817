"""Prefixes that make a model take on a pack's concepts without steering, from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm_steer.errors import EvaluationError
from vllm_steer.packs.pack import Prefix


def add_prefixes(command: argparse.ArgumentParser, use: str, class_too: bool = False) -> None:
    """Adds the arguments of :func:`given_prefixes`.

    Args:
        command: The command.
        use: Purpose of the prefixes, as a sentence.
        class_too: Whether to add ``--class``, only for prefixes.
    """
    group = command.add_argument_group(
        "prefixes (default: those of the pack)",
        f"Prompts that make the model take on each concept without steering. {use}",
    )
    group.add_argument(
        "--prefixes", type=Path, metavar="FILE", help="lines of 'direction: whole prefix'"
    )
    if class_too:
        group.add_argument(
            "--class",
            dest="concept_class",
            help="fears, moods, experts, personas, places: the class's prefix, with the names of the directions",
        )
    group.add_argument("--prefix", help="custom prefix, with {concept} for the direction's name")
    group.add_argument(
        "--prefix-role", choices=("user", "system"), default="user", help="message with the prefix"
    )


def given_prefixes(
    args: argparse.Namespace, names: Sequence[str], concept_class: str | None = None
) -> dict[str, Prefix]:
    """Returns the prefixes given by the arguments, by direction; empty without any.

    Args:
        args: The parsed arguments of :func:`add_prefixes`.
        names: The directions.
        concept_class: The class whose prefix is used; None for none.

    Raises:
        EvaluationError: They are given in more than one way.
        ExtractionError: They cannot be read, or there is no such class.
    """
    from vllm_steer.offline.extract import inputs
    from vllm_steer.offline.models.prompts import prefix_for

    ways = [args.prefixes, concept_class, args.prefix]
    if sum(way is not None for way in ways) > 1:
        raise EvaluationError("give only one of --prefixes, --class and --prefix")
    texts: dict[str, str] = {}
    if args.prefixes is not None:
        texts = dict(inputs.whole_prefixes(args.prefixes))
    elif concept_class is not None:
        texts = {name: prefix_for(concept_class, name) for name in names}
    elif args.prefix is not None:
        texts = dict(inputs.templated(list(names), args.prefix))
    return {name: Prefix(text=text, role=args.prefix_role) for name, text in texts.items()}
