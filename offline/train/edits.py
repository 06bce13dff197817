"""What a trained form makes of hidden states, each by its own formula.

Hidden states are float32 ``[rows, length, hidden_size]``; what a row is changed by has the rows in front. Float32, as the
engine changes the residual stream, whatever the model runs in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(hidden: Tensor, projection: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns h + Rᵀ(W·h + b − R·h), the low-rank linear subspace of LoReFT (arXiv 2404.03592, Eq. 2).

    Args:
        hidden: h.
        projection: R, ``[rows, rank, hidden_size]`` with orthonormal rows.
        weight: W, ``[rows, rank, hidden_size]``.
        bias: b, ``[rows, rank]``.
    """
    read = hidden @ (weight - projection).transpose(-1, -2) + bias[:, None]
    return hidden + read @ projection


def multiplied(hidden: Tensor, factors: Tensor, offsets: Tensor) -> Tensor:
    """Returns h ⊙ (1 + m) + a, each dimension scaled and moved (arXiv 2502.01179, of a head's output there).

    Args:
        hidden: h.
        factors: m, ``[rows, hidden_size]``.
        offsets: a, ``[rows, hidden_size]``.
    """
    return hidden * (1.0 + factors[:, None]) + offsets[:, None]


def clamped(hidden: Tensor, unit: Tensor, value: Tensor) -> Tensor:
    """Returns h + (s − w·h)·w: the component along a unit vector is set.

    Args:
        hidden: h.
        unit: w, ``[rows, hidden_size]``.
        value: s, ``[rows]``.
    """
    return hidden + (value[:, None] - along(hidden, unit))[..., None] * unit[:, None]


def along(hidden: Tensor, unit: Tensor) -> Tensor:
    """Returns w·h, ``[rows, length]``."""
    return torch.einsum("rlh,rh->rl", hidden, unit)


def detected(hidden: Tensor, unit: Tensor, acting: Tensor) -> Tensor:
    """Returns ReLU(w·h), ``[rows, length]``, how much a concept is there; 0 where nothing acts.

    Args:
        hidden: h.
        unit: w, ``[rows, hidden_size]``.
        acting: ``[rows, length]``, bool.
    """
    return torch.where(acting, along(hidden, unit).relu(), 0.0)


def strongest(latents: Tensor, count: int) -> Tensor:
    """Returns which latents are the ``count`` largest of their row, ``[rows, length]``, bool; of equal ones the first."""
    order = latents.detach().argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(latents, dtype=torch.bool)
    return chosen.scatter(-1, order[:, :count], True)
