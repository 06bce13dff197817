"""AxBench's steering evaluation, arXiv 2501.17148: every concept at every factor on sampled instructions.

Each answer is rated from 0 to 2 for its concept, for its instruction and for its fluency; the harmonic mean of the
three is its score. A concept's factor is chosen by the mean score on the first half of its instructions, and what is
reported is the mean on the other half. As in the authors' code: the grid of factors, 10 instructions sampled by the
concept's id, answers of at most 128 tokens at temperature 1, and the first of equal factors.

It departs in these. ε is the factor times the direction's default scale, which for a pack of ``reft_r1`` is the
paper's largest detection. Answers that are not rated enter no mean and are counted, where the authors' code takes 0.
Empty answers are 0 in all three without being shown to the judge. The judge's questions ask the same in the project's
words; those of the authors can be given. The unsteered model is rated as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.bench.axbench_data import Concept, sampled_instructions
from vllm_steer.offline.bench.capability import Capability, CapabilityTexts, capability
from vllm_steer.offline.bench.figures import Mean, harmonic, shown
from vllm_steer.offline.bench.ratings import HIGHEST, Rated, Rater, Rating
from vllm_steer.offline.bench.steers import Ask, Part, Said, Steer, answers
from vllm_steer.offline.engine.tokens import Sampling, TokenEngine
from vllm_steer.offline.models.loading import public_name
from vllm_steer.packs.pack import SteeringPack

FACTORS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0)
"""The authors' grid."""
FIELDS: Mapping[str, Sequence[str]] = {
    "concept": ("concept", "sentence"),
    "instruct": ("instruction", "sentence"),
    "fluency": ("sentence",),
}
"""The three questions, and what the text of each must hold."""
QUESTIONS: Mapping[str, str] = {
    "concept": (
        "How much of a concept is in a text? Grammar and sense do not matter. Rate 0 if the concept does not occur, 1 if it "
        "occurs a little or is forced in, 2 if it is a full and natural part of the text.\n\n"
        "<concept>\n{concept}\n</concept>\n\n<text>\n{sentence}\n</text>"
    ),
    "instruct": (
        "Is a text about what an instruction asks for? Only its topic matters, not grammar, sense or how much it "
        "says. Rate 0 "
        "if it has nothing to do with the instruction, 1 if it is loosely related, 2 if it is clearly about it.\n\n"
        "<instruction>\n{instruction}\n</instruction>\n\n<text>\n{sentence}\n</text>"
    ),
    "fluency": (
        "How fluent is a text? What it is about does not matter, nor whether it is complete. Rate 0 if it cannot be "
        "understood "
        "or repeats itself, 1 if it is readable with clear errors or awkward turns, 2 if it is fluent and almost without "
        "fault.\n\n<text>\n{sentence}\n</text>"
    ),
}
"""What the judge is asked where no other questions are given."""
_PARTS = tuple(FIELDS)


@dataclass(frozen=True)
class AxBenchSettings:
    """How it is run.

    Attributes:
        factors: The grid, distinct and none of them 0.
        instructions: Instructions of each concept, at least two.
        max_tokens: Longest answer.
        temperature: Of the sampling; 0 for greedy answers.
        seed: Seed of the sampling.
        layers: Layers to steer; None for each direction's own.
    """

    factors: tuple[float, ...] = FACTORS
    instructions: int = 10
    max_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.factors or 0.0 in self.factors or len(set(self.factors)) != len(self.factors):
            raise EvaluationError(
                f"factors {list(self.factors)} must be distinct and none of them 0"
            )
        if self.instructions < 2:
            raise EvaluationError(
                "at least two instructions are needed: one to choose the factor on, one to report"
            )
        if self.max_tokens < 1:
            raise EvaluationError("max_tokens must be at least 1")

    @property
    def choosing(self) -> int:
        """Number of instructions that factors are chosen on; the larger half, as the authors round."""
        return self.instructions - round(self.instructions / 2)


class Scores(BaseModel):
    """Mean ratings of some answers.

    Attributes:
        score: Mean of the harmonic means, 0 to 2; None where no answer is rated.
        concept: Mean rating of the concept.
        instruct: Mean rating of the instruction.
        fluency: Mean rating of the fluency.
        rated: Number of answers with three ratings.
        unrated: Number of those without.
    """

    model_config = ConfigDict(frozen=True)

    score: float | None
    concept: float | None
    instruct: float | None
    fluency: float | None
    rated: int
    unrated: int


class FactorResult(BaseModel):
    """A concept at a factor.

    Attributes:
        factor: The factor.
        scale: ε.
        choosing: On the instructions that factors are chosen on.
        reported: On the others.
        perplexity: Geometric mean of the answers' perplexity under the unsteered model; None where all are empty.
        repetition: Mean share of repeated word pairs.
        capability: Capability at this strength; None where nothing was given to measure it on.
    """

    model_config = ConfigDict(frozen=True)

    factor: float
    scale: float
    choosing: Scores
    reported: Scores
    perplexity: float | None
    repetition: float
    capability: Capability | None


