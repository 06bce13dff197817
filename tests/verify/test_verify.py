"""``vllm-steer verify``: what it says of this build, and of builds that are broken in one line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.broken_builds import MUTATIONS, Mutation
from tests.documents import block
from vllm_steer.cli import main
from vllm_steer.packs.pack import SteeringPack

ROOT = Path(__file__).parents[2]
ENGINE = {"kv_cache_memory_bytes": 2**28, "block_size": 32, "max_model_len": 512}
# Spares a short run a second import of vLLM for each engine, and compiling what ranks log-probabilities.
FAST = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
CHECKS = ["start", "parity", "isolation", "prefix cache", "overhead"]


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    status: int
    page: str
    errors: str
    result: dict[str, Any]

    def check(self, name: str) -> dict[str, Any]:
        (found,) = [check for check in self.result["checks"] if check["name"] == name]
        return found

    def with_status(self, status: str) -> list[str]:
        return [c["name"] for c in self.result["checks"] if c["status"] == status]


def verify(
    out: Path,
    model: Path,
    packs: list[SteeringPack],
    *options: str,
    package: Path = ROOT,
    env: dict[str, str] = FAST,
) -> Run:
    """Runs the documentation's command with more options, and with the plugin found in ``package``."""
    (out.parent / "packs").symlink_to(packs[0].path.parent)
    program, *words = shlex.split(
        block("docs/tutorials/operate.md", "bash", "vllm-steer verify").replace("MODEL", str(model))
    )
    assert program == "vllm-steer"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vllm_steer.cli", *words]
        + ["--engine", json.dumps(ENGINE), *options],
        cwd=out.parent,
        env=os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}"} | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    return Run(done.returncode, done.stdout, done.stderr, json.loads(out.read_text()))


