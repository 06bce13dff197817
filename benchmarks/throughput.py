"""Tokens a second with steering and without, every arm in one interleaved run.

    python -m benchmarks.throughput --json throughput.json
    python -m benchmarks.throughput --model 100m --requests 16 --json throughput-100m.json

Plain vLLM, the plugin and each rival run in processes of their own, side by side; in each round
every arm runs once, in random order, and its speed is divided by plain vLLM's in that round. The arm
`control` is a second plain vLLM: its ratio says how far this machine can be trusted.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import arms, report
from benchmarks.fleet import WAITING_LIMIT, Fleet, Measurement, Rounds, fleet, measure
from benchmarks.models import prepare_model
from benchmarks.options import engine_parser

MAX_MODEL_LEN = 512
CACHE_BYTES = 2**29


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``LLM`` that the command line decides."""
    return {
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "disable_log_stats": True,
    }


def result(running: Fleet, measurements: list[Measurement]) -> dict[str, Any]:
    """All figures; ``ratios`` are those of the first workload, the main one."""
    return {
        "model": {"name": running.model.name, "parameters": running.model.parameters},
        "engines": running.described,
        "checks": running.checks,
        "not_measured": running.notes,
        "ratios": {name: ratio.as_dict() for name, ratio in measurements[0].ratios.items()},
        "workloads": {m.workload.name: m.as_dict() for m in measurements},
    }


def table(running: Fleet, measurement: Measurement) -> list[str]:
    """The figures of one workload as text."""
    work = measurement.workload
    lines = [
        f"{running.model.name} ({running.model.parameters / 1e6:.1f} M parameters), {work.name}: "
        f"{work.requests} requests of {work.prompt} + {work.answer} tokens, "
        f"{len(measurement.times)} rounds",
        *report.ratio_rows(measurement.ratios, measurement.speeds, running.notes, "tokens/s"),
    ]
    if measurement.waiting_share > WAITING_LIMIT:
        lines.append(
            f"waiting engines used {measurement.waiting_share:.1%} of a core: the figures are disturbed"
        )
    return [*lines, ""]


def main() -> None:
    """Command line."""
    parser = engine_parser(__doc__)
    parser.add_argument("--requests", type=int, default=32, help="requests that run together")
    parser.add_argument("--tokens", type=float, default=1.0, help="factor of prompts and answers")
    parser.add_argument("--repetitions", type=int, default=15, help="rounds of each start")
    parser.add_argument("--starts", type=int, default=1, help="starts of all engines")
    parser.add_argument("--workloads", nargs="+", choices=arms.WORKLOADS, default=arms.WORKLOADS)
    parser.add_argument("--no-rivals", action="store_true", help="the plugin and plain vLLM alone")
    parser.add_argument(
        "--also", nargs="+", choices=arms.VARIANTS, default=(), help="plugins started another way"
    )
    parser.add_argument("--no-control", action="store_true", help="no second plain engine")
    args = parser.parse_args()
    about = report.environment()
    model = prepare_model(args.model, args.work)
    chosen = [
        workload
        for workload in arms.workloads(args.requests, args.tokens)
        if workload.name in args.workloads
    ]
    found: dict[str, list[Rounds]] = {workload.name: [] for workload in chosen}
    for number in range(args.starts):
        with fleet(
            model,
            args.work,
            settings(args),
            {},
            requests=args.requests,
            control=not args.no_control,
            rivals=not args.no_rivals,
            variants=args.also,
            seed=args.seed + number,
        ) as running:
            for workload in chosen:
                once = measure(running, workload, args.repetitions, args.seed + number)
                found[workload.name].append(once)
    measurements = [Measurement(workload, found[workload.name]) for workload in chosen]
    report.write_json(args.json, {**about, **result(running, measurements)})
    title = f"{args.model}, {'eager' if args.eager else 'compiled'}: tokens a second"
    report.plot_ratios(
        args.plot or args.json.with_suffix(".png"),
        title,
        {m.workload.name: m.ratios for m in measurements},
    )
    for measurement in measurements:
        report.show(table(running, measurement))


if __name__ == "__main__":
    main()
