"""Bystanders beside hostile clients; ``python -m benchmarks.soak`` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import passed, run

pytestmark = pytest.mark.server


def test_bystanders_notice_nothing(tmp_path: Path) -> None:
    found = run(tmp_path, seconds=20.0, seed=0)
    assert passed(found), found
    assert found["requests"] > 100
    assert found["bystanders"] > 20
