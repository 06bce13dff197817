"""The results of a sweep, as JSON, with tables in Markdown."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_steer.errors import EvaluationError
from vllm_steer.packs.pack import Prefix


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figures(_Record):
    """Figures of a set of answers.

    Attributes:
        steerability: Mean grade over concepts, 0 to 1; None where no answer was graded.
        low: Lower end of its 95 % interval over concepts; None with fewer than two, and where all are
            equal; see ``vllm_steer.offline.measures.intervals``.
        high: Upper end.
        gap_closed: Share of the gap closed, mean over the concepts that have one; None without any. The
            gap lies between how likely the prefixed model's own answers are after the plain prompt and
            after the prefixed one: 0 is no effect, 1 that of the prefix.
        gap_low: Lower end of its 95 % interval over concepts; of one concept alone over
            questions, None with fewer than three.
        gap_high: Upper end.
        perplexity: Geometric mean over answers of the perplexity under the unsteered model, given
            the question without prefix; None where every answer was empty.
        repetition: Mean share of an answer's word pairs that it has already used.
        answers: Number of answers.
        judge_errors: Answers among them that the judge failed to grade; they count in no grade.
    """

    steerability: float | None
    low: float | None
    high: float | None
    gap_closed: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    perplexity: float | None
    repetition: float
    answers: int
    judge_errors: int


class Bound(_Record):
    """The bound of fluency on answers to tuning questions, averaged over concepts.

    Each concept's bound goes by the prefixed model's answers to the same questions, or, where its
    prefix is unknown, by the unsteered model's.

    Attributes:
        repetition: Largest repetition.
        perplexity: Largest perplexity; None if all answers that it is based on were empty.
        prefixed: Number of concepts whose bound is based on the prefixed model's answers.
    """

    repetition: float
    perplexity: float | None
    prefixed: int


class Point(_Record):
    """A concept, or all concepts of a class, at one scale.

    Attributes:
        scale: ε.
        fluent: Whether the text counts as fluent, compared with other answers to the same questions.
        figures: Its figures.
    """

    scale: float
    fluent: bool
    figures: Figures


class ConceptResult(_Record):
    """One concept; measured on held-out questions.

    Attributes:
        name: Name of the direction.
        scale: Its own scale, chosen on tuning questions.
        fluent: Whether its answers to them are fluent at it; otherwise no scale was, and this is the
            weakest.
        single: At the one scale of its class.
        own: At its own scale.
        unsteered: Without steering: the floor.
        prefixed: After its prefix, without steering: the ceiling; None where the prefix is unknown.
        tuning: Every scale on tuning questions.
        heldout: Every scale on held-out questions.
    """

    name: str
    scale: float
    fluent: bool
    single: Figures
    own: Figures
    unsteered: Figures
    prefixed: Figures | None
    tuning: list[Point]
    heldout: list[Point]


class ClassResult(_Record):
    """One class, or all classes together; measured on held-out questions.

    Attributes:
        name: Name of the class.
        scale: The one scale for all concepts, chosen on tuning questions; None for all classes
            together, where each has its own.
        fluent: Whether the answers to them are fluent at it; otherwise no scale was, and this is the
            weakest. None for all classes together.
        bound: What counts as fluent there; likewise.
        concepts: Each concept.
        single: At the one scale.
        own: Each concept at its own scale.
        oracle: Each concept and question at the scale that turned out best for it, fluent or not: an
            upper bound that looks at the answers it reports.
        unsteered: Without steering: the floor.
        prefixed: After the concept's prefix, without steering: the ceiling, of the concepts whose prefix
            is known; None without any.
        tuning: Every scale on tuning questions.
        heldout: Every scale on held-out questions.
    """

    name: str
    scale: float | None
    fluent: bool | None
    bound: Bound | None
    concepts: list[ConceptResult]
    single: Figures
    own: Figures
    oracle: Figures
    unsteered: Figures
    prefixed: Figures | None
    tuning: list[Point]
    heldout: list[Point]


class SweepResult(_Record):
    """A whole sweep.

    Attributes:
        model: The model, as it was given; of a local path the last part.
        judge: Name of the judge.
        max_tokens: Longest answer.
        packs: Digest of each pack's tensors by name of the pack.
        prefixes: Prefix that each direction was compared with, by ``pack/direction``; missing if unknown.
        tuning_questions: Questions that scales were chosen on, by class.
        heldout_questions: Questions that are reported, by class.
        classes: A result per class, and one named ``all`` where there are several.
        judge_faults: The first few of the judge's errors.
    """

    model: str
    judge: str
    max_tokens: int
    packs: dict[str, str]
    prefixes: dict[str, Prefix]
    tuning_questions: dict[str, list[str]]
    heldout_questions: dict[str, list[str]]
    classes: list[ClassResult]
    judge_faults: list[str]


def read_result(file: Path) -> SweepResult:
    """Reads ``sweep.json``.

    Raises:
        EvaluationError: It cannot be read or is not a sweep's result; the message names the field.
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
