"""The ``demo`` command of ``vllm-steer``."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_steer.cli.evaluation import extras
from vllm_steer.cli.extract import cores

_DESCRIPTION = """Fetches SmolLM2-135M-Instruct, learns and calibrates a direction, serves it with vllm
serve together with a shipped pack, asks everyday questions plain, with a prefix and steered, and shows
the answers in a table."""


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer demo``."""
    demo = commands.add_parser(
        "demo",
        help="learn a direction of a real model, serve it, show plain, prefixed and steered answers",
        description=_DESCRIPTION,
    )
    demo.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="default: %(default)s"
    )
    kind = demo.add_mutually_exclusive_group()
    kind.add_argument(
        "--full",
        action="store_true",
        help="learn and calibrate all 30 directions instead of using the shipped ones: about an hour on two cores; "
        "an interrupted run continues",
    )
    kind.add_argument(
        "--tiny",
        action="store_true",
        help="use the tests' model of 4.5 million parameters: no download, a minute or two",
    )
    demo.add_argument(
        "--concepts",
        type=int,
        metavar="N",
        help="concepts per class (default: 2; 3 with --tiny)",
    )
    demo.add_argument(
        "--workers", type=int, default=cores(), help="processes for learning vectors, with --tiny"
    )
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    with extras("offline"):
        from vllm_steer.offline.demo.run import run_demo
        from vllm_steer.offline.showcase.run import run_showcase
    args.output.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        run_demo(args.output, args.concepts or 3, args.workers)
    else:
        run_showcase(args.output, args.concepts or 2, args.full)
