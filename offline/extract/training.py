"""Directions trained to make the prefixed model's answers likely after the plain prompt.

The model is frozen. A direction is a vector for each of some blocks, added at every position, that
lowers the mean negative log-likelihood of the answers' tokens, see ``vllm_steer.offline.train``. Steps are relative to
each block's own residual norm, since streams of models differ in length by orders of magnitude: a coordinate moves by
``rate`` times the norm over the square root of the hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_steer.offline.extract.answers import Example
from vllm_steer.offline.models.likelihood import AnswerModel
from vllm_steer.offline.train.examples import Answered
from vllm_steer.offline.train.forms import Vectors
from vllm_steer.offline.train.objectives.likelihood import Likelihood
from vllm_steer.offline.train.positions import Positions
from vllm_steer.offline.train.trainer import Lesson as Examples
from vllm_steer.offline.train.trainer import Trainer, TrainerOptions

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TrainingOptions:
    """Options of training.

    Attributes:
        steps: Largest number of optimiser steps.
        answers: Answers per step.
        rate: Step of a coordinate, relative to the norm of the block's residual stream per coordinate.
        penalty: Weight of the mean, over blocks, of the squared length of the vector over that of the
            residual stream, beside the loss per token.
        every: Steps between two evaluations on the stopping answers.
        patience: Evaluations without improvement after which a concept stops.
        batch_size: Rows of a forward pass.
        seed: Seed of the draws.
    """

    steps: int = 24
    answers: int = 8
    rate: float = 0.01
    penalty: float = 0.0
    every: int = 4
    patience: int = 2
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained direction.

    Attributes:
        vectors: ``[layers, hidden_size]``, float32; ε = 1 adds them as trained.
        gap_closed: Share of the gap closed on the stopping answers.
        steps: Number of steps to reach it.
    """

    vectors: Floats
    gap_closed: float
    steps: int


@dataclass(frozen=True, eq=False)
class Lesson:
    """Training data of one concept.

    Attributes:
        learned: Examples for the loss.
        stopping: Other examples, for stopping; at least one.
        start: ``[layers, hidden_size]``, float32; initial vectors.
    """

    learned: Sequence[Example]
    stopping: Sequence[Example]
    start: Floats


def train(
    answers: AnswerModel,
    lessons: Sequence[Lesson],
    norms: Floats,
    options: TrainingOptions,
    progress: str | None = None,
) -> list[Trained]:
    """Trains a direction for each lesson.

    Args:
        answers: The model, with the blocks to steer.
        lessons: Training data of each concept.
        norms: ``[lessons, layers]``, float32; norm of the residual stream after each of the blocks.
        options: The options.
        progress: Label of the progress bar; None for no bar.

    Raises:
        ExtractionError: The loss of a concept is not finite.
    """
    start = torch.tensor(np.stack([lesson.start for lesson in lessons]))
    objective = Likelihood(
        answers, Vectors(start, torch.tensor(norms)), Positions("all"), options.penalty
    )
    given = [Examples(_answered(x.learned), _answered(x.stopping)) for x in lessons]
    found = Trainer(
        objective,
        given,
        TrainerOptions(
            steps=options.steps,
            examples=options.answers,
            rate=options.rate,
            every=options.every,
            patience=options.patience,
            batch_size=options.batch_size,
            seed=options.seed,
        ),
    ).run(progress)
    return [
        Trained(each.learned["vectors"].cpu().numpy(), each.score, each.steps)
        for each in found
        if each.score is not None
    ]


def _answered(examples: Sequence[Example]) -> list[Answered]:
    return [Answered(e.plain.token_ids, e.answer, e.prefixed.token_ids) for e in examples]
