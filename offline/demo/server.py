"""A real ``vllm serve`` process for the demo and the tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vllm_steer.errors import EngineError
from vllm_steer.vllm_compat.root_cause import cause_in_log

SERVED_NAME = "demo"
START_TIMEOUT = 600.0


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Base URL of its OpenAI-style API, ending in ``/v1``.
        log: File with its output.
        pid: Process id of ``vllm serve``; the engine's processes are its children.
    """

    url: str
    log: Path
    pid: int


def serve_command(model: Path, packs: Sequence[Path], port: int) -> list[str]:
    """Returns the ``vllm serve`` command for a model with steering packs."""
    options = ["--port", str(port), "--served-model-name", SERVED_NAME, "--dtype", "float32"]
    # A small model needs little memory; the default would take most of the machine's.
    limits = ["--max-model-len", "512", "--max-num-seqs", "64", "--kv-cache-memory-bytes", "512M"]
    steering = ["--enable-steering", "--steering-packs", *map(str, packs)]
    return ["vllm", "serve", str(model), *options, *limits, *steering]


@contextmanager
def serve(model: Path, packs: Sequence[Path], log: Path, *extra: str) -> Iterator[Server]:
    """Runs a server until the block ends.

    Args:
        model: Checkpoint directory.
        packs: Steering packs to load.
        log: File for the server's output.
        extra: More arguments of ``vllm serve``.

    Raises:
        EngineError: The server ended or did not answer in time; the message ends with the root cause from its
            log.
    """
    port = free_port()
    command = [*serve_command(model, packs, port), *extra]
    with running(command, port, log) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Runs a ``vllm serve`` command until the block ends.

    Args:
        command: The command, with ``vllm`` for the executable next to this Python.
        port: The port that it names.
        log: File for the server's output.
        environment: Environment variables in addition to this process's.

    Raises:
        EngineError: The server ended or did not answer in time; the message ends with the root cause from its
            log.
    """
    executable = str(Path(sys.executable).with_name(command[0]))
    with log.open("w") as stream:
        process = subprocess.Popen(
            [executable, *command[1:]],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield Server(f"http://127.0.0.1:{port}/v1", log, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    with tqdm(desc="starting vllm serve", unit="s", bar_format="{desc}: {elapsed}") as bar:
        started = time.monotonic()
        while not _answers(url):
            bar.update()
            if process.poll() is not None:
                raise EngineError(
                    f"vllm serve ended with status {process.returncode}; {_said(log)}"
                )
            if time.monotonic() - started > START_TIMEOUT:
                raise EngineError(f"vllm serve did not answer in {START_TIMEOUT:g} s; {_said(log)}")
            time.sleep(1.0)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _said(log: Path) -> str:
    return f"{log} says: {cause_in_log(log.read_text(errors='replace'))}"


def free_port() -> int:
    """Returns a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
