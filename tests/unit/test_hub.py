"""Packs from a hub: the real huggingface_hub against a hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub, serve_hub
from tests.unit.conftest import make_pack
from vllm_steer.errors import PackError
from vllm_steer.packs.hub import hub_snapshot, resolve_pack
from vllm_steer.packs.pack import SteeringPack, load_pack

REPO = "someone/fears"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as served:
        yield served


@pytest.fixture
def python(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a process of its own: huggingface_hub reads its environment once."""

    def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *args],
            env={
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_OFFLINE": "0",
                **environment,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.fixture
def cli(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *args, **environment: python("-m", "vllm_steer.cli", *args, **environment)


def content(pack: SteeringPack) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in pack.path.iterdir()}


def test_a_pack_is_fetched_pinned_and_served_offline(
    hub: Hub, cli: Callable[..., subprocess.CompletedProcess[str]], fears: SteeringPack
) -> None:
    more = {"README.md": b"# card", "evil.pkl": b"cos\nsystem\n(S'touch hit'\ntR.", "a.py": b"1/0"}
    commit = hub.push(REPO, "v1", {**content(fears), **more})
    done = cli("inspect", f"{REPO}@v1")
    assert done.returncode == 0, done.stderr
    assert f"verified: {REPO}@{commit}" in done.stdout
    assert fears.digests["spiders"][:12] in done.stdout
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert {request.rpartition("/")[2] for request in fetched} == set(content(fears))

    before = len(hub.requests)
    assert cli("inspect", f"{REPO}@v1", HF_HUB_OFFLINE="1").stdout == done.stdout
    assert cli("inspect", f"{REPO}@{commit}").stdout == done.stdout
    assert len(hub.requests) == before

    done = cli("inspect", REPO, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert (
        f"steering pack {REPO}@main: not in the cache of the hub, and HF_HUB_OFFLINE is set; run"
        in done.stderr
    )


def test_a_moved_branch_is_noticed(
    hub: Hub, cli: Callable[..., subprocess.CompletedProcess[str]],
    pack_at: Callable[..., SteeringPack],
) -> None:  # fmt: skip
    commits = []
    for seed in (0, 1):
        commits.append(hub.push(REPO, "main", content(pack_at(f"p{seed}", {"a": [1]}, seed))))
        assert f"{REPO}@{commits[-1]}" in cli("inspect", REPO).stdout
    assert commits[0] != commits[1]
    assert f"{REPO}@{commits[0]}" in cli("inspect", f"{REPO}@{commits[0]}").stdout


def test_what_is_on_disk_wins(
    hub: Hub, cli: Callable[..., subprocess.CompletedProcess[str]], fears: SteeringPack,
    tmp_path: Path,
) -> None:  # fmt: skip
    hub.push(REPO, "main", content(fears))
    (tmp_path / "someone").mkdir()
    os.rename(fears.path, tmp_path / REPO)
    done = cli("inspect", REPO)
    assert f"verified: {tmp_path / REPO}" in done.stdout
    assert hub.requests == []


# What ``vllm serve`` does with its arguments, and what another API server does with the same ones.
SERVE = """
import argparse, json, sys
from vllm_steer.serving.flags import add_flags, read_flags

parser = add_flags(lambda parser: parser)(argparse.ArgumentParser())
parser.add_argument("--additional-config", type=json.loads)
args = parser.parse_args()
again = read_flags(lambda cls, args: args)
for _ in range(2):
    again(object, args)
    sys.stdout.write(args.additional_config["steering"]["packs"][0] + "\\n")
"""


@pytest.mark.parametrize("flags", [True, False])
def test_processes_of_a_server_get_one_path(
    flags: bool, hub: Hub, python: Callable[..., subprocess.CompletedProcess[str]],
    fears: SteeringPack,
) -> None:  # fmt: skip
    commit = hub.push(REPO, "v1", content(fears))
    source = f"{REPO}@v1"
    given = (
        ["--enable-steering", "--steering-packs", source]
        if flags
        else ["--additional-config", json.dumps({"steering": {"packs": [source]}})]
    )
    done = python("-c", SERVE, *given)
    assert done.returncode == 0, done.stderr
    # The oldest vLLM logs to standard output too.
    first, second = (line for line in done.stdout.splitlines() if line.startswith(os.sep))
    assert first == second
    assert os.path.isabs(first)
    assert first.endswith(f"snapshots/{commit}")
    assert load_pack(first).digests == fears.digests
    assert sum("/revision/" in request for request in hub.requests) <= 2

    done = python("-c", SERVE, *given, HF_HUB_OFFLINE="1", HF_HOME="/nowhere")
    field = "--steering-packs" if flags else "additional_config.steering.packs"
    assert f"PackError: {field}: steering pack {source}: not in the cache" in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("someone/nothing", "RepositoryNotFoundError"),
        (f"{REPO}@v9", "RevisionNotFoundError"),
        ("someone/empty", "the repository has no steering_config.json"),
        ("someone/huge", "steering_vectors.safetensors has 1099511627776 bytes; it may have at most"),
    ],
)  # fmt: skip
def test_what_cannot_be_fetched_is_named(
    source: str, message: str, hub: Hub, cli: Callable[..., subprocess.CompletedProcess[str]],
    fears: SteeringPack,
) -> None:  # fmt: skip
    hub.push(REPO, "main", content(fears))
    hub.push("someone/empty", "main", {"README.md": b""})
    if source == "someone/huge":
        hub.push("someone/huge", "main", content(fears))
        hub.sizes["steering_vectors.safetensors"] = 2**40
    done = cli("inspect", source)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not any("/resolve/" in request for request in hub.requests)


def test_a_hub_out_of_reach(cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = cli("inspect", REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert f"steering pack {REPO}@main: cannot be fetched from the hub (ConnectError" in done.stderr
    assert "the network" in done.stderr


@pytest.mark.parametrize(
    "source",
    ["nowhere", "/no/where", "./a/b", "a/b/c", "a/b@", "a/../b", "../a/b", "a/b@../../main", "a/b@v/../w",
     "-a/b", "a/b@-x", "a b/c", "https://x/y", "a/b\n"],
)  # fmt: skip
def test_what_is_no_repository_is_never_asked_for(source: str) -> None:
    with pytest.raises(PackError, match="not a directory; give the directory that holds"):
        resolve_pack(source)


def test_only_a_commit_of_the_cache_is_a_snapshot(tmp_path: Path) -> None:
    commit = "0" * 40
    cache = tmp_path / "models--a--b" / "snapshots"
    assert str(hub_snapshot(cache / commit)) == f"a/b@{commit}"
    for path in (
        cache / "main",
        tmp_path / "models--a--b" / commit,
        tmp_path / "x" / "snapshots" / commit,
    ):
        assert hub_snapshot(path) is None


def test_links_of_the_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "models--a--b" / "snapshots" / ("0" * 40), "x", {"x": [1]})
    blobs = pack.path.parents[1] / "blobs"
    blobs.mkdir()
    for file in list(pack.path.iterdir()):
        os.rename(file, blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    assert load_pack(pack.path).digests == pack.digests
    vectors = pack.path / "steering_vectors.safetensors"
    os.rename(blobs / vectors.name, tmp_path / "elsewhere")
    vectors.unlink()
    vectors.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackError, match="a link that points outside the pack"):
        load_pack(pack.path)
