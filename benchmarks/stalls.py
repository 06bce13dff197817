"""How long bad bodies of up to 6 MB keep a server from answering others, beside plain vLLM in the same run.

    python -m benchmarks.stalls --json FILE

Two real servers, one without the plugin, get each body in turn while another client asks for ``/health`` without
a pause; what counts is its longest wait. No body may stall the plugin's server for longer than 1.5 times as long as
plain vLLM, or 50 ms, whichever is more. Stalls are medians over rounds.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks import report
from benchmarks.options import results_parser
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.server import SERVED_NAME, Server, free_port, running, serve_command
from vllm_steer.testing.random_pack import checkpoint_identity, write_random_pack

RATIO, SECONDS = 1.5, 0.05
_LARGE = 6 * 2**20
_MANY = 300_000
_KEY = "somebody"
_NAME = "p/a"
_SAID = [{"role": "user", "content": "Hello"}]
_TIMEOUT = 120.0


@dataclass(frozen=True)
class Bad:
    """A body, and where it is sent.

    Attributes:
        what: Name in the table.
        route: Path.
        content: Makes the body.
        method: HTTP method.
    """

    what: str
    route: str
    content: Callable[[], bytes]
    method: str = "POST"


def _body(route: str, **fields: Any) -> bytes:
    said = {"/v1/completions": {"prompt": "Hello"}, "/v1/responses": {"input": "Hello"}}
    body = {"model": SERVED_NAME} | said.get(route, {"messages": _SAID, "max_tokens": 1})
    return json.dumps(body | fields).encode()


def _bad(what: str, route: str, **fields: Any) -> Bad:
    return Bad(what, route, lambda: _body(route, **fields))


def _directions(count: int, **fields: Any) -> dict[str, Any]:
    return {"directions": [{"name": _NAME, "scale": 1.0 + n} | fields for n in range(count)]}


def _nested(depth: int) -> bytes:
    return b'{"steering": ' + b"[" * depth + b"]" * depth + b"}"


_RANGES = [[7 * n, 7 * n + 3] for n in range(64)]
_PROMPTS = ["Hello " * (n + 1) for n in range(50)]
BODIES: tuple[Bad, ...] = (
    _bad("unknown keys", "/v1/chat/completions", **{f"k{n}": n for n in range(_MANY)}),
    _bad("unknown keys like ours", "/v1/completions", **{f"s{n}ring": n for n in range(_MANY)}),
    _bad("keys that begin like ours", "/v1/responses", **{f"steer{n}": n for n in range(_MANY)}),
    _bad("one long key", "/v1/chat/completions", **{"s" * _LARGE: 1}),
    _bad("keys of steering", "/v1/completions", steering={f"k{n}": n for n in range(_MANY)}),
    _bad("many directions", "/v1/chat/completions", steering=_directions(100_000)),
    _bad(
        "keys of directions",
        "/v1/completions",
        steering=_directions(64, **{f"k{n}": n for n in range(4000)}),
    ),
    _bad("long names", "/v1/completions", steering={"directions": [{"name": "n" * 300}] * 64}),
    _bad("a name of 6 MB", "/v1/completions", steering={"directions": [{"name": "n" * _LARGE}]}),
    _bad(
        "64 × 64 ranges, 50 prompts",
        "/v1/completions",
        prompt=_PROMPTS,
        max_tokens=1,
        steering=_directions(64, positions=_RANGES),
    ),
    _bad(
        "128 ranges, 50 prompts",
        "/v1/completions",
        prompt=_PROMPTS,
        max_tokens=1,
        steering=_directions(2, positions=_RANGES),
    ),
    _bad(
        "as many ranges as are taken",
        "/v1/completions",
        prompt=_PROMPTS[:16],
        max_tokens=1,
        steering=_directions(2, positions=_RANGES),
    ),
    _bad(
        "unknown keys, 50 prompts",
        "/v1/completions",
        prompt=_PROMPTS,
        max_tokens=1,
        **{f"s{n}ring": n for n in range(_MANY)},
    ),
    _bad(
        "keys of vllm_xargs, 50 prompts",
        "/v1/completions",
        prompt=_PROMPTS,
        max_tokens=1,
        vllm_xargs={f"k{n}": n for n in range(10_000)},
    ),
    _bad("layers", "/v1/completions", steering=_directions(64, layers=[0] * 4096)),
    _bad("text of 6 MB", "/v1/completions", vllm_xargs={"steering": "[" * _LARGE}),
    _bad(
        "keys of vllm_xargs", "/v1/chat/completions", vllm_xargs={f"k{n}": n for n in range(_MANY)}
    ),
    _bad("a flat list", "/v1/completions", steer=[_NAME] * _MANY),
    Bad("deep nesting", "/v1/completions", lambda: _nested(_LARGE // 2 - 16)),
    Bad("no JSON", "/v1/chat/completions", lambda: b'{"steering": ' + b"x" * _LARGE),
    _bad("half surrogates", "/v1/completions", **{f"s\ud800{n}": n for n in range(_MANY)}),
    _bad(
        "an alias beside keys",
        "/v1/completions",
        model=f"{SERVED_NAME}:x",
        **{f"k{n}": n for n in range(_MANY)},
    ),
    _bad("unknown keys of messages", "/v1/messages", **{f"k{n}": n for n in range(_MANY)}),
    _bad("objects of messages", "/v1/messages", **{f"s{n}": {} for n in range(_MANY // 2)}),
    _bad("unknown keys of invocations", "/invocations", **{f"k{n}": n for n in range(_MANY)}),
    Bad("no such route", "/v1/nothing", lambda: _body("", **{f"k{n}": n for n in range(_MANY)})),
    Bad("vectors nobody may send", "/v1/steering/vectors/x", lambda: b"x" * _LARGE, "PUT"),
)


class _Probe(threading.Thread):
    """Asks for ``/health`` again and again."""

    def __init__(self, root: str) -> None:
        super().__init__(daemon=True)
        self._root, self._ended, self.longest = root, threading.Event(), 0.0

    def run(self) -> None:
        with httpx.Client(base_url=self._root, timeout=_TIMEOUT) as http:
            while not self._ended.is_set():
                started = time.monotonic()
                http.get("/health").raise_for_status()
                self.longest = max(self.longest, time.monotonic() - started)

    def end(self) -> float:
        """Stops it; returns its longest wait in seconds."""
        self._ended.set()
        self.join(_TIMEOUT)
        return self.longest


def stall(server: Server, bad: Bad, content: bytes) -> tuple[float, int]:
    """Returns the longest wait of others while a server deals with a body, and its status."""
    root = server.url.removesuffix("/v1")
    probe = _Probe(root)
    probe.start()
    # So that the probe's own connection is there.
    time.sleep(0.1)
    headers = {"content-type": "application/json", "authorization": f"Bearer {_KEY}"}
    answer = httpx.request(
        bad.method, root + bad.route, content=content, headers=headers, timeout=_TIMEOUT
    )
    return probe.end(), answer.status_code


def run(folder: Path, *, repetitions: int, seed: int) -> dict[str, Any]:
    """Starts both servers and sends every body to each, in random order.

    Args:
        folder: Directory for what is written.
        repetitions: Rounds.
        seed: Seed of the order.
    """
    model = demo_model_path()
    identity = checkpoint_identity(model)
    layers = {"a": range(identity.num_layers)}
    pack = write_random_pack(
        folder / "p",
        "p",
        identity,
        layers,
        seed=0,
        default_scale=1.0,
        safe_scale=1.0,
        residual_norm=16.0,
    )
    digest = hashlib.sha256(_KEY.encode()).hexdigest()
    policy = {"aliases": {"x": {"directions": [{"name": _NAME}]}}, "keys": {digest: ["*"]}}
    (folder / "policy.json").write_text(json.dumps(policy))
    rng, waits = random.Random(seed), {bad.what: {"plain": [], "plugin": []} for bad in BODIES}
    statuses: dict[str, dict[str, int]] = {bad.what: {} for bad in BODIES}
    with ExitStack() as stack:
        servers = {}
        for name in ("plain", "plugin"):
            port = free_port()
            command = [*serve_command(model, [pack.path], port), "--enforce-eager"]
            if name == "plain":
                command = command[: command.index("--enable-steering")] + ["--enforce-eager"]
            else:
                command += ["--steering-policy", str(folder / "policy.json")]
            environment = {"VLLM_PLUGINS": ""} if name == "plain" else {}
            servers[name] = stack.enter_context(
                running(command, port, folder / f"{name}.log", environment)
            )
        turns = [(bad, name) for bad in BODIES for name in servers] * repetitions
        rng.shuffle(turns)
        for bad, name in tqdm(turns, desc="bodies", unit="body"):
            longest, status = stall(servers[name], bad, bad.content())
            waits[bad.what][name].append(longest)
            statuses[bad.what][name] = status
    return _report(waits, statuses) | {"repetitions": repetitions, "seed": seed}


def _report(
    waits: Mapping[str, Mapping[str, Sequence[float]]], statuses: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    bodies = {}
    for what, by_name in waits.items():
        medians = {name: statistics.median(found) for name, found in by_name.items()}
        limit = max(RATIO * medians["plain"], SECONDS)
        bodies[what] = {
            **medians,
            "ratio": medians["plugin"] / medians["plain"],
            "within": medians["plugin"] <= limit,
            "status": statuses[what],
        }
    return {
        "bodies": bodies,
        "over": [what for what, found in bodies.items() if not found["within"]],
        "worst_stall": max(found["plugin"] for found in bodies.values()),
    }


def table(result: Mapping[str, Any]) -> list[str]:
    """Returns the stalls as a Markdown table, in milliseconds."""
    rows = ["| body | plain | steered | ratio |", "|---|---|---|---|"]
    for what, found in result["bodies"].items():
        plain, plugin = (f"{1000 * found[name]:.0f}" for name in ("plain", "plugin"))
        mark = "" if found["within"] else " (over)"
        rows.append(f"| {what} | {plain} | {plugin} | {found['ratio']:.2f}{mark} |")
    return rows


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    environment = report.environment()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), repetitions=args.repetitions, seed=args.seed)
    report.write_json(args.json, environment | result)
    report.show(table(result))
    raise SystemExit(bool(result["over"]))


if __name__ == "__main__":
    main()
