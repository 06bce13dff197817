"""Clients of the soak that mean harm, or do not care; each sends one thing at a time until the end."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from safetensors.numpy import save

from benchmarks.fuzz_http import FAULTS
from benchmarks.soak_model import DEEP, DIRECTIONS, LAYERS, SWING, Load
from vllm_steer.offline.demo.server import SERVED_NAME
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.random_pack import write_variant

KEY = "hostile"
ROUTES = (
    "/completions",
    "/chat/completions",
    "/responses",
    "/messages",
    "/embeddings",
    "/chat/completions/batch",
    "/steering/packs",
    "/nothing",
)
# Beside /v1.
ROOT_ROUTES = ("/invocations", "/tokenize", "/generate", "/nothing", "/inference/v1/generate")
_LENGTHS = (0.0, 1e-45, 1e-18, 1.0, 900.0, 1e18, 3e38, math.inf, math.nan)
_BUSY = 503
# A hostile client waits no longer for an answer; the server has to notice that it went away.
_PATIENCE = 60.0


@dataclass
class Damage:
    """What the hostile clients met.

    Attributes:
        requests: Requests sent.
        statuses: Count of each status; 0 is no answer.
        server_errors: Answers with a status of 500 or more but 503, in words.
    """

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    server_errors: list[str] = field(default_factory=list)

    def note(self, what: str, status: int, text: str = "") -> None:
        """Counts one answer."""
        self.requests += 1
        self.statuses[status] += 1
        if status >= 500 and status != _BUSY:
            self.server_errors.append(f"{what}: {status} {text[:300]}")


@dataclass(frozen=True)
class Hostile:
    """What a hostile client has.

    Attributes:
        http: Client with its key, whose base URL ends in ``/v1``.
        rng: Its choices.
        damage: Shared by all of them.
        root: Directory that packs may be loaded from.
        swing: The pack that comes and goes.
        hidden_size: Width of the residual stream.
        load: How much it asks for.
    """

    http: httpx.AsyncClient
    rng: random.Random
    damage: Damage
    root: Path
    swing: SteeringPack
    hidden_size: int
    load: Load

    async def send(self, what: str, method: str, path: str, **given: Any) -> httpx.Response | None:
        """Sends one request and counts its answer; None when there was none in time."""
        try:
            response = await self.http.request(method, path, timeout=_PATIENCE, **given)
        except httpx.HTTPError:
            self.damage.note(what, 0)
            return None
        self.damage.note(what, response.status_code, response.text)
        return response

    def prompt(self) -> list[int]:
        """Random token ids."""
        return [self.rng.randrange(10, 1500) for _ in range(self.rng.randint(1, self.load.prompt))]

    def body(self, steering: Any, **fields: Any) -> dict[str, Any]:
        """A request for a long answer."""
        body = {"model": SERVED_NAME, "prompt": self.prompt(), "ignore_eos": True}
        body |= {"max_tokens": self.rng.choice(self.load.answers), "steering": steering}
        return body | fields

    def choice(self, pack: str = DEEP) -> dict[str, Any]:
        """A direction at its most, in one of the forms."""
        name, other = (f"{pack}/{one}" for one in self.rng.sample(DIRECTIONS, 2))
        scale = self.rng.choice([-1, 1]) * 10 ** self.rng.uniform(0, 4.5)
        forms: list[dict[str, Any]] = [
            {"scale": scale},
            {"scale": scale, "op": "affine", "read": self.rng.choice([name, other])},
            {"scale": scale, "op": "affine", "read": other, "bias": 1e4},
            {"scale": scale, "op": "clamp"},
            {"scale": scale, "op": "ablate"},
            {"scale": self.rng.uniform(-180, 180), "op": "rotate", "plane": other},
            {"scale": scale, "gate": {"direction": other, "above": self.rng.uniform(-9, 9)}},
            {"scale": scale, "restore_norm": True},
        ]
        return {"name": name} | self.rng.choice(forms)


async def overflow(one: Hostile) -> None:
    """Asks for changes as large as are taken, alone and summed."""
    count = one.rng.choice([1, 1, 2, 64])
    plain = {"name": f"{DEEP}/a", "scale": one.rng.choice([1e3, 15000.0, 15999.0])}
    directions = [one.choice() if count < 3 else plain for _ in range(count)]
    where = one.rng.choice(["all", "prompt", "generated"])
    steering = {"directions": directions, "positions": where}
    await one.send("overflow", "POST", "/completions", json=one.body(steering))


async def many_sums(one: Hostile) -> None:
    """Asks for as many different sums as are taken, for several answers."""
    directions = []
    for number in range(one.rng.choice([4, 16])):
        start = one.rng.randrange(4)
        ranges = [[start + 3 * n, start + 3 * n + 2] for n in range(one.rng.choice([4, 16, 64]))]
        name = f"{DEEP}/{one.rng.choice(DIRECTIONS)}"
        directions.append({"name": name, "scale": 0.1 + number / 7, "positions": ranges})
    body = one.body({"directions": directions}, n=one.rng.choice([1, one.load.samples]))
    await one.send("many sums", "POST", "/completions", json=body)


async def upload(one: Hostile) -> None:
    """Sends vectors at the edges of what numbers can be, uses them, and takes them away meanwhile."""
    name = f"up{one.rng.randrange(6)}"
    layers = one.rng.sample(range(LAYERS), one.rng.randint(1, 4))
    vectors = {}
    for direction in ("x", "y"):
        values = np.zeros((len(layers), one.hidden_size), np.float32)
        values[:, one.rng.randrange(one.hidden_size)] = one.rng.choice(_LENGTHS)
        vectors[direction] = values
    content = save(vectors, {"layers": json.dumps(layers)})
    seconds = one.rng.choice([1, 2, 60])
    path = f"/steering/vectors/{name}"
    await one.send("upload", "PUT", f"{path}?seconds={seconds}", content=content)
    choice = {"name": f"{name}/x", "scale": 1.0}
    if one.rng.random() < 0.5:
        choice |= {"op": "affine", "read": f"{name}/y"}
    body = one.body({"directions": [choice]})
    asked = [one.send("uploaded", "POST", "/completions", json=body) for _ in range(3)]
    if one.rng.random() < 0.5:
        asked.append(_later(0.05, one.send("drop", "DELETE", path)))
    await asyncio.gather(*asked)


async def background(one: Hostile) -> None:
    """Lets answers outlive their HTTP request, and takes away what they need."""
    name = f"up{one.rng.randrange(6)}"
    vectors = {"x": np.full((1, one.hidden_size), 0.1, np.float32)}
    path = f"/steering/vectors/{name}"
    await one.send("upload", "PUT", f"{path}?seconds=2", content=save(vectors, {"layers": "[3]"}))
    body = {"model": SERVED_NAME, "input": "Hello", "max_output_tokens": one.load.answers[-1]}
    body |= {"background": True, "store": True, "ignore_eos": True}
    body |= {"steering": {"directions": [{"name": f"{name}/x"}]}}
    found = await one.send("background", "POST", "/responses", json=body)
    await one.send("drop", "DELETE", path)
    if found is not None and found.status_code == 200:
        answer = found.json()["id"]
        await asyncio.sleep(one.rng.uniform(0, 1))
        await one.send("stored", "GET", f"/responses/{answer}")
        if one.rng.random() < 0.5:
            await one.send("cancel", "POST", f"/responses/{answer}/cancel")


async def not_reading(one: Hostile) -> None:
    """Opens a stream of many sums and reads nothing of it for a while."""
    parts = urlsplit(str(one.http.base_url))
    ranges = [[3 * n, 3 * n + 1] for n in range(32)]
    choices = [
        {"name": f"{DEEP}/{d}", "scale": 1.0 + n, "positions": [[a + n, b + n] for a, b in ranges]}
        for n, d in enumerate(DIRECTIONS[:2])
    ]
    longest = {"n": one.load.samples, "max_tokens": one.load.answers[-1]}
    body = one.body({"directions": choices}, stream=True, logprobs=5, **longest)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    _, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1024)
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        await asyncio.sleep(one.rng.uniform(2, 10))
    finally:
        writer.close()
    one.damage.note("not reading", 0)


async def hang_up(one: Hostile) -> None:
    """Goes away before the answer, at its beginning, or in its midst."""
    body = one.body(
        {"directions": [one.choice()]}, stream=True, n=one.rng.choice([1, one.load.samples])
    )
    await _begun(one, one.rng.choice([0, 1, 5]), json=body)


async def _begun(one: Hostile, left: int, **given: Any) -> None:
    """Sends a request for a stream, reads some lines of it, and goes away."""
    try:
        async with asyncio.timeout(one.rng.choice([0.01, 0.1, 30.0])):
            async with one.http.stream("POST", "/completions", **given) as response:
                one.damage.note("hang up", response.status_code)
                async for _ in response.aiter_lines():
                    if (left := left - 1) < 0:
                        break
    except (TimeoutError, httpx.HTTPError):
        one.damage.note("hang up", 0)


async def change(one: Hostile) -> None:
    """Loads, unloads and replaces a pack and an alias while requests use them."""
    name, alias = f"{SWING}/{one.rng.choice(DIRECTIONS)}", f"alias{one.rng.randrange(2)}"
    steering = {"directions": [{"name": name, "scale": one.rng.uniform(-9, 9)}]}
    if one.rng.random() < 0.5:
        await asyncio.to_thread(
            write_variant, one.swing, one.root / SWING, SWING, one.rng.choice([0.5, -1.0])
        )
    aliased = one.body(None, model=f"{SERVED_NAME}:{alias}")
    del aliased["steering"]
    sent: Sequence[Awaitable[Any]] = [
        one.send("load", "POST", "/steering/packs", json={"name": SWING}),
        one.send("swing", "POST", "/completions", json=one.body(steering)),
        one.send("alias", "PUT", f"/steering/aliases/{alias}", json=steering),
        one.send("aliased", "POST", "/completions", json=aliased),
        one.send("unload", "DELETE", f"/steering/packs/{SWING}"),
        one.send("end alias", "DELETE", f"/steering/aliases/{alias}"),
    ]
    await asyncio.gather(*one.rng.sample(sent, len(sent)))


async def reads(one: Hostile) -> None:
    """Reads what there is and what there is not, ends answers by it, and goes away in their midst."""
    rng, theirs = one.rng, "calm/a"
    names = [f"{DEEP}/{rng.choice(DIRECTIONS)}", f"{SWING}/a", "up1/x", f"{DEEP}/none", theirs]
    read = [
        {
            "name": rng.choice([names[0], rng.choice(names)]),
            "layers": rng.choice([[0], [3, LAYERS - 1], [LAYERS], []]),
            "at": rng.choice(["generated", "all", "prompt", [[2, 5], [-3, None]]]),
            "when": rng.choice(["before", "after"]),
        }
        for _ in range(rng.choice([1, 1, 2, 9]))
    ]
    rule = {
        "read": rng.choice([0, 0, 1, 99]),
        "above": rng.choice([0.0, -1e30, 1e308, math.inf, math.nan]),
        "for": rng.choice([0, 1, 3]),
    }
    steering: dict[str, Any] = {"read": read, "recompute": rng.random() < 0.5}
    if rng.random() < 0.5:
        steering["directions"] = [one.choice()]
    if rng.random() < 0.5:
        steering[rng.choice(["stop_when", "abort_when"])] = rule
    streamed = rng.random() < 0.3
    body = one.body(steering, stream=streamed, n=rng.choice([1, one.load.samples]))
    # Not as httpx would write it: NaN and Infinity are sent as they are.
    given = {
        "content": json.dumps(body).encode(),
        "headers": {"content-type": "application/json"},
    }
    if streamed:
        await _begun(one, rng.choice([0, 3, 1000]), **given)
        return
    found = await one.send("reads", "POST", "/completions", **given)
    allowed = found is not None and found.status_code == 200
    if allowed and any(each["name"] == theirs for each in read):
        one.damage.server_errors.append("a key read what it may not")


async def keys(one: Hostile) -> None:
    """Asks with keys that are wrong, missing or given twice for what they may not use."""
    body = one.body({"directions": [{"name": "calm/a"}]}, max_tokens=1)
    mine, theirs = (("authorization", f"Bearer {key}") for key in (KEY, "bystander"))
    headers = one.rng.choice([[mine], [mine, theirs], [("authorization", "Bearer no")], []])
    request = one.http.build_request("POST", "/completions", json=body)
    kept = [(k, v) for k, v in request.headers.multi_items() if k != "authorization"]
    request.headers = httpx.Headers([*kept, *headers])
    try:
        response = await one.http.send(request)
    except httpx.HTTPError:
        one.damage.note("keys", 0)
        return
    one.damage.note("keys", response.status_code, response.text)
    if response.status_code == 200:
        one.damage.server_errors.append("a key used what it may not")


async def faults(one: Hostile) -> None:
    """Sends bodies with a fault to every route, those that do not exist too."""
    _, wrong = one.rng.choice(FAULTS)(one.rng)
    body: dict[str, Any] = {"model": SERVED_NAME, "max_tokens": 4, "prompt": "Hello"}
    body |= {"messages": [{"role": "user", "content": "Hello"}], "input": "Hello"} | wrong
    root = str(one.http.base_url).removesuffix("/v1/")
    if one.rng.random() < 0.1:
        body |= {f"k{n}": n for n in range(20_000)}
    await one.send(
        "faults",
        "POST",
        one.rng.choice([*ROUTES, *(f"{root}{path}" for path in ROOT_ROUTES)]),
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )


KINDS: tuple[Callable[[Hostile], Awaitable[None]], ...] = (
    overflow,
    overflow,
    many_sums,
    upload,
    background,
    not_reading,
    hang_up,
    change,
    reads,
    keys,
    faults,
)


async def harm(one: Hostile, kind: Callable[[Hostile], Awaitable[None]], end: float) -> None:
    """Does one kind of harm again and again."""
    while time.monotonic() < end:
        await kind(one)
        await asyncio.sleep(one.rng.uniform(0.0, 0.2))


async def _later(seconds: float, sent: Awaitable[Any]) -> Any:
    await asyncio.sleep(seconds)
    return await sent
