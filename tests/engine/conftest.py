"""The order of the engine tests: those that share an engine follow each other, since few stay alive."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
ORDER = (
    "test_compile_cache.py",
    "test_parallel.py",
    "test_start.py",
    "test_parity.py",
    "test_isolation.py",
    "test_prefix_cache.py",
    "test_stop_tokens.py",
    "test_token_positions.py",
    "test_features.py",
    "test_forms.py",
    "test_reads.py",
    "test_sweep.py",
    "test_fusion.py",
    "test_trained.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the items of this folder, in the places that they have."""
    places = [number for number, item in enumerate(items) if item.path.parent == HERE]
    ordered = sorted((items[number] for number in places), key=lambda item: _rank(item.path.name))
    for number, item in zip(places, ordered, strict=True):
        items[number] = item


def _rank(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)
