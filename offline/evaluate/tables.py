"""The results of a sweep as Markdown tables, and both of its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_steer.offline.evaluate.results import (
    ClassResult,
    ConceptResult,
    Figures,
    Point,
    SweepResult,
)
from vllm_steer.offline.files import write_atomically
from vllm_steer.offline.measures.fluency import PERPLEXITY, REPETITION, UNKNOWN_PERPLEXITY
from vllm_steer.offline.measures.intervals import CAVEAT

JSON_FILE = "sweep.json"
MARKDOWN_FILE = "sweep.md"
_FLUENT = (
    f"Each ε is chosen on tuning questions among those whose answers are fluent: at most {REPETITION:g} more "
    f"of their word pairs repeat than in the prefixed model's answers to the same questions, at no more than "
    f"{PERPLEXITY:g} times their perplexity; where no prefix is known, than in the unsteered model's answers "
    f"and {UNKNOWN_PERPLEXITY:g} times. Where no ε is fluent, the weakest stands."
)


def write_result(folder: Path, result: SweepResult) -> None:
    """Writes ``sweep.md``, then ``sweep.json``, each atomically."""
    write_atomically(folder / MARKDOWN_FILE, markdown(result))
    write_atomically(folder / JSON_FILE, result.model_dump_json(indent=2) + "\n")


def markdown(result: SweepResult) -> str:
    """Returns the tables of a sweep."""
    lines = [
        f"Model {result.model}, judge `{result.judge}`, answers of at most {result.max_tokens} tokens, "
        f"greedy. Steerability is the mean grade of answers to held-out questions, with a 95 % "
        f"interval over concepts; in brackets the perplexity of the answers under the unsteered model. "
        f"The floor is the unsteered model, the ceiling the model with the concept's prefix. Gap closed: "
        f"how far steering makes the prefixed model's own answers as likely as the prefix does. {CAVEAT}.",
        "",
        _FLUENT,
        "",
        _row(
            "class", "concepts", "ε", "unsteered (floor)", "one ε", "gap closed", "one ε per concept",
            "gap closed", "oracle-best ε", "prefixed (ceiling)",
        ),
        "|---" * 10 + "|",
        *(_class_row(found) for found in result.classes),
    ]  # fmt: skip
    for found in result.classes:
        if found.heldout:
            lines += ["", f"{found.name}, held-out questions{_bound(found)}:", ""]
            lines += _curve(found.heldout)
            lines += ["", f"{found.name}, each concept at its own ε:", ""]
            lines += _concepts(found.concepts)
    errors = sum(
        point.figures.judge_errors
        for found in result.classes
        for point in [*found.tuning, *found.heldout]
    )
    if errors:
        lines += ["", f"The judge failed on {errors} answers, which count in no grade. Among them:"]
        lines += [f"- {fault}" for fault in result.judge_faults]
    return "\n".join(lines) + "\n"


def figure_cell(figures: Figures | None) -> str:
    """Returns ``0.82 [0.71, 0.90] (12.3)``."""
    if figures is None:
        return "–"
    cell = _interval(figures.steerability, figures.low, figures.high)
    if figures.perplexity is not None:
        cell += f" ({figures.perplexity:.3g})"
    return cell + (f", {figures.judge_errors} ungraded" if figures.judge_errors else "")


def _class_row(found: ClassResult) -> str:
    return _row(
        found.name,
        str(len(found.concepts)),
        "–" if found.scale is None else _scale(found.scale, found.fluent),
        figure_cell(found.unsteered),
        figure_cell(found.single),
        _gap(found.single),
        figure_cell(found.own),
        _gap(found.own),
        figure_cell(found.oracle),
        figure_cell(found.prefixed),
    )


def _bound(found: ClassResult) -> str:
    """The bound under which the scale was chosen."""
    if found.bound is None or found.bound.perplexity is None:
        return ""
    return (
        f" (fluent on tuning questions: repetition at most {found.bound.repetition:.2f}, perplexity at "
        f"most {found.bound.perplexity:.3g})"
    )


def _curve(points: Sequence[Point]) -> list[str]:
    lines = [
        _row("ε", "steerability", "gap closed", "perplexity", "repetition", "fluent"),
        "|---" * 6 + "|",
    ]
    for point in points:
        figures = point.figures
        cells = (
            f"{point.scale:g}",
            figure_cell(figures.model_copy(update={"perplexity": None})),
            _gap(figures),
            _perplexity(figures),
            f"{figures.repetition:.2f}",
            "yes" if point.fluent else "no",
        )
        lines.append(_row(*cells))
    return lines


def _concepts(concepts: Sequence[ConceptResult]) -> list[str]:
    lines = [
        _row(
            "concept", "ε", "unsteered", "steered", "prefixed", "gap closed", "perplexity", "repetition"
        ),
        "|---" * 8 + "|",
    ]  # fmt: skip
    for found in concepts:
        cells = (
            found.name.replace("|", r"\|"),
            _scale(found.scale, found.fluent),
            _number(found.unsteered.steerability),
            _number(found.own.steerability),
            "–" if found.prefixed is None else _number(found.prefixed.steerability),
            _gap(found.own),
            _perplexity(found.own),
            f"{found.own.repetition:.2f}",
        )
        lines.append(_row(*cells))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _scale(scale: float, fluent: bool | None) -> str:
    return f"{scale:g}" if fluent else f"{scale:g}, not fluent"


def _gap(figures: Figures) -> str:
    return _interval(figures.gap_closed, figures.gap_low, figures.gap_high)


def _perplexity(figures: Figures) -> str:
    return "–" if figures.perplexity is None else f"{figures.perplexity:.3g}"


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return _number(value) + ends


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