@pytest.fixture(scope="module")
def passing(
    model: Path, packs: list[SteeringPack], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    out = tmp_path_factory.mktemp("verify") / "verify.json"
    return verify(out, model, packs, "--eager", "--quick", "--dtype", "float32")


@pytest.mark.engine
def test_this_build_passes(passing: Run) -> None:
    assert passing.status == passing.result["exit_status"] == 0, passing.page + passing.errors
    assert [check["name"] for check in passing.result["checks"]] == CHECKS
    assert passing.with_status("passed") == CHECKS[:-1]
    assert passing.with_status("not checked") == ["overhead"]


@pytest.mark.engine
def test_the_figures_are_those_of_float32(passing: Run) -> None:
    parity = passing.check("parity")["figures"]
    assert 0 < parity["largest"] < parity["allowed_largest"] == 1e-4
    assert parity["tokens_that_differ"] == 0
    # The steerings could have been seen missing.
    assert parity["effect"] > 1.0
    assert not parity["too_weak"]
    cached = passing.check("prefix cache")["figures"]["cached_tokens"].values()
    assert sorted(map(bool, cached)) == [False] * 5 + [True] * 3


@pytest.mark.engine
def test_the_page_says_what_was_verified(passing: Run, packs: list[SteeringPack]) -> None:
    first = passing.page.splitlines()[0]
    assert first == "vllm-steer verify: passed; not checked: overhead"
    layers = sorted(
        {layer for pack in packs for r in pack.directions.values() for layer in r.layers}
    )
    for words in (
        f"torch {passing.result['facts']['versions']['torch']}",
        "device           cpu",
        "model runner     V1",
        "graphs           eager",
        "dtype            float32",
        f"layers hooked    {', '.join(map(str, layers))}",
        "(allowed 0.0001)",
    ):
        assert words in passing.page


def test_what_cannot_run_has_status_2(
    model: Path,
    packs: list[SteeringPack],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*options: str) -> str:
        assert main(["verify", "--model", str(model), *options]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("vllm-steer: ")
        assert shown.err.count("\n") == 1
        return shown.err

    pack = str(packs[0].path)
    assert "no steering pack at 'nowhere'" in refused("--pack", "nowhere")
    assert "--quick skips" in refused("--pack", pack, "--quick", "--min-ratio", "0.9")
    assert "is set by verify itself" in refused(
        "--pack", pack, "--engine", '{"additional_config": {}}'
    )
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert "VLLM_PLUGINS is 'another'" in refused("--pack", pack)


@pytest.mark.slow
@pytest.mark.engine
def test_vllm_that_does_not_start_by_itself_has_status_2(
    model: Path, packs: list[SteeringPack], tmp_path: Path
) -> None:
    options = ("--quick", "--engine", json.dumps({"quantization": "awq"}))
    run = verify(tmp_path / "verify.json", model, packs, *options)
    assert run.status == 2
    assert run.page.startswith("vllm-steer verify: could not run")
    assert "plain vLLM does not start here either" in run.page
    assert "Traceback" not in run.page + run.errors


@pytest.mark.slow
@pytest.mark.engine
def test_a_whole_run_as_operators_start_it(
    model: Path, packs: list[SteeringPack], tmp_path: Path
) -> None:
    options = ("--no-parity", "--min-ratio", "0.01")
    run = verify(tmp_path / "verify.json", model, packs, *options, env={})
    assert run.status == 0, run.page + run.errors
    assert run.with_status("not checked") == ["parity"]
    assert run.page.startswith("vllm-steer verify: passed; not checked: parity\n")
    assert "compiled" in run.result["facts"]["graphs"]
    ratios = run.check("overhead")["figures"]["ratios"]
    assert all(0 < one["low"] <= one["median"] <= one["high"] for one in ratios.values())


NO_ADDITION = Mutation(
    "engine/blocks.py",
    "steered = (hidden.float() + vectors[rows].float()).to(hidden.dtype)",
    "steered = hidden + 0 * vectors[rows]",
)
ANOTHERS_STEERING = Mutation(
    "engine/token_rows.py",
    "slots = np.array([slot(request_id, _NO_SLOT) for request_id in self._batch], dtype=np.intp)",
    "slots = np.array([slot(request_id, 1) for request_id in self._batch], dtype=np.intp)",
)
BROKEN = {
    "start": NO_ADDITION,
    "parity": MUTATIONS["positions: the first one of a range is left out"],
    "isolation": ANOTHERS_STEERING,
    "prefix cache": MUTATIONS["prefix cache: blocks are found by token ids alone"],
}


@pytest.mark.parametrize("mutation", [*MUTATIONS.values(), *BROKEN.values()])
def test_the_lines_that_are_broken_are_there(mutation: Mutation) -> None:
    """The slow tests of broken builds would not find them otherwise."""
    assert mutation.becomes in mutation.source()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("check", BROKEN)
def test_a_broken_build_fails_the_right_check(
    check: str, model: Path, packs: list[SteeringPack], tmp_path: Path
) -> None:
    package = BROKEN[check].build(tmp_path)
    options = ("--eager", "--quick", "--dtype", "float32")
    run = verify(tmp_path / "verify.json", model, packs, *options, package=package)
    assert run.status == 1, run.page + run.errors
    assert check in run.with_status("failed")
    assert run.page.startswith("vllm-steer verify: failed")
    assert "Traceback" not in run.page + run.errors
    if check == "prefix cache":
        assert run.with_status("failed") == [check]


@pytest.mark.slow
@pytest.mark.engine
def test_a_run_that_is_ended_ends_its_engines(model: Path, packs: list[SteeringPack]) -> None:
    given = ["--model", str(model), "--pack", str(packs[0].path), "--engine", json.dumps(ENGINE)]
    run = subprocess.Popen(
        [sys.executable, "-P", "-m", "vllm_steer.cli", "verify", *given],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    started = psutil.Process(run.pid)
    deadline = time.monotonic() + 120
    # The engine's process, and that of the engine core.
    while len(engines := started.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    run.terminate()
    assert run.wait(120) == 128 + signal.SIGTERM
    assert len(engines) >= 2
    assert not any(engine.is_running() for engine in engines)
