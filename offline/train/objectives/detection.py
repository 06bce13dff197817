"""A direction that detects and steers: ReFT-r1 of AxBench, arXiv 2501.17148."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_steer.offline.models.hooks import Change
from vllm_steer.offline.models.likelihood import AnswerModel
from vllm_steer.offline.train.batches import total
from vllm_steer.offline.train.edits import detected, strongest
from vllm_steer.offline.train.examples import Answered, Row
from vllm_steer.offline.train.forms import UnitVectors, where
from vllm_steer.offline.train.objectives.objective import Moment, Objective
from vllm_steer.offline.train.positions import Positions


def magnitude(latents: Tensor, count: int) -> Tensor:
    """Returns the mean of the ``count`` largest latents of each row, ``[rows]``: how strongly it is steered.

    Args:
        latents: ``[rows, length]``, at least 0.
        count: k.
    """
    return torch.where(strongest(latents, count), latents, 0.0).sum(-1) / count


def spread(latents: Tensor, acting: Tensor, count: int) -> Tensor:
    """Returns the sum of all latents but the ``count`` largest, over the positions, ``[rows]``: what is penalised.

    Args:
        latents: ``[rows, length]``, at least 0.
        acting: ``[rows, length]``, bool; the positions that count.
        count: k.
    """
    return torch.where(strongest(latents, count), 0.0, latents).sum(-1) / acting.sum(-1)


class DetectionSteering(Objective[Answered]):
    """ReFT-r1: an answer's tokens are likely while the mean of the strongest detections, times w, is added.

    Beside it, detections at other tokens cost, more and more from the first step to the last.
    """

    form: UnitVectors

    def __init__(
        self,
        answers: AnswerModel,
        form: UnitVectors,
        positions: Positions,
        strongest_tokens: int,
        sparsity: float,
    ) -> None:
        """Takes a model and what is trained.

        Args:
            answers: The frozen model, with the one block that is changed.
            form: What is trained.
            positions: Where it detects and acts; never everywhere, for nothing is learned of the first token.
            strongest_tokens: k, tokens whose detections count.
            sparsity: λ, weight of the detections at other tokens at the end of training.
        """
        super().__init__(answers, form, positions)
        self._count, self._sparsity = strongest_tokens, sparsity

    def loss(self, rows: Sequence[Row[Answered]], moment: Moment) -> Tensor:
        likelihoods, spreads = self._forward([r.example for r in rows], [r.lesson for r in rows])
        per_token = torch.tensor([1.0 / row.tokens for row in rows], device=likelihoods.device)
        per_example = torch.tensor([1.0 / row.examples for row in rows], device=likelihoods.device)
        weight = self._sparsity * moment.step / moment.steps
        return -(likelihoods * per_token).sum() + weight * (spreads * per_example).sum()

    def score(self, lesson: int, examples: Sequence[Answered], batch_size: int) -> float:
        """Returns the mean log-likelihood of an answer's token."""
        found = total(
            lambda part: self._forward(part, [lesson] * len(part))[0], examples, batch_size
        )
        return found / sum(example.tokens for example in examples)

    def largest(self, units: Tensor, examples: Sequence[Answered]) -> float:
        """Returns the largest detection in prompts and answers without steering: AxBench's largest activation.

        Args:
            units: ``[1, hidden_size]``, w.
            examples: The examples, each of which is read alone.
        """
        found = []
        for example in examples:
            batch, acting = self.batch([example.prompt], [example.answer])
            hidden, _ = self.unchanged(batch)
            found.append(float(detected(hidden, units, _known(acting)).max()))
        return max(found)

    def _forward(
        self, examples: Sequence[Answered], lessons: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        batch, given = self.batch([e.prompt for e in examples], [e.answer for e in examples])
        acting = _known(given)
        unit = self.form.units[list(lessons), 0]
        spreads: list[Tensor] = []

        def change(_: int, hidden: Tensor) -> Tensor:
            latents = detected(hidden.float(), unit, acting)
            spreads.append(spread(latents, acting, self._count))
            steered = hidden.float() + (magnitude(latents, self._count)[:, None] * unit)[:, None]
            return where(acting, steered.to(hidden.dtype), hidden)

        put: Change = change
        found = self.answers.log_likelihoods(batch, put)
        return found, spreads[0]


def _known(acting: Tensor | None) -> Tensor:
    if acting is None:
        raise ValueError("detections need positions that leave out the first token and padding")
    return acting
