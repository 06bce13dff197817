"""What is trained: how a change of the residual stream is parametrised, for several lessons at several blocks.

Parameters have the axes ``[lessons, layers]`` in front. A row of a batch belongs to a lesson. Parameters are float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from vllm_steer.offline.models.hooks import Change, added
from vllm_steer.offline.train.edits import low_rank, multiplied


class Form(nn.Module, ABC):
    """Parameters that are trained."""

    @abstractmethod
    def learned(self, lesson: int) -> dict[str, Tensor]:
        """Returns what one lesson has learned, float32 ``[layers, ...]`` by name, to be served."""

    def rates(self, rate: float) -> list[dict[str, object]]:
        """Returns the groups of parameters for the optimiser, each with its step."""
        return [{"params": list(self.parameters()), "lr": rate}]

    def before_step(self) -> None:
        """What is done to gradients before the optimiser's step."""

    def after_step(self) -> None:
        """What is done to parameters after it."""


class ChangingForm(Form):
    """A form that changes hidden states by itself, whatever the objective."""

    @abstractmethod
    def change(self, lessons: Sequence[int], acting: Tensor | None) -> Change:
        """Returns the change of a batch.

        Args:
            lessons: Lesson of each row.
            acting: ``[rows, length]``, bool, where it acts; None for everywhere.
        """


class Vectors(ChangingForm):
    """A vector at each block, in units of the block's residual stream, so that steps are relative to it."""

    unit: Tensor

    def __init__(self, start: Tensor, norms: Tensor) -> None:
        """Begins at given vectors.

        Args:
            start: ``[lessons, layers, hidden_size]``.
            norms: ``[lessons, layers]``; norm of the residual stream after each block.
        """
        super().__init__()
        # A coordinate of 1 is as long as the block's residual stream has it on average.
        self.register_buffer("unit", norms[..., None] / start.shape[-1] ** 0.5)
        self.steps = nn.Parameter(start / self.unit)

    @property
    def vectors(self) -> Tensor:
        """``[lessons, layers, hidden_size]``, what is added."""
        return self.steps * self.unit

    def change(self, lessons: Sequence[int], acting: Tensor | None) -> Change:
        return additions(self.vectors[list(lessons)], acting)

    def learned(self, lesson: int) -> dict[str, Tensor]:
        return {"vectors": self.vectors[lesson]}


class ScaledVectors(ChangingForm):
    """A direction and a factor of it at each block, trained together with steps of their own."""

    unit: Tensor

    def __init__(self, directions: Tensor, unit: Tensor, factor_rate: float) -> None:
        """Begins at given directions, each with the factor 1.

        Args:
            directions: ``[lessons, layers, hidden_size]``.
            unit: ``[lessons, layers]``; what a coordinate of 1 is with the factor 1.
            factor_rate: Step of the factors, which have the same for all lessons and blocks.
        """
        super().__init__()
        self.register_buffer("unit", unit[..., None])
        self.directions = nn.Parameter(directions)
        self.factors = nn.Parameter(torch.ones_like(unit))
        self._factor_rate = factor_rate

    @property
    def vectors(self) -> Tensor:
        """``[lessons, layers, hidden_size]``, what is added."""
        return self.factors[..., None] * self.directions * self.unit

    def change(self, lessons: Sequence[int], acting: Tensor | None) -> Change:
        return additions(self.vectors[list(lessons)], acting)

    def learned(self, lesson: int) -> dict[str, Tensor]:
        return {"vectors": self.vectors[lesson], "factors": self.factors[lesson]}

    def rates(self, rate: float) -> list[dict[str, object]]:
        return [
            {"params": [self.directions], "lr": rate},
            {"params": [self.factors], "lr": self._factor_rate},
        ]


