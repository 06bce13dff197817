"""The measurements of a calibration, with all directions in the same batches.

Two shares say how much of the prefix's effect a direction reproduces. *Gap closed*: how likely the prefixed
model's answers become after the plain prompt; their words are given, so a direction with only the voice
closes it. *Expression*: how much likelier the direction's own answers are after the prefixed prompt than
after the plain one, divided by the same for the prefixed model's answers; the direction has to find the
words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_steer.offline.calibrate.grid import Subject
from vllm_steer.offline.engine.tokens import Asked, TokenEngine
from vllm_steer.offline.extract.answers import Example
from vllm_steer.offline.measures.fluency import Fluency, repetition
from vllm_steer.offline.measures.intervals import ratio_interval
from vllm_steer.offline.measures.shares import closed
from vllm_steer.packs.pack import CalibrationPoint
from vllm_steer.request.positions import absolute_positions

Doubles = NDArray[np.float64]
Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Gap:
    """The prefixed model's answers to some questions, and how likely they are without steering.

    Attributes:
        examples: Questions and answers.
        plain: ``[examples]``, float64; log-likelihood of each answer after the plain prompt.
        prefixed: ``[examples]``, float64; after the prefixed prompt.
    """

    examples: tuple[Example, ...]
    plain: Doubles
    prefixed: Doubles

    def some(self, count: int) -> Gap:
        """Returns the gap of the first ``count`` questions."""
        return Gap(self.examples[:count], self.plain[:count], self.prefixed[:count])

    def rest(self, count: int) -> Gap:
        """Returns the gap of the questions after the first ``count``."""
        return Gap(self.examples[count:], self.plain[count:], self.prefixed[count:])

    def closed(self, steered: Doubles) -> float:
        """Returns the share of the gap closed by answers with the log-likelihoods ``steered``."""
        return closed(steered - self.plain, self.prefixed - self.plain)

    def expressed(self, plain: Doubles, prefixed: Doubles) -> float:
        """Returns the share of the concept that other answers to the same questions express.

        Args:
            plain: ``[examples]``, float64; log-likelihood of each answer after the plain prompt.
            prefixed: The same after the prefixed prompt.
        """
        return closed(prefixed - plain, self.prefixed - self.plain)

    @property
    def prompts(self) -> list[Tokens]:
        """Token ids of the plain prompts."""
        return [e.plain.token_ids for e in self.examples]

    def interval(self, steered: Doubles) -> tuple[float, float] | None:
        """Returns the 95 % interval over questions; see :func:`vllm_steer.offline.measures.intervals.ratio_interval`."""
        return ratio_interval(steered - self.plain, self.prefixed - self.plain)


@dataclass(frozen=True)
class Trial:
    """A direction at one scale on some layers.

    Attributes:
        subject: The direction.
        scale: ε.
        layers: The layers.
    """

    subject: Subject
    scale: float
    layers: tuple[int, ...]

    def steering(self, prompt_len: int) -> dict[str, Any]:
        """Returns the steering of a prompt of a given length, whatever follows it."""
        chosen = {"name": self.subject.name, "scale": self.scale, "layers": list(self.layers)}
        positions = absolute_positions(self.subject.record.positions, prompt_len)
        return {"directions": [chosen | {"positions": positions}]}


@dataclass(frozen=True)
class Spoken:
    """Measures of a direction's answers.

    Attributes:
        fluency: Their fluency.
        expression: How much of the concept they express, 1 for as much as the prefixed model's; None if no
            prefix is known, and for ops that remove a component.
    """

    fluency: Fluency
    expression: float | None


def measured_gaps(
    engine: TokenEngine, examples: Sequence[Sequence[Example]], name: str
) -> list[Gap]:
    """Returns the gap of each direction's examples."""
    asked = [Asked(e.plain.token_ids, e.answer) for part in examples for e in part]
    plain = iter(engine.score(asked, name))
    return [
        Gap(
            tuple(part),
            np.array([next(plain) for _ in part]),
            np.array([e.log_likelihood for e in part]),
        )
        for part in examples
    ]


