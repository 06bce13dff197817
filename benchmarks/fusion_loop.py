"""The search of Fusion Steering without an engine: Hugging Face with hooks, as one would write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline.fusion.original import Fusion, refreshed
from offline.fusion.references import References, direction_name
from offline.fusion.search import FusionRequest
from offline.generation import Answer
from offline.hooks import Change, changed
from offline.models import find_blocks


@dataclass(eq=False)
class PlainLoop:
    """Answers requests in batches, one batch after another; called like ``Generator.answer``.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        references: Vectors of the questions that requests name.
        max_tokens: Longest answer.
        batch: Requests in a batch.
        original: Whether mu is refreshed at every token and nothing is cached, as in the original;
            for batches of one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    references: References
    max_tokens: int
    batch: int = 1
    original: bool = False

    def __post_init__(self) -> None:
        layers = self.references.vectors.shape[1]
        self._blocks = find_blocks(self.model, layers)
        self._index = {direction_name(i): i for i in range(len(self.references.prompts))}

    def __call__(self, requests: Sequence[FusionRequest]) -> list[Answer]:
        """Answers requests in their order, with the perplexity under the unsteered model."""
        answers: list[Answer] = []
        for start in range(0, len(requests), self.batch):
            answers += self._answer(requests[start : start + self.batch])
        return answers

    @torch.inference_mode()
    def _answer(self, requests: Sequence[FusionRequest]) -> list[Answer]:
        rows = [self._index[str(request.direction).partition("/")[2]] for request in requests]
        prompts = [self.references.prompts[row] for row in rows]
        ids, mask = self._padded(prompts)
        width, end = ids.shape[1], self.tokenizer.eos_token_id
        change = (
            self._original(rows[0], requests[0]) if self.original else self._add(rows, requests)
        )
        with changed(self._blocks, change):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.max_tokens,
                do_sample=False,
                use_cache=not self.original,
            )
        found = []
        for row in out[:, width:].tolist():
            found.append(row[: row.index(end) + 1] if end in row else row)
        perplexities = self._perplexities(prompts, found)
        return [
            Answer(
                str(self.tokenizer.decode(tokens, skip_special_tokens=True)),
                end in tokens,
                perplexity,
            )
            for tokens, perplexity in zip(found, perplexities, strict=True)
        ]

    def _perplexities(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[list[int]]
    ) -> list[float]:
        ids, mask = self._padded([[*p, *a] for p, a in zip(prompts, answers, strict=True)])
        logs = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logs = logs.log_softmax(dim=-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        return [
            float((-logs[row, -len(answer) :].mean()).exp()) for row, answer in enumerate(answers)
        ]

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Pads on the left; returns token ids and mask."""
        width = max(map(len, sequences))
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, width - len(sequence) :] = torch.tensor(list(sequence))
            mask[row, width - len(sequence) :] = 1
        return ids, mask

    def _add(self, rows: Sequence[int], requests: Sequence[FusionRequest]) -> Change:
        """Plain addition: mu is that of the unsteered prompt."""
        scales = torch.stack([layer_scales(request) for request in requests])
        delta = scales[..., None] * torch.tensor(self.references.vectors[list(rows)])

        def change(layer: int, output: Tensor) -> Tensor:
            return output + delta[:, layer, None]

        return change

    def _original(self, row: int, request: FusionRequest) -> Change:
        reference = torch.tensor(self.references.reference[row])
        return refreshed(Fusion(self.references.prompts[row], reference, layer_scales(request)))


def layer_scales(request: FusionRequest) -> Tensor:
    """Returns a request's scale of each layer, ``[layers]``, float32."""
    scales = torch.zeros(sum(len(layers) for layers in request.segments))
    for layers, scale in zip(request.segments, request.scales, strict=True):
        scales[list(layers)] = scale
    return scales
