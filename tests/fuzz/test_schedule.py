"""Random schedules, and proof that they notice a build that is broken in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "fuzz_schedule.py"


def fuzz(out: Path, *options: str, package: Path = ROOT) -> dict[str, Any]:
    """Runs the fuzzer with the plugin found in ``package``; returns its results."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(out), *options],
        env=os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert out.exists(), done.stderr[-3000:]
    results: dict[str, Any] = json.loads(out.read_text())
    assert bool(done.returncode) == bool(results["mismatches"])
    return results


@pytest.mark.feature("chunked prefill, preemption, aborts", "exact")
def test_random_schedules(tmp_path: Path) -> None:
    results = fuzz(tmp_path / "v1.json", "--requests", "160", "--world", "80", "--seed", "0")
    faults = [fault for world in results["worlds"] for fault in world["mismatches"]]
    assert not faults, faults
    # The schedules were hard ones.
    assert results["preemptions"] > 0
    assert results["cached_tokens"] > 0
    assert results["aborted"] > 0


@pytest.mark.feature("Model Runner V2", "exact")
def test_random_schedules_on_model_runner_v2(tmp_path: Path) -> None:
    results = fuzz(tmp_path / "v2.json", "--requests", "24", "--runner", "v2", "--seed", "1")
    faults = [fault for world in results["worlds"] for fault in world["mismatches"]]
    assert not faults, faults


@dataclass(frozen=True)
class Mutation:
    """One line of the plugin, changed."""

    file: str
    line: str
    becomes: str
    seed: int = 0


MUTATIONS = {
    "positions: the first one of a range is left out": Mutation(
        "engine/plan.py",
        "inside = (columns[_START] <= positions) & (positions < columns[_END])",
        "inside = (columns[_START] < positions) & (positions < columns[_END])",
    ),
    "positions: a preempted request loses its steering": Mutation(
        "engine/runner_v1.py",
        "for request_id in scheduler_output.finished_req_ids:",
        "for request_id in scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set()):",
    ),
    "prefix cache: blocks are found by token ids alone": Mutation(
        "engine/prefix_cache.py",
        'keys = [*keys, ("steering", f"{key}:{first - start}:{last - start}")]',
        "keys = [*keys]",
    ),
    "prefix cache: where a block is steered does not count": Mutation(
        "engine/prefix_cache.py",
        'keys = [*keys, ("steering", f"{key}:{first - start}:{last - start}")]',
        'keys = [*keys, ("steering", key)]',
        # A world with room for many cached blocks.
        seed=5,
    ),
    "isolation: rows of the step before stay": Mutation(
        "engine/bank.py",
        "if self._known is not None and np.array_equal(rows, self._known):",
        "if self._known is not None and len(rows) == len(self._known):",
    ),
    "isolation: a new combination does not fill its row": Mutation(
        "engine/worker.py",
        "for row, segment in step.new:",
        "for row, segment in step.new[:1]:",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_build_is_noticed(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    shutil.copytree(ROOT / "vllm_steer", tmp_path / "vllm_steer")
    file = tmp_path / "vllm_steer" / mutation.file
    source = file.read_text()
    assert source.count(mutation.line) == 1
    file.write_text(source.replace(mutation.line, mutation.becomes))
    options = ("--requests", "80", "--seed", str(mutation.seed))
    results = fuzz(tmp_path / "out.json", *options, package=tmp_path)
    assert results["mismatches"] > 0
