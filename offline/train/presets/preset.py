"""What a preset is: an objective of a form, with the settings of its paper, and what is served of what it learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from torch import Tensor

from vllm_steer.offline.models.likelihood import AnswerModel
from vllm_steer.offline.train.directions import Direction
from vllm_steer.offline.train.examples import E
from vllm_steer.offline.train.objectives.objective import Objective
from vllm_steer.offline.train.positions import Positions
from vllm_steer.offline.train.trainer import Result

if TYPE_CHECKING:
    from vllm_steer.offline.train.settings import TrainSettings


@dataclass(frozen=True, eq=False)
class Bench:
    """What a preset works with.

    Attributes:
        answers: The frozen model, with the blocks that are changed.
        norms: ``[layers]``, float32; median norm of the residual stream after each of them.
        hidden_size: Width of the residual stream.
        positions: Where it acts.
        settings: The settings.
    """

    answers: AnswerModel
    norms: Tensor
    hidden_size: int
    positions: Positions
    settings: TrainSettings


class Preset(ABC, Generic[E]):
    """One way to train.

    Attributes:
        paper: Its arXiv id; empty for the project's own.
        example: What it is trained on.
        defaults: Settings that it has where no others are asked for.
        takes: Settings that belong to it, beside those of all.
        one_layer: Whether it trains one block at a time.
        without_template: Whether it leaves out the tokens of the chat template before the user's text.
    """

    paper: ClassVar[str]
    example: ClassVar[type[Any]]
    defaults: ClassVar[Mapping[str, Any]]
    takes: ClassVar[frozenset[str]] = frozenset()
    one_layer: ClassVar[bool] = False
    without_template: ClassVar[bool] = False

    @abstractmethod
    def objective(self, bench: Bench) -> Objective[E]:
        """Returns the objective of one direction."""

    @abstractmethod
    def directions(
        self, name: str, objective: Any, result: Result, examples: Sequence[E]
    ) -> list[Direction]:
        """Returns what a pack holds of a result.

        Args:
            name: Name of what was learned.
            objective: What :meth:`objective` returned, trained.
            result: What was kept.
            examples: What it was learned from.
        """

    def layers(self, blocks: int) -> list[int]:
        """Returns the blocks that it trains where none are asked for.

        Args:
            blocks: Number of the model's blocks.
        """
        # Where the papers steer models of 26 to 42 blocks, or near it.
        return [(blocks - 1) // 2]
