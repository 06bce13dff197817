"""The README and the pages of the documentation, and the code that stands in them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page.

    Attributes:
        page: Path of the page, from the repository's root.
        line: Line that it begins at.
        language: What stands behind the fence; empty for none.
        code: What is inside.
    """

    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def fences() -> list[Fence]:
    """Returns every fenced block of README and documentation."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            code = textwrap.dedent(match[3])
            found.append(Fence(str(page.relative_to(ROOT)), line, match[2], code))
    return found


def fence(page: str, language: str, containing: str) -> Fence:
    """Returns the one block of a page and a language that contains a text.

    Raises:
        ValueError: There is none, or there are several.
    """
    (found,) = (
        f for f in fences() if (f.page, f.language) == (page, language) and containing in f.code
    )
    return found


def block(page: str, language: str, containing: str) -> str:
    """Returns the code of that block."""
    return fence(page, language, containing).code
