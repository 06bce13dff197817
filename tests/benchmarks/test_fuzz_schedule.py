"""Random schedules, and proof that they notice a build that is broken in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.broken_builds import MUTATIONS

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]


def fuzz(out: Path, *options: str, package: Path = ROOT) -> dict[str, Any]:
    """Runs the fuzzer with the plugin found in ``package``; returns its results."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks.fuzz_schedule", "--json", str(out), *options],
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


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_build_is_noticed(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    options = ("--requests", "80", "--seed", str(mutation.seed))
    results = fuzz(tmp_path / "out.json", *options, package=mutation.build(tmp_path))
    assert results["mismatches"] > 0
