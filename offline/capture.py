"""One forward pass per prompt: block outputs and attention to the prefix at the candidate tokens.

The model runs in Hugging Face's eager attention. Each block's attention matrix is reduced to
``[batch, candidates]`` by a hook as soon as it exists, so that one matrix lives at a time, whatever
the number of blocks. Block outputs are taken by hooks too: ``hidden_states[-1]`` of Hugging Face
has passed the final norm, but steering adds before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from offline.models import find_blocks
from offline.prompts import RenderedPrompt
from vllm_steer.errors import ExtractionError


@dataclass(frozen=True, eq=False)
class Captured:
    """What the forward passes leave behind, in the order of the prompts.

    Attributes:
        attention: ``[prompts, blocks, candidates]``, float32; mean over heads of the attention
            that a candidate token pays to all prefix tokens together, 0 without a prefix.
        hidden: ``[prompts, blocks, candidates, hidden_size]``, float32; block outputs, the last
            block's before the final norm.
        residual_norms: ``[blocks]``, float64; mean Euclidean norm of the block output over every
            token of every prompt.
    """

    attention: NDArray[np.float32]
    hidden: NDArray[np.float32]
    residual_norms: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Right-padded prompts, on the model's device.

    Attributes:
        token_ids: ``[batch, length]``, int64.
        real: ``[batch, length]``, bool; False on padding.
        prefix: ``[batch, length]``, float32; 1 on prefix tokens.
        candidates: ``[batch, candidates]``, int64; positions of the last real tokens.
    """

    token_ids: Tensor
    real: Tensor
    prefix: Tensor
    candidates: Tensor


@dataclass(eq=False)
class _Recorder:
    """What the hooks write during one forward pass: one entry per block."""

    batch: _Batch
    attention: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    norm_sums: dict[int, Tensor] = field(default_factory=dict)

    def see_attention(self, block: int, weights: Tensor) -> None:
        """Reduces weights ``[batch, heads, length, length]`` to the candidates' prefix sums."""
        rows = torch.arange(len(weights), device=weights.device)[:, None]
        chosen = weights[rows, :, self.batch.candidates].float()
        to_prefix = (chosen * self.batch.prefix[:, None, None, :]).sum(dim=-1)
        self.attention[block] = to_prefix.mean(dim=-1)

    def see_output(self, block: int, output: Tensor) -> None:
        """Keeps the candidates of a block output ``[batch, length, hidden_size]``."""
        rows = torch.arange(len(output), device=output.device)[:, None]
        self.hidden[block] = output[rows, self.batch.candidates].float()
        norms = torch.linalg.vector_norm(output.float(), dim=-1)
        self.norm_sums[block] = norms[self.batch.real].sum(dtype=torch.float64)


def capture(
    model: PreTrainedModel,
    prompts: Sequence[RenderedPrompt],
    *,
    candidates: int,
    batch_size: int,
    progress: str | None = None,
) -> Captured:
    """Runs every prompt once and keeps what the method needs of it.

    Padding is on the right and masked, and the results equal those of single prompts; prompts are
    batched by length and come back in their own order.

    Args:
        model: A decoder-only model, loaded with ``attn_implementation="eager"``.
        prompts: Rendered prompts; at least one, each of at least ``candidates`` tokens.
        candidates: Number of last tokens to keep, N.
        batch_size: Prompts per forward pass.
        progress: Text beside the progress bar; None for no bar.

    Raises:
        ExtractionError: The model's blocks or attention weights cannot be found, or a block output
            is not finite.
    """
    config = model.config.get_text_config()
    blocks = find_blocks(model, config.num_hidden_layers)
    shape = (len(prompts), len(blocks), candidates)
    attention = np.zeros(shape, dtype=np.float32)
    hidden = np.zeros((*shape, config.hidden_size), dtype=np.float32)
    norm_sums = np.zeros(len(blocks))
    model.train(False)
    by_length = np.argsort([len(prompt.token_ids) for prompt in prompts], kind="stable")
    with tqdm(
        total=len(prompts), desc=progress, unit="prompt", disable=progress is None, leave=False
    ) as bar:
        for start in range(0, len(prompts), batch_size):
            chosen = by_length[start : start + batch_size]
            batch = _pad([prompts[index] for index in chosen], candidates, model.device)
            recorder = _run(model, blocks, batch)
            attention[chosen] = _stack(recorder.attention)
            hidden[chosen] = _stack(recorder.hidden)
            norm_sums += [float(recorder.norm_sums[block]) for block in range(len(blocks))]
            bar.update(len(chosen))
    _check_finite(hidden)
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    return Captured(attention, hidden, norm_sums / tokens)


def _pad(prompts: Sequence[RenderedPrompt], candidates: int, device: torch.device) -> _Batch:
    lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
    if int(lengths.min()) < candidates:
        raise ExtractionError(
            f"a prompt has {int(lengths.min())} tokens, fewer than the {candidates} candidates"
        )
    shape = (len(prompts), int(lengths.max()))
    token_ids = torch.zeros(shape, dtype=torch.int64)
    prefix = torch.zeros(shape)
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt.token_ids)] = torch.tensor(prompt.token_ids)
        prefix[row, slice(*prompt.prefix_span)] = 1.0
    real = torch.arange(shape[1]) < lengths[:, None]
    last = lengths[:, None] + torch.arange(-candidates, 0)
    return _Batch(token_ids.to(device), real.to(device), prefix.to(device), last.to(device))


def _run(model: PreTrainedModel, blocks: nn.ModuleList, batch: _Batch) -> _Recorder:
    recorder = _Recorder(batch)
    # The backbone alone: logits over the vocabulary would be computed for nothing.
    with torch.inference_mode(), _hooked(blocks, recorder):
        model.base_model(
            input_ids=batch.token_ids, attention_mask=batch.real.long(), use_cache=False
        )
    missing = [block for block in range(len(blocks)) if block not in recorder.attention]
    if missing:
        raise ExtractionError(
            f"blocks {missing} gave no attention weights; load the model with "
            f"attn_implementation='eager' (blocks without attention cannot be used)"
        )
    return recorder


@contextmanager
def _hooked(blocks: nn.ModuleList, recorder: _Recorder) -> Iterator[None]:
    """Registers the hooks of every block and takes them off again."""
    handles = []
    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_hook(_output_hook(index, recorder)))
            handles += [
                child.register_forward_hook(_attention_hook(index, recorder))
                for child in block.children()
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(block: int, recorder: _Recorder) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        recorder.see_output(block, output[0] if isinstance(output, tuple) else output)

    return hook


def _attention_hook(block: int, recorder: _Recorder) -> Any:
    length = recorder.batch.token_ids.shape[1]

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # Eager attention modules return (output, weights); no other child of a block does.
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
            weights = output[1]
            if weights.dim() == 4 and weights.shape[-2:] == (length, length):
                recorder.see_attention(block, weights)

    return hook


def _stack(by_block: dict[int, Tensor]) -> NDArray[np.float32]:
    return torch.stack([by_block[block] for block in range(len(by_block))], dim=1).cpu().numpy()


def _check_finite(hidden: NDArray[np.float32]) -> None:
    finite = np.isfinite(hidden).all(axis=(0, 2, 3))
    if not finite.all():
        raise ExtractionError(
            f"blocks {np.flatnonzero(~finite).tolist()} give NaN or Inf; run the model in float32 "
            f"or bfloat16"
        )
