"""The documentation as a site, its notebook, and what the README may be."""

from __future__ import annotations

import html.parser
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.documents import PAGES, README, ROOT

LINES = 150


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= LINES


def test_files_that_are_named_exist() -> None:
    """Links of the README, and paths of the repository that pages name as code."""
    for target in re.findall(r"\]\(([^)#]+)", README.read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for page in PAGES:
        for path in re.findall(
            r"`((?:tests|offline|vllm_steer|benchmarks)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


@dataclass
class _Loads(html.parser.HTMLParser):
    """Everything that a page of the site loads by itself."""

    def __post_init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(values.get("src") or "")
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(values.get("href") or "")


def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Every link and anchor is checked by the strict build."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        build,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        loads = _Loads()
        loads.feed(page.read_text())
        assert loads.found, page
        assert [u for u in loads.found if u.startswith(("http", "//"))] == [], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(@import|url\()[\s\"']*(https?:)?//", sheet.read_text()), sheet


@pytest.mark.engine
def test_the_notebook_runs(smollm2: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "docs" / "tutorials" / "steering.ipynb", 4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}})
    client.execute()
    shown = ["".join(o.get("text", "") for o in c.get("outputs", ())) for c in notebook.cells]
    (strengths,) = (text for text in shown if text.startswith("0.0: "))
    answers = re.findall(r"^[\d.]+: (.*)", strengths, re.MULTILINE)
    assert len(answers) == len(set(answers)) == 4
    assert "Sherlock Holmes" in shown[-1], "the message says what would have been right"
