"""The ``verify`` command of ``vllm-steer``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_steer.cli.evaluation import json_object
from vllm_steer.errors import ConfigError, SteeringError
from vllm_steer.packs.pack import load_pack, resolve_pack
from vllm_steer.verify.report import COULD_NOT_RUN, Report
from vllm_steer.verify.run import VerifyJob, verify

_DESCRIPTION = """Starts the installed vLLM with and without steering, and checks that requests are
steered exactly as by Hugging Face with forward hooks, that requests of a batch do not affect each other,
that the prefix cache separates different steerings, and what steering costs. Its prompts use the model's
own chat template, or none, regardless of the packs' templates, since exactness does not depend on it.
Prints one page. Exit status: 0 nothing failed, 1 something failed, 2 nothing could be verified."""


def add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer verify``."""
    parser = commands.add_parser(
        "verify",
        help="check steering on the installed vLLM",
        description=_DESCRIPTION,
    )
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument(
        "--pack",
        dest="packs",
        nargs="+",
        required=True,
        metavar="PACK",
        help="packs for the model: directories, or owner/name or owner/name@revision on the hub",
    )
    parser.add_argument("--eager", action="store_true", help="without compilation and CUDA graphs")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of engine and reference; float32 shows the smallest faults (default: the model's)",
    )
    parser.add_argument("--gpu-memory-utilization", type=float, metavar="U", help="as in vLLM")
    parser.add_argument(
        "--engine",
        type=json_object,
        default={},
        metavar="JSON",
        help="""more arguments of vllm.LLM, such as '{"tensor_parallel_size": 4}'""",
    )
    parser.add_argument("--quick", action="store_true", help="skip the overhead")
    parser.add_argument(
        "--no-parity",
        action="store_true",
        help="skip Hugging Face, for a model that does not fit there",
    )
    parser.add_argument(
        "--min-ratio",
        type=float,
        metavar="R",
        help="fail if the plugin, idle or steering, has less than R of plain vLLM's throughput",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the results to this file"
    )
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    try:
        with _ending_engines():
            report = _report(args)
        sys.stdout.write(report.page())
        if args.json is not None:
            args.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    except (SteeringError, OSError) as error:
        sys.stderr.write(f"vllm-steer: {error}\n")
        return COULD_NOT_RUN
    return report.exit_status


@contextmanager
def _ending_engines() -> Iterator[None]:
    """Within it SIGTERM also ends the engines, as an interrupt does."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(args: argparse.Namespace) -> Report:
    from vllm_steer.offline.questions.by_class import DEFAULTS

    if args.quick and args.min_ratio is not None:
        raise ConfigError("--min-ratio needs the overhead, which --quick skips")
    job = VerifyJob(
        model=args.model,
        packs=tuple(load_pack(resolve_pack(pack)) for pack in args.packs),
        texts=tuple(dict.fromkeys(line for lines in DEFAULTS.values() for line in lines)),
        engine=_engine(args),
        parity=not args.no_parity,
        overhead=not args.quick,
        least_ratio=args.min_ratio,
    )
    from tqdm import tqdm

    from vllm_steer.verify.oracle import scoring_process

    # No progress bar without a terminal.
    with tqdm(total=job.steps, unit="step", leave=False, disable=None) as bar:

        def step(name: str) -> None:
            bar.set_description_str(name, refresh=False)
            bar.update()
            bar.refresh()

        return verify(job, scoring_process, step)


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    given = {"dtype": args.dtype, "gpu_memory_utilization": args.gpu_memory_utilization}
    eager = {"enforce_eager": True} if args.eager else {}
    return {**args.engine, **eager, **{k: v for k, v in given.items() if v is not None}}
