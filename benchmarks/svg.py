"""Parts of the documentation's pictures: SVG that carries its own colours and loads nothing."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
.page { fill: #ffffff; stroke: #d0d7de; }
.card { fill: #f6f8fa; } .steered { fill: #e9e4fb; }
text { font: 14px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif; fill: #1f2328; }
.small { font-size: 12px; fill: #59636e; } .bold { font-weight: 600; }
.axis { stroke: #8c959f; fill: none; } .grid { stroke: #d8dee4; fill: none; }
.thin { stroke: #8250df; stroke-opacity: 0.28; fill: none; }
.thick { stroke: #6639ba; stroke-width: 3; fill: none; } .dot { fill: #6639ba; }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #3d444d; } .card { fill: #161b22; } .steered { fill: #2b2148; }
text { fill: #e6edf3; } .small { fill: #9198a1; }
.axis { stroke: #656c76; } .grid { stroke: #262c36; }
.thin { stroke: #ab7df8; } .thick { stroke: #c297ff; } .dot { fill: #c297ff; }
}
"""


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Returns a picture on a card of its own, with the colours of light and dark pages.

    Args:
        width: Pixels.
        height: Pixels.
        title: What it shows, for those who do not see it.
        parts: Elements.
    """
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    page = f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>'
    return "\n".join(
        [
            head,
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            page,
            *parts,
            "</svg>",
            "",
        ]
    )


def text(x: float, y: float, text: str, kind: str = "") -> str:
    """Returns a line of text, its baseline at ``y``; ``kind`` is a class of the style."""
    shown = f' class="{kind}"' if kind else ""
    return f'<text{shown} x="{x:g}" y="{y:g}">{escape(text)}</text>'


def lines(x: float, y: float, lines: Iterable[str], kind: str = "", step: int = 20) -> list[str]:
    """Returns lines of text one below the other, ``step`` pixels apart."""
    return [text(x, y + step * number, line, kind) for number, line in enumerate(lines)]


def card(x: int, y: int, width: int, height: int, kind: str) -> str:
    """Returns a rectangle with round corners."""
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>'
