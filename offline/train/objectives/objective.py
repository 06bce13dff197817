"""What an objective offers the trainer, and the batches that all of them ask the model in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from vllm_steer.offline.models.likelihood import AnswerModel, Padded, padded
from vllm_steer.offline.train.examples import E, Row, Tokens
from vllm_steer.offline.train.forms import Form
from vllm_steer.offline.train.positions import Positions


@dataclass(frozen=True)
class Moment:
    """Where training is.

    Attributes:
        step: Number of the step, from 0.
        steps: Steps of the whole training.
    """

    step: int
    steps: int


class Objective(ABC, Generic[E]):
    """A loss of examples, and how good what was learned is."""

    def __init__(self, answers: AnswerModel, form: Form, positions: Positions) -> None:
        """Takes a model and what is trained.

        Args:
            answers: The frozen model, with the blocks that are changed.
            form: What is trained.
            positions: Where it acts.
        """
        self.answers, self.form, self.positions = answers, form, positions

    @abstractmethod
    def loss(self, rows: Sequence[Row[E]], moment: Moment) -> Tensor:
        """Returns what a part of a step adds to the loss; the parts of a step add up to its loss.

        Args:
            rows: Examples of any lessons.
            moment: Where training is.
        """

    @abstractmethod
    def score(self, lesson: int, examples: Sequence[E], batch_size: int) -> float:
        """Returns how good a lesson is on examples, the greater the better; called without gradients.

        Args:
            lesson: Number of the lesson.
            examples: The examples.
            batch_size: Rows of a forward pass.
        """

    def figures(self, score: float, examples: Sequence[E]) -> dict[str, float]:
        """Returns what a score on held-out examples says, by name."""
        return {"held_out_loss": -score}

    def penalty(self, lessons: Sequence[int]) -> Tensor | None:
        """Returns what is added to the loss once a step, beside that of the examples."""
        return None

    def batch(
        self, prompts: Sequence[Tokens], answers: Sequence[Tokens]
    ) -> tuple[Padded, Tensor | None]:
        """Returns prompts and answers as one batch, and where the form acts in it; None for everywhere."""
        device = self.answers.model.device
        acting = self.positions.mask(prompts, answers)
        return padded(prompts, answers, device), None if acting is None else acting.to(device)

    @torch.no_grad()
    def unchanged(self, batch: Padded) -> tuple[Tensor, Tensor]:
        """Returns what the model does by itself at its first changed block, and answers.

        Args:
            batch: Prompts and answers.

        Returns:
            The block's output, float32 ``[rows, length, hidden_size]``, and the answers' logits, ``[tokens, vocabulary]``.
        """
        shown: list[Tensor] = []
        with self.answers.watching(lambda at, hidden: None if at else shown.append(hidden)):
            logits = self.answers.logits(batch)
        return shown[0].float(), logits
