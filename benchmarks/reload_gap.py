"""How long answers stand still while a large pack is loaded into a running server.

    python -m benchmarks.reload_gap --model 100m --eager --json FILE

Clients stream answers without end. A pack is loaded and unloaded again and again; the longest time
between two chunks of a stream is taken in each load, and in as long a time before it, when nothing is
loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks import report
from benchmarks.models import PACK_NAME, prepare_model, write_pack
from benchmarks.options import engine_parser
from benchmarks.serve import serving
from benchmarks.traffic import SERVED_NAME
from vllm_steer.packs.pack import load_pack

# Between a load and the next time of measurement.
_PAUSE = 0.5
_TIMEOUT = 120.0


@dataclass(frozen=True)
class Load:
    """One load of the pack.

    Attributes:
        seconds: From the request to its answer.
        worst_gap: Longest time between two chunks of a stream that the load fell into, seconds.
        worst_gap_before: The same in the seconds before it.
    """

    seconds: float
    worst_gap: float
    worst_gap_before: float


def worst_gap(streams: Sequence[Sequence[float]], start: float, end: float) -> float:
    """Longest time between two neighbouring moments of a stream that touches ``[start, end]``."""
    gaps = [
        after - before
        for moments in streams
        for before, after in zip(moments, moments[1:], strict=False)
        if after > start and before < end
    ]
    return max(gaps, default=0.0)


async def measure(url: str, clients: int, loads: int, expected: float) -> list[Load]:
    """Loads and unloads the pack under streams.

    Args:
        url: Base URL of the API.
        clients: Streams at once.
        loads: How often to load.
        expected: Seconds that a load may take, which are waited for before each.
    """
    streams: list[list[float]] = [[] for _ in range(clients)]
    found = []
    async with httpx.AsyncClient(timeout=_TIMEOUT) as client:
        tasks = [asyncio.create_task(_stream(client, url, moments)) for moments in streams]
        try:
            for _ in tqdm(range(loads), desc="loads", unit="load"):
                await asyncio.sleep(_PAUSE + expected)
                started = time.perf_counter()
                answer = await client.post(f"{url}/steering/packs", json={"name": PACK_NAME})
                answer.raise_for_status()
                ended = time.perf_counter()
                await asyncio.sleep(_PAUSE)
                answer = await client.delete(f"{url}/steering/packs/{PACK_NAME}")
                answer.raise_for_status()
                seconds = ended - started
                gap = worst_gap(streams, started, ended)
                before = worst_gap(streams, started - seconds, started)
                found.append(Load(seconds, gap, before))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return found


async def _stream(client: httpx.AsyncClient, url: str, moments: list[float]) -> None:
    body = {
        "model": SERVED_NAME,
        "prompt": [1, 2, 3],
        "max_tokens": 400,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0.0,
    }
    while True:
        async with client.stream("POST", f"{url}/completions", json=body) as response:
            response.raise_for_status()
            async for _ in response.aiter_lines():
                moments.append(time.perf_counter())


def _report(args: argparse.Namespace) -> dict[str, Any]:
    about = report.environment()
    args.work.mkdir(parents=True, exist_ok=True)
    model = prepare_model(args.model, args.work)
    first = write_pack(model, args.work, 1)
    roots = args.work / f"{model.path.name}-roots-{args.directions}"
    served = roots / PACK_NAME
    if not served.exists():
        write_pack(model, roots, args.directions).path.rename(served)
    size = load_pack(served).manifest.tensors.size
    options = ["--steering-pack-roots", str(roots)]
    layers = [str(layer) for layer in range(model.identity.num_layers)]
    options += ["--steering-layers", *layers]
    with serving(model, first.path, args, "reload-gap", options) as (server, _):
        loads = asyncio.run(measure(server.url, args.clients, args.loads, args.expected))
    medians = {name: statistics.median(getattr(one, name) for one in loads) for name in _FIELDS}
    report.show(
        [
            f"{args.directions} directions, {size / 2**20:.0f} MiB, {model.name}, "
            f"{args.clients} streams, median and longest of {len(loads)} loads, ms",
            *(
                f"{text:38s} {1000 * medians[name]:8.1f} {1000 * max(getattr(one, name) for one in loads):8.1f}"
                for name, text in _FIELDS.items()
            ),
        ]
    )
    return {
        **about,
        "model": model.name,
        "directions": args.directions,
        "bytes": size,
        "clients": args.clients,
        "median": medians,
        "loads": [asdict(one) for one in loads],
    }


_FIELDS = {
    "seconds": "a load takes",
    "worst_gap": "longest wait for a token meanwhile",
    "worst_gap_before": "the same without a load",
}


def main() -> None:
    """Command line."""
    parser = engine_parser(__doc__)
    parser.add_argument("--directions", type=int, default=2048, help="of the pack that is loaded")
    parser.add_argument("--clients", type=int, default=4, help="streams at once")
    parser.add_argument("--requests", type=int, default=16, help="that the server runs at once")
    parser.add_argument("--loads", type=int, default=20, help="how often it is loaded")
    parser.add_argument(
        "--expected", type=float, default=1.0, help="seconds without a load before each"
    )
    args = parser.parse_args()
    report.write_json(args.json, _report(args))


if __name__ == "__main__":
    main()
