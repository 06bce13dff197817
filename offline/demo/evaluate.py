"""Batched greedy answers of the demo model, plain or steered, and their verdicts.

Steering follows the paper: ε·v_l is added to the output of each block l at every position, of
the prompt and of the generated tokens. Every row of a batch has its own ε and direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.judge import expressed_concept, is_fluent

MAX_NEW_TOKENS = 48


@dataclass(frozen=True, eq=False)
class Trial:
    """One answer to ask for.

    Attributes:
        statement: The statement asked about.
        concept: The concept the answer should express; `None` for none.
        prefixed: Whether the prompt carries the concept's prefix.
        direction: [layers, hidden_size], float32, unit rows, for blocks 1 to L-1; `None` for an
            unsteered answer.
        scale: ε.
    """

    statement: str
    concept: str | None = None
    prefixed: bool = False
    direction: NDArray[np.float32] | None = None
    scale: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """The judge's verdict on one answer."""

    answer: str
    expressed: str | None
    fluent: bool


class DemoModel:
    """The demo model, in float32 on the CPU."""

    def __init__(self, path: Path, batch_size: int = 128) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._batch_size = batch_size

    def judge(self, trials: Sequence[Trial], description: str) -> list[Verdict]:
        """Answer and judge every trial, in order, under a progress bar."""
        verdicts: list[Verdict] = []
        with tqdm(total=len(trials), desc=description, unit="answer") as progress:
            for start in range(0, len(trials), self._batch_size):
                batch = trials[start : start + self._batch_size]
                for trial, (answer, finished) in zip(batch, self._answer(batch), strict=True):
                    fluent = is_fluent(answer, trial.statement, finished)
                    verdicts.append(Verdict(answer, expressed_concept(answer), fluent))
                progress.update(len(batch))
        return verdicts

    @torch.inference_mode()
    def _answer(self, trials: Sequence[Trial]) -> list[tuple[str, bool]]:
        """Return each trial's answer and whether it ended within the token limit."""
        end = self._tokenizer.eos_token_id
        encoded = self._tokenizer(
            [self._chat(trial) for trial in trials],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with self._steered(trials):
            generated = self._model.generate(
                input_ids=encoded.input_ids,
                attention_mask=encoded.attention_mask,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        answers: list[tuple[str, bool]] = []
        for row in generated[:, encoded.input_ids.shape[1] :].tolist():
            finished = end in row
            kept = row[: row.index(end)] if finished else row
            answers.append((str(self._tokenizer.decode(kept)), finished))
        return answers

    def _chat(self, trial: Trial) -> str:
        user = user_text(trial.statement, trial.concept if trial.prefixed else None)
        return str(
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
            )
        )

    @contextmanager
    def _steered(self, trials: Sequence[Trial]) -> Iterator[None]:
        """Add every trial's ε·v_l to the output of block l, for l from 1."""
        blocks = self._model.model.layers
        delta = torch.zeros(len(blocks) - 1, len(trials), 1, self._model.config.hidden_size)
        for row, trial in enumerate(trials):
            if trial.direction is not None:
                delta[:, row, 0] = trial.scale * torch.tensor(trial.direction)
        handles = [
            block.register_forward_hook(_adder(shift))
            for block, shift in zip(blocks[1:], delta, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _adder(shift: torch.Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + shift

    return hook
