"""A pack is read beside the engine's steps, once, and served as it was read."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import make_pack
from vllm_steer.engine import staging
from vllm_steer.engine.staging import drop_staged, stage, staged_pack
from vllm_steer.errors import PackError
from vllm_steer.packs.pack import SteeringPack


@pytest.fixture(autouse=True)
def nothing_staged() -> Iterator[None]:
    drop_staged()
    yield
    drop_staged()


def until_read(path: str, sha256: str) -> None:
    end = time.monotonic() + 10
    while not stage(path, sha256):
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_caller_does_not_wait_and_the_pack_is_read_once(
    fears: SteeringPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, readers = threading.Event(), []
    original = staging.load_checked

    def slow(path: str, sha256: str) -> SteeringPack:
        go.wait(10)
        readers.append(threading.current_thread())
        return original(path, sha256)

    monkeypatch.setattr(staging, "load_checked", slow)
    chosen = str(fears.path), fears.manifest.tensors.sha256
    assert not stage(*chosen)
    assert not stage(*chosen)
    go.set()
    until_read(*chosen)
    shutil.rmtree(fears.path)
    assert staged_pack(*chosen).digests == fears.digests
    assert len(readers) == 1
    assert readers[0] is not threading.current_thread()


def test_a_pack_that_was_not_staged_is_read_now(fears: SteeringPack) -> None:
    assert staged_pack(str(fears.path), fears.manifest.tensors.sha256).digests == fears.digests


def test_what_cannot_be_read_is_told_and_read_again(fears: SteeringPack, tmp_path: Path) -> None:
    chosen = str(fears.path), fears.manifest.tensors.sha256
    kept = tmp_path / "kept"
    shutil.copytree(fears.path, kept)
    make_pack(fears.path, "fears", {"spiders": [1]}, seed=5)
    with pytest.raises(PackError, match="changed on disk"):
        until_read(*chosen)
    shutil.rmtree(fears.path)
    with pytest.raises(PackError, match="not a directory"):
        until_read(*chosen)
    shutil.copytree(kept, fears.path)
    until_read(*chosen)


def test_one_pack_is_held(pack_at: Callable[..., Any]) -> None:
    first, second = (pack_at(name, {"a": [1]}) for name in ("first", "second"))
    for pack in (first, second):
        until_read(str(pack.path), pack.manifest.tensors.sha256)
    shutil.rmtree(first.path)
    with pytest.raises(PackError):
        staged_pack(str(first.path), first.manifest.tensors.sha256)
