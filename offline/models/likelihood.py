"""Log-likelihoods of answers while a model's residual stream is changed; gradients flow to the change.

Rows are padded on the right, where a causal model does not see it, so no mask and no positions are needed,
and every family works.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.models.hooks import Change, See, added, changed, watched
from vllm_steer.offline.models.loading import find_blocks

Tokens = Sequence[int]


@dataclass(frozen=True, eq=False)
class Padded:
    """Prompts with their answers, padded to one length.

    Attributes:
        token_ids: ``[rows, length]``, int64.
        kept: ``[span]``, int64; positions whose logits are needed, the same for all rows.
        targets: ``[rows, span]``, int64; the token that follows each of them.
        real: ``[rows, span]``, bool; whether that token is one of the row's answer.
    """

    token_ids: Tensor
    kept: Tensor
    targets: Tensor
    real: Tensor


def padded(prompts: Sequence[Tokens], answers: Sequence[Tokens], device: torch.device) -> Padded:
    """Returns prompts with their answers as one batch.

    Args:
        prompts: Token ids of each prompt; none of them empty.
        answers: Token ids of each answer; none of them empty.
        device: Where the tensors go.
    """
    rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))
    token_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    kept = torch.arange(min(map(len, prompts)) - 1, length - 1)
    starts = torch.tensor([[len(p) - 1] for p in prompts])
    ends = torch.tensor([[len(row) - 1] for row in rows])
    return Padded(
        token_ids.to(device),
        kept.to(device),
        token_ids[:, kept + 1].to(device),
        ((kept >= starts) & (kept < ends)).to(device),
    )


class AnswerModel:
    """A frozen model with changes to its residual stream."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[int], checkpointing: bool = False
    ) -> None:
        """Freezes the model.

        Args:
            model: A decoder-only model with a language-modelling head.
            layers: Blocks whose outputs are changed.
            checkpointing: Whether the backward pass recomputes each block's activations.

        Raises:
            ExtractionError: The model's blocks cannot be found.
        """
        self.model = model.eval().requires_grad_(False)
        self.layers = tuple(layers)
        blocks = find_blocks(model, model.config.get_text_config().num_hidden_layers)
        self._every = list(blocks)
        self._checkpointing = checkpointing
        self._blocks = [blocks[layer] for layer in self.layers]

    def log_likelihoods(self, batch: Padded, change: Tensor | Change | None = None) -> Tensor:
        """Returns the log-likelihood of every row's answer, ``[rows]``, float32.

        Args:
            batch: Prompts and answers.
            change: ``[rows, layers, hidden_size]`` or ``[1, layers, hidden_size]``; added at every position
                to the outputs of ``layers``. Or a function that replaces an output, given its place in ``layers``
                and the output. None for no change.
        """
        with self._changed(change):
            return by_row(batch, self._found(batch))

    def logits(self, batch: Padded, change: Change | None = None) -> Tensor:
        """Returns the logits of all answers' tokens, one answer after the other, ``[tokens, vocabulary]``, float32.

        Args:
            batch: Prompts and answers.
            change: As in :meth:`log_likelihoods`.
        """
        with self._changed(change):
            return self._logits(batch)[batch.real].float()

    @contextmanager
    def watching(self, see: See) -> Iterator[None]:
        """Shows the outputs of ``layers``, the number being the place in them, while the context lasts."""
        with watched(self._blocks, see):
            yield

    def token_log_likelihoods(self, batch: Padded) -> Tensor:
        """Returns the log-likelihood of every answer token, ``[rows, tokens of the longest]``, float32, 0 after an end."""
        counts = batch.real.sum(dim=1).tolist()
        return pad_sequence(list(self._found(batch).split(counts)), batch_first=True)

    @contextmanager
    def _changed(self, change: Tensor | Change | None) -> Iterator[None]:
        if change is None:
            yield
            return
        recomputed = checkpointed(self._every) if self._checkpointing else nullcontext()
        put = added(change) if isinstance(change, Tensor) else change
        with recomputed, changed(self._blocks, put):
            yield

    def _found(self, batch: Padded) -> Tensor:
        """Returns the log-likelihoods of all answers' tokens, one answer after the other."""
        logits = self._logits(batch)
        # Of the positions between the shortest prompt and the longest answer, those of answers alone:
        # a row over the vocabulary is far larger than everything else.
        return -functional.cross_entropy(
            logits[batch.real].float(), batch.targets[batch.real], reduction="none"
        )

    def _logits(self, batch: Padded) -> Tensor:
        output = self.model(input_ids=batch.token_ids, use_cache=False, logits_to_keep=batch.kept)
        logits: Tensor = output.logits
        if logits.shape[1] == batch.token_ids.shape[1]:
            # Families without logits_to_keep return them all.
            logits = logits[:, batch.kept]
        if logits.shape[:2] != batch.targets.shape:
            raise ExtractionError(
                f"{type(self.model).__name__} gives logits of shape {tuple(logits.shape)} for "
                f"{tuple(batch.token_ids.shape)} tokens"
            )
        return logits


def by_row(batch: Padded, found: Tensor) -> Tensor:
    """Adds up values of answer tokens, one answer after the other, ``[tokens]``, to those of rows, ``[rows]``."""
    row = batch.real.nonzero()[:, 0]
    return found.new_zeros(len(batch.real)).index_add(0, row, found)


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Makes blocks keep only their inputs for the backward pass while the context lasts."""
    originals = [block.forward for block in blocks]
    try:
        for block, original in zip(blocks, originals, strict=True):
            block.forward = partial(checkpoint, original, use_reentrant=False)
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.forward = original
