"""The table of the field's methods: its tests, links and counts."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass

import pytest

from tests.documents import ROOT

PAGE = ROOT / "docs" / "reference" / "field.md"
METHODS = 34


@dataclass(frozen=True)
class Row:
    """A method."""

    number: int
    served: str
    learned: str
    lacks: str
    shown: str


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text().splitlines():
        if re.match(r"\| \d+ \|", line):
            number, _, served, learned, lacks, shown = (
                part.strip() for part in line[1:-1].split("|")
            )
            found.append(Row(int(number), served, learned, lacks, shown))
    return found


def test_every_method_has_a_row() -> None:
    assert [row.number for row in rows()] == list(range(1, METHODS + 1))


@pytest.mark.parametrize("row", rows(), ids=lambda row: str(row.number))
def test_row(row: Row) -> None:
    marks = [part[:1] for part in (row.served, row.learned)]
    assert set(marks) <= set("✓◐–")
    # What is claimed is shown, and what is not whole says what it lacks.
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.shown)
    assert bool(tests) == (set(marks) != {"–"}), row.shown
    assert len(tests) >= sum(mark != "–" for mark in marks) or row.learned.startswith("–")
    if "✓✓" != "".join(marks):
        assert row.lacks not in ("", "–")
    for file, name in tests:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, name
    for page in re.findall(r"\]\(([^)#]+)", row.served + row.learned + row.lacks):
        assert (PAGE.parent / page).resolve().exists(), page


def test_counts() -> None:
    counts = [
        Counter(part[:1] for part in each)
        for each in zip(*((r.served, r.learned) for r in rows()), strict=True)
    ]
    served, learned = (f"{c['✓']} ✓, {c['◐']} ◐, {c['–']} –" for c in counts)
    assert f"Served: {served}. Learned: {learned}." in PAGE.read_text()
