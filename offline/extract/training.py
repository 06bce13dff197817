"""Directions trained to make the prefixed model's answers likely after the plain prompt.

The model is frozen. A direction is a vector for each of some blocks, added at every position, that
lowers the mean negative log-likelihood of the answers' tokens. Steps are relative to each block's residual
norm, since the norms of models differ by orders of magnitude: a coordinate moves by ``rate`` times the norm
over the square root of the hidden size.

Concepts in one batch share only forward passes: each has its own draws of answers, optimiser state and
stopping.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.extract.answers import Example
from vllm_steer.offline.measures.shares import closed
from vllm_steer.offline.models.likelihood import AnswerModel, padded

Floats = NDArray[np.float32]
T = TypeVar("T")


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
        stopping: Other examples, for stopping.
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
    return _Training(answers, lessons, norms, options).run(progress)


class _Training:
    def __init__(
        self,
        answers: AnswerModel,
        lessons: Sequence[Lesson],
        norms: Floats,
        options: TrainingOptions,
    ) -> None:
        self._answers, self._lessons, self._options = answers, lessons, options
        device = answers.model.device
        start = torch.tensor(np.stack([lesson.start for lesson in lessons]), device=device)
        # A coordinate of 1 corresponds to the average coordinate of the block's residual stream.
        self._unit = torch.tensor(norms, device=device)[..., None] / start.shape[-1] ** 0.5
        self._steps = (start / self._unit).requires_grad_(True)
        self._draws = [_draw(len(lesson.learned), options) for lesson in lessons]
        self._ends = [self._gap_ends(lesson.stopping) for lesson in lessons]
        self._best: list[Trained | None] = [None] * len(lessons)
        self._active = list(range(len(lessons)))

    def run(self, progress: str | None) -> list[Trained]:
        options = self._options
        optimizer = torch.optim.Adam([self._steps], lr=options.rate)
        with tqdm(
            total=options.steps, desc=progress, unit="step", disable=progress is None, leave=False
        ) as bar:
            for step in range(1, options.steps + 1):
                optimizer.zero_grad()
                self._accumulate()
                optimizer.step()
                bar.update()
                if step % options.every == 0 or step == options.steps:
                    self._look(step)
                    if not self._active:
                        break
        return [best for best in self._best if best is not None]

    def _accumulate(self) -> None:
        """Accumulates the gradients of a step, for each concept from its own loss per token."""
        drawn = {
            c: [self._lessons[c].learned[i] for i in next(self._draws[c])] for c in self._active
        }
        tokens = {c: sum(len(e.answer) for e in examples) for c, examples in drawn.items()}
        rows = [(c, example) for c, examples in drawn.items() for example in examples]
        for part in _parts(rows, self._options.batch_size):
            change = (self._steps * self._unit)[[c for c, _ in part]]
            found = self._log_likelihoods([e for _, e in part], change)
            weights = torch.tensor([1.0 / tokens[c] for c, _ in part], device=found.device)
            loss = -(found * weights).sum()
            _check_finite(float(loss.detach()))
            torch.autograd.backward(loss)
        if self._options.penalty:
            squares = self._steps[self._active].square().mean(dim=(1, 2)).sum()
            torch.autograd.backward(self._options.penalty * squares)

    @torch.no_grad()
    def _look(self, step: int) -> None:
        """Measures the gap closed and stops concepts that no longer improve."""
        vectors = (self._steps * self._unit).detach()
        for concept in list(self._active):
            steered = self._total(self._lessons[concept].stopping, vectors[[concept]])
            plain, prefixed = self._ends[concept]
            gap = closed(np.array([steered - plain]), np.array([prefixed - plain]))
            _check_finite(gap)
            best = self._best[concept]
            if best is None or gap > best.gap_closed:
                kept = vectors[concept].cpu().numpy().copy()
                self._best[concept] = Trained(kept, gap, step)
            elif step - best.steps >= self._options.patience * self._options.every:
                self._active.remove(concept)

    @torch.no_grad()
    def _gap_ends(self, examples: Sequence[Example]) -> tuple[float, float]:
        """Log-likelihoods of the answers after the plain and after the prefixed prompts."""
        return self._total(examples, None), self._total(examples, None, prefixed=True)

    def _total(
        self, examples: Sequence[Example], change: Tensor | None, prefixed: bool = False
    ) -> float:
        return sum(
            float(self._log_likelihoods(part, change, prefixed).sum())
            for part in _parts(examples, self._options.batch_size)
        )

    def _log_likelihoods(
        self, examples: Sequence[Example], change: Tensor | None, prefixed: bool = False
    ) -> Tensor:
        prompts = [(e.prefixed if prefixed else e.plain).token_ids for e in examples]
        batch = padded(prompts, [e.answer for e in examples], self._answers.model.device)
        return self._answers.log_likelihoods(batch, change)


def _check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise ExtractionError(
            "the loss of training is not finite; train in float32 or bfloat16, with a smaller train_rate"
        )


def _draw(count: int, options: TrainingOptions) -> Iterator[list[int]]:
    """Yields the answers of each step; each is drawn once before any is drawn again."""
    source = np.random.default_rng(options.seed)
    left: list[int] = []
    while True:
        while len(left) < min(options.answers, count):
            left += source.permutation(count).tolist()
        taken, left = left[: options.answers], left[options.answers :]
        yield taken


def _parts(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
