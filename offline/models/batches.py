"""Prompts to padded batches, without their shared first tokens.

The prompts of one concept differ only in the statement, and the model is causal: the tokens before the
statement have the same keys and values in every prompt. They run once, and the batches continue from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.models.prompts import RenderedPrompt


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded prompts without their shared beginning, on the model's device.

    Attributes:
        indices: Which of all prompts these are, in the order of the rows.
        token_ids: ``[batch, length]``, int64.
        shared: Number of tokens before ``token_ids``, the same in every row.
        real: ``[batch, length]``, bool; False on padding.
        spans: ``[batch, 2]``, int64; prefix tokens ``[start, end)``, counted from the prompt's start.
        ends: ``[batch]``, int64; number of tokens of each prompt, shared ones included.
        candidates: ``[batch, candidates]``, int64; positions in ``token_ids`` of the last real tokens.
    """

    indices: tuple[int, ...]
    token_ids: Tensor
    shared: int
    real: Tensor
    spans: Tensor
    ends: Tensor
    candidates: Tensor

    @property
    def attention_mask(self) -> Tensor:
        """``[batch, shared + length]``, int64; 1 on real tokens."""
        before = self.real.new_ones(len(self.real), self.shared)
        return torch.cat([before, self.real], dim=1).long()

    @property
    def prefix(self) -> Tensor:
        """``[batch, shared + length]``, float32; 1 on prefix tokens."""
        position = torch.arange(self.shared + self.token_ids.shape[1], device=self.spans.device)
        return ((position >= self.spans[:, :1]) & (position < self.spans[:, 1:])).float()


def shared_length(prompts: Sequence[RenderedPrompt], candidates: int) -> int:
    """Returns the number of first tokens shared by all prompts, leaving each at least its candidates.

    Raises:
        ExtractionError: A prompt has fewer tokens than there are candidates.
    """
    lengths = [len(prompt.token_ids) for prompt in prompts]
    if min(lengths) < candidates:
        raise ExtractionError(
            f"a prompt has {min(lengths)} tokens, fewer than the {candidates} candidates"
        )
    if len(prompts) == 1:
        return 0
    # Tokens shared by the first and the last in sorted order are shared by all in between.
    first, *_, last = sorted(prompt.token_ids for prompt in prompts)
    differing = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return min(next(differing, min(len(first), len(last))), min(lengths) - candidates)


def make_batches(
    prompts: Sequence[RenderedPrompt],
    candidates: int,
    batch_size: int,
    shared: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Yields batches of prompts of similar length, each prompt once.

    Args:
        prompts: Rendered prompts.
        candidates: Number of last tokens to keep, N.
        batch_size: Prompts in a batch.
        shared: Number of first tokens to leave out; see ``shared_length``.
        device: Where the tensors go.
    """
    by_length = np.argsort([len(prompt.token_ids) for prompt in prompts], kind="stable").tolist()
    for start in range(0, len(prompts), batch_size):
        indices = by_length[start : start + batch_size]
        yield _pad([prompts[index] for index in indices], indices, candidates, shared, device)


def _pad(
    prompts: Sequence[RenderedPrompt],
    indices: Sequence[int],
    candidates: int,
    shared: int,
    device: torch.device,
) -> Batch:
    ends = torch.tensor([len(prompt.token_ids) for prompt in prompts])
    token_ids = torch.zeros(len(prompts), int(ends.max()) - shared, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt.token_ids) - shared] = torch.tensor(prompt.token_ids[shared:])
    lengths = (ends - shared)[:, None]
    return Batch(
        indices=tuple(indices),
        token_ids=token_ids.to(device),
        shared=shared,
        real=(torch.arange(token_ids.shape[1]) < lengths).to(device),
        spans=torch.tensor([prompt.prefix_span for prompt in prompts]).to(device),
        ends=ends.to(device),
        candidates=(lengths + torch.arange(-candidates, 0)).to(device),
    )


class _SharedLayer(DynamicLayer):
    """Keys and values of the shared tokens at one block, for batches of any size.

    Keys and values of a batch are returned but not kept, so memory does not grow with the blocks.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._shared = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = (shared.expand(len(key_states), -1, -1, -1) for shared in self._shared)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def run_shared(model: PreTrainedModel, token_ids: Sequence[int]) -> Cache:
    """Runs the shared tokens once and returns their cache, which batches only read.

    Args:
        model: A decoder-only model.
        token_ids: The shared tokens.

    Raises:
        ExtractionError: A block caches something other than keys and values, as recurrent ones do.
    """
    # Without a configuration every layer keeps all tokens, those with a sliding window too; the
    # attention mask still lets each see its window alone.
    cache = DynamicCache()
    model.base_model(
        input_ids=torch.tensor([list(token_ids)], device=model.device),
        past_key_values=cache,
        use_cache=True,
    )
    layers: list[Any] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            raise ExtractionError("a block keeps no keys and values to continue from")
        layers.append(_SharedLayer(keys, values))
    return Cache(layers=layers)
