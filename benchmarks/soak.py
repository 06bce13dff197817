"""Bystanders beside hostile clients on one real server: what they get must be what a quiet server says.

    python -m benchmarks.soak --minutes 10 --seed 1 --json FILE

A random model of 24 blocks, where changes compound. Hostile clients ask for values that overflow in every
form, huge sums, vectors at the edges of what numbers can be, and answers in the background; they do not read
what they asked for, hang up, replace packs and aliases, and send wrong keys and bodies to all routes.
Bystanders ask steered and unsteered questions, whose answers were known before. ``wait_ratio`` is the worst
wait of a request for two steered tokens beside the hostile clients over that beside as many unsteered ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks import report
from benchmarks import soak_bystanders as bystanders
from benchmarks import soak_hostile as hostile
from benchmarks.engine import ROOT
from benchmarks.fuzz_http import memory
from benchmarks.load_clients import scrape
from benchmarks.options import results_parser
from benchmarks.soak_model import CALM, DEEP, FULL, LIGHT, SWING, Load, write_model, write_packs
from vllm_steer.offline.demo.server import SERVED_NAME, Server, free_port, running, serve_command
from vllm_steer.packs.pack import SteeringPack

_ADMIN = "administrator"
# Of the time, for the waits beside unsteered load.
_BASELINE = 0.2
_SETTLE_SECONDS = 60.0
# Of the hostile time, until memory is measured first.
_WARM = 0.3


def run(
    folder: Path, *, seconds: float, seed: int, dtype: str = "float32", runner: str = "v1"
) -> dict[str, Any]:
    """Starts a server, lets the clients at it, and reports what they got.

    Args:
        folder: Directory for what is written.
        seconds: For how long the hostile clients ask.
        seed: Seed of what everybody asks.
        dtype: The served model's.
        runner: vLLM's model runner, ``v1`` or ``v2``; the latter runs under Triton's interpreter, which answers
            about ten tokens a second, so all ask for less.

    Returns:
        The results, as they are written to the JSON file.
    """
    model = write_model(folder / "model")
    packs = write_packs(model, folder / "root")
    port = free_port()
    environment = _ENV | (_v2_environment(folder / "site") if runner == "v2" else {})
    command = _command(model, packs, folder, port, dtype)
    load = LIGHT if runner == "v2" else FULL
    with running(command, port, folder / "log", environment) as server:
        return asyncio.run(_Soak(server, packs, folder / "root", seed, dtype, load).run(seconds))


_ENV = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
# Python runs it at the start of each of the server's processes, and of the standard library's trackers, which wait.
_SITE = """import sys

if "resource_tracker import" not in " ".join(sys.orig_argv):
    from vllm_steer.testing.triton import pretend_triton_backend

    pretend_triton_backend()
"""


def _v2_environment(folder: Path) -> dict[str, str]:
    """What makes a server on a CPU run Model Runner V2."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE)
    path = [str(folder), str(ROOT)]
    return {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }


def _command(
    model: Path, packs: Sequence[SteeringPack], folder: Path, port: int, dtype: str
) -> list[str]:
    policy = folder / "policy.json"
    allowed = {bystanders.KEY: [f"{CALM}/*"], hostile.KEY: [f"{DEEP}/*", f"{SWING}/*", "up*/*"]}
    digests = {hashlib.sha256(key.encode()).hexdigest(): names for key, names in allowed.items()}
    policy.write_text(json.dumps({"keys": digests}))
    command = serve_command(model, [pack.path for pack in packs], port)
    command[command.index("--dtype") + 1] = dtype
    return [
        *command,
        *["--enforce-eager", "--enable-prefix-caching", "--steering-ops", "affine"],
        *["--steering-policy", str(policy), "--steering-pack-roots", str(folder / "root")],
        *["--steering-reads", "2", "--steering-upload-mib", "1", "--return-tokens-as-token-ids"],
        *["--api-key", bystanders.KEY, hostile.KEY, _ADMIN],
    ]


