"""CLaS-Bench, arXiv 2601.08331: questions in one language, steered towards answers in another.

*Forcing* is the share of answers in the target language, *relevance* the mean of the judge's ratings from 0 to 2, over
2, which do not ask about the language; their harmonic mean is the steering score, for every target, every source, and
over all. As in the authors' code, the steering from a source to a target is the target's direction minus the source's,
at length 1 times a strength, at one block; every language is asked in every language, its own without steering;
answers are greedy, of at most 1024 tokens.

It departs in these. The strength and the block are chosen on one half of the questions and reported on the other,
where the authors choose and report on all. Relevance of an empty answer is 0 without the judge. The judge's question
asks the same in the project's words; another can be given. Languages are told by py3langid or a user's script, where
the authors take fastText's model. Answers that are not rated enter no mean and are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.bench.capability import Capability, CapabilityTexts, capability
from vllm_steer.offline.bench.figures import harmonic, shown
from vllm_steer.offline.bench.languages import Identifier
from vllm_steer.offline.bench.ratings import HIGHEST, Rated, Rater, Rating
from vllm_steer.offline.bench.steers import Ask, Part, Said, Steer, answers, direction_of
from vllm_steer.offline.engine.tokens import TokenEngine
from vllm_steer.offline.models.loading import public_name
from vllm_steer.packs.pack import SteeringPack

FIELDS: Mapping[str, Sequence[str]] = {"relevance": ("question", "response")}
"""The one question, and what its text must hold."""
QUESTIONS: Mapping[str, str] = {
    "relevance": (
        "A question was asked, and a model that was made to answer in a certain language answered it. Do not judge "
        "which language "
        "the answer is in, only its content: is it about the question, and is it coherent? Rate 0 if it has nothing "
        "to do with "
        "the question, or is gibberish or a loop; 1 if it is partly related, incomplete or of little use; 2 if it "
        "clearly answers "
        "the question in coherent text.\n\n<question>\n{question}\n</question>\n\n<answer>\n{response}\n</answer>"
    )
}
"""What the judge is asked where no other question is given."""
Towards = Literal["difference", "target"]


@dataclass(frozen=True)
class ClasSettings:
    """How it is run.

    Attributes:
        strengths: Lengths of what is added, or scales of ``target``; distinct, none of them 0.
        layers: Blocks to try, one at a time; with ``target`` None is each direction's own layers.
        towards: The target's direction minus the source's, at length 1; or the target's alone, as it is in the pack.
        max_tokens: Longest answer.
    """

    strengths: tuple[float, ...]
    layers: tuple[int, ...] | None = None
    towards: Towards = "difference"
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        values = self.strengths
        if not values or 0.0 in values or len(set(values)) != len(values):
            raise EvaluationError(f"strengths {list(values)} must be distinct and none of them 0")
        if self.towards == "difference" and not self.layers:
            raise EvaluationError(
                "layers are needed: a difference has length 1 at one block at a time"
            )
        if self.max_tokens < 1:
            raise EvaluationError("max_tokens must be at least 1")


class Clas(BaseModel):
    """Figures of some answers.

    Attributes:
        forcing: Share in the target language, 0 to 1.
        relevance: Mean rating over 2; None where none is rated.
        score: Their harmonic mean; None where none is rated.
        answers: Number of answers.
        unrated: Number of those that are not rated.
    """

    model_config = ConfigDict(frozen=True)

    forcing: float
    relevance: float | None
    score: float | None
    answers: int
    unrated: int


class Strength(BaseModel):
    """A strength at a block.

    Attributes:
        strength: The strength.
        layer: The block; None for the directions' own layers.
        choosing: On the questions that it is chosen on.
        reported: On the others.
        targets: Reported figures by target language.
        sources: Reported figures by source language.
        capability: Mean capability over the pairs of languages; None where nothing was given to measure it on.
    """

    model_config = ConfigDict(frozen=True)

    strength: float
    layer: int | None
    choosing: Clas
    reported: Clas
    targets: dict[str, Clas]
    sources: dict[str, Clas]
    capability: Capability | None


class ClasResult(BaseModel):
    """A run.

    Attributes:
        model: The model.
        judge: The judge.
        identifier: What tells languages.
        packs: Digest of the vectors by pack.
        chosen: The strength with the highest score on the questions that it is chosen on.
        strengths: All of them.
        unsteered: Reported figures without steering.
        capability_unsteered: Capability of the unsteered model.
        errors: The judge's first errors.
        settings: How it was run.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    judge: str
    identifier: str
    packs: dict[str, str]
    chosen: Strength
    strengths: list[Strength]
    unsteered: Clas
    capability_unsteered: Capability | None
    errors: list[str]
    settings: ClasSettings


