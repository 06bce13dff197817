"""Pictures of what probes tell apart: histograms of scores by layer, and answers coloured token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.svg import lines, svg, text

_COLUMNS = 5
_WIDTH, _ROW = 184, 18
_POSITIVE, _NEGATIVE = "#c05a1c", "#3b7dc4"
# Of a monospaced letter, in pixels, and letters of a line.
_LETTER, _LETTERS = 8.43, 104
_LINE = 26
_FONT = "font-family: 'DejaVu Sans Mono', Menlo, Consolas, monospace"


def histograms(report: Mapping[str, Any]) -> str:
    """Returns histograms of scores on held-out answers, a panel for each concept with a row for each layer.

    Args:
        report: What ``benchmarks.probes`` writes.
    """
    concepts = report["concepts"]
    rows = len(next(iter(concepts.values()))["histograms"])
    tall = 34 + _ROW * rows + 26
    parts: list[str] = []
    for number, (concept, found) in enumerate(concepts.items()):
        left = 44 + (_WIDTH + 4) * (number % _COLUMNS)
        top = 16 + tall * (number // _COLUMNS)
        parts.append(text(left, top + 16, concept, "bold"))
        parts += _panel(left, top + 34, found)
    height = 16 + tall * -(-len(concepts) // _COLUMNS)
    counts = report["questions"]
    note = (
        f"{report['model']}, highest score of each held-out answer: {counts['heldout']} plain (blue), "
        f"{counts['prefixed']} with the concept's prefix (orange); rows: layers"
    )
    parts.append(text(24, height + 4, note, "small"))
    mark = "bold: the layer that was chosen; upright: its threshold at 1 % false positives"
    parts.append(text(24, height + 22, mark, "small"))
    return svg(60 + (_WIDTH + 4) * _COLUMNS, height + 36, "Scores of answers, by layer", parts)


def _panel(left: float, top: float, found: Mapping[str, Any]) -> list[str]:
    parts = []
    # The last layer stands on top.
    for row, (layer, counts) in enumerate(reversed(found["histograms"].items())):
        base = top + _ROW * (row + 1)
        chosen = int(layer) == found["layer"]
        parts.append(text(left - 22, base, layer, "small bold" if chosen else "small"))
        for kind, color in (("negative", _NEGATIVE), ("positive", _POSITIVE)):
            parts.append(_bars(left, base, counts[kind], color))
        if chosen:
            (measured,) = [e for e in found["probe"]["layers"] if e["layer"] == found["layer"]]
            above = measured["thresholds"][0]["above"]
            share = (above - counts["low"]) / (counts["high"] - counts["low"])
            x = left + (_WIDTH - 30) * min(max(share, 0.0), 1.0)
            parts.append(f'<path class="axis" stroke-width="2" d="M{x:.1f} {base}v-{_ROW}"/>')
    return parts


def _bars(left: float, base: float, counts: Sequence[int], color: str) -> str:
    width, most = (_WIDTH - 30) / len(counts), max(counts)
    steps = " ".join(f"V{base - (_ROW - 3) * count / most:.0f}h{width:.1f}" for count in counts)
    return f'<path fill="{color}" fill-opacity="0.6" d="M{left} {base} {steps} V{base}Z"/>'


def coloured(shown: Mapping[str, Any]) -> str:
    """Returns a plain and a steered answer, each token on the colour of its score.

    Args:
        shown: ``coloured`` of what ``benchmarks.probes`` writes.
    """
    scores = [score for way in shown["answers"].values() for score in way["scores"]]
    low, high = min(scores), max(scores)
    parts = [text(24, 34, f"“{shown['question']}”", "bold")]
    top = 62
    for way, answer in shown["answers"].items():
        parts.append(text(24, top, way, "bold"))
        drawn, top = _answer(answer, top + 26, (low, high), shown["threshold"])
        parts += drawn
        top += 16
    note = [
        f"score of {shown['concept']} at layer {shown['layer']}: no colour is {low:.0f}, full colour {high:.0f}; framed: "
        f"above the threshold at 1 % false positives, {shown['threshold']:.1f}; the last token is not read",
    ]
    parts += lines(24, top + 4, note, "small")
    return svg(930, top + 22, "Answers, coloured token by token by their score", parts)


def _answer(
    answer: Mapping[str, Any], top: int, ends: tuple[float, float], threshold: float
) -> tuple[list[str], int]:
    """Draws the tokens of an answer in lines; returns its parts and where the last line ends."""
    parts, column = [], 0
    scores = [*answer["scores"], None]
    for token, score in zip(answer["tokens"], scores, strict=True):
        shown = token.replace("\n", "⏎")
        if column + len(shown) > _LETTERS:
            column, top = 0, top + _LINE
        x, width = 24 + _LETTER * column, _LETTER * len(shown)
        if score is not None:
            share = (score - ends[0]) / (ends[1] - ends[0])
            frame = f' stroke="{_POSITIVE}" stroke-width="1.5"' if score > threshold else ""
            parts.append(
                f'<rect x="{x:.1f}" y="{top - 15}" width="{width:.1f}" height="21" rx="2" fill="{_POSITIVE}" '
                f'fill-opacity="{0.7 * share:.2f}"{frame}/>'
            )
        place = f'x="{x:.1f}" y="{top}" textLength="{width:.1f}" xml:space="preserve"'
        parts.append(f'<text {place} style="{_FONT}">{escape(shown)}</text>')
        column += len(shown)
        if "\n" in token:
            column, top = 0, top + _LINE
    return parts, top + _LINE
