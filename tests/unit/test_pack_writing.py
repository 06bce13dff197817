"""A pack is replaced as a whole: under kill -9, under readers, under other writers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.unit.conftest import make_pack
from vllm_steer.errors import PackError
from vllm_steer.packs.pack import MANIFEST_FILE, VECTORS_FILE, SteeringPack, load_pack

# A child that writes the packs of seeds in turn; with a step, it kills itself before that system call.
WRITER = """
    import os, signal, sys
    from pathlib import Path
    from tests.unit.conftest import make_pack

    path, first, count, step = Path(sys.argv[1]), *map(int, sys.argv[2:])
    calls = 0

    def deadly(call):
        def counted(*args, **kwargs):
            global calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return counted

    if step:
        for name in ("open", "write", "fsync", "chmod", "replace", "unlink", "close"):
            setattr(os, name, deadly(getattr(os, name)))
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    for turn in range(count):
        make_pack(path, "fears", {"a": [1, 2], "b": [3]}, seed=(first + turn) % 2)
"""


def writer(path: Path, first: int, count: int, step: int = 0) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path), *map(str, (first, count, step))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child.stdout as stream:
        assert stream.readline() == "ready\n"
    return child


def digests(tmp_path: Path, seed: int) -> dict[str, str]:
    return make_pack(tmp_path / f"seed {seed}", "fears", {"a": [1, 2], "b": [3]}, seed).digests


def test_killed_at_every_step(tmp_path: Path) -> None:
    """Whichever system call a writer dies at, the old pack is there or the new, and both come to be."""
    old, new = digests(tmp_path, 0), digests(tmp_path, 1)
    seen = []
    for step in range(1, 60):
        path = tmp_path / f"pack {step}"
        make_pack(path, "fears", {"a": [1, 2], "b": [3]}, seed=0)
        (path / "README.md").write_text("kept")
        child = writer(path, first=1, count=1, step=step)
        if child.wait() == 0:
            break
        assert child.returncode == -signal.SIGKILL
        seen.append(load_pack(path).digests)
        assert seen[-1] in (old, new)
        assert (path / "README.md").read_text() == "kept"
        make_pack(path, "fears", {"a": [1, 2], "b": [3]}, seed=0)
        assert sorted(file.name for file in path.iterdir()) == [
            "README.md",
            MANIFEST_FILE,
            VECTORS_FILE,
        ]
        assert load_pack(path).digests == old
    else:
        pytest.fail("the writer never came to its end")
    assert len(seen) > 10
    assert seen[0] == old
    assert seen[-1] == new
    assert seen == sorted(seen, key=lambda found: found == new), "it changes once"


def test_killed_at_any_time(tmp_path: Path) -> None:
    known = [digests(tmp_path, seed) for seed in (0, 1)]
    path, clock = tmp_path / "pack", random.Random(0)
    make_pack(path, "fears", {"a": [1, 2], "b": [3]}, seed=0)
    for _ in range(8):
        child = writer(path, first=clock.randrange(2), count=100_000)
        time.sleep(clock.uniform(0.005, 0.05))
        child.kill()
        child.wait()
        assert load_pack(path).digests in known


def test_read_while_it_is_replaced(tmp_path: Path) -> None:
    """Two writers at once, and a reader that always finds one of the two packs whole."""
    known = [digests(tmp_path, seed) for seed in (0, 1)]
    path = tmp_path / "pack"
    make_pack(path, "fears", {"a": [1, 2], "b": [3]}, seed=0)
    children = [writer(path, first=first, count=100_000) for first in (0, 1)]
    found, busy = [], []
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            try:
                found.append(load_pack(path).digests)
            except PackError as error:
                busy.append(str(error))
        assert all(child.poll() is None for child in children)
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert all(one in known for one in found)
    assert all("replaced repeatedly" in message for message in busy)
    assert len(busy) < len(found)
    assert all(one in found for one in known), "the reader saw no change"
    assert load_pack(path).digests in known


def test_overwritten_in_place_after_loading(fears: SteeringPack) -> None:
    """As ``cp`` does; what was verified stays what it was."""
    before = {name: vector.tobytes() for name, vector in fears.vectors.items()}
    with (fears.path / VECTORS_FILE).open("r+b") as stream:
        stream.write(b"\xff" * os.path.getsize(fears.path / VECTORS_FILE))
        stream.truncate(10)
    assert {name: vector.tobytes() for name, vector in fears.vectors.items()} == before


def test_a_failed_write_leaves_the_old_pack(fears: SteeringPack) -> None:
    with pytest.raises(PackError, match="fears.*cannot be written"):
        make_pack(fears.path, "fears", {"spiders": [1, 9]})
    assert load_pack(fears.path).digests == fears.digests
    assert len(list(fears.path.iterdir())) == 2


def test_a_pack_cannot_be_written_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(PackError, match="the pack cannot be written"):
        make_pack(tmp_path / "taken", "fears", {"a": [1]})
