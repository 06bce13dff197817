"""The affine form in the graph of a block: h ← h + f_0 vector + Σ_k f_k c_k U_k, see ``row_values``.

The factors f are per token, from the schedules of a request. All forms read the stream as the block returned it,
those that scale its dimensions too, and their changes are summed, so there is no order among them; only then is a
norm restored.
It acts on the true residual stream, which a block returns in two parts if vLLM fuses the addition with the
next norm. A self-test at startup (``residual_selftest``) proves that the parts are read correctly.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_steer.engine.bank import SteeringBank
from vllm_steer.engine.row_values import BIAS, MOST, SHARE, SLOPE, THRESHOLD, TURN
from vllm_steer.plan.capacity import PLANE_RANK

# A block's output: hidden states, alone or with the residual or None.
BlockOutput = torch.Tensor | tuple[torch.Tensor, *tuple[torch.Tensor | None, ...]]

LEFT_BUFFER = "_steering_left"
READERS_BUFFER = "_steering_readers"
NUMBERS_BUFFER = "_steering_numbers"
RESTORE_BUFFER = "_steering_restore"
FACTORS_BUFFER = "_steering_factors"
DIAGONAL_BUFFER = "_steering_diagonal"
_TINY = torch.finfo(torch.float32).tiny
# Blocks that return an unused second tensor of the same shape: hidden is the whole stream.
UNREAD_RESIDUALS = (
    "Cohere2MoeDecoderLayer",
    "CohereCompassDecoderLayer",
    "CohereDecoderLayer",
    "Exaone4DecoderLayer",
    "GraniteMoeHybridAttentionDecoderLayer",
    "GraniteMoeHybridMambaDecoderLayer",
    "HyperCLOVAXDecoderLayer",
    "MuseGlimmerDecoderLayer",
    "PhiMoEDecoderLayer",
    "StablelmDecoderLayer",
)


def register(block: nn.Module, bank: SteeringBank, layer: int) -> None:
    """Registers the buffers of the affine form in a block.

    Args:
        block: The block of ``layer``.
        bank: The bank, of rank 1 at least.
        layer: Its layer.
    """
    at = bank.index[layer]
    block.register_buffer(LEFT_BUFFER, bank.left[at], persistent=False)
    block.register_buffer(READERS_BUFFER, bank.readers[at], persistent=False)
    block.register_buffer(NUMBERS_BUFFER, bank.numbers[at], persistent=False)
    block.register_buffer(RESTORE_BUFFER, bank.restore[at], persistent=False)
    block.register_buffer(FACTORS_BUFFER, bank.factors, persistent=False)
    if bank.multiply:
        block.register_buffer(DIAGONAL_BUFFER, bank.diagonal[at], persistent=False)


def residual_of(block: nn.Module, output: BlockOutput) -> torch.Tensor | None:
    """The part of the residual stream that a block returns in addition to its hidden states."""
    if not isinstance(output, tuple) or len(output) != 2 or output[1] is None:
        return None
    if type(block).__name__ in UNREAD_RESIDUALS:
        return None
    return output[1]


def factors_of(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The factors of each token's vector and components, float32 ``[num_tokens, 1 + rank]``."""
    factors: torch.Tensor = getattr(block, FACTORS_BUFFER)
    return factors[: hidden.shape[-2]]


def affine_change(
    block: nn.Module, stream: torch.Tensor, rows: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """Returns the change by each token's row, without its vector.

    Args:
        block: A block with the buffers.
        stream: Float32 ``[num_tokens, hidden_size]``, the residual stream.
        rows: int32 ``[num_tokens]``.
        factors: Float32 ``[num_tokens, rank]``.

    Returns:
        Float32 ``[num_tokens, hidden_size]``.
    """
    left = getattr(block, LEFT_BUFFER)[rows].float()
    readers = getattr(block, READERS_BUFFER)[rows].float()
    numbers = getattr(block, NUMBERS_BUFFER)[rows]
    rank = left.shape[-2]
    read = (readers * stream.unsqueeze(-2)).sum(-1)
    own, probed = read[..., :rank], read[..., rank:]
    pairs = own.unflatten(-1, (-1, PLANE_RANK))
    lengths = pairs.square().sum(-1, keepdim=True).sqrt().expand_as(pairs).flatten(-2)
    values = own + numbers[..., BIAS, :] + numbers[..., TURN, :] * lengths
    threshold, slope = numbers[..., THRESHOLD, :], numbers[..., SLOPE, :]
    soft = torch.sigmoid(slope * (probed - threshold))
    gate = torch.where(slope > 0, soft, (probed > threshold).float())
    most = numbers[..., MOST, :]
    opened = factors * gate
    # Nothing of a closed gate, not even an overflow.
    acting = torch.where(gate > 0, opened * values, 0.0).clamp(-most, most)
    change: torch.Tensor = (acting.unsqueeze(-1) * left).sum(-2)
    diagonal: torch.Tensor | None = getattr(block, DIAGONAL_BUFFER, None)
    if diagonal is None:
        return change
    share = numbers[..., SHARE, :]
    amount = (share * opened).sum(-1, keepdim=True)
    longest = (share * most).sum(-1, keepdim=True)
    # Finite first, so that its length is.
    grown = (amount * diagonal[rows].float() * stream).clamp(-longest, longest)
    length = grown.norm(dim=-1, keepdim=True)
    change += grown * (longest / length.clamp(min=_TINY)).clamp(max=1.0)
    return change


def restored(
    block: nn.Module, stream: torch.Tensor, change: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Returns the change with the stream's norm restored, for rows that restore it.

    Args:
        block: A block with the buffers.
        stream: Float32 ``[num_tokens, hidden_size]``, before the change.
        change: Float32 of the same shape.
        rows: int32 ``[num_tokens]``.
    """
    after = stream + change
    factor = stream.norm(dim=-1, keepdim=True) / after.norm(dim=-1, keepdim=True)
    asked = getattr(block, RESTORE_BUFFER)[rows].unsqueeze(-1) > 0
    # A zero stream has no direction in which to restore the norm.
    return torch.where(asked & factor.isfinite(), after * factor - stream, change)
