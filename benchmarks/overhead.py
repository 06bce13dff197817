"""What steering costs on the host, without an engine: planning a step, admission, a new row, loading.

    python -m benchmarks.overhead --json overhead.json

Planning is measured through the same object that a worker uses, on random packs: 256 decoding
requests, for several numbers of directions combined and of layers. Medians, in microseconds.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import report
from benchmarks.options import results_parser
from vllm_steer.config import GRAPH_REVISION, ResolvedConfig, plugin_version
from vllm_steer.engine.intake import check_plan
from vllm_steer.packs.pack import load_pack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.store import configured_store
from vllm_steer.plan.binding import bind
from vllm_steer.plan.capacity import check_capacity
from vllm_steer.plan.message import decode_plan, encode_plan
from vllm_steer.plan.resolve import resolve
from vllm_steer.request.schema import PLAN_KEY, parse
from vllm_steer.testing.random_pack import random_identity, write_random_pack

HIDDEN = 256
PROMPT = 200
MAX_LEN = 4096
DIRECTIONS = (1, 8, 64)
LAYERS = (4, 32, 128)
# Combinations that take turns, so that no step finds its row in a cache by luck.
COMBINATIONS = 64
LOADED = (1, 512)
# Microseconds: what planning may cost.
PLAN_LIMIT, UNSTEERED_LIMIT = 50.0, 5.0


class Bench:
    """A worker's steering on a model of empty blocks, with a pack of random directions."""

    def __init__(self, folder: Path, directions: int, layers: int, requests: int) -> None:
        """Writes the pack and builds what a worker builds.

        Args:
            folder: Where the pack goes.
            directions: Directions of the pack, and of each request.
            layers: Layers of the model; every direction has a vector at each.
            requests: Requests of a step.
        """
        import torch

        from vllm_steer.engine.worker import RunnerFacts, WorkerSteering

        self.requests = requests
        self._names = [f"bench/d{number}" for number in range(directions)]
        pack = write_pack(folder, directions, layers)
        self.config = ResolvedConfig(
            packs=[str(pack)],
            rows=2 * requests + 1,
            sums_per_request=2,
            queued=False,
            layers=list(range(layers)),
            digests=[load_pack(pack).manifest.tensors.sha256],
            version=plugin_version(),
            graph_revision=GRAPH_REVISION,
        )
        self.store = configured_store(self.config)
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(layers))
        self.steering = WorkerSteering(
            self.config,
            model,
            RunnerFacts(
                layers, HIDDEN, 8192, torch.float32, torch.device("cpu"), speculative=False
            ),
        )
        self._starts = np.full(requests, PROMPT, dtype=np.int32)
        self._lengths = np.ones(requests, dtype=np.int32)
        self._positions = torch.arange(8192)
        self._tokens = torch.zeros(8192, dtype=torch.int32)
        self._ids = [f"request-{number}" for number in range(requests)]
        self._rng = random.Random(0)

    def extra_args(self) -> dict[str, Any]:
        """A request's steering: every direction at every layer, at scales of its own."""
        choices = [{"name": n, "scale": self._rng.uniform(0.5, 1.5)} for n in self._names]
        return {"steering": {"directions": choices, "positions": "all"}}

    def admit(self, extra_args: dict[str, Any]) -> bytes:
        """What the front end and the engine's intake do with one request; returns its message."""
        request = parse(extra_args)
        if request is None:
            raise RuntimeError("the request asks for no steering")
        plan = resolve(bind(request, self.store.registry), PROMPT, MAX_LEN)
        check_capacity(plan, self.config)
        message = encode_plan(plan)
        check_plan(decode_plan(message), self.config, self.store, "float32")
        return message

    def arrive(self, number: int, message: bytes | None) -> None:
        """The worker takes request ``number`` in, in place of the one that had its number."""
        self.steering.remove_request(self._ids[number])
        extra = {PLAN_KEY: message} if message else None
        self.steering.add_request(self._ids[number], _Sampling(extra))

    def step(self) -> None:
        """One decode step of all requests."""
        self._starts += 1
        self.steering.prepare_step(
            self._ids, self._starts, self._lengths, self._positions, self._tokens
        )


class _Sampling:
    """As much of ``SamplingParams`` as a worker reads."""

    def __init__(self, extra_args: dict[str, Any] | None) -> None:
        self.extra_args = extra_args


