"""What a sweep found, as JSON and as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from offline.files import write_atomically
from vllm_steer.errors import EvaluationError

JSON_FILE = "sweep.json"
MARKDOWN_FILE = "sweep.md"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figures(_Record):
    """What a set of answers comes to.

    Attributes:
        steerability: Mean grade over concepts, 0 to 1; None where no answer was graded.
        low: Lower end of its 95 % bootstrap interval over concepts; None with fewer than two.
        high: Upper end.
        perplexity: Geometric mean over answers of the perplexity under the unsteered model, given
            the question without prefix; None where every answer was empty.
        repetition: Mean share of an answer's word pairs that it has already used.
        answers: Number of answers.
        judge_errors: Answers among them that the judge failed to grade; they count in no grade.
    """

    steerability: float | None
    low: float | None
    high: float | None
    perplexity: float | None
    repetition: float
    answers: int
    judge_errors: int


class Point(_Record):
    """All concepts of a class at one scale."""

    scale: float
    figures: Figures


class ClassResult(_Record):
    """One class, or all classes together; measured on held-out questions.

    Attributes:
        name: Name of the class.
        concepts: Names of the directions.
        scale: The one scale for all concepts, chosen on tuning questions; None for all classes
            together, where each has its own.
        concept_scales: Each concept's own scale, chosen on tuning questions.
        single: At the one scale.
        own: Each concept at its own scale.
        oracle: Each concept and question at the scale that turned out best for it: an upper bound
            that looks at the answers it reports.
        unsteered: Without steering.
        by_concept: Mean grade of each concept at the one scale, None where none was graded.
        tuning: Every scale on tuning questions.
        heldout: Every scale on held-out questions.
    """

    name: str
    concepts: list[str]
    scale: float | None
    concept_scales: dict[str, float]
    single: Figures
    own: Figures
    oracle: Figures
    unsteered: Figures
    by_concept: dict[str, float | None]
    tuning: list[Point]
    heldout: list[Point]


class SweepResult(_Record):
    """A whole sweep.

    Attributes:
        model: The model, as it was given; of a local path the last part.
        judge: Name of the judge.
        max_tokens: Longest answer.
        seed: Seed of the bootstrap.
        packs: Digest of each pack's tensors by name of the pack.
        tuning_questions: Questions that scales were chosen on, by class.
        heldout_questions: Questions that are reported, by class.
        classes: A result per class, and one named ``all`` where there are several.
        judge_faults: The first few of the judge's errors.
    """

    model: str
    judge: str
    max_tokens: int
    seed: int
    packs: dict[str, str]
    tuning_questions: dict[str, list[str]]
    heldout_questions: dict[str, list[str]]
    classes: list[ClassResult]
    judge_faults: list[str]


def read_result(file: Path) -> SweepResult:
    """Reads ``sweep.json``.

    Raises:
        EvaluationError: It cannot be read or is no sweep's result; the message names the field.
    """
    try:
        return SweepResult.model_validate_json(file.read_bytes())
    except OSError as error:
        raise EvaluationError(f"cannot read {file}: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "file"
        raise EvaluationError(
            f"{file} is not the JSON of vllm-steer sweep: {where}: {fault['msg']}"
        ) from error


def write_result(folder: Path, result: SweepResult) -> None:
    """Writes ``sweep.md``, then ``sweep.json``, each atomically."""
    write_atomically(folder / MARKDOWN_FILE, markdown(result))
    write_atomically(folder / JSON_FILE, result.model_dump_json(indent=2) + "\n")


def markdown(result: SweepResult) -> str:
    """Returns the tables of a sweep."""
    lines = [
        f"Model {result.model}, judge `{result.judge}`, answers of at most {result.max_tokens} tokens, "
        f"greedy. Steerability is the mean grade of answers to held-out questions, with a 95 % bootstrap "
        f"interval over concepts; in brackets the perplexity of the answers under the unsteered model.",
        "",
        "| class | concepts | ε | one ε, chosen on tuning questions | one ε per concept | oracle-best ε | unsteered |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in result.classes:
        scale = "–" if found.scale is None else f"{found.scale:g}"
        cells = (found.single, found.own, found.oracle, found.unsteered)
        lines.append(
            f"| {found.name} | {len(found.concepts)} | {scale} | "
            + " | ".join(figure_cell(figures) for figures in cells)
            + " |"
        )
    for found in result.classes:
        if found.heldout:
            lines += ["", f"{found.name}, held-out questions:", "", *_curve(found.heldout)]
    errors = sum(
        point.figures.judge_errors
        for found in result.classes
        for point in [*found.tuning, *found.heldout]
    )
    if errors:
        lines += ["", f"The judge failed on {errors} answers, which count in no grade. Among them:"]
        lines += [f"- {fault}" for fault in result.judge_faults]
    return "\n".join(lines) + "\n"


def figure_cell(figures: Figures) -> str:
    """Returns ``0.82 [0.71, 0.90] (12.3)``."""
    cell = _number(figures.steerability)
    if figures.low is not None and figures.high is not None:
        cell += f" [{figures.low:.2f}, {figures.high:.2f}]"
    if figures.perplexity is not None:
        cell += f" ({figures.perplexity:.3g})"
    return cell + (f", {figures.judge_errors} ungraded" if figures.judge_errors else "")


def _curve(points: Sequence[Point]) -> list[str]:
    lines = ["| ε | steerability | perplexity | repetition |", "|---|---|---|---|"]
    for point in points:
        figures = point.figures
        perplexity = "–" if figures.perplexity is None else f"{figures.perplexity:.3g}"
        graded = figures.model_copy(update={"perplexity": None})
        lines.append(
            f"| {point.scale:g} | {figure_cell(graded)} | {perplexity} | {figures.repetition:.2f} |"
        )
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
