"""What makes a model take on the concepts of a pack without steering, from the command line."""

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
        use: What prefixes are for, in a sentence.
        class_too: Whether ``--class`` is one of them and means nothing else.
    """
    group = command.add_argument_group(
        "prefixes (default: those that the pack was learned from)",
        f"What makes the model take on each concept without steering. {use}",
    )
    group.add_argument(
        "--prefixes", type=Path, metavar="FILE", help="lines of 'direction: whole prefix'"
    )
    if class_too:
        group.add_argument(
            "--class",
            dest="concept_class",
            help="fears, moods, experts, personas, places: that class's, with the names of the directions",
        )
    group.add_argument(
        "--prefix", help="prefix of a class of your own, {concept} in the direction's place"
    )
    group.add_argument(
        "--prefix-role", choices=("user", "system"), default="user", help="where prefixes stand"
    )


def given_prefixes(
    args: argparse.Namespace, names: Sequence[str], concept_class: str | None = None
) -> dict[str, Prefix]:
    """Returns the prefixes that the arguments give, by direction; none where they give none.

    Args:
        args: The parsed arguments of :func:`add_prefixes`.
        names: The directions.
        concept_class: The class whose prefix they take; None for none.

    Raises:
        EvaluationError: They are given in several ways.
        ExtractionError: They cannot be read, or there is no such class.
    """
    from vllm_steer.offline.extract import inputs
    from vllm_steer.offline.models.prompts import prefix_for

    ways = [args.prefixes, concept_class, args.prefix]
    if sum(way is not None for way in ways) > 1:
        raise EvaluationError("--prefixes, --class and --prefix are three ways; give one")
    texts: dict[str, str] = {}
    if args.prefixes is not None:
        texts = dict(inputs.whole_prefixes(args.prefixes))
    elif concept_class is not None:
        texts = {name: prefix_for(concept_class, name) for name in names}
    elif args.prefix is not None:
        texts = dict(inputs.templated(list(names), args.prefix))
    return {name: Prefix(text=text, role=args.prefix_role) for name, text in texts.items()}
