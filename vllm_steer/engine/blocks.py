"""Finds the decoder blocks of a model and adds steering to its graph.

Blocks are found by structure, not by a list of model names: the outermost ``ModuleList`` with as many modules
as the model has layers; lists of the same modules count once. The addition is plain torch in a forward hook
that reads two registered buffers, so that ``torch.compile`` traces it into the block and fuses it with the
norm that follows; no graph break and no custom operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import nn

from vllm_steer.engine import affine, finite
from vllm_steer.engine.affine import BlockOutput
from vllm_steer.engine.bank import SteeringBank
from vllm_steer.engine.readers import ReaderBank, has_readers, write_scores
from vllm_steer.errors import CompatibilityError

ROWS_BUFFER = "_steering_rows"
VECTORS_BUFFER = "_steering_vectors"
# Blocks that return hidden states not yet summed over tensor-parallel ranks, so an addition would be
# multiplied (vllm/models/deepseek_v32, vllm/model_executor/models/minimax_m3).
UNREDUCED_BLOCKS = ("DeepseekV32DecoderLayer", "MiniMaxM3DecoderLayer")


def find_blocks(model: nn.Module, num_layers: int) -> list[nn.Module]:
    """Returns the decoder blocks in order, with placeholders for those of other pipeline stages.

    Args:
        model: The model as vLLM loaded it.
        num_layers: Number of decoder blocks of the whole model.

    Raises:
        CompatibilityError: No list of blocks, or more than one, fits.
    """
    get_language_model = getattr(model, "get_language_model", None)
    if callable(get_language_model):
        # For a vision-language model, whose other tower may have as many blocks.
        model = get_language_model()
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, nn.ModuleList) and not inside:
            outermost[name] = module
    found: dict[str, nn.ModuleList] = {}
    for name, modules in outermost.items():
        # Gemma 4 lists its blocks again, in the part of the model that fills the cache.
        again = any(list(modules) == list(other) for other in found.values())
        if len(modules) == num_layers and not again:
            found[name] = modules
    if len(found) != 1:
        raise CompatibilityError(
            f"cannot tell which modules of {type(model).__name__} are its {num_layers} decoder blocks: "
            f"{len(found)} lists of that length ({', '.join(found) or 'none'}); this model cannot be steered"
        )
    blocks = list(next(iter(found.values())))
    unreduced = sorted({type(block).__name__ for block in blocks} & set(UNREDUCED_BLOCKS))
    if unreduced:
        raise CompatibilityError(
            f"{unreduced[0]} returns hidden states that are not yet summed over tensor-parallel ranks; "
            f"this model cannot be steered"
        )
    return blocks


def hook_blocks(
    blocks: Iterable[tuple[int, nn.Module]], bank: SteeringBank, readers: ReaderBank | None = None
) -> None:
    """Makes each block add its row of the bank to the residual stream, for every token.

    Args:
        blocks: Pairs of layer index and block.
        bank: The vectors and the row of each token.
        readers: The readers; None leaves reads out of the graph.
    """
    for layer, block in blocks:
        block.register_buffer(ROWS_BUFFER, bank.rows, persistent=False)
        block.register_buffer(VECTORS_BUFFER, bank.vectors[bank.index[layer]], persistent=False)
        if bank.rank:
            affine.register(block, bank, layer)
        if readers is not None:
            readers.register(block, layer)
        block.register_forward_hook(_steer_affinely if bank.rank else _add_steering)


def hook_finite(blocks: Iterable[nn.Module]) -> None:
    """Makes each block's output finite, after any steering.

    Args:
        blocks: The first hooked block and all after it, of a model in float16.
    """
    for block in blocks:
        block.register_forward_hook(_keep_finite)


def _add_steering(block: nn.Module, args: object, output: BlockOutput) -> BlockOutput:
    """Adds to the hidden states that a block returns, alone or with the residual.

    The next norm reads hidden + residual, so the sum is steered either way; several architectures return an
    unused residual, so the vector is added to hidden. The sum is computed in float32: the compiler folds a
    same-dtype addition into the down-projection, which then has to store the vectors of all tokens.
    """
    vectors = getattr(block, VECTORS_BUFFER)
    hidden = _hidden(block, output, vectors.shape[-1])
    rows = getattr(block, ROWS_BUFFER)[: hidden.shape[-2]]
    if has_readers(block):
        write_scores(block, _stream(block, output, hidden), vectors[rows].float())
    steered = (hidden.float() + vectors[rows].float()).to(hidden.dtype)
    return (steered, *output[1:]) if isinstance(output, tuple) else steered


def _steer_affinely(block: nn.Module, args: object, output: BlockOutput) -> BlockOutput:
    """Applies the affine form of each token's row to the residual stream; the change is added to hidden."""
    vectors = getattr(block, VECTORS_BUFFER)
    hidden = _hidden(block, output, vectors.shape[-1])
    rows = getattr(block, ROWS_BUFFER)[: hidden.shape[-2]]
    stream = _stream(block, output, hidden)
    factors = affine.factors_of(block, hidden)
    change = factors[:, :1] * vectors[rows].float()
    change = change + affine.affine_change(block, stream, rows, factors[:, 1:])
    change = affine.restored(block, stream, change, rows)
    if has_readers(block):
        write_scores(block, stream, change)
    steered = (hidden.float() + change).to(hidden.dtype)
    return (steered, *output[1:]) if isinstance(output, tuple) else steered


def _stream(block: nn.Module, output: BlockOutput, hidden: torch.Tensor) -> torch.Tensor:
    """The residual stream after a block, in float32."""
    residual = affine.residual_of(block, output)
    return hidden.float() if residual is None else hidden.float() + residual.float()


def _keep_finite(block: nn.Module, args: object, output: BlockOutput) -> BlockOutput:
    """Makes a block's output stream finite: :func:`vllm_steer.engine.finite.keep_finite`."""
    return finite.keep_finite(output, affine.residual_of(block, output))


def _hidden(block: nn.Module, output: BlockOutput, width: int) -> torch.Tensor:
    """The hidden states that a block returns, ``[num_tokens, width]``, optionally with a batch of one."""
    hidden = output[0] if isinstance(output, tuple) and len(output) <= 2 else output
    if not _is_one_stream(hidden, width):
        raise CompatibilityError(
            f"{type(block).__name__} does not return one vector of width {width} for each token, alone "
            f"or with a residual beside it; this model cannot be steered"
        )
    return hidden


def _is_one_stream(hidden: object, width: int) -> TypeGuard[torch.Tensor]:
    """Whether hidden states are ``[num_tokens, width]`` or, with a batch of one, ``[1, num_tokens, width]``.

    Several streams per token, ``[num_tokens, streams, width]``, would take the rows of other tokens.
    """
    if not isinstance(hidden, torch.Tensor) or hidden.shape[-1] != width:
        return False
    return hidden.ndim == 2 or (hidden.ndim == 3 and hidden.shape[0] == 1)