def write_pack(folder: Path, directions: int, layers: int) -> Path:
    """Writes a random pack, each of its directions at all layers."""
    path = folder / f"{directions}x{layers}"
    write_random_pack(
        path,
        "bench",
        random_identity(HIDDEN, layers),
        {f"d{number}": range(layers) for number in range(directions)},
        seed=0,
        default_scale=1.0,
        safe_scale=1.0,
        residual_norm=10.0,
    )
    return path


def microseconds(function: Callable[[], object], count: int) -> float:
    """Median time of a call, after a tenth as many that do not count."""
    times = []
    for number in range(count + count // 10):
        started = time.perf_counter()
        function()
        if number >= count // 10:
            times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def measure(bench: Bench, calls: int) -> dict[str, float]:
    """The figures of one combination of directions and layers, in microseconds.

    Args:
        bench: What to measure.
        calls: Calls of each kind.
    """
    asked = [bench.extra_args() for _ in range(COMBINATIONS)]
    turn = iter(range(10**9))
    found = {
        "admission": microseconds(
            lambda: bench.admit(asked[next(turn) % COMBINATIONS]), max(20, calls // 10)
        )
    }
    found["idle_step"] = microseconds(bench.step, calls)
    for number in range(bench.requests):
        bench.arrive(number, bench.admit(bench.extra_args()) if number % 2 else None)
    bench.step()
    found["half_steered_step"] = microseconds(bench.step, calls)
    payloads = [bench.admit(bench.extra_args()) for _ in range(bench.requests)]
    for number, payload in enumerate(payloads):
        bench.arrive(number, payload)
    bench.step()
    found["steered_step"] = microseconds(bench.step, calls)

    new = iter([bench.admit(bench.extra_args()) for _ in range(max(20, calls // 10) * 2)])

    def arrival() -> None:
        bench.arrive(next(turn) % bench.requests, next(new))
        bench.step()

    # A step in which one request has arrived: its sum is formed and uploaded.
    found["arrival_step"] = microseconds(arrival, max(20, calls // 10))
    return found


def loading(folder: Path, layers: int) -> dict[str, float]:
    """Seconds to read and verify packs of one direction and of many, as a start does."""
    found = {}
    for directions in LOADED:
        path = write_pack(folder, directions, layers)
        found[str(directions)] = 1e-6 * microseconds(lambda p=path: PackRegistry.load([str(p)]), 5)
    return found


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--requests", type=int, default=256, help="decoding requests of a step")
    parser.add_argument("--directions", nargs="+", type=int, default=DIRECTIONS)
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS)
    parser.add_argument("--calls", type=int, default=2000, help="calls of each kind that count")
    args = parser.parse_args()
    about = report.environment()
    figures: list[dict[str, Any]] = []
    cases = [(d, layers) for d in args.directions for layers in args.layers]
    with tempfile.TemporaryDirectory() as folder:
        for directions, layers in tqdm(cases, desc="overhead", unit="case"):
            bench = Bench(Path(folder), directions, layers, args.requests)
            found = measure(bench, args.calls)
            figures.append({"directions": directions, "layers": layers, **found})
        load_seconds = loading(Path(folder), max(args.layers))
    report.write_json(
        args.json,
        {
            **about,
            "versions": {name: version(name) for name in ("torch", "numpy", "vllm-steer")},
            "requests": args.requests,
            "microseconds": figures,
            "loading_seconds": load_seconds,
        },
    )
    names = ["idle_step", "half_steered_step", "steered_step", "arrival_step", "admission"]
    lines = [
        f"{args.requests} decoding requests, microseconds, medians",
        f"{'directions':>10s} {'layers':>7s} " + " ".join(f"{name:>18s}" for name in names),
        *(
            f"{row['directions']:10d} {row['layers']:7d} "
            + " ".join(f"{row[name]:18.1f}" for name in names)
            for row in figures
        ),
        f"planning may cost {PLAN_LIMIT:g}, with nothing steered {UNSTEERED_LIMIT:g}",
        "loading packs at "
        + f"{max(args.layers)} layers: "
        + ", ".join(
            f"{number} directions {seconds:.3f} s" for number, seconds in load_seconds.items()
        ),
    ]
    report.show(lines)


if __name__ == "__main__":
    main()