class ConceptResult(BaseModel):
    """A concept.

    Attributes:
        concept: Its words.
        direction: Its direction.
        factor: The factor that was chosen; None where no answer is rated.
        factors: What it did at each factor.
        unsteered: The unsteered model, on the reported instructions.
    """

    model_config = ConfigDict(frozen=True)

    concept: str
    direction: str
    factor: float | None
    factors: list[FactorResult]
    unsteered: Scores

    def chosen(self) -> FactorResult | None:
        """Returns the result at the chosen factor, if what is reported there is rated."""
        found = [r for r in self.factors if r.factor == self.factor]
        return found[0] if found and found[0].reported.score is not None else None


class AxBenchResult(BaseModel):
    """A run.

    Attributes:
        model: The model.
        judge: The judge.
        packs: Digest of the vectors by pack.
        score: Mean score over concepts, each at its factor, on the reported instructions.
        unsteered: Likewise of the unsteered model; None where none of its answers is rated.
        capability_unsteered: Capability of the unsteered model.
        failed: Concepts of which too little was rated.
        errors: The judge's first errors.
        concepts: What each did.
        settings: How it was run.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    judge: str
    packs: dict[str, str]
    score: Mean
    unsteered: Mean | None
    capability_unsteered: Capability | None
    failed: list[str]
    errors: list[str]
    concepts: list[ConceptResult]
    settings: AxBenchSettings


def run_axbench(
    engine: TokenEngine,
    pack: SteeringPack,
    concepts: Mapping[str, Concept],
    instructions: Sequence[str],
    rater: Rater,
    settings: AxBenchSettings,
    texts: CapabilityTexts,
) -> AxBenchResult:
    """Runs the benchmark.

    Args:
        engine: The engine, with the pack.
        pack: The pack.
        concepts: The concept of each direction that is evaluated.
        instructions: What instructions are sampled from.
        rater: The judge.
        settings: How it is run.
        texts: What capability is measured on; may be empty.

    Raises:
        EvaluationError: The engine or the judge fails, or no concept is rated.
    """
    asked = {
        name: sampled_instructions(instructions, concept, settings.instructions)
        for name, concept in concepts.items()
    }
    # One factor after the other, the unsteered model first.
    grid = (0.0, *settings.factors)
    steers = {
        (name, factor): _steer(pack, name, factor, settings) for name in concepts for factor in grid
    }
    sampling = Sampling(settings.temperature) if settings.temperature else None
    asks = [
        Ask(question, steers[name, factor], settings.seed + at if sampling else None)
        for name in concepts
        for factor in grid
        for at, question in enumerate(asked[name])
    ]
    said = answers(engine, asks, settings.max_tokens, sampling)
    ratings = _ratings(rater, concepts, asks, said, settings.instructions * len(grid))
    able: Iterator[Capability | None] = iter([None] * len(steers))
    unsteered_ability = None
    if texts:
        unsteered_ability, *measured = capability(
            engine, texts, [Steer(), *(s for (_, f), s in steers.items() if f)]
        )
        able = iter(measured)
    size, found = settings.instructions, []
    for at, (name, concept) in enumerate(concepts.items()):
        start = at * len(grid) * size
        rows = [slice(start + n * size, start + (n + 1) * size) for n in range(len(grid))]
        plain = _scores(ratings[rows[0]][settings.choosing :])
        results = [
            _factor(
                factor,
                steers[name, factor].parts[0].scale,
                said[row],
                ratings[row],
                settings.choosing,
                next(able),
            )
            for factor, row in zip(settings.factors, rows[1:], strict=True)
        ]
        found.append(
            ConceptResult(
                concept=concept.text,
                direction=f"{pack.name}/{name}",
                factor=_best(results),
                factors=results,
                unsteered=plain,
            )
        )
    return _result(engine, pack, rater, settings, found, ratings, unsteered_ability)


def _steer(pack: SteeringPack, name: str, factor: float, settings: AxBenchSettings) -> Steer:
    if not factor:
        return Steer()
    record = pack.directions[name]
    scale = factor * record.default_scale
    return Steer((Part(f"{pack.name}/{name}", record, scale, settings.layers),))


_Row = tuple[Rating, ...]


def _ratings(
    rater: Rater,
    concepts: Mapping[str, Concept],
    asks: Sequence[Ask],
    said: Sequence[Said],
    per_concept: int,
) -> list[_Row]:
    """The three ratings of every answer; an empty one is not shown to the judge."""
    words = [concept.text for concept in concepts.values() for _ in range(per_concept)]
    rows = list(zip(words, asks, said, strict=True))
    given = iter(
        rater.rate(
            [
                Rated(part, {"concept": word, "instruction": ask.question, "sentence": one.text})
                for word, ask, one in rows
                if one.text.strip()
                for part in _PARTS
            ]
        )
    )
    nothing = (Rating(0.0),) * len(_PARTS)
    return [tuple(next(given) for _ in _PARTS) if one.text.strip() else nothing for *_, one in rows]


def _scores(rows: Sequence[_Row]) -> Scores:
    rated = [[r.value for r in row if r.value is not None] for row in rows]
    whole = [values for values in rated if len(values) == len(_PARTS)]
    means: NDArray[np.float64] = np.array(whole, dtype=np.float64).reshape(-1, len(_PARTS))
    parts = dict(zip(_PARTS, means.mean(axis=0).tolist() if whole else [None] * 3, strict=True))
    return Scores(
        score=float(np.mean([harmonic(values) for values in whole])) if whole else None,
        **parts,
        rated=len(whole),
        unrated=len(rows) - len(whole),
    )


def _factor(
    factor: float,
    scale: float,
    said: Sequence[Said],
    ratings: Sequence[_Row],
    choosing: int,
    able: Capability | None,
) -> FactorResult:
    surprise = [np.log(one.perplexity) for one in said if one.perplexity is not None]
    return FactorResult(
        factor=factor,
        scale=scale,
        choosing=_scores(ratings[:choosing]),
        reported=_scores(ratings[choosing:]),
        perplexity=float(np.exp(np.mean(surprise))) if surprise else None,
        repetition=float(np.mean([one.repetition for one in said])),
        capability=able,
    )


def _best(results: Sequence[FactorResult]) -> float | None:
    """The factor with the highest score on the instructions that it is chosen on, the first of equal ones."""
    known = [(r.choosing.score, r.factor) for r in results if r.choosing.score is not None]
    if not known:
        return None
    highest = max(score for score, _ in known)
    return next(factor for score, factor in known if score == highest)


def _result(
    engine: TokenEngine,
    pack: SteeringPack,
    rater: Rater,
    settings: AxBenchSettings,
    found: list[ConceptResult],
    ratings: Sequence[_Row],
    able: Capability | None,
) -> AxBenchResult:
    errors = list(dict.fromkeys(r.error for row in ratings for r in row if r.error))
    chosen = [each.chosen() for each in found]
    scores = [each.reported.score for each in chosen if each and each.reported.score is not None]
    plain = [each.unsteered.score for each in found if each.unsteered.score is not None]
    if not scores:
        raise EvaluationError(
            f"no concept was rated on both halves of its instructions; the first error of the judge: "
            f"{errors[0] if errors else 'none'}"
        )
    return AxBenchResult(
        model=public_name(engine.model),
        judge=rater.name,
        packs={pack.name: pack.manifest.tensors.sha256},
        score=Mean.of(scores, (0.0, HIGHEST)),
        unsteered=Mean.of(plain, (0.0, HIGHEST)) if plain else None,
        capability_unsteered=able,
        failed=[each.concept for each, best in zip(found, chosen, strict=True) if best is None],
        errors=errors[:5],
        concepts=found,
        settings=settings,
    )


def table(result: AxBenchResult) -> str:
    """Returns a run as Markdown: the score, every concept at its factor, and the means at every factor."""
    lines = [
        f"# AxBench: {result.model}",
        "",
        f"Judge: {result.judge}. Score {result.score} of 2 over {len(result.concepts) - len(result.failed)} concepts"
        + (f", unsteered {result.unsteered}." if result.unsteered else "."),
        "",
        "| concept | direction | factor | score | concept | instruct | fluency | unsteered | unrated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in result.concepts:
        best = each.chosen()
        unrated = sum(r.choosing.unrated + r.reported.unrated for r in each.factors)
        figures = ["–"] * 5
        if best is not None:
            own = best.reported
            figures = [
                f"{best.factor:g}",
                *(shown(v) for v in (own.score, own.concept, own.instruct, own.fluency)),
            ]
        row = [each.concept.replace("|", "\\|"), each.direction, *figures]
        lines.append(f"| {' | '.join([*row, shown(each.unsteered.score), str(unrated)])} |")
    lines += [
        "",
        "| factor | score | perplexity | repetition | neutral perplexity | multiple choice |",
        "|---|---|---|---|---|---|",
    ]
    plain = result.capability_unsteered
    if plain is not None:
        lines.append(
            f"| 0 | {shown(result.unsteered.value if result.unsteered else None)} | – | – | {shown(plain.perplexity, 2)} | "
            f"{shown(plain.accuracy)} |"
        )
    for at, factor in enumerate(result.settings.factors):
        lines.append(_factor_line(factor, [each.factors[at] for each in result.concepts]))
    if result.failed:
        lines += ["", f"Too little was rated of: {', '.join(result.failed)}."]
    if result.errors:
        lines += ["", f"The judge's first error: {result.errors[0]}"]
    return "\n".join(lines) + "\n"


def _factor_line(factor: float, rows: Sequence[FactorResult]) -> str:
    able = [row.capability for row in rows if row.capability is not None]
    figures = [
        _mean([row.reported.score for row in rows]),
        _mean([row.perplexity for row in rows]),
        _mean([row.repetition for row in rows]),
        _mean([each.perplexity for each in able]),
        _mean([each.accuracy for each in able]),
    ]
    return f"| {factor:g} | {' | '.join(shown(value) for value in figures)} |"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
