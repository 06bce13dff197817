"""The fast path: attention weights of only the candidate tokens, alongside a fused attention kernel.

Eager attention computes ``length × length`` weights for every head; the method reads N rows of them.
This attention implementation, registered with Hugging Face's interface, lets the fused kernel compute
the output and the N rows from the same queries and keys, after rotary embeddings, query-key norms and
whatever else the family applies to them. A model whose attention it cannot follow is refused by
``UnsupportedAttentionError`` or detected by ``vllm_steer.offline.extract.capture.choose_path``, and runs
eagerly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "candidate_rows"

# Arguments by which families change the weights in ways that the fused kernel or the rows do not support.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sinks")

_rows: ContextVar[tuple[Tensor, int] | None] = ContextVar("candidate_rows", default=None)


class UnsupportedAttentionError(Exception):
    """The model's attention weights are not the softmax of masked scaled products alone."""


@contextmanager
def only_rows(model: PreTrainedModel, candidates: Tensor, shared: int) -> Iterator[None]:
    """Within it, attention modules return the weights of the candidates, ``[batch, heads, N, keys]``.

    Args:
        model: The model; its attention implementation is restored afterwards.
        candidates: ``[batch, N]``, int64; positions among the queries.
        shared: Number of keys before the first query.
    """
    before = model.config._attn_implementation
    token = _rows.set((candidates, shared))
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        _rows.reset(token)
        model.set_attn_implementation(before)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attends by the fused kernel and returns the candidates' weights with the output.

    Args:
        module: The attention module.
        query: ``[batch, heads, queries, head_dim]``, model dtype.
        key: ``[batch, key_heads, keys, head_dim]``.
        value: Likewise.
        attention_mask: ``[batch, 1, queries, keys]``, bool; None for causal attention.
        scaling: Factor of the products; None for ``head_dim ** -0.5``.
        **kwargs: What else the family passes.

    Raises:
        UnsupportedAttentionError: Something is passed that the weights here would lack.
    """
    wanted = _rows.get()
    odd = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if wanted is None or odd or (attention_mask is not None and attention_mask.dtype != torch.bool):
        raise UnsupportedAttentionError(f"{type(module).__name__} passes {odd}")
    candidates, shared = wanted
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    row = torch.arange(len(query), device=query.device)[:, None]
    chosen = query[row, :, candidates].transpose(1, 2)  # [batch, heads, N, head_dim]
    keys = repeat_kv(key, query.shape[1] // key.shape[1])
    scores = chosen @ keys.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    seen = torch.arange(key.shape[2], device=key.device) <= (shared + candidates)[..., None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, 0].expand(len(query), -1, -1)[row, candidates]
    scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    # The reference rounds the weights to the model's dtype.
    return output, scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
