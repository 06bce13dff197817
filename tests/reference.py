"""The plain form that the engine is held against: Hugging Face with forward hooks.

No cache, no batch, no compilation: every token is computed anew from the whole sequence, and the
output of each block is changed at the positions asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from offline.models import find_blocks
from tests.engine_process import Output
from vllm_steer.pack import SteeringPack

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens, and log-probabilities ``[tokens, vocabulary]`` for each."""

    tokens: list[int]
    logprobs: np.ndarray


class Reference:
    """A Hugging Face model in float32 that steers by hooks."""

    def __init__(self, model: Path, packs: Sequence[SteeringPack]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            # The plain form of attention: others leave out soft-capping.
            model,
            dtype=torch.float32,
            attn_implementation="eager",
        ).eval()
        self._blocks = find_blocks(
            self._model, self._model.config.get_text_config().num_hidden_layers
        )
        self._packs = {pack.name: pack for pack in packs}
        self._answers: dict[str, Answer] = {}

    def generate(
        self, prompt: Sequence[int], steering: dict[str, Any] | None, count: int
    ) -> Answer:
        """Generates ``count`` tokens greedily; answers are kept, since many tests share them."""
        key = repr((list(prompt), steering, count))
        if key not in self._answers:
            self._answers[key] = self._generate(prompt, steering, count)
        return self._answers[key]

    @torch.no_grad()
    def score(
        self, prompt: Sequence[int], tokens: Sequence[int], steering: dict[str, Any] | None
    ) -> np.ndarray:
        """Log-probabilities ``[prompt + tokens, vocabulary]`` of the token after each position."""
        ids = torch.tensor([[*prompt, *tokens]])
        with self._steered(steering, len(prompt)):
            logprobs: np.ndarray = (
                self._model(ids, use_cache=False).logits[0].log_softmax(-1).numpy()
            )
        return logprobs

    @torch.no_grad()
    def _generate(
        self, prompt: Sequence[int], steering: dict[str, Any] | None, count: int
    ) -> Answer:
        tokens, logprobs = list(prompt), []
        with self._steered(steering, len(prompt)):
            for _ in range(count):
                logits = self._model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                logprobs.append(logits.log_softmax(-1).numpy())
                tokens.append(int(logits.argmax()))
        return Answer(tokens[len(prompt) :], np.stack(logprobs))

    @contextmanager
    def _steered(self, steering: dict[str, Any] | None, prompt_len: int) -> Iterator[None]:
        hooks = [
            block.register_forward_hook(self._hook(layer, steering, prompt_len))
            for layer, block in enumerate(self._blocks)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, layer: int, steering: dict[str, Any] | None, prompt_len: int) -> Any:
        def change(_block: Any, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            position = torch.arange(hidden.shape[1])
            delta = torch.zeros_like(hidden)
            restore = torch.zeros_like(position, dtype=torch.bool)
            for choice in (steering or {}).get("directions", ()):
                record, row = self._row(choice["name"], layer)
                layers = choice.get("layers") or (steering or {}).get("layers") or record.layers
                if layer not in layers or row is None:
                    continue
                where = (
                    choice.get("positions") or (steering or {}).get("positions") or record.positions
                )
                mask = steered_positions(where, position, prompt_len)
                default = 1.0 if choice.get("op") == "ablate" else record.default_scale
                scale = choice.get("scale", default)
                read = {
                    key: self._row(choice[key], layer)[1]
                    for key in ("plane", "read")
                    if key in choice
                }
                moved = apply_form(hidden[0], row, scale, choice, **read)
                schedule = choice.get("schedule") or (steering or {}).get("schedule")
                if schedule:
                    factor = scheduled(schedule, position - prompt_len)
                    moved = hidden[0] + factor[:, None] * (moved - hidden[0])
                if "gate" in choice:
                    probe = self._row(choice["gate"]["direction"], layer)[1]
                    fires = hidden[0] @ probe > choice["gate"]["above"]
                    mask = mask & fires
                delta[0, mask] += (moved - hidden[0])[mask]
                if choice.get("restore_norm"):
                    restore |= steered_positions(where, position, prompt_len)
            steered = hidden + delta
            lengths = hidden.norm(dim=-1) / steered.norm(dim=-1)
            steered[0, restore] *= lengths[0, restore, None]
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return change

    def _row(self, full_name: str, layer: int) -> tuple[Any, torch.Tensor | None]:
        pack, _, name = full_name.partition("/")
        record = self._packs[pack].directions[name]
        if layer not in record.layers:
            return record, None
        return record, torch.tensor(self._packs[pack].vectors[name][record.layers.index(layer)])


def apply_form(
    hidden: torch.Tensor,
    vector: torch.Tensor,
    scale: float,
    choice: dict[str, Any],
    plane: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """What one direction makes of hidden states ``[tokens, width]``, written out for each form."""
    unit = vector / vector.norm()
    op = choice.get("op", "add")
    if op == "add":
        return hidden + scale * vector
    if op == "ablate":
        return hidden - scale * torch.outer(hidden @ unit, unit)
    if op == "clamp":
        return hidden - torch.outer(hidden @ unit, unit) + scale * unit
    if op == "affine":
        assert read is not None
        return hidden + torch.outer(scale * (hidden @ read + choice.get("bias", 0.0)), vector)
    assert plane is not None
    other = plane - (plane @ unit) * unit
    other = other / other.norm()
    x, y = hidden @ unit, hidden @ other
    rest = hidden - torch.outer(x, unit) - torch.outer(y, other)
    angle = torch.deg2rad(torch.tensor(float(scale)))
    if op == "rotate":
        angle = angle + torch.atan2(y, x)
    length = torch.hypot(x, y)
    return rest + torch.outer(length * angle.cos(), unit) + torch.outer(length * angle.sin(), other)


def scheduled(schedule: dict[str, Any], passed: torch.Tensor) -> torch.Tensor:
    """The factor of each token, by how many tokens it comes after the first generated one."""
    start, end, tokens = schedule["start"], schedule["end"], schedule["tokens"]
    if schedule.get("shape", "linear") == "linear":
        values = [start + (end - start) * min(max(g, 0) / tokens, 1.0) for g in passed.tolist()]
    else:
        values = [
            end + (start - end) * 2.718281828459045 ** -(max(g, 0) / tokens)
            for g in passed.tolist()
        ]
    return torch.tensor(values)


def steered_positions(
    choice: str | dict[str, list[int]] | list[list[int | None]],
    position: torch.Tensor,
    prompt_len: int,
) -> torch.Tensor:
    """Which of the absolute positions a choice means, as a mask in the shape of ``position``."""
    if isinstance(choice, str):
        return {
            "all": position >= 0,
            "prompt": position < prompt_len,
            "generated": position >= prompt_len,
            "last_prompt": position == prompt_len - 1,
        }[choice]
    if isinstance(choice, dict):
        low, high = choice["generated"]
        end_of = position.max() + 1 if high is None else prompt_len + high
        return (position >= prompt_len + low) & (position < end_of)
    mask = torch.zeros_like(position, dtype=torch.bool)
    for start, end in choice:
        first = start + prompt_len if start < 0 else start
        last = prompt_len + 10**6 if end is None else end + prompt_len if end < 0 else end
        mask |= (first <= position) & (position < last)
    return mask


def assert_equals_hooks(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    steerings: Iterable[dict[str, Any] | None],
    outputs: Sequence[Output],
    count: int,
) -> None:
    """Each greedy output has the reference's tokens, and its log-probabilities to 1e-4."""
    for prompt, steering, output in zip(prompts, steerings, outputs, strict=True):
        expected = reference.generate(prompt, steering, count)
        assert output.tokens == expected.tokens
        assert np.abs(output.logprobs - expected.logprobs).max() < TOLERANCE
