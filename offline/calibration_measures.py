"""What a calibration measures, all directions in the same batches: gaps closed, and how fluent the text is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline.answers import Example
from offline.calibration_grid import Subject
from offline.fluency import Fluency
from offline.scores import repetition
from offline.shares import closed, closed_interval
from offline.token_engine import Asked, TokenEngine

Doubles = NDArray[np.float64]


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
        """Returns the gap of the first so many questions."""
        return Gap(self.examples[:count], self.plain[:count], self.prefixed[:count])

    def rest(self, count: int) -> Gap:
        """Returns the gap of the questions after the first so many."""
        return Gap(self.examples[count:], self.plain[count:], self.prefixed[count:])

    def closed(self, steered: Doubles) -> float:
        """Returns the share of the gap closed by answers that are as likely as ``steered`` says."""
        return closed(steered - self.plain, self.prefixed - self.plain)

    def interval(self, steered: Doubles, seed: int) -> tuple[float, float] | None:
        """Returns the 95 % bootstrap interval over questions; None with fewer than three."""
        return closed_interval(steered - self.plain, self.prefixed - self.plain, seed)


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
        """Returns the steering of a prompt of so many tokens, whatever stands after it."""
        chosen = {"name": self.subject.name, "scale": self.scale, "layers": list(self.layers)}
        positions = {
            "all": [[0, None]],
            "prompt": [[0, prompt_len]],
            "generated": [[prompt_len, None]],
            "last_prompt": [[prompt_len - 1, prompt_len]],
        }[self.subject.record.positions]
        return {"directions": [chosen | {"positions": positions}]}


def measured_gaps(
    engine: TokenEngine, examples: Sequence[Sequence[Example]], name: str
) -> list[Gap]:
    """Returns the gap of each direction's examples."""
    flat = [example for part in examples for example in part]
    asked = [Asked(e.plain.token_ids, e.answer) for e in flat]
    asked += [Asked(e.prefixed.token_ids, e.answer) for e in flat]
    found = np.array(engine.score(asked, name))
    plain, prefixed = iter(found[: len(flat)]), iter(found[len(flat) :])
    return [
        Gap(
            tuple(part),
            np.array([next(plain) for _ in part]),
            np.array([next(prefixed) for _ in part]),
        )
        for part in examples
    ]


def steered_likelihoods(
    engine: TokenEngine, trials: Sequence[tuple[Trial, Gap]], name: str
) -> list[Doubles]:
    """Returns the log-likelihoods of each gap's answers after the plain prompt, steered by its trial.

    What is taken away is taken from the prefixed prompt instead, and mirrored, so that all that the
    prefix adds taken away reads as the whole gap.
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


def fluencies(
    engine: TokenEngine,
    trials: Sequence[tuple[Trial | None, Sequence[tuple[int, ...]]]],
    max_tokens: int,
    name: str,
) -> list[Fluency]:
    """Returns how fluent greedy answers are.

    Args:
        engine: The engine.
        trials: Steering (None for none) and the token ids of the prompts.
        max_tokens: Longest answer.
        name: Text beside the progress bars.
    """
    asked = [
        Asked(prompt, steering=trial.steering(len(prompt)) if trial else None)
        for trial, prompts in trials
        for prompt in prompts
    ]
    answers = engine.generate(asked, max_tokens, name)
    texts = iter([answer.text for answer in answers])
    surprise = iter(
        surprises(
            engine, [(one.prompt, a.tokens) for one, a in zip(asked, answers, strict=True)], name
        )
    )
    return [
        fluency_of([next(texts) for _ in prompts], [next(surprise) for _ in prompts])
        for _, prompts in trials
    ]


def surprises(
    engine: TokenEngine, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], name: str
) -> list[float]:
    """Returns the mean negative log-likelihood of each answer's tokens without steering; 0 for none."""
    asked = [Asked(prompt, answer) for prompt, answer in pairs if answer]
    scores = iter(engine.score(asked, f"{name}, perplexity"))
    return [-next(scores) / len(answer) if answer else 0.0 for _, answer in pairs]


def fluency_of(texts: Sequence[str], surprise: Sequence[float]) -> Fluency:
    """Returns the fluency of answers from their texts and mean negative log-likelihoods."""
    return Fluency(
        float(np.mean([repetition(text) for text in texts])), math.exp(float(np.mean(surprise)))
    )