class _Soak:
    """The clients of one server."""

    def __init__(
        self,
        server: Server,
        packs: Sequence[SteeringPack],
        root: Path,
        seed: int,
        dtype: str,
        load: Load,
    ) -> None:
        self._server, self._packs, self._root, self._load = server, packs, root, load
        self._seed, self._tolerance = seed, bystanders.TOLERANCES[dtype]
        self._damage = hostile.Damage()
        self._watch, self._baseline = bystanders.Watch(), bystanders.Watch()

    async def run(self, seconds: float) -> dict[str, Any]:
        bodies = bystanders.cases(self._seed, self._load)
        async with AsyncExitStack() as stack:
            good, bad, admin = [
                await stack.enter_async_context(self._client(key))
                for key in (bystanders.KEY, hostile.KEY, _ADMIN)
            ]
            answers = await bystanders.quiet_answers(good, bodies)
            await self._unsteered_load(good, _BASELINE * seconds)
            end = time.monotonic() + seconds
            found: dict[str, Any] = {}
            await asyncio.gather(
                self._show(end, seconds),
                self._measure_memory(found, _WARM * seconds),
                *self._bystanding(good, bodies, answers, end),
                *self._harming(bad, end),
            )
            left = await self._settle(admin)
            alive = await self._alive(admin)
            after = await bystanders.quiet_answers(good, bodies) if alive else []
            for number, (was, now) in enumerate(zip(answers, after, strict=False)):
                if not was.agrees(now, self._tolerance):
                    self._watch.wrong.append(f"case {number}, when all were gone")
        return self._report(found, alive, left) | {"seconds": seconds, "seed": self._seed}

    def _client(self, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._server.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=self._load.timeout,
            limits=httpx.Limits(max_connections=None),
        )

    async def _unsteered_load(self, http: httpx.AsyncClient, seconds: float) -> None:
        end, load = time.monotonic() + seconds, self._load
        rng = random.Random(f"load {self._seed}")

        async def ask_on() -> None:
            while time.monotonic() < end:
                body = {
                    "model": SERVED_NAME,
                    "prompt": [rng.randrange(10, 1500) for _ in range(rng.randint(1, load.prompt))],
                    "max_tokens": rng.choice(load.answers),
                    "n": rng.choice([1, 1, load.samples]),
                    "ignore_eos": True,
                }
                await bystanders.ask(http, body, self._baseline)

        rest = random.Random(f"short {self._seed}")
        await asyncio.gather(
            *(ask_on() for _ in range(len(hostile.KINDS) + load.bystanders)),
            bystanders.wait_short(http, self._baseline, rest, end),
        )

    def _bystanding(
        self, http: httpx.AsyncClient, bodies: Any, answers: Any, end: float
    ) -> list[Any]:
        def rng(number: int) -> random.Random:
            return random.Random(f"bystander {self._seed} {number}")

        return [
            bystanders.wait_short(http, self._watch, rng(-1), end),
            *(
                bystanders.stand_by(
                    http, bodies, answers, self._watch, rng(number), end, self._tolerance
                )
                for number in range(self._load.bystanders)
            ),
        ]

    def _harming(self, http: httpx.AsyncClient, end: float) -> list[Any]:
        swing = next(pack for pack in self._packs if pack.name == SWING)
        size = swing.manifest.model.hidden_size
        return [
            hostile.harm(
                hostile.Hostile(
                    http,
                    random.Random(f"hostile {self._seed} {number}"),
                    self._damage,
                    self._root,
                    swing,
                    size,
                    self._load,
                ),
                kind,
                end,
            )
            for number, kind in enumerate(hostile.KINDS)
        ]

    async def _measure_memory(self, found: dict[str, Any], seconds: float) -> None:
        await asyncio.sleep(seconds)
        found["rss_before"] = memory(self._server)

    async def _show(self, end: float, seconds: float) -> None:
        with tqdm(total=round(seconds), desc="soak", unit="s") as bar:
            while (left := end - time.monotonic()) > 0:
                await asyncio.sleep(min(1.0, left))
                bar.update(min(bar.total, round(seconds - left)) - bar.n)
                bar.set_postfix(hostile=self._damage.requests, bystanders=self._watch.requests)

    async def _settle(self, http: httpx.AsyncClient) -> float:
        """Waits until the server has noticed that all are gone; returns the requests that it still has."""
        end, left = time.monotonic() + _SETTLE_SECONDS, -1.0
        while left and time.monotonic() < end:
            await asyncio.sleep(0.5)
            try:
                metrics = await scrape(http)
            except httpx.HTTPError:
                return max(left, 1.0)
            left = sum(metrics[f"steering:{name}_requests", ()] for name in ("active", "waiting"))
        return left

    async def _alive(self, http: httpx.AsyncClient) -> bool:
        try:
            health = str(http.base_url).removesuffix("/v1/") + "/health"
            return (await http.get(health)).status_code == 200
        except httpx.HTTPError:
            return False

    def _report(self, found: Mapping[str, Any], alive: bool, left: float) -> dict[str, Any]:
        watch, damage, before = self._watch, self._damage, self._baseline
        waits = {
            "unsteered": max(before.waits, default=0.0),
            "hostile": max(watch.waits, default=0.0),
        }
        rss = memory(self._server) if alive else 0
        wrong = [*watch.wrong, *watch.errors, *before.errors]
        return {
            "requests": damage.requests + watch.requests + before.requests,
            "bystanders": watch.requests,
            "bystanders_wrong": len(wrong),
            "engine_deaths": int(not alive),
            "stuck": watch.stuck + before.stuck + round(left),
            "server_errors": len(damage.server_errors),
            "wait_ratio": waits["hostile"] / waits["unsteered"] if all(waits.values()) else None,
            "worst_waits": waits,
            "rss_growth": rss / found["rss_before"] - 1,
            "statuses": dict(sorted(damage.statuses.items())),
            "failures": {"wrong": wrong[:20], "errors": damage.server_errors[:20]},
        }


def passed(result: Mapping[str, Any]) -> bool:
    """Whether nobody was harmed, and anybody was there."""
    harm = ("bystanders_wrong", "engine_deaths", "stuck", "server_errors")
    return not any(result[key] for key in harm) and result["bystanders"] > 0


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the hostile part")
    parser.add_argument("--dtype", choices=list(bystanders.TOLERANCES), default="float32")
    parser.add_argument("--runner", choices=["v1", "v2"], default="v1", help="model runner")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    environment = report.environment()
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            Path(folder),
            seconds=60.0 * args.minutes,
            seed=args.seed,
            dtype=args.dtype,
            runner=args.runner,
        )
    about = {"dtype": args.dtype, "runner": args.runner}
    report.write_json(args.json, environment | about | result)
    report.show([json.dumps(result, indent=2)])
    raise SystemExit(not passed(result))


if __name__ == "__main__":
    main()