def steered_likelihoods(
    engine: TokenEngine, trials: Sequence[tuple[Trial, Gap]], name: str
) -> list[Doubles]:
    """Returns the log-likelihoods of each gap's answers after the plain prompt, steered by its trial.

    Ops that remove a component are measured on the prefixed prompt instead, and mirrored, so that removing
    everything the prefix adds counts as the whole gap.
    """
    asked = []
    for trial, gap in trials:
        for example in gap.examples:
            prompt = example.prefixed if _takes_away(trial) else example.plain
            steering = trial.steering(len(prompt.token_ids))
            asked.append(Asked(prompt.token_ids, example.answer, steering))
    scores = iter(engine.score(asked, name))
    found = []
    for trial, gap in trials:
        steered = np.array([next(scores) for _ in gap.examples])
        found.append(gap.plain + gap.prefixed - steered if _takes_away(trial) else steered)
    return found


def _takes_away(trial: Trial) -> bool:
    return trial.subject.record.op == "ablate"


def spoken(
    engine: TokenEngine,
    trials: Sequence[tuple[Trial | None, Gap | Sequence[Tokens]]],
    max_tokens: int,
    name: str,
) -> list[Spoken]:
    """Returns the measures of greedy answers.

    Args:
        engine: The engine.
        trials: Steering (None for none), and the gap of the questions to ask; or, if no prefix is known, the
            token ids of their prompts.
        max_tokens: Longest answer.
        name: Label of the progress bars.
    """
    asked = [
        Asked(prompt, steering=trial.steering(len(prompt)) if trial else None)
        for trial, questions in trials
        for prompt in _prompts(questions)
    ]
    answers = engine.generate(asked, max_tokens, name)
    plain_asked = [(one.prompt, a.tokens) for one, a in zip(asked, answers, strict=True)]
    prefixed_asked: list[tuple[Tokens, Tokens]] = []
    given = iter(answers)
    for trial, questions in trials:
        own = [next(given).tokens for _ in _prompts(questions)]
        if _expresses(trial) and isinstance(questions, Gap):
            prompts = [e.prefixed.token_ids for e in questions.examples]
            prefixed_asked += zip(prompts, own, strict=True)
    plain = iter(_likelihoods(engine, plain_asked, f"{name}, after the plain prompts"))
    prefixed = iter(_likelihoods(engine, prefixed_asked, f"{name}, after the prefixed prompts"))
    given, found = iter(answers), []
    for trial, questions in trials:
        own_answers = [next(given) for _ in _prompts(questions)]
        likely = np.array([next(plain) for _ in own_answers])
        surprise = [
            -value / max(len(a.tokens), 1) for value, a in zip(likely, own_answers, strict=True)
        ]
        expression = None
        if _expresses(trial) and isinstance(questions, Gap):
            expression = questions.expressed(likely, np.array([next(prefixed) for _ in likely]))
        found.append(Spoken(fluency_of([a.text for a in own_answers], surprise), expression))
    return found


def done(point: CalibrationPoint) -> float:
    """Returns how much of the prefix's effect a direction has at a scale, with each share capped at 1."""
    shares = [share for share in (point.gap_closed, point.expression) if share is not None]
    return sum(min(share, 1.0) for share in shares)


def _prompts(questions: Gap | Sequence[Tokens]) -> Sequence[Tokens]:
    return questions.prompts if isinstance(questions, Gap) else questions


def _expresses(trial: Trial | None) -> bool:
    """Whether a trial adds a concept; ops that remove a component express nothing."""
    return trial is not None and not _takes_away(trial)


def _likelihoods(
    engine: TokenEngine, pairs: Sequence[tuple[Tokens, Tokens]], name: str
) -> list[float]:
    """Returns the log-likelihood of each answer after its prompt without steering; 0 for an empty one."""
    scores = iter(engine.score([Asked(*pair) for pair in pairs if pair[1]], name))
    return [next(scores) if answer else 0.0 for _, answer in pairs]


def surprises(
    engine: TokenEngine, pairs: Sequence[tuple[Tokens, Tokens]], name: str
) -> list[float]:
    """Returns the mean negative log-likelihood of each answer's tokens without steering; 0 for none."""
    found = _likelihoods(engine, pairs, f"{name}, perplexity")
    return [-value / max(len(answer), 1) for value, (_, answer) in zip(found, pairs, strict=True)]


def fluency_of(texts: Sequence[str], surprise: Sequence[float]) -> Fluency:
    """Returns the fluency of answers from their texts and mean negative log-likelihoods."""
    return Fluency(
        float(np.mean([repetition(text) for text in texts])), math.exp(float(np.mean(surprise)))
    )
