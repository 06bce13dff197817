"""Options that benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.models import DEMO, SHAPES, WORK


def results_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser that asks where the results go.

    Args:
        doc: The benchmark's docstring, of which the first line describes it.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    return parser


def engine_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that the benchmarks of engines and of servers share.

    Args:
        doc: The benchmark's docstring, of which the first line describes it.
    """
    parser = results_parser(doc)
    parser.add_argument("--model", default=DEMO, help=f"{DEMO}, {', '.join(SHAPES)}, or a folder")
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor graphs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for models, packs and logs")
    parser.add_argument("--plot", type=Path, help="PNG file; by default beside the results")
    return parser
