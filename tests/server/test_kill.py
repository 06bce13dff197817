"""A server killed while it reloads a pack that a writer replaces: what is on disk loads and steers."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from vllm_steer.offline.demo.server import SERVED_NAME, Server, serve
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.testing.parity import TOLERANCE
from vllm_steer.testing.random_pack import write_variant
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.server
TOKENS = 16
FACTORS = (1.0, -1.0)

# A child that writes the versions of a pack in turn until it is killed, with breaks in which all of a
# server's processes can find the same one.
WRITER = """
    import itertools, random, sys, time
    from pathlib import Path
    from vllm_steer.testing.random_pack import write_variant
    from vllm_steer.packs.pack import load_pack

    versions = [load_pack(path) for path in sys.argv[2:]]
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    for version in itertools.cycle(versions):
        write_variant(version, Path(sys.argv[1]), "live", 1.0)
        time.sleep(random.uniform(0, 0.1))
"""


@contextmanager
def writing(path: Path, versions: list[SteeringPack]) -> Iterator[psutil.Process]:
    """A process that replaces a pack again and again."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    with subprocess.Popen(
        [*command, *(str(version.path) for version in versions)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        try:
            yield psutil.Process(child.pid)
        finally:
            child.kill()


class Reloads:
    """Posts reloads without a pause until the server is gone."""

    def __init__(self, server: Server) -> None:
        self.statuses: list[int] = []
        self.broken = 0
        self._url = f"{server.url}/steering/packs"
        self._thread = threading.Thread(target=self._post, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until a reload was carried out."""
        end = time.monotonic() + 60
        while 200 not in self.statuses:
            assert time.monotonic() < end, f"no reload is carried out: {self.statuses}"
            time.sleep(0.01)

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _post(self) -> None:
        while not self.broken:
            try:
                answer = httpx.post(self._url, json={"name": "live"}, timeout=60)
                self.statuses.append(answer.status_code)
            except httpx.TransportError:
                self.broken += 1


def processes_of(server: Server) -> list[psutil.Process]:
    """A server's processes, but for Python's tracker, which frees the shared memory of the dead."""
    owner = psutil.Process(server.pid)
    family = [owner, *owner.children(recursive=True)]
    return [p for p in family if "resource_tracker" not in " ".join(p.cmdline())]


def kill_all(processes: list[psutil.Process]) -> None:
    """Kills processes at one moment: all are stopped before the first is killed."""
    for sent in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            process.send_signal(sent)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def complete(server: Server, prompt: list[int], steering: dict[str, Any]) -> Any:
    body = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.0}
    body |= {"ignore_eos": True, "logprobs": 0, "return_tokens_as_token_ids": True}
    answer = httpx.post(f"{server.url}/completions", json=body | {"steering": steering}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def intact(path: Path, versions: list[SteeringPack]) -> SteeringPack:
    """The pack on disk, which is one of its versions."""
    found = load_pack(path)
    assert found.digests in [version.digests for version in versions]
    return found


def check_right(
    server: Server,
    prompt: list[int],
    live: SteeringPack,
    versions: list[SteeringPack],
    reference: Reference,
) -> None:
    """The server steers by the pack as it lies on disk, and gives the tokens of its content."""
    (name, *_) = live.directions
    steered = complete(server, prompt, {"directions": [{"name": f"live/{name}", "scale": 9.0}]})
    (receipt,) = steered["steering"]
    assert receipt["directions"][0]["digest"] == live.digests[name]
    (version,) = [version for version in versions if version.digests == live.digests]
    same = {"directions": [{"name": f"{version.name}/{name}", "scale": 9.0}]}
    logprobs = steered["choices"][0]["logprobs"]
    tokens = [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]]
    assert tokens == reference.generate(prompt, same, TOKENS).tokens
    places = np.arange(len(prompt) - 1, len(prompt) - 1 + TOKENS), tokens
    right, plain = (reference.score(prompt, tokens, s)[places] for s in (same, None))
    assert logprobs["token_logprobs"] == pytest.approx(right.tolist(), abs=TOLERANCE)
    assert np.abs(right - plain).max() > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 6])
def test_killed_while_it_reloads(
    kills: int, model: Path, packs: list[SteeringPack], prompts: list[list[int]], tmp_path: Path
) -> None:
    """Writers alone are killed first; then each start finds what the kill of all of them left."""
    clock, root = random.Random(kills), tmp_path / "root"
    versions = [
        write_variant(packs[-1], tmp_path / f"version{n}", f"version{n}", factor)
        for n, factor in enumerate(FACTORS)
    ]
    live = write_variant(versions[0], root / "live", "live", 1.0)
    reference = Reference(model, versions)
    options = ("--enforce-eager", "--steering-pack-roots", str(root))
    for number in range(kills + 1):
        with serve(model, [packs[0].path, live.path], tmp_path / "log", *options) as server:
            check_right(server, prompts[0], live, versions, reference)
            if number == kills:
                break
            for _ in range(4):
                with writing(live.path, versions) as writer:
                    time.sleep(clock.uniform(0.1, 0.5))
                    kill_all([writer])
                left = intact(live.path, versions)
                answer = httpx.post(f"{server.url}/steering/packs", json={"name": "live"})
                assert answer.json()["sha256"] == left.manifest.tensors.sha256
            with writing(live.path, versions) as writer:
                reloads = [Reloads(server) for _ in range(3)]
                for one in reloads:
                    one.wait()
                time.sleep(clock.uniform(0, 1))
                kill_all([writer, *processes_of(server)])
            for one in reloads:
                one.join()
            # A reload that finds one content and then another is refused, and does no harm.
            assert {s for one in reloads for s in one.statuses} <= {200, 400, 409}
        live = intact(live.path, versions)
