"""Many clients and reloads at once; ``python -m benchmarks.load_http`` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.load_http import run
from vllm_steer.packs.pack import SteeringPack

pytestmark = pytest.mark.server


def test_many_clients_and_reloads(packs: list[SteeringPack], tmp_path: Path) -> None:
    found = run(packs, tmp_path, clients=40, seconds=8, pause=0.2)
    failures = found["failures"]
    assert not any(failures.values()), failures
    assert found["metrics_match"]
    assert found["reloads"] > 1
    assert set(found["kinds"]) == {"steered", "unsteered", "alias", "leaving", "refused"}
