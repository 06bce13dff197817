"""Preference in both directions: BiPO, arXiv 2406.00045."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vllm_steer.offline.models.likelihood import AnswerModel
from vllm_steer.offline.train.batches import parts
from vllm_steer.offline.train.examples import Preference, Row
from vllm_steer.offline.train.forms import Vectors, additions
from vllm_steer.offline.train.objectives.objective import Moment, Objective
from vllm_steer.offline.train.positions import Positions


def preference_losses(steered: Tensor, reference: Tensor, sign: Tensor, beta: float) -> Tensor:
    """Returns −log σ(d·β·((log π_v(r⁺) − log π(r⁺)) − (log π_v(r⁻) − log π(r⁻)))) of each pair, ``[pairs]``.

    Args:
        steered: ``[2, pairs]``; log-likelihoods of the positive and of the negative answers while d·v is added.
        reference: ``[2, pairs]``; the same without it.
        sign: ``[pairs]``; d, 1 or −1.
        beta: β, how far the steered model may go from its reference.
    """
    positive, negative = steered - reference
    return -functional.logsigmoid(sign * beta * (positive - negative))


class BidirectionalPreference(Objective[Preference]):
    """BiPO: adding the vector makes the positive answer preferred, subtracting it the negative one.

    Each step adds or subtracts for all its pairs, by a draw, as the authors do.
    """

    form: Vectors

    def __init__(
        self,
        answers: AnswerModel,
        form: Vectors,
        positions: Positions,
        beta: float,
        seed: int,
    ) -> None:
        """Takes a model and what is trained.

        Args:
            answers: The frozen model, with the blocks that are changed.
            form: What is trained.
            positions: Where it acts.
            beta: β.
            seed: Of the draws.
        """
        super().__init__(answers, form, positions)
        self._beta, self._seed = beta, seed
        self._references: dict[Preference, Tensor] = {}

    def sign(self, step: int) -> int:
        """Returns d of a step, the same whenever it is asked."""
        return int(np.random.default_rng([self._seed, step]).choice([-1, 1]))

    def loss(self, rows: Sequence[Row[Preference]], moment: Moment) -> Tensor:
        found = self._losses(
            [row.example for row in rows], [row.lesson for row in rows], self.sign(moment.step)
        )
        weights = torch.tensor([1.0 / row.examples for row in rows], device=found.device)
        return (found * weights).sum()

    def score(self, lesson: int, examples: Sequence[Preference], batch_size: int) -> float:
        """Returns the mean loss of both directions, negative."""
        total = sum(
            float(self._losses(part, [lesson] * len(part), sign).sum())
            for part in parts(examples, batch_size)
            for sign in (1, -1)
        )
        return -total / (2 * len(examples))

    def _losses(self, examples: Sequence[Preference], lessons: Sequence[int], sign: int) -> Tensor:
        reference = torch.stack(self._reference(examples), dim=1)
        # The answers one after the other, the positive ones first.
        steered = self._log_likelihoods(examples, sign * self.form.vectors[list(lessons) * 2])
        signs = torch.full_like(reference[0], sign)
        return preference_losses(steered.view(2, -1), reference, signs, self._beta)

    @torch.no_grad()
    def _reference(self, examples: Sequence[Preference]) -> list[Tensor]:
        """Returns log-likelihoods without the vector, ``[2]`` of each example; they are computed once."""
        for example in examples:
            if example not in self._references:
                # Alone, so that no batch that it is first met in changes a bit of it.
                self._references[example] = self._log_likelihoods([example], None)
        return [self._references[example] for example in examples]

    def _log_likelihoods(self, examples: Sequence[Preference], vectors: Tensor | None) -> Tensor:
        prompts = [example.prompt for example in examples] * 2
        given = [e.positive for e in examples] + [e.negative for e in examples]
        batch, acting = self.batch(prompts, given)
        change = None if vectors is None else additions(vectors, acting)
        return self.answers.log_likelihoods(batch, change)