class _Orthonormal(nn.Module):
    """Matrices with orthonormal columns, ``[lessons, layers, hidden_size, rank]``, parametrised by the library."""

    def __init__(self, shape: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        drawn = torch.randn(*shape, generator=generator)
        self.weight = nn.Parameter(torch.linalg.qr(drawn).Q)


class LowRank(ChangingForm):
    """R, W and b of LoReFT (arXiv 2404.03592) at each block, none shared."""

    def __init__(self, shape: tuple[int, int], hidden_size: int, rank: int, seed: int) -> None:
        """Draws the beginning.

        Args:
            shape: Lessons and layers.
            hidden_size: Width of the residual stream.
            rank: Rows of R.
            seed: Of the draw.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = _Orthonormal((*shape, hidden_size, rank), generator)
        # The library completes the basis by a draw of its own.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.subspace = parametrizations.orthogonal(drawn)
        # As the layers of torch are that the authors' code takes: uniform within the root of the width.
        bound = hidden_size**-0.5
        weight = torch.rand(*shape, rank, hidden_size, generator=generator)
        bias = torch.rand(*shape, rank, generator=generator)
        self.weight = nn.Parameter((2 * weight - 1) * bound)
        self.bias = nn.Parameter((2 * bias - 1) * bound)

    @property
    def projection(self) -> Tensor:
        """R, ``[lessons, layers, rank, hidden_size]``."""
        weight: Tensor = self.subspace.weight  # type: ignore[assignment]
        return weight.transpose(-1, -2)

    def change(self, lessons: Sequence[int], acting: Tensor | None) -> Change:
        rows = list(lessons)
        projection, weight, bias = self.projection[rows], self.weight[rows], self.bias[rows]

        def changed(at: int, hidden: Tensor) -> Tensor:
            found = low_rank(hidden.float(), projection[:, at], weight[:, at], bias[:, at])
            return where(acting, found.to(hidden.dtype), hidden)

        return changed

    def learned(self, lesson: int) -> dict[str, Tensor]:
        return {
            "projection": self.projection[lesson],
            "weight": self.weight[lesson],
            "bias": self.bias[lesson],
        }


class ScaledDimensions(ChangingForm):
    """Factors of the dimensions and a vector at each block, beginning at no change."""

    unit: Tensor

    def __init__(self, norms: Tensor, hidden_size: int) -> None:
        """Begins at zeros.

        Args:
            norms: ``[lessons, layers]``; norm of the residual stream after each block.
            hidden_size: Width of the residual stream.
        """
        super().__init__()
        # As for ``Vectors``; factors have no unit.
        self.register_buffer("unit", norms[..., None] / hidden_size**0.5)
        shape = (*norms.shape, hidden_size)
        self.factors = nn.Parameter(torch.zeros(shape))
        self.steps = nn.Parameter(torch.zeros(shape))

    def change(self, lessons: Sequence[int], acting: Tensor | None) -> Change:
        rows = list(lessons)
        factors, offsets = self.factors[rows], (self.steps * self.unit)[rows]

        def changed(at: int, hidden: Tensor) -> Tensor:
            found = multiplied(hidden.float(), factors[:, at], offsets[:, at])
            return where(acting, found.to(hidden.dtype), hidden)

        return changed

    def learned(self, lesson: int) -> dict[str, Tensor]:
        return {"factors": self.factors[lesson], "bias": (self.steps * self.unit)[lesson]}


class UnitVectors(Form):
    """A vector of length 1 at each block, kept at it after every step."""

    def __init__(self, start: Tensor, tangent: bool) -> None:
        """Begins at given vectors.

        Args:
            start: ``[lessons, layers, hidden_size]``, of any length.
            tangent: Whether gradients lose their part along the vector.
        """
        super().__init__()
        self.units = nn.Parameter(nn.functional.normalize(start, dim=-1))
        self._tangent = tangent

    def learned(self, lesson: int) -> dict[str, Tensor]:
        return {"vectors": self.units[lesson]}

    @torch.no_grad()
    def before_step(self) -> None:
        gradient = self.units.grad
        if self._tangent and gradient is not None:
            gradient -= (gradient * self.units).sum(-1, keepdim=True) * self.units

    @torch.no_grad()
    def after_step(self) -> None:
        self.units.copy_(nn.functional.normalize(self.units, dim=-1))


def additions(vectors: Tensor, acting: Tensor | None) -> Change:
    """Returns the change that adds a vector to every position, or to those where it acts.

    Args:
        vectors: ``[rows, layers, hidden_size]``.
        acting: ``[rows, length]``, bool; None for everywhere.
    """
    if acting is None:
        return added(vectors)
    return lambda at, hidden: (
        hidden + torch.where(acting[..., None], vectors[:, at, None], 0.0).to(hidden.dtype)
    )


def where(acting: Tensor | None, changed: Tensor, hidden: Tensor) -> Tensor:
    """Returns the changed states where a form acts, and the others elsewhere."""
    return changed if acting is None else torch.where(acting[..., None], changed, hidden)


def snapshot(learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies that training does not change."""
    return {name: value.detach().clone() for name, value in learned.items()}
