"""The pictures of the README and the documentation that show measurements, as SVG.

``python -m benchmarks.pictures`` draws them from ``benchmarks/results`` and the shipped pack, and
writes the table of the demo's answers; a test fails when one is stale. Each picture carries its own
colours for light and dark pages and loads nothing.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import probe_pictures
from benchmarks.engine import ROOT
from benchmarks.svg import card, lines, svg, text
from benchmarks.tables import markdown, results
from vllm_steer.offline.showcase import shipped_pack
from vllm_steer.testing.marked import Block

PICTURES = ROOT / "docs" / "pictures"
DEMO_PAGE = ROOT / "docs" / "demo.md"
# Three of the rows that the demo shows, of different kinds; the page has them all.
SHOWN = ("own/pirate", "smollm2/Santa Claus", "smollm2/Tokyo")


def demo_picture(examples: Sequence[Mapping[str, Any]]) -> str:
    """Returns plain and steered answers side by side.

    Args:
        examples: Rows of ``demo-answers.json``.
    """
    by_direction = {example["direction"]: example for example in examples}
    parts, top, width = [], 64, 960
    parts += [text(24, 34, "question", "bold"), text(236, 34, "plain", "bold")]
    parts += [text(602, 34, "steered, the same prompt", "bold")]
    for name in SHOWN:
        example = by_direction[name]
        asked, about = (
            _wrap(example["question"], 22),
            _wrap(f"direction learned from “{example['prefix']}”", 28),
        )
        plain, steered = _wrap(example["plain"], 44), _wrap(example["steered"], 44)
        height = 20 * max(len(plain), len(steered), len(asked) + len(about)) + 24
        parts.append(card(226, top, 356, height, "card"))
        parts.append(card(592, top, 356, height, "steered"))
        parts += lines(24, top + 26, asked, "bold")
        parts += lines(24, top + 32 + 20 * len(asked), about, "small", 17)
        parts += lines(240, top + 26, plain) + lines(606, top + 26, steered)
        top += height + 12
    note = (
        "SmolLM2-135M-Instruct, greedy, 48 tokens at most; every direction at its calibrated scale"
    )
    parts.append(text(24, top + 14, note, "small"))
    title = "Answers of SmolLM2-135M to three questions, plain and steered"
    return svg(width, top + 30, title, parts)


def strength_picture(directions: Iterable[Mapping[str, Any]]) -> str:
    """Returns what every scale did to each direction of a pack, as its calibration measured it.

    Args:
        directions: Records of a manifest.
    """
    curves = [d["calibration"]["curve"] for d in directions if d["calibration"]]
    scales = sorted({point["scale"] for curve in curves for point in curve})
    parts: list[str] = []
    panels = (
        ("gap closed: is the voice there?", "gap_closed"),
        ("expressed: is the concept spoken of?", "expression"),
    )
    for number, (title, key) in enumerate(panels):
        left, top, width, height = 70 + 460 * number, 60, 380, 220

        def x(scale: float, left: int = left, width: int = width) -> float:
            return left + 20 + (width - 40) * (scale - scales[0]) / (scales[-1] - scales[0])

        def y(value: float, top: int = top, height: int = height) -> float:
            return top + height * (1 - (min(max(value, -1.0), 2.0) + 1) / 3)

        parts.append(text(left, 34, title, "bold"))
        for value in (-1, 0, 1, 2):
            kind = "axis" if value == 0 else "grid"
            parts.append(f'<path class="{kind}" d="M{left} {y(value):.1f}h{width}"/>')
            parts.append(text(left - 26, y(value) + 5, f"{value}".replace("-", "−"), "small"))
        parts += [_line(curve, key, x, y, "thin") for curve in curves]
        middle = [
            {"scale": s, key: median(p[key] for c in curves for p in c if p["scale"] == s)}
            for s in scales
        ]
        parts.append(_line(middle, key, x, y, "thick"))
        for point in middle:
            at = point["scale"]
            parts.append(f'<circle class="dot" cx="{x(at):.1f}" cy="{y(point[key]):.1f}" r="4"/>')
            parts.append(text(x(at) - 12, top + height + 22, f"{at:g}", "small"))
            fluent = [p["fluent"] for c in curves for p in c if p["scale"] == at]
            parts.append(
                text(x(at) - 12, top + height + 42, f"{sum(fluent)}/{len(fluent)}", "small")
            )
        parts.append(text(left - 46, top + height + 22, "scale", "small"))
        parts.append(text(left - 46, top + height + 42, "fluent", "small"))
    note = (
        f"{len(curves)} directions of SmolLM2-135M, tuning questions; thick: median; 1 is what the prefix does; "
        "cut off at −1 and 2"
    )
    parts.append(text(24, 350, note, "small"))
    return svg(960, 366, "Gap closed and concept expressed, by scale", parts)


def demo_table(examples: Iterable[Mapping[str, Any]]) -> str:
    """Returns every row that the demo shows, as Markdown.

    Args:
        examples: Rows of ``demo-answers.json``.
    """
    rows = [
        [
            f"{_plain(e['question'])}<br><br>`{e['direction']}`<br>“{_plain(e['prefix'])}”",
            *(_plain(e[way]) for way in ("plain", "prefixed")),
            f"{_plain(e['steered'])}<br><br>dose {e['dose']:.2f}; closes {e['gap_closed']:.0%} of the gap"
            + ("" if e["steers"] else "; found not to steer"),
        ]
        for e in examples
    ]
    return markdown(["question and direction", "plain", "with the prefix", "steered"], rows)


def _examples() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = results("demo-answers")["examples"]
    return found


def _directions() -> list[dict[str, Any]]:
    manifest = json.loads((shipped_pack() / "steering_config.json").read_text())
    found: list[dict[str, Any]] = manifest["directions"]
    return found


DRAWN: Mapping[Path, Callable[[], str]] = {
    PICTURES / "demo.svg": lambda: demo_picture(_examples()),
    PICTURES / "strength.svg": lambda: strength_picture(_directions()),
    PICTURES / "probes.svg": lambda: probe_pictures.histograms(results("probes")),
    PICTURES / "scores.svg": lambda: probe_pictures.coloured(results("probes")["coloured"]),
}
TABLE = Block(DEMO_PAGE, "demo-answers", lambda: demo_table(_examples()))


def _line(
    points: Iterable[Mapping[str, Any]],
    key: str,
    x: Callable[[float], float],
    y: Callable[[float], float],
    kind: str,
) -> str:
    at = " ".join(f"{x(p['scale']):.1f},{y(p[key]):.1f}" for p in points)
    return f'<polyline class="{kind}" points="{at}"/>'


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    for character in "\\`*_|<>[]#":
        text = text.replace(character, f"\\{character}")
    return text


def stale() -> Iterator[Path]:
    """Yields the files that do not show what was measured."""
    for path, draw in DRAWN.items():
        if not path.exists() or path.read_text() != draw():
            yield path
    if TABLE.inside(DEMO_PAGE.read_text()) != TABLE.render().strip():
        yield DEMO_PAGE


def main() -> None:
    """Draws every picture and writes the table."""
    for path, draw in DRAWN.items():
        path.write_text(draw())
    TABLE.write()


if __name__ == "__main__":
    main()