@dataclass(frozen=True)
class _Answer:
    """One answer with its figures."""

    source: str
    target: str
    question: int
    forced: bool
    rating: Rating


def run_clas(
    engine: TokenEngine,
    pack: SteeringPack,
    questions: Mapping[str, Sequence[str]],
    rater: Rater,
    identifier: Identifier,
    settings: ClasSettings,
    texts: CapabilityTexts,
) -> ClasResult:
    """Runs the benchmark.

    Args:
        engine: The engine, with the pack.
        pack: The pack, whose directions are named by languages.
        questions: The same questions by language.
        rater: The judge.
        identifier: What tells languages.
        settings: How it is run.
        texts: What capability is measured on; may be empty.

    Raises:
        EvaluationError: A language has no direction, or not at a block; the engine or the judge fails; or nothing is rated.
    """
    layers: Sequence[int | None] = settings.layers or (None,)
    cells = list(product(layers, settings.strengths))
    pairs = list(product(questions, questions))
    steers = {
        (cell, pair): _steer(pack, *pair, *cell, settings.towards)
        for cell, pair in product(cells, pairs)
    }
    unsteered = [Ask(q) for source in questions for q in questions[source]]
    steered = [(c, p, Ask(q, steers[c, p])) for c, p in steers for q in questions[p[0]]]
    asks = [*unsteered, *(ask for *_, ask in steered)]
    said = answers(engine, asks, settings.max_tokens, None)
    told = identifier.languages([one.text for one in said])
    ratings = _ratings(rater, asks, said)
    errors = list(dict.fromkeys(r.error for r in ratings if r.error))
    count = len(next(iter(questions.values())))
    # The unsteered answers occur once, for all targets.
    plain = [
        _Answer(source, target, at % count, told[at] == target, ratings[at])
        for target in questions
        for at, source in enumerate(s for s in questions for _ in range(count))
    ]
    by_cell: dict[tuple[int | None, float], list[_Answer]] = {cell: [] for cell in cells}
    for at, (cell, (source, target), _) in enumerate(steered):
        place = len(unsteered) + at
        answer = _Answer(source, target, at % count, told[place] == target, ratings[place])
        by_cell[cell].append(answer)
    able = _capability(engine, texts, cells, pairs, steers)
    found = [_strength(cell, by_cell[cell], count, able.get(cell)) for cell in cells]
    known = [each for each in found if each.choosing.score is not None]
    if not known:
        raise EvaluationError(
            f"no answer was rated; the first error of the judge: {errors[0] if errors else 'none'}"
        )
    return ClasResult(
        model=public_name(engine.model),
        judge=rater.name,
        identifier=identifier.name,
        packs={pack.name: pack.manifest.tensors.sha256},
        chosen=max(known, key=lambda each: each.choosing.score or 0.0),
        strengths=found,
        unsteered=_figures([a for a in plain if not _chooses(a, count)]),
        capability_unsteered=able.get(None),
        errors=errors[:5],
        settings=settings,
    )


def _steer(
    pack: SteeringPack,
    source: str,
    target: str,
    layer: int | None,
    strength: float,
    towards: Towards,
) -> Steer:
    records = [direction_of(pack, name) for name in (target, source)]
    layers = None if layer is None else (layer,)
    for name, record in zip((target, source), records, strict=True):
        if layer is not None and layer not in record.layers:
            raise EvaluationError(
                f"direction {name!r} has no vector at layer {layer}; it has {list(record.layers)}"
            )
    if source == target:
        return Steer()
    names = [f"{pack.name}/{name}" for name in (target, source)]
    if towards == "target":
        return Steer((Part(names[0], records[0], strength * records[0].default_scale, layers),))
    assert layer is not None
    rows = [
        pack.vectors[name][list(record.layers).index(layer)].astype(np.float64)
        for name, record in zip((target, source), records, strict=True)
    ]
    length = float(np.linalg.norm(rows[0] - rows[1]))
    if not length:
        raise EvaluationError(
            f"directions {target!r} and {source!r} are equal at layer {layer}, so that nothing lies between them"
        )
    scales = (strength / length, -strength / length)
    return Steer(tuple(Part(*part, layers) for part in zip(names, records, scales, strict=True)))


