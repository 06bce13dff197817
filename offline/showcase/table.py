"""The answers as a text table for a terminal and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from vllm_steer.offline.demo.concepts import CONCEPTS
from vllm_steer.offline.showcase.ask import Example

HEAD = ("question and concept", "plain", "with the prefix", "steered")
# With separators and borders, 119 columns.
_WIDTHS = (24, 28, 28, 28)


def text_table(examples: Sequence[Example]) -> str:
    """Returns the table for a terminal of 120 columns."""
    rule = "+".join("-" * (width + 2) for width in _WIDTHS)
    lines = [_row(HEAD), rule]
    for example in examples:
        lines += [_row(["\n\n".join(paragraphs) for paragraphs in _cells(example)]), rule]
    return "\n".join(lines)


def markdown_table(examples: Sequence[Example]) -> str:
    """Returns the same table as Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for example in examples:
        cells = [
            "<br><br>".join(map(_escaped, paragraphs)).replace("\n", "<br>")
            for paragraphs in _cells(example)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(example: Example) -> tuple[list[str], ...]:
    """Paragraphs of each cell."""
    asked = example.asked
    return (
        [asked.question, f"{_title(example)}\n“{asked.prefix}”"],
        [example.plain],
        [example.prefixed],
        [example.steered, _done(example)],
    )


def _title(example: Example) -> str:
    _, _, name = example.asked.direction.partition("/")
    of = next((f" ({cls})" for cls, table in CONCEPTS.items() if name in table), "")
    return example.asked.direction + of


def _done(example: Example) -> str:
    """The receipt's dose and the calibration's result."""
    (direction,) = example.receipt["directions"]
    done = (
        f"strength {direction['strength']:g}: scale {direction['scale']:g}, "
        f"dose {example.receipt['dose']:.2f}"
    )
    found = example.asked.record.calibration
    if found is None or found.gap_closed is None:
        return done
    doubt = "" if found.steers else "; found not to steer"
    return f"{done}; closes {found.gap_closed:.0%} of the gap{doubt}"


def _row(cells: Sequence[str]) -> str:
    wrapped = [_wrapped(cell, width) for cell, width in zip(cells, _WIDTHS, strict=True)]
    height = max(map(len, wrapped))
    return "\n".join(
        "|".join(
            f" {cell[line] if line < len(cell) else '':<{width}} "
            for cell, width in zip(wrapped, _WIDTHS, strict=True)
        ).rstrip()
        for line in range(height)
    )


def _wrapped(cell: str, width: int) -> list[str]:
    return [line for part in cell.split("\n") for line in textwrap.wrap(part, width) or [""]]


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    for character in "\\`*_|<>[]#":
        text = text.replace(character, f"\\{character}")
    return text
