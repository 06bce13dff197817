"""The likelihood of given answers: a prompt, or a set of demonstrations, is distilled into what is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_steer.offline.measures.shares import closed
from vllm_steer.offline.models.likelihood import AnswerModel
from vllm_steer.offline.train.batches import total
from vllm_steer.offline.train.examples import Answered, Row
from vllm_steer.offline.train.forms import ChangingForm, Vectors
from vllm_steer.offline.train.objectives.objective import Moment, Objective
from vllm_steer.offline.train.positions import Positions


class Likelihood(Objective[Answered]):
    """Mean negative log-likelihood of an answer's token, over all tokens of a lesson's step."""

    form: ChangingForm

    def __init__(
        self,
        answers: AnswerModel,
        form: ChangingForm,
        positions: Positions,
        penalty: float = 0.0,
    ) -> None:
        """Takes a model and what is trained.

        Args:
            answers: The frozen model, with the blocks that are changed.
            form: What is trained.
            positions: Where it acts.
            penalty: ``Vectors`` alone: weight of the mean, over blocks, of the squared length of the vector
                over that of the residual stream.
        """
        super().__init__(answers, form, positions)
        self._penalty = penalty
        self._ends: dict[Sequence[Answered], tuple[float, float]] = {}

    def loss(self, rows: Sequence[Row[Answered]], moment: Moment) -> Tensor:
        found = self._log_likelihoods([row.example for row in rows], [row.lesson for row in rows])
        weights = torch.tensor([1.0 / row.tokens for row in rows], device=found.device)
        return -(found * weights).sum()

    def penalty(self, lessons: Sequence[int]) -> Tensor | None:
        if not self._penalty or not isinstance(self.form, Vectors):
            return None
        return self._penalty * self.form.steps[list(lessons)].square().mean(dim=(1, 2)).sum()

    def score(self, lesson: int, examples: Sequence[Answered], batch_size: int) -> float:
        """Returns the share of the gap that is closed; without prefixed prompts the loss, negative."""
        found = self._total(examples, batch_size, lesson)
        if any(example.prefixed is None for example in examples):
            return found / sum(example.tokens for example in examples)
        key = tuple(examples)
        if key not in self._ends:
            self._ends[key] = (
                self._total(examples, batch_size),
                self._total(examples, batch_size, prefixed=True),
            )
        plain, prefixed = self._ends[key]
        return closed(np.array([found - plain]), np.array([prefixed - plain]))

    def figures(self, score: float, examples: Sequence[Answered]) -> dict[str, float]:
        if any(example.prefixed is None for example in examples):
            return super().figures(score, examples)
        return {"held_out_gap_closed": score}

    def _total(
        self,
        examples: Sequence[Answered],
        batch_size: int,
        lesson: int | None = None,
        prefixed: bool = False,
    ) -> float:
        return total(
            lambda part: self._log_likelihoods(
                part, None if lesson is None else [lesson] * len(part), prefixed
            ),
            examples,
            batch_size,
        )

    def _log_likelihoods(
        self,
        examples: Sequence[Answered],
        lessons: Sequence[int] | None,
        prefixed: bool = False,
    ) -> Tensor:
        prompts = [(e.prefixed if prefixed else None) or e.prompt for e in examples]
        batch, acting = self.batch(prompts, [e.answer for e in examples])
        change = None if lessons is None else self.form.change(lessons, acting)
        return self.answers.log_likelihoods(batch, change)
