"""States of answer tokens: the same answers read after the prefixed and after the plain prompt.

The concept is read where the model speaks of it, in its own words, and since both readings are of the
same tokens, their difference holds what the prefix does and not what is said. An answer's tokens become
one state per block: their mean, their mean weighted by each token's attention to the prefix, or the token
that attends most to it (Eq. 3 of arXiv 2602.00333, over answer tokens). Or the states that the answer's
tokens are predicted from, weighted by how much likelier the prefix makes each of them: most tokens of an
answer show nothing of the prefix, and the likelihoods show which do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.extract.answers import Example
from vllm_steer.offline.extract.capture import check_finite
from vllm_steer.offline.models.hooks import watched
from vllm_steer.offline.models.likelihood import AnswerModel, padded
from vllm_steer.offline.models.loading import find_blocks

AnswerTokens = Literal["mean", "weighted", "attention", "telling"]
ANSWER_TOKENS: tuple[AnswerTokens, ...] = get_args(AnswerTokens)
BY_ATTENTION: frozenset[AnswerTokens] = frozenset({"weighted", "attention"})
"""Those that need attention weights."""


@dataclass(frozen=True, eq=False)
class AnswerStates:
    """What the forward passes leave behind, in the order of the answers.

    Attributes:
        prefixed: ``[answers, blocks, hidden_size]``, float32; block outputs after the prefixed
            prompt, the last block's before the final norm.
        plain: Likewise after the plain prompt, of the same tokens with the same weights.
        attention: ``[answers, blocks]``, float32; mean over heads of the attention that the tokens pay
            to all prefix tokens together, reduced over tokens as the states are. Zeros where no
            attention was read.
        residual_norms: ``[blocks]``, float64; median Euclidean norm of the block output over the tokens
            of the plain prompts and their answers, without each prompt's first.
    """

    prefixed: NDArray[np.float32]
    plain: NDArray[np.float32]
    attention: NDArray[np.float32]
    residual_norms: NDArray[np.float64]


def read_answers(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    tokens: AnswerTokens,
    attention: bool,
    batch_size: int,
    progress: str | None = None,
) -> AnswerStates:
    """Reads every answer after both of its prompts.

    Args:
        model: A decoder-only model, loaded with ``attn_implementation="eager"`` where attention is read.
        examples: The answers, at least one.
        tokens: How an answer's tokens become one state.
        attention: Whether to read attention in any case; ``weighted`` and ``attention`` need it.
        batch_size: Answers per forward pass.
        progress: Label of the progress bar; None for no bar.

    Raises:
        ExtractionError: The model's blocks or attention weights cannot be found, or a block output
            is not finite.
    """
    config = model.config.get_text_config()
    blocks = find_blocks(model, config.num_hidden_layers)
    reader = _Reader(model, blocks, tokens, attention or tokens in BY_ATTENTION)
    shape = (len(examples), len(blocks), config.hidden_size)
    prefixed, plain = (np.zeros(shape, dtype=np.float32) for _ in range(2))
    paid = np.zeros(shape[:2], dtype=np.float32)
    by_length = np.argsort([len(e.prefixed.token_ids) + len(e.answer) for e in examples])
    model.train(False)
    with (
        torch.inference_mode(),
        tqdm(
            total=len(examples), desc=progress, unit="answer", disable=progress is None, leave=False
        ) as bar,
    ):
        for start in range(0, len(examples), batch_size):
            rows = by_length[start : start + batch_size]
            reader.read([examples[row] for row in rows])
            prefixed[rows], plain[rows], paid[rows] = reader.prefixed, reader.plain, reader.paid
            bar.update(len(rows))
    for hidden in (prefixed, plain):
        check_finite(hidden[:, :, None])
    return AnswerStates(prefixed, plain, paid, reader.norms())


class _Reader:
    """Forward passes over one batch after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: torch.nn.ModuleList,
        tokens: AnswerTokens,
        attention: bool,
    ) -> None:
        self._model, self._blocks = model, blocks
        self._tokens, self._attention = tokens, attention
        self._scored = AnswerModel(model, ()) if tokens == "telling" else None
        self._norms: list[list[NDArray[np.float32]]] = [[] for _ in blocks]

    def read(self, examples: Sequence[Example]) -> None:
        """Reads a batch after its prefixed, then after its plain prompts."""
        shape = (len(examples), len(self._blocks))
        width = self._model.config.get_text_config().hidden_size
        self.prefixed, self.plain = (np.zeros((*shape, width), dtype=np.float32) for _ in range(2))
        self.paid = np.zeros(shape, dtype=np.float32)
        # [rows, tokens], of every block: how much each answer token counts.
        self._weights: dict[int, Tensor] = {}
        self._gains = None if self._scored is None else _gains(self._scored, examples)
        self._run(examples, prefixed=True)
        missing = sorted(set(range(len(self._blocks))) - set(self._weights))
        if missing:
            raise ExtractionError(
                f"blocks {missing} gave no attention weights; load the model with "
                f"attn_implementation='eager', or read all answer tokens alike"
            )
        self._run(examples, prefixed=False)

    def norms(self) -> NDArray[np.float64]:
        return np.array([float(np.median(np.concatenate(norms))) for norms in self._norms])

    def _run(self, examples: Sequence[Example], prefixed: bool) -> None:
        prompts = [(e.prefixed if prefixed else e.plain).token_ids for e in examples]
        rows = [[*p, *e.answer] for p, e in zip(prompts, examples, strict=True)]
        lengths = torch.tensor([[len(row)] for row in rows])
        token_ids = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
        device = self._model.device
        starts = torch.tensor([[len(p)] for p in prompts])
        answered = starts + torch.arange(max(len(e.answer) for e in examples))
        self._real = (answered < lengths).to(device)
        read = answered if self._gains is None else answered - 1
        self._at = read.clamp(max=token_ids.shape[1] - 1).to(device)
        position = torch.arange(token_ids.shape[1])
        self._counted = ((position > 0) & (position < lengths)).to(device)
        spans = torch.tensor([e.prefixed.prefix_span for e in examples])
        self._prefix = ((position >= spans[:, :1]) & (position < spans[:, 1:])).float().to(device)
        see = self._see_attention if prefixed and self._attention else None
        if prefixed and not self._attention:
            alike = _shares(self._counts(), self._real)
            self._weights = dict.fromkeys(range(len(self._blocks)), alike)
        states = self.prefixed if prefixed else self.plain
        counts = not prefixed
        with watched(self._blocks, lambda at, h: self._see_output(at, h, states, counts), see):
            # Right padding: a causal model sees none of it, so that no mask is needed.
            self._model.base_model(input_ids=token_ids.to(device), use_cache=False)

    def _counts(self) -> Tensor:
        """How much each answer token counts where attention does not say, ``[rows, tokens]``."""
        return self._real.float() if self._gains is None else self._gains

    def _see_attention(self, block: int, weights: Tensor) -> None:
        """Reduces weights ``[batch, heads, queries, keys]`` to those of the answer's tokens."""
        row = torch.arange(len(self._at), device=weights.device)[:, None]
        answer = weights.transpose(1, 2)[row, self._at].float()
        paid = (answer * self._prefix[:, None, None, :]).sum(dim=-1).mean(dim=-1)
        paid = torch.where(self._real, paid, 0.0)
        if self._tokens not in BY_ATTENTION:
            chosen = _shares(self._counts(), self._real)
        elif self._tokens == "weighted":
            chosen = _shares(paid, self._real)
        else:
            best = torch.where(self._real, paid, -1.0).argmax(dim=1)
            chosen = torch.nn.functional.one_hot(best, paid.shape[1]).float()
        self._weights[block] = chosen
        self.paid[:, block] = (paid * chosen).sum(dim=1).cpu().numpy()

    def _see_output(
        self, block: int, output: Tensor, states: NDArray[np.float32], counts: bool
    ) -> None:
        row = torch.arange(len(self._at), device=output.device)[:, None]
        weights = self._weights.get(block)
        if weights is None:
            return
        chosen = output[row, self._at].float()
        states[:, block] = (chosen * weights[..., None]).sum(dim=1).cpu().numpy()
        if counts:
            norms = torch.linalg.vector_norm(output.float(), dim=-1)[self._counted]
            self._norms[block].append(norms.cpu().numpy())


def _gains(model: AnswerModel, examples: Sequence[Example]) -> Tensor:
    """Returns by how much the prefix makes each answer token likelier, ``[rows, tokens]``; 0 for less likely."""
    answers = [e.answer for e in examples]
    prefixed, plain = (
        model.token_log_likelihoods(padded(prompts, answers, model.model.device))
        for prompts in (
            [e.prefixed.token_ids for e in examples],
            [e.plain.token_ids for e in examples],
        )
    )
    return (prefixed - plain).clamp(min=0.0)


def _shares(weights: Tensor, real: Tensor) -> Tensor:
    """Returns weights that sum to 1 in every row, equal ones where all are 0.

    Args:
        weights: ``[rows, tokens]``, none of them negative, 0 where no token is.
        real: ``[rows, tokens]``, bool; where one is.
    """
    total = weights.sum(dim=1, keepdim=True)
    weights = torch.where(total > 0, weights, real.float())
    return weights / weights.sum(dim=1, keepdim=True)
