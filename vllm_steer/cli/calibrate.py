"""The ``calibrate`` command of ``vllm-steer``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_steer.cli.evaluation import add_engine, extras
from vllm_steer.cli.prefixes import add_prefixes, given_prefixes
from vllm_steer.errors import EvaluationError
from vllm_steer.packs.pack import load_pack
from vllm_steer.packs.summary import pack_summary


def add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer calibrate``."""
    calibrate = commands.add_parser(
        "calibrate",
        help="measure layers and strength of a pack's directions, and write them into it",
        description="Measures through the engine, for every direction, on which layers and at which scale it makes "
        "the prefixed model's answers most likely while the text stays fluent, and the largest scale at which it "
        "does. An interrupted run continues.",
    )
    calibrate.add_argument("pack", type=Path, help="directory of the pack")
    calibrate.add_argument("--model", required=True, help="checkpoint directory or hub id")
    add_prefixes(
        calibrate,
        "Without a prefix, only the largest fluent scale is measured.",
        class_too=True,
    )
    calibrate.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="everyday questions, one per line (default: built-in)",
    )
    calibrate.add_argument(
        "--max-tokens", type=int, default=48, help="longest answer (default: %(default)s)"
    )
    add_engine(calibrate)
    calibrate.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> None:
    with extras("offline"):
        from vllm_steer.offline.calibrate.run import CalibrationSettings, calibrate_pack
    from vllm_steer.offline.questions.everyday import everyday_questions

    if args.max_tokens < 1:
        raise EvaluationError(f"--max-tokens must be at least 1, not {args.max_tokens}")
    pack = load_pack(args.pack)
    found = calibrate_pack(
        pack,
        args.model,
        everyday_questions(args.questions),
        CalibrationSettings(max_tokens=args.max_tokens),
        given_prefixes(args, list(pack.directions), args.concept_class),
        args.engine,
    )
    sys.stdout.write(pack_summary(found))
