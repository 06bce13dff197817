"""Malformed steering against a running server: each request a 4xx that names the field, no harm done.

    python -m benchmarks.fuzz_http --requests 10000 --json FILE

Of every two bodies one has a fault that was thought of, the other a value of ``steering`` that
Hypothesis made of the request's JSON schema; on all three routes, streaming and not. Good requests in
between must get the tokens that they got before. Seeds replay.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from tqdm import tqdm

from benchmarks import report
from benchmarks.options import results_parser
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import CONCEPTS
from vllm_steer.offline.demo.packs import FULL_METHOD, extract_demo_packs
from vllm_steer.offline.demo.server import SERVED_NAME, Server, serve
from vllm_steer.testing.fuzz_values import content_of, fault_of, mutated

ROUTES = ("/completions", "/chat/completions", "/responses")
NAMES = ("fears/spiders", "fears/heights")
GOOD = {"directions": [{"name": NAMES[0], "scale": 9.0}]}
_PARALLEL = 16
_WARM_UP = 0.1
_JUNK = (
    "",
    " ",
    "\x00",
    "../../etc/passwd",
    "ünïcödé",
    "{}",
    "[]",
    "a" * 301,
    "fears/",
    "/",
    "null",
)

Fault = tuple[str, dict[str, Any]]
"""What is wrong, and the fields of a body that has it."""


def _scalar(rng: random.Random) -> Any:
    return rng.choice([0, -1, 1.5, True, False, rng.choice(_JUNK[1:]), [], [1], [[]], {"a": 1}])


def _direction(rng: random.Random, **wrong: Any) -> dict[str, Any]:
    return {"directions": [{"name": "fears/spiders", "scale": rng.uniform(-9, 9)} | wrong]}


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


FAULTS: tuple[Callable[[random.Random], Fault], ...] = (
    lambda r: (
        "steering is no object",
        {"steering": r.choice([1, 0.5, True, [], [1], "x", "{", "[]"])},
    ),
    lambda r: ("unknown key", {"steering": GOOD | {f"k{r.random()}": _scalar(r)}}),
    lambda r: ("unknown key of a direction", {"steering": _direction(r, **{f"k{r.random()}": 1})}),
    lambda r: (
        "directions",
        {"steering": {"directions": r.choice([[], 1, "x", {}, None, [1], [None]])}},
    ),
    lambda r: ("no directions", {"steering": {}}),
    lambda r: ("too many", {"steering": {"directions": GOOD["directions"] * r.randint(65, 200)}}),
    lambda r: ("name", {"steering": _direction(r, name=r.choice([*_JUNK, 1, None, [], {}]))}),
    lambda r: ("unknown name", {"steering": _direction(r, name=f"fears/{r.random()}")}),
    lambda r: (
        "scale",
        {"steering": _direction(r, scale=r.choice(["9", [], {}, True, 1e30, -1e30]))},
    ),
    lambda r: (
        "scale not finite",
        {"steering": _direction(r, scale=r.choice([float("nan"), float("inf")]))},
    ),
    lambda r: (
        "layers",
        {
            "steering": _direction(
                r, layers=r.choice([[], [-1], [99], ["1"], [1.5], 1, [[1]], [True]])
            )
        },
    ),
    lambda r: (
        "layers of all",
        {"steering": GOOD | {"layers": r.choice([[], [10**9], "all", {}, [None]])}},
    ),
    lambda r: (
        "positions",
        {
            "steering": GOOD
            | {
                "positions": r.choice(
                    [
                        "every",
                        "",
                        [],
                        [[5, 2]],
                        [[1]],
                        [["a", None]],
                        [[-9999, None]],
                        [[0, 1]] * 65,
                        [[2**40, None]],
                        3,
                        {},
                    ]
                )
            }
        },
    ),
    lambda r: ("deep", {"steering": _nested(r.randint(50, 400))}),
    lambda r: (
        "not the text of an object",
        {"vllm_xargs": {"steering": r.choice(["", "{", "nope", "[]", "1"])}},
    ),
    lambda r: (
        "flat",
        {"vllm_xargs": {"steer": r.choice([[], [1], ["fears/spiders:x"], ["::"], 5, ["nobody"]])}},
    ),
    lambda r: (
        "flat layers",
        {"vllm_xargs": {"steer": ["fears/spiders:3"], "steer_layers": r.choice([3, ["a"], [99]])}},
    ),
    lambda r: (
        "flat positions",
        {
            "vllm_xargs": {
                "steer": ["fears/spiders:3"],
                "steer_positions": r.choice(["x", ["1"], ["a:b"], 1]),
            }
        },
    ),
    lambda r: ("misspelt", {r.choice(["sterring", "steering_", "Steering", "steer_layer"]): GOOD}),
    lambda r: ("misspelt beyond UTF-8", {r.choice(["steer\ud800", "\udfffsteering"]): GOOD}),
    lambda r: ("both forms", {"steering": GOOD, "steer": ["fears/spiders:3"]}),
    lambda r: ("twice", {"steering": GOOD, "vllm_xargs": {"steering": json.dumps(GOOD)}}),
    lambda r: ("internal key", {"vllm_xargs": {"_vllm_steer_plan": [[0, None, "x", []]]}}),
)


@dataclass
class Outcome:
    """What the server did.

    Attributes:
        requests: Malformed requests sent.
        statuses: Count of each status.
        values: Requests whose steering Hypothesis made.
        not_4xx: Malformed requests that were answered otherwise, or whose message names no field.
        wrong: Good requests in between whose answer changed.
    """

    requests: int = 0
    values: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    not_4xx: list[dict[str, Any]] = field(default_factory=list)
    wrong: int = 0


def body_of(rng: random.Random, route: str) -> dict[str, Any]:
    """A good body without steering."""
    body: dict[str, Any] = {"model": SERVED_NAME, "temperature": 0.0, "stream": rng.random() < 0.5}
    if route == "/completions":
        return body | {"prompt": "Hello", "max_tokens": 4}
    if route == "/chat/completions":
        return body | {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    return body | {"input": "Hello", "max_output_tokens": 4}


async def ask_good(client: httpx.AsyncClient, url: str) -> str:
    """The answer to a good steered request."""
    body = {"model": SERVED_NAME, "prompt": "Hello", "max_tokens": 8, "temperature": 0.0}
    response = await client.post(f"{url}/completions", json=body | {"steering": GOOD})
    response.raise_for_status()
    return str(response.json()["choices"][0]["text"])


async def attack(server: Server, count: int, seed: int, outcome: Outcome) -> None:
    """Sends ``count`` malformed requests, some at a time, with good ones in between."""
    rng = random.Random(seed)
    bar = tqdm(total=count, desc="requests", unit="request")
    async with httpx.AsyncClient(timeout=60) as client:
        expected = await ask_good(client, server.url)
        turn = asyncio.Semaphore(_PARALLEL)

        async def one(route: str, what: str, body: dict[str, Any]) -> None:
            async with turn:
                # Written by hand, since NaN and Inf are no JSON for a client that is well-behaved.
                response = await client.post(
                    server.url + route,
                    content=json.dumps(body).encode(),
                    headers={"content-type": "application/json"},
                )
            outcome.statuses[response.status_code] += 1
            text = response.text
            named = any(word in text for word in ("steer", "vllm_xargs"))
            if not 400 <= response.status_code < 500 or not named:
                fault = {"route": route, "fault": what, "status": response.status_code}
                outcome.not_4xx.append(fault | {"answer": text[:300], "body": str(body)[:300]})
            bar.update()

        left = count
        while left:
            number = min(left, 500)
            tasks = []
            for _ in range(number):
                route = rng.choice(ROUTES)
                what, wrong = rng.choice(FAULTS)(rng)
                tasks.append(one(route, what, body_of(rng, route) | wrong))
            await asyncio.gather(*tasks)
            outcome.requests += number
            outcome.wrong += await ask_good(client, server.url) != expected
            left -= number
    bar.close()


def send_value(
    http: httpx.Client, value: Any, rng: random.Random, outcome: Outcome
) -> dict[str, Any] | None:
    """Sends a value of ``steering``, right or wrong; returns what is wrong with the answer."""
    route = rng.choice(ROUTES)
    response = http.post(
        route,
        content=content_of(body_of(rng, route) | {"steering": value}),
        headers={"content-type": "application/json"},
    )
    outcome.statuses[response.status_code] += 1
    outcome.values += 1
    what = fault_of(value, response.status_code, response.text)
    if not what:
        return None
    fault = {"route": route, "fault": what, "status": response.status_code}
    return fault | {"answer": response.text[:300], "body": ascii(value)[:300]}


def attack_values(server: Server, count: int, seed: int, outcome: Outcome) -> None:
    """Sends ``count`` values of ``steering`` that Hypothesis made, one after the other."""
    rng, bar = random.Random(seed), tqdm(total=count, desc="values", unit="request")
    with httpx.Client(base_url=server.url, timeout=60) as http:

        @hypothesis_seed(seed)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(mutated(NAMES))
        def send(value: Any) -> None:
            fault = send_value(http, value, rng, outcome)
            if fault is not None:
                outcome.not_4xx.append(fault)
            bar.update()

        send()
    bar.close()


def memory(server: Server) -> int:
    """Resident bytes of the server's processes."""
    owner = psutil.Process(server.pid)
    family = (owner, *owner.children(recursive=True))
    return sum(process.memory_info().rss for process in family)