def _ratings(rater: Rater, asks: Sequence[Ask], said: Sequence[Said]) -> list[Rating]:
    rows = list(zip(asks, said, strict=True))
    given = iter(
        rater.rate(
            [
                Rated("relevance", {"question": ask.question, "response": one.text})
                for ask, one in rows
                if one.text.strip()
            ]
        )
    )
    return [next(given) if one.text.strip() else Rating(0.0) for _, one in rows]


def _chooses(answer: _Answer, count: int) -> bool:
    """Whether an answer is one that the strength is chosen on: those to the first half of the questions."""
    return answer.question < count - count // 2


def _figures(rows: Sequence[_Answer]) -> Clas:
    forcing = float(np.mean([row.forced for row in rows]))
    rated = [row.rating.value for row in rows if row.rating.value is not None]
    relevance = float(np.mean(rated)) / HIGHEST if rated else None
    return Clas(
        forcing=forcing,
        relevance=relevance,
        score=None if relevance is None else harmonic([forcing, relevance]),
        answers=len(rows),
        unrated=len(rows) - len(rated),
    )


def _strength(
    cell: tuple[int | None, float],
    rows: Sequence[_Answer],
    count: int,
    able: Capability | None,
) -> Strength:
    reported = [row for row in rows if not _chooses(row, count)]
    languages = list(dict.fromkeys(row.target for row in rows))
    return Strength(
        layer=cell[0],
        strength=cell[1],
        choosing=_figures([row for row in rows if _chooses(row, count)]),
        reported=_figures(reported),
        targets={n: _figures([r for r in reported if r.target == n]) for n in languages},
        sources={n: _figures([r for r in reported if r.source == n]) for n in languages},
        capability=able,
    )


def _capability(
    engine: TokenEngine,
    texts: CapabilityTexts,
    cells: Sequence[tuple[int | None, float]],
    pairs: Sequence[tuple[str, str]],
    steers: Mapping[tuple[tuple[int | None, float], tuple[str, str]], Steer],
) -> dict[tuple[int | None, float] | None, Capability]:
    """Mean capability over the pairs of languages at every strength, and without steering under None."""
    if not texts:
        return {}
    acting = [pair for pair in pairs if pair[0] != pair[1]]
    plain, *measured = capability(
        engine, texts, [Steer(), *(steers[cell, pair] for cell in cells for pair in acting)]
    )
    found: dict[tuple[int | None, float] | None, Capability] = {None: plain}
    for at, cell in enumerate(cells):
        own = measured[at * len(acting) : (at + 1) * len(acting)]
        if own:
            found[cell] = Capability(
                perplexity=_mean([each.perplexity for each in own]),
                accuracy=_mean([each.accuracy for each in own]),
            )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def table(result: ClasResult) -> str:
    """Returns a run as Markdown: every strength, and the chosen one by language."""
    best = result.chosen
    lines = [
        f"# CLaS-Bench: {result.model}",
        "",
        f"Judge: {result.judge}. Languages: {result.identifier}. Steering score {shown(best.reported.score)} at strength "
        f"{best.strength:g}, layer {_layer(best.layer)}.",
        "",
        "| layer | strength | forcing | relevance | score | unrated | neutral perplexity | multiple choice |",
        "|---|---|---|---|---|---|---|---|",
        _row("–", "0", result.unsteered, result.capability_unsteered),
    ]
    lines += [
        _row(_layer(each.layer), f"{each.strength:g}", each.reported, each.capability)
        for each in result.strengths
    ]
    for title, parts in (("target", best.targets), ("source", best.sources)):
        lines += ["", f"| {title} | forcing | relevance | score |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {shown(one.forcing)} | {shown(one.relevance)} | {shown(one.score)} |"
            for name, one in parts.items()
        ]
    if result.errors:
        lines += ["", f"The judge's first error: {result.errors[0]}"]
    return "\n".join(lines) + "\n"


def _layer(layer: int | None) -> str:
    return "own" if layer is None else str(layer)


def _row(layer: str, strength: str, one: Clas, able: Capability | None) -> str:
    figures = [shown(one.forcing), shown(one.relevance), shown(one.score), str(one.unrated)]
    ability = able or Capability()
    return f"| {layer} | {strength} | {' | '.join(figures)} | {shown(ability.perplexity, 2)} | {shown(ability.accuracy)} |"
