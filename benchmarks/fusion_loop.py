"""The search of Fusion Steering without an engine: Hugging Face with hooks, as one would write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vllm_steer.offline.evaluate.generation import Answer
from vllm_steer.offline.fusion.original import Fusion, refreshed
from vllm_steer.offline.fusion.references import References
from vllm_steer.offline.fusion.search import Case, FusionRequest
from vllm_steer.offline.models.hooks import Change, changed
from vllm_steer.offline.models.loading import find_blocks


@dataclass(eq=False)
class PlainLoop:
    """Answers requests in batches, one batch after another; called like ``Generator.answer``.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        references: Prompts and references of the questions.
        deltas: What is added, by the name of a case.
        max_tokens: Longest answer.
        batch: Requests in a batch.
        original: Whether mu is refreshed at every token and nothing is cached, as in the original;
            for batches of one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    references: References
    deltas: Mapping[str, NDArray[np.float32]]
    max_tokens: int
    batch: int = 1
    original: bool = False

    def __post_init__(self) -> None:
        self._blocks = find_blocks(self.model, self.references.reference.shape[1])

    def __call__(self, requests: Sequence[FusionRequest]) -> list[Answer]:
        """Answers requests in their order, with the perplexity under the unsteered model."""
        answers: list[Answer] = []
        for start in range(0, len(requests), self.batch):
            answers += self._answer(requests[start : start + self.batch])
        return answers

    @torch.inference_mode()
    def _answer(self, requests: Sequence[FusionRequest]) -> list[Answer]:
        cases = [request.case for request in requests if request.case]
        prompts = [self.references.prompts[case.question] for case in cases]
        ids, mask = self._padded(prompts)
        width, end = ids.shape[1], self.tokenizer.eos_token_id
        change = self._original(cases[0]) if self.original else self._add(cases)
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

    def _add(self, cases: Sequence[Case]) -> Change:
        """Plain addition, as the engine's."""
        delta = torch.from_numpy(np.stack([self.deltas[case.name] for case in cases]))

        def change(layer: int, output: Tensor) -> Tensor:
            return output + delta[:, layer, None]

        return change

    def _original(self, case: Case) -> Change:
        reference = torch.from_numpy(self.references.reference[case.question])
        scales = torch.tensor(case.layer_scales)
        return refreshed(Fusion(self.references.prompts[case.question], reference, scales))
