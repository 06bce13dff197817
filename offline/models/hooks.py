"""Hooks on a model's decoder blocks: seeing their outputs and attention weights, changing outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

BlockOutput = Tensor | tuple[Tensor, *tuple[object, ...]]
"""A decoder block's output: hidden states ``[batch, length, hidden_size]``, alone or with other values."""
See = Callable[[int, Tensor], None]
"""Is shown a block's number and a tensor of it."""
Change = Callable[[int, Tensor], Tensor]
"""Takes a block's number and output ``[batch, length, hidden_size]``, returns what to put in its place."""


@contextmanager
def watched(
    blocks: Sequence[nn.Module] | nn.ModuleList, see_output: See, see_attention: See | None = None
) -> Iterator[None]:
    """Shows the output of every block, and its attention weights, while the context lasts.

    Args:
        blocks: Decoder blocks in their order.
        see_output: Is shown block outputs ``[batch, length, hidden_size]``.
        see_attention: Is shown attention weights ``[batch, heads, queries, keys]``; None for none.
    """
    handles = []
    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_hook(_output_hook(index, see_output)))
            if see_attention is not None:
                handles += [
                    child.register_forward_hook(_attention_hook(index, see_attention))
                    for child in block.children()
                ]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changed(blocks: Sequence[nn.Module] | nn.ModuleList, change: Change) -> Iterator[None]:
    """Replaces every block's output while the context lasts."""
    handles = []
    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_hook(_changing_hook(index, change)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def added(vectors: Tensor) -> Change:
    """Returns the change that adds a vector to every position.

    Args:
        vectors: ``[rows, blocks, hidden_size]`` or ``[1, blocks, hidden_size]``.
    """
    return lambda block, hidden: hidden + vectors[:, block, None].to(hidden.dtype)


def _output_hook(block: int, see: See) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: BlockOutput) -> None:
        see(block, output[0] if isinstance(output, tuple) else output)

    return hook


def _attention_hook(block: int, see: See) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        # Attention modules return (output, weights); no other child of a block returns 4 dimensions.
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
            weights = output[1]
            if weights.dim() == 4:
                see(block, weights)

    return hook


def _changing_hook(block: int, change: Change) -> Callable[..., BlockOutput]:
    def hook(module: nn.Module, args: object, output: BlockOutput) -> BlockOutput:
        if isinstance(output, tuple):
            return change(block, output[0]), *output[1:]
        return change(block, output)

    return hook
