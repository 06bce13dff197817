"""Everything that only a GPU can tell, in one command: speed, kernels of a step, equality with eager.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --shapes tiny --batches 1 4 --repetitions 1

For each shape and model runner: plain vLLM, the plugin and the rivals side by side, all arms at
each batch size in interleaved rounds; a profile of one decode step with and without steering; and
the plugin's greedy answers, compiled and with CUDA graphs, against those of its eager path. One JSON
file and one plot for each shape and runner. With ``--device cpu`` the same code counts operators
instead of kernels.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import arms, report
from benchmarks.arms import Arm, Workload
from benchmarks.engine import answers_of, start_engine
from benchmarks.equality import Answer, compare_greedy
from benchmarks.fleet import (
    PLUGIN_ENVIRONMENT,
    Fleet,
    Measurement,
    engine_arguments,
    fleet,
    measure,
)
from benchmarks.models import SHAPES, WORK, BenchModel, prepare_model
from benchmarks.profile_step import profile_decode
from vllm_steer.verify.process import EngineProcess

PROMPT = 32
ANSWER = 128
CHECKED_REQUESTS = 8
CHECKED_TOKENS = 24
PROFILE_STEPS = 8
PROFILED = ("plain", "idle", "steered_one", "steered_distinct", "hotwire_idle", "hotwire_distinct")
RESULTS = Path(__file__).parent / "results"
# What rounding may make of a log-probability.
TOLERANCE = {"cuda": 0.15, "cpu": 1e-3}


def settings(device: str) -> dict[str, Any]:
    """Arguments of ``LLM`` for a device."""
    common = {"max_model_len": 1024, "disable_log_stats": True}
    if device == "cuda":
        # Several engines share the device, so none may ask for what is left of it.
        memory = {"kv_cache_memory_bytes": 8 * 2**30, "gpu_memory_utilization": 0.2}
        return {**common, **memory, "dtype": "bfloat16"}
    inductor = {"inductor_compile_config": {"cpp.enable_kernel_profile": True}}
    return {
        **common,
        "dtype": "float32",
        "kv_cache_memory_bytes": 2**28,
        "compilation_config": inductor,
    }


def environment(device: str, runner: str) -> dict[str, str]:
    """Variables that choose the model runner; on a CPU the newer one needs Triton's interpreter."""
    chosen = {"VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0"}
    if device == "cpu" and runner == "v2":
        chosen["TRITON_INTERPRET"] = "1"
    return chosen


def checked_answers(engine: EngineProcess, vocabulary: int) -> list[Answer]:
    """Greedy answers to a mixed batch: unsteered requests beside distinctly steered ones."""
    rng = random.Random(0)
    prompts = Workload("equality", CHECKED_REQUESTS, PROMPT, CHECKED_TOKENS).prompts(
        vocabulary, rng
    )
    extra = arms.steered_distinct(CHECKED_REQUESTS, rng)
    mixed = [ask if index % 2 else None for index, ask in enumerate(extra)]
    return answers_of(engine, prompts, mixed, CHECKED_TOKENS)


def eager_answers(
    model: BenchModel, folder: Path, arguments: Mapping[str, Any], variables: Mapping[str, str]
) -> list[Answer]:
    """The answers of the plugin without compilation and graphs, from an engine that ends at once."""
    engine = start_engine(
        "eager plugin",
        {
            **engine_arguments(model, folder, arguments, CHECKED_REQUESTS),
            "enforce_eager": True,
        },
        {**variables, **PLUGIN_ENVIRONMENT},
    )
    try:
        return checked_answers(engine, model.vocabulary)
    finally:
        engine.close()


def profile_arm(running: Fleet, arm: Arm, batch: int) -> dict[str, Any]:
    """Kernels or operators of one decode step of an arm."""
    rng = random.Random(0)
    work = Workload("profile", batch, PROMPT, ANSWER)
    prompts = work.prompts(running.model.vocabulary, rng)
    extra = arm.steering(batch, rng)
    return running.engines[arm.engine].call(profile_decode, prompts, extra, PROFILE_STEPS)


