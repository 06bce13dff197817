"""Latency over HTTP with mixed traffic: time to first token and time per token, every arm interleaved.

    python -m benchmarks.serve --json serve.json
    python -m benchmarks.serve --directions 512 --starts 3 --json serve-512.json

Two real ``vllm serve`` processes, one without the plugin, get the same mixed traffic in turn from the
client of ``vllm bench serve``. With ``--directions N`` the measure is another one: two servers with
the plugin, one with a pack of N directions and one with a pack of one, compared in time to first
token and in time to start.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import arms, report
from benchmarks.arms import Arm
from benchmarks.models import DEMO, BenchModel, prepare_model, write_pack
from benchmarks.options import engine_parser
from benchmarks.traffic import SERVED_NAME, Latency, Traffic, send
from vllm_steer.offline.demo.server import Server, free_port, running
from vllm_steer.packs.pack import load_pack
from vllm_steer.verify.interleave import Ratio, ratio_to, rounds

MAX_MODEL_LEN = 512
PLAIN_ARM = Arm(arms.PLAIN, arms.PLAIN, arms.unsteered)
CONTROL_ARM = Arm(arms.CONTROL, arms.PLAIN, arms.unsteered)
SINGLE = "1 direction"
LOADS = 5


@contextmanager
def serving(
    model: BenchModel,
    pack: Path | None,
    args: argparse.Namespace,
    name: str,
    more: Sequence[str] = (),
) -> Iterator[tuple[Server, float]]:
    """Runs a server, without the plugin if ``pack`` is None; also gives the seconds that it took to start."""
    port = free_port()
    load_format = "auto" if model.name == DEMO or Path(model.name).is_dir() else "dummy"
    options = {
        "--port": port,
        "--served-model-name": SERVED_NAME,
        "--dtype": args.dtype,
        "--load-format": load_format,
        "--max-model-len": MAX_MODEL_LEN,
        "--max-num-seqs": args.requests,
        "--kv-cache-memory-bytes": "512M",
    }
    command = [
        "vllm",
        "serve",
        str(model.path),
        *(str(part) for pair in options.items() for part in pair),
    ]
    command += ["--enforce-eager"] if args.eager else []
    if pack is not None:
        command += ["--enable-steering", "--steering-packs", str(pack), *more]
    environment = {"VLLM_PLUGINS": "" if pack is None else "vllm_steer"}
    started = time.monotonic()
    with running(command, port, args.work / f"{name}.log", environment) as server:
        yield server, time.monotonic() - started


def measure_arms(
    chosen: Sequence[Arm],
    servers: Mapping[str, Server],
    traffic: Traffic,
    model: BenchModel,
    args: argparse.Namespace,
) -> list[dict[str, Latency]]:
    """Sends the traffic to every arm in each round, after one round that does not count."""
    by_name = {arm.name: arm for arm in chosen}

    def run(name: str, rng: random.Random) -> Latency:
        arm = by_name[name]
        url = servers[arm.engine].url
        return send(url, str(model.path), traffic, arm, model.vocabulary, rng, args.seed)

    with tqdm(total=(args.repetitions + 1) * len(by_name), desc="traffic", unit="run") as bar:
        rounds(list(by_name), run, 1, args.seed - 1, bar.update)
        return rounds(list(by_name), run, args.repetitions, args.seed, bar.update)


def ratios_of(
    figure: Callable[[Latency], float], base: str, times: Sequence[Mapping[str, Latency]]
) -> dict[str, Ratio]:
    """Ratio of each arm's figure to that of ``base``, round by round."""
    figures = [{name: figure(latency) for name, latency in one.items()} for one in times]
    return {name: ratio_to([base], name, figures) for name in times[0] if name != base}


