"""Tables and pictures of the documentation and the README are those of ``benchmarks/results``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import pictures
from benchmarks.tables import BLOCKS, FINDINGS, README, blocks_of, stale
from vllm_steer.testing.marked import Block

DOCUMENTS = [FINDINGS, README]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(document: Path) -> None:
    assert stale(document.read_text(), blocks_of(document)) == [], "run python -m benchmarks.tables"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_changed_figure_is_noticed(block: Block) -> None:
    text = block.document.read_text()
    before, begin, rest = text.partition(block.begin)
    *_, figure = re.finditer(r"\d", rest.partition(block.end)[0])
    at = figure.start()
    other = f"{rest[:at]}{(int(figure[0]) + 1) % 10}{rest[at + 1 :]}"
    assert stale(before + begin + other, blocks_of(block.document)) == [block.name]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_marker_has_its_table(document: Path) -> None:
    marked = re.findall(r"^<!-- (\S+): begin -->$", document.read_text(), re.MULTILINE)
    assert marked == [b.name for b in blocks_of(document)]


def test_nothing_is_written_where_a_marker_is_missing() -> None:
    block = blocks_of(FINDINGS)[0]
    text = FINDINGS.read_text()
    for broken in (text.replace(block.begin, ""), text.replace(block.end, ""), text + block.begin):
        with pytest.raises(ValueError, match="must stand once in findings.md"):
            block.replaced(broken, "")


def test_pictures_show_what_was_measured() -> None:
    assert list(pictures.stale()) == [], "run python -m benchmarks.pictures"
