"""Keeps what blocks return finite, so that no request's overflow reaches keys and values that others read.

Plans are bounded before they run (``vllm_steer.plan.bounds``); here is what holds whatever ran. Each component of the affine
form moves the stream by no more than a limit, and in float16, where the model itself may overflow on a stream that was
moved, numbers of the stream that are not finite become zero after every block from the first hooked one on. Whatever is
within the limits is not touched, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_steer.plan.bounds import farthest
from vllm_steer.vllm_compat.model_shape import dtype_name

if TYPE_CHECKING:
    from vllm_steer.engine.affine import BlockOutput


def limit_of(dtype: torch.dtype, layers: int) -> float:
    """Returns the length that the vector of a row, and its components together, may move the stream by at one layer.

    Args:
        dtype: The model's dtype.
        layers: Layers that are hooked.
    """
    return farthest(dtype_name(dtype)) / max(layers, 1)


def overflows(dtype: torch.dtype) -> bool:
    """Whether a model of this dtype may overflow on a stream that was moved within the bounds."""
    return dtype == torch.float16


def keep_finite(output: BlockOutput, residual: torch.Tensor | None) -> BlockOutput:
    """Returns what a block returns, with zeros where its stream is not finite in float16.

    Args:
        output: Hidden states, alone or with more beside them.
        residual: The part of the stream beside them, as ``affine.residual_of`` finds it.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    stream = hidden.float() if residual is None else hidden.float() + residual.float()
    fits = stream.to(hidden.dtype).isfinite()
    kept = torch.where(fits, hidden, 0.0)
    if not isinstance(output, tuple):
        return kept
    if residual is None:
        return (kept, *output[1:])
    # What is beside hidden states is the residual only where there is nothing else.
    return (kept, torch.where(fits, residual, 0.0))
