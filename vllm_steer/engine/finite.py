"""Keeps block outputs finite, so that no request's overflow reaches keys and values that others read.

Plans are bounded before they run (``vllm_steer.plan.bounds``); this holds regardless of the plan. Each
component of the affine form moves the stream by at most a limit. In float16, where the model itself may
overflow on a moved stream, non-finite values of the stream become zero after every block from the first
hooked one on. Values within the limits are not changed, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_steer.plan.bounds import farthest
from vllm_steer.vllm_compat.model_shape import dtype_name

if TYPE_CHECKING:
    from vllm_steer.engine.affine import BlockOutput


def limit_of(dtype: torch.dtype, layers: int) -> float:
    """Returns the limit on how far a row's vector, and its components together, may move the stream at one
    layer.

    Args:
        dtype: The model's dtype.
        layers: Number of hooked layers.
    """
    return farthest(dtype_name(dtype)) / max(layers, 1)


def overflows(dtype: torch.dtype) -> bool:
    """Whether a model of this dtype may overflow on a stream moved within the bounds."""
    return dtype == torch.float16


def keep_finite(output: BlockOutput, residual: torch.Tensor | None) -> BlockOutput:
    """Returns a block's output, with zeros where its stream is not finite in float16.

    Args:
        output: Hidden states, alone or with other tensors.
        residual: The other part of the stream, from ``affine.residual_of``.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    stream = hidden.float() if residual is None else hidden.float() + residual.float()
    fits = stream.to(hidden.dtype).isfinite()
    kept = torch.where(fits, hidden, 0.0)
    if not isinstance(output, tuple):
        return kept
    if residual is None:
        return (kept, *output[1:])
    # The second tensor is the residual only if there is no third.
    return (kept, torch.where(fits, residual, 0.0))
