"""Scored answers and their states to a vector for each block, as the papers do; arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.measures.fluency import repetition
from vllm_steer.offline.rollouts.sampled import Rollout

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

# Share of repeated word pairs above which an answer counts as looping, as in extraction.
LOOPING = 0.2
_TINY = 1e-12
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Found:
    """What was learned.

    Attributes:
        layers: Rows of ``vectors``, ascending.
        vectors: ``[layers, hidden_size]``, float32.
        metrics: Figures for people to read.
    """

    layers: list[int]
    vectors: Floats
    metrics: dict[str, JsonValue] = field(default_factory=dict)


def roast(states: Floats, questions: NDArray[np.int64], right: Flags) -> tuple[Floats, int]:
    """Returns the mean over questions of each one's difference between right and wrong answers, at length 1.

    The mean over all pairs of a right and a wrong answer is the difference of their means.

    Args:
        states: ``[answers, blocks, hidden_size]``.
        questions: ``[answers]``; number of each one's question.
        right: ``[answers]``; whether it is right.

    Returns:
        ``[blocks, hidden_size]``, and the number of questions that have answers of both kinds.

    Raises:
        ExtractionError: There is no such question.
    """
    voted = []
    for question in np.unique(questions):
        own = questions == question
        if right[own].all() or not right[own].any():
            continue
        difference = states[own & right].mean(axis=0) - states[own & ~right].mean(axis=0)
        length = np.linalg.norm(difference, axis=1, keepdims=True)
        voted.append(difference / np.maximum(length, _TINY))
    if not voted:
        raise ExtractionError(
            "no question has right and wrong answers; sample more of each, ask questions that the model answers now "
            "rightly, "
            "now wrongly, or choose another threshold"
        )
    return np.mean(voted, axis=0).astype(np.float32), len(voted)


def persona_pairs(rollouts: Sequence[Rollout], threshold: float) -> list[tuple[int, int]]:
    """Returns the pairs of answers of which one shows the trait and the other does not, as places in ``rollouts``.

    Args:
        rollouts: Answers of both sides; side 0 is asked for the trait.
        threshold: Score from which one shows it; the other's is below 1 − threshold.

    Raises:
        ExtractionError: There is no such pair.
    """
    places = {
        (r.question, r.draw, r.side): at
        for at, r in enumerate(rollouts)
        if repetition(r.text) <= LOOPING
    }
    pairs = []
    for (question, draw, side), at in places.items():
        other = places.get((question, draw, 1))
        if side or other is None:
            continue
        shows, hides = rollouts[at].score, rollouts[other].score
        assert shows is not None
        assert hides is not None
        if shows >= threshold and hides < 1 - threshold:
            pairs.append((at, other))
    if not pairs:
        raise ExtractionError(
            "of no pair of answers does the first show the trait and the second not; see how the judge scores, or choose "
            "another threshold"
        )
    return pairs


def correlations(features: Floats, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns Pearson's correlation of each feature with the score; 0 for a feature that is constant.

    Args:
        features: ``[answers, ...]``; activations.
        scores: ``[answers]``.

    Raises:
        ExtractionError: All scores are equal, so that nothing goes with them.
    """
    centred = scores - scores.mean()
    spread = np.sqrt((centred**2).sum())
    if spread <= _TINY:
        raise ExtractionError(
            f"all {len(scores)} answers have the score {scores[0]:g}; a correlation needs right and wrong ones"
        )
    values = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    length = np.sqrt((values**2).sum(axis=0))
    # What is constant differs from its mean by rounding.
    floor = _TINY + _ROUNDING * np.abs(features).max(axis=0)
    covariance = np.tensordot(centred, values, axes=1)
    found: NDArray[np.float64] = np.where(
        length > floor, covariance / (np.maximum(length, floor) * spread), 0.0
    )
    return found


def corrsteer(
    features: Floats,
    scores: NDArray[np.float64],
    right: Flags,
    layers: Sequence[int],
    each: bool,
    decoder: Floats | None = None,
) -> Found:
    """Returns the best feature of all blocks, or of each, times its mean activation in right answers.

    Args:
        features: ``[answers, blocks, features]``; the largest activation over an answer's tokens.
        scores: ``[answers]``.
        right: ``[answers]``; whether it is right.
        layers: The blocks' numbers.
        each: Whether every block keeps its best feature.
        decoder: ``[blocks, features, hidden_size]``; what each feature writes. None for the coordinates of the residual
            stream, each of which writes itself.

    Raises:
        ExtractionError: All scores are equal, no answer is right, or no feature goes with the score.
    """
    if not right.any():
        raise ExtractionError("no answer is right; choose another threshold")
    found = correlations(features, scores)
    best = found.argmax(axis=1)
    highest = found[np.arange(len(layers)), best]
    kept = np.arange(len(layers)) if each else np.array([int(highest.argmax())])
    kept = kept[highest[kept] > 0]
    if not len(kept):
        raise ExtractionError("no feature goes with the score")
    strength = features[right].mean(axis=0)[kept, best[kept]]
    if decoder is None:
        written = np.zeros((len(kept), features.shape[2]), dtype=np.float32)
        written[np.arange(len(kept)), best[kept]] = 1.0
    else:
        written = decoder[kept, best[kept]]
    return Found(
        [layers[at] for at in kept],
        (strength[:, None] * written).astype(np.float32),
        {
            "features": [int(best[at]) for at in kept],
            "correlations": [float(highest[at]) for at in kept],
            "activations": [float(value) for value in strength],
        },
    )