def compare_arms(model: BenchModel, args: argparse.Namespace) -> dict[str, Any]:
    """Every arm under mixed traffic."""
    pack = write_pack(model, args.work, arms.DIRECTIONS)
    traffic = Traffic(args.requests, args.rate)
    with ExitStack() as stack:
        plain, _ = stack.enter_context(serving(model, None, args, "serve-plain"))
        plugin, _ = stack.enter_context(serving(model, pack.path, args, "serve-plugin"))
        servers = {arms.PLAIN: plain, arms.PLUGIN: plugin}
        chosen = [PLAIN_ARM, *arms.PLUGIN_ARMS, CONTROL_ARM]
        times = measure_arms(chosen, servers, traffic, model, args)
    measures: dict[str, Callable[[Latency], float]] = {
        "ttft": lambda latency: latency.ttft,
        "tpot": lambda latency: latency.tpot,
    }
    found = {key: ratios_of(figure, arms.PLAIN, times) for key, figure in measures.items()}
    report.plot_ratios(
        args.plot or args.json.with_suffix(".png"),
        f"{model.name}, mixed traffic at {args.rate:g} requests/s: latency",
        found,
    )
    lines = [
        f"{model.name}, {args.requests} requests at {args.rate:g}/s, {args.repetitions} rounds"
    ]
    for key, figure in measures.items():
        medians = {name: statistics.median(figure(one[name]) for one in times) for name in times[0]}
        lines += ["", f"{key}, milliseconds", *report.ratio_rows(found[key], medians, {}, "ms")]
    report.show(lines)
    return {
        "traffic": asdict(traffic),
        **{
            f"{key}_ratios": {name: ratio.as_dict() for name, ratio in ratios.items()}
            for key, ratios in found.items()
        },
        "times": [{name: asdict(latency) for name, latency in one.items()} for one in times],
    }


def compare_packs(model: BenchModel, args: argparse.Namespace) -> dict[str, Any]:
    """A pack of many directions beside a pack of one: first token, start, and loading alone."""
    many = f"{args.directions} directions"
    packs = {
        SINGLE: write_pack(model, args.work, 1).path,
        many: write_pack(model, args.work, args.directions).path,
    }
    starts: dict[str, list[float]] = {name: [] for name in packs}
    chosen = [Arm(SINGLE, SINGLE, arms.steered_one), Arm(many, many, arms.steered_one)]
    # One after the other and a single token: the time to first token without a queue.
    traffic = Traffic(args.requests, float("inf"), answers=(1,), concurrency=1)
    for number in range(args.starts - 1):
        for name in sorted(packs, reverse=bool(number % 2)):
            with serving(model, packs[name], args, "serve-start") as (_, seconds):
                starts[name].append(seconds)
    with ExitStack() as stack:
        servers = {}
        for number, (name, pack) in enumerate(packs.items()):
            servers[name], seconds = stack.enter_context(
                serving(model, pack, args, f"serve-pack-{number}")
            )
            starts[name].append(seconds)
        times = measure_arms(chosen, servers, traffic, model, args)
    ratio = ratios_of(lambda latency: latency.ttft, SINGLE, times)[many]
    loading = {name: _loading_seconds(path) for name, path in packs.items()}
    ttft = {name: statistics.median(one[name].ttft for one in times) for name in packs}
    report.plot_ratios(
        args.plot or args.json.with_suffix(".png"),
        f"{model.name}: first token with {many} against one",
        {"ttft": {many: ratio}},
        "ratio to a pack of one",
    )
    report.show(
        [
            f"{'pack':18s} {'first token':>12s} {'start':>9s} {'loading alone':>14s}",
            *(
                f"{name:18s} {ttft[name]:9.2f} ms {statistics.median(starts[name]):7.2f} s "
                f"{loading[name]:12.3f} s"
                for name in packs
            ),
            f"first token, ratio: {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]",
        ]
    )
    return {
        "directions": args.directions,
        "ttft_ratio": ratio.as_dict(),
        "ttft_ms": ttft,
        "start_seconds": starts,
        "loading_seconds": loading,
        "times": [{name: asdict(latency) for name, latency in one.items()} for one in times],
    }


def _loading_seconds(path: Path) -> float:
    """Median time to read and verify a pack; a server's front end and its engine do it once each."""
    times = []
    for _ in range(LOADS):
        started = time.perf_counter()
        _ = load_pack(path).digests
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Command line."""
    parser = engine_parser(__doc__)
    parser.add_argument("--requests", type=int, default=48, help="requests of a run")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--repetitions", type=int, default=10, help="rounds that count")
    parser.add_argument("--directions", type=int, help="compare a pack of so many with one of one")
    parser.add_argument("--starts", type=int, default=1, help="starts of each server to time")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    about = report.environment()
    model = prepare_model(args.model, args.work)
    found = compare_arms(model, args) if args.directions is None else compare_packs(model, args)
    shown = {"name": model.name, "parameters": model.parameters}
    report.write_json(args.json, {**about, "model": shown, **found})


if __name__ == "__main__":
    main()
