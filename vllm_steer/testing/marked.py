"""What a command writes between two markers of a document, and a test holds against its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Block:
    """What stands between two markers of a document.

    Attributes:
        document: File that has the markers.
        name: Name in the markers.
        render: Returns the text.
    """

    document: Path
    name: str
    render: Callable[[], str]

    @property
    def begin(self) -> str:
        """The marker before the text."""
        return f"<!-- {self.name}: begin -->"

    @property
    def end(self) -> str:
        """The marker behind the text."""
        return f"<!-- {self.name}: end -->"

    def inside(self, text: str) -> str:
        """Returns what stands between the markers in a document's text."""
        return text.partition(self.begin)[2].partition(self.end)[0].strip()

    def replaced(self, text: str, table: str) -> str:
        """Returns a document's text with another table between the markers.

        Raises:
            ValueError: The document does not have each marker once, in their order.
        """
        before, _, rest = text.partition(self.begin)
        _, _, after = rest.partition(self.end)
        if text.count(self.begin) != 1 or text.count(self.end) != 1 or self.end not in rest:
            raise ValueError(f"{self.begin} and {self.end} must stand once in {self.document.name}")
        return f"{before}{self.begin}\n{table.strip()}\n{self.end}{after}"

    def write(self) -> None:
        """Writes the rendered text into the document."""
        self.document.write_text(self.replaced(self.document.read_text(), self.render()))
