"""The results of a Fusion Steering run, as JSON and as a Markdown table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_steer.offline.files import write_atomically

JSON_FILE = "fusion.json"
MARKDOWN_FILE = "fusion.md"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Share(_Record):
    """A mean over questions, with its 95 % interval; no interval for one question, or where all are equal."""

    mean: float
    low: float | None
    high: float | None

    def cell(self) -> str:
        """Returns ``0.82 [0.71, 0.90]``."""
        ends = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.mean:.2f}{ends}"


class Figures(_Record):
    """Figures of one answer to each question.

    Attributes:
        right: Share of right answers.
        overlap: Share of the gold answer's words in the answer.
        perplexity: Geometric mean under the unsteered model, of answers that are not empty.
    """

    right: Share
    overlap: Share
    perplexity: float | None


class Chosen(_Record):
    """The answer to one question.

    Attributes:
        question: The user's text.
        gold: The gold answer.
        answer: The answer.
        right: Whether it is right.
        overlap: Share of the gold answer's words in it.
        perplexity: Under the unsteered model.
        scales: Scale of each segment; None for an unsteered answer.
        steering: The request's steering that gives it.
    """

    question: str
    gold: str
    answer: str
    right: bool
    overlap: float
    perplexity: float | None
    scales: list[float] | None
    steering: dict[str, Any] | None


class Arm(_Record):
    """One way to steer.

    Attributes:
        figures: At the best trial of each question, or at the scales of other questions.
        by_trials: The same for a search of 1, 2, ... trials; empty where the scales are others'.
        answers_per_question: Steered answers that were generated for one question.
        seconds: Duration of the search.
        chosen: The answers.
    """

    figures: Figures
    by_trials: list[Figures]
    answers_per_question: float
    seconds: float
    chosen: list[Chosen]


class FusionResult(_Record):
    """A whole run.

    Attributes:
        model: The model, as it was given; of a local path the last part.
        pack: Digest of the vectors.
        max_tokens: Longest answer.
        trials: Trials of each search.
        scales: Ends of the range of α, and of γ.
        seed: Seed of the samplers.
        questions: Questions that were given.
        wrong: Those of them that the model gets wrong unsteered, on which all else is measured.
        tuning_questions: Questions, all others, that common scales were searched on.
        unsteered: The unsteered answers to the wrong ones.
        arms: Results by arm.
    """

    model: str
    pack: str
    max_tokens: int
    trials: int
    scales: tuple[float, float]
    seed: int
    questions: int
    wrong: int
    tuning_questions: int
    unsteered: Figures
    arms: dict[str, Arm]


def write_result(folder: Path, result: FusionResult) -> None:
    """Writes ``fusion.md``, then ``fusion.json``, each atomically."""
    write_atomically(folder / MARKDOWN_FILE, markdown(result))
    write_atomically(folder / JSON_FILE, result.model_dump_json(indent=1) + "\n")


def markdown(result: FusionResult) -> str:
    """Returns the table of a run."""
    low, high = result.scales
    lines = [
        f"Model {result.model}, {result.wrong} of {result.questions} questions that it gets wrong "
        f"unsteered, α and γ from {low:g} to {high:g} each, greedy answers of at most {result.max_tokens} "
        f"tokens. Scales are searched with each question's gold answer; 95 % intervals over "
        f"questions.",
        "",
        "| | right | overlap | perplexity | answers searched per question |",
        "|---|---|---|---|---|",
        _row("unsteered", result.unsteered, 0.0),
    ]
    lines += [
        _row(name, arm.figures, arm.answers_per_question) for name, arm in result.arms.items()
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, figures: Figures, answers: float) -> str:
    cells = (name, figures.right.cell(), figures.overlap.cell(), perplexity_cell(figures))
    return f"| {' | '.join(cells)} | {answers:g} |"


def perplexity_cell(figures: Figures) -> str:
    """Returns the perplexity, or a dash where every answer was empty."""
    return "–" if figures.perplexity is None else f"{figures.perplexity:.3g}"