def run(model: BenchModel, runner: str, args: argparse.Namespace) -> dict[str, Any]:
    """All measures of one shape on one model runner."""
    variables = environment(args.device, runner)
    arguments = settings(args.device) | ({"enforce_eager": True} if args.eager else {})
    expected = eager_answers(model, args.work, arguments, variables)
    largest = max(args.batches)
    with fleet(
        model,
        args.work,
        arguments,
        variables,
        requests=largest,
        control=False,
        rivals=not args.no_rivals,
    ) as running:
        answers = checked_answers(running.engines[arms.PLUGIN], model.vocabulary)
        measurements = []
        for batch in args.batches:
            work = Workload(f"batch {batch}", batch, PROMPT, args.answer)
            rounds = [measure(running, work, args.repetitions, args.seed)]
            measurements.append(Measurement(work, rounds))
        profiled = [arm for arm in running.arms if arm.name in PROFILED]
        profiles = {arm.name: profile_arm(running, arm, largest) for arm in profiled}
    report_run(f"{model.name}, {runner}", running, measurements, profiles, model)
    report.plot_ratios(
        args.results / f"{args.device}-{model.name}-{runner}.png",
        f"{model.name} on {args.device}, Model Runner {runner.upper()}: tokens a second",
        {m.workload.name: m.ratios for m in measurements},
    )
    return {
        "model": {"name": model.name, "parameters": model.parameters},
        "model_runner": runner,
        "engines": running.described,
        "checks": running.checks,
        "not_measured": running.notes,
        "equality": compare_greedy(answers, expected, TOLERANCE[args.device]),
        "ratios": {name: ratio.as_dict() for name, ratio in measurements[-1].ratios.items()},
        "workloads": {m.workload.name: m.as_dict() for m in measurements},
        "profiles": profiles,
        "extra_kernels_per_layer": extra_kernels(profiles, model.identity.num_layers),
    }


def extra_kernels(profiles: Mapping[str, Mapping[str, Any]], layers: int) -> dict[str, float]:
    """Kernels a layer that each arm's step has more than plain vLLM's; operators without a GPU."""
    kind = "kernels" if profiles[arms.PLAIN]["kernels"] else "operators"
    plain = profiles[arms.PLAIN][kind]
    return {name: round((found[kind] - plain) / layers, 3) for name, found in profiles.items()}


def report_run(
    title: str,
    running: Fleet,
    measurements: list[Measurement],
    profiles: Mapping[str, Mapping[str, Any]],
    model: BenchModel,
) -> None:
    """Shows the tables of one shape and runner."""
    for measurement in measurements:
        rows = report.ratio_rows(measurement.ratios, measurement.speeds, running.notes, "tokens/s")
        report.show([f"{title}, {measurement.workload.name}", *rows, ""])
    extra = extra_kernels(profiles, model.identity.num_layers)
    rows = [
        f"{'one decode step':18s} {'kernels':>8s} {'µs':>10s} {'operators':>10s} {'more a layer':>13s}"
    ]
    rows += [
        f"{name:18s} {found['kernels']:8.1f} {found['device_us'] or found['host_us']:10.1f} "
        f"{found['operators']:10.1f} {extra[name]:13.3f}"
        for name, found in profiles.items()
    ]
    report.show([*rows, ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.5b", "8b"])
    parser.add_argument("--runners", nargs="+", choices=("v2", "v1"), default=["v2", "v1"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--answer", type=int, default=ANSWER, help="tokens of each answer")
    parser.add_argument("--repetitions", type=int, default=7, help="rounds that count")
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor graphs")
    parser.add_argument("--no-rivals", action="store_true", help="the plugin and plain vLLM alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for models, packs, rivals")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    failed = False
    for shape in args.shapes:
        model = prepare_model(shape, args.work)
        for runner in args.runners:
            found = {**report.environment(), **run(model, runner, args)}
            report.write_json(args.results / f"{args.device}-{shape}-{runner}.json", found)
            equality = found["equality"]
            failed |= not equality["passed"]
            report.show(
                [f"{equality['equal']} of {equality['requests']} answers equal the eager path's"]
            )
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