def run(packs: Sequence[Path], folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Starts a server and attacks it."""
    outcome = Outcome()
    with serve(demo_model_path(), packs, folder / "log", "--enforce-eager") as server:
        values = count // 2
        made = count - values
        warm, warm_values = max(1, round(made * _WARM_UP)), max(1, round(values * _WARM_UP))
        asyncio.run(attack(server, warm, seed, outcome))
        attack_values(server, warm_values, seed, outcome)
        before = memory(server)
        attack_values(server, values - warm_values, seed + 1, outcome)
        asyncio.run(attack(server, made - warm, seed + 1, outcome))
        after = memory(server)
        alive = httpx.get(server.url.removesuffix("/v1") + "/health").status_code == 200
    return {
        "requests": outcome.requests + outcome.values,
        "values": outcome.values,
        "not_4xx": len(outcome.not_4xx),
        "alive": alive,
        "rss_growth": after / before - 1,
        "rss_bytes": [before, after],
        "wrong_good_answers": outcome.wrong,
        "statuses": dict(outcome.statuses),
        "seed": seed,
        "faults": outcome.not_4xx[:50],
    }


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    environment = report.environment()
    few = FULL_METHOD.model_copy(update={"positive_count": 20, "negative_count": 20})
    with tempfile.TemporaryDirectory() as folder:
        packs = extract_demo_packs(Path(folder), {"fears": list(CONCEPTS["fears"])[:2]}, few)
        result = run([pack.path for pack in packs], Path(folder), args.requests, args.seed)
    report.write_json(args.json, environment | result)
    shown = {key: value for key, value in result.items() if key != "faults"}
    report.show([json.dumps(shown, indent=2)])
    raise SystemExit(bool(result["not_4xx"] or result["wrong_good_answers"] or not result["alive"]))


if __name__ == "__main__":
    main()
