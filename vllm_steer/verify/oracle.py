"""The reference implementation: Hugging Face with forward hooks.

No cache, no batch, no compilation: every token is recomputed from the whole sequence, and the output of each
block is changed at the given positions. The input is a prompt, its steering and optional further tokens; the
output is log-probabilities.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.models.loading import find_blocks, load_model
from vllm_steer.packs.pack import DirectionRecord, SteeringPack, load_pack
from vllm_steer.request.positions import plain_positions
from vllm_steer.verify.oracle_forms import (
    apply_form,
    before_trigger,
    opened,
    scheduled,
    steered_positions,
)


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens, and log-probabilities ``[tokens, vocabulary]`` for each."""

    tokens: list[int]
    logprobs: NDArray[np.float32]


class Reference:
    """A Hugging Face model that steers by hooks."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        packs: Sequence[SteeringPack],
        dtype: str = "float32",
        device: str | None = "cpu",
    ) -> None:
        """Loads the model with eager attention, since other implementations omit soft-capping.

        Args:
            model: Checkpoint directory or hub id.
            packs: Packs that requests name.
            dtype: Name of the dtype to run in.
            device: Device of the model; None for CUDA if available, else CPU.

        Raises:
            ExtractionError: There is no such model, or it cannot be loaded.
        """
        self._model = load_model(model, dtype, device)
        self._blocks = find_blocks(
            self._model, self._model.config.get_text_config().num_hidden_layers
        )
        self._packs = {pack.name: pack for pack in packs}
        self._answers: dict[str, Answer] = {}
        # The tokens that the model is reading.
        self._tokens: list[int] = []
        # The residual stream before and after the change, by layer, while reads need it.
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def generate(
        self, prompt: Sequence[int], steering: dict[str, Any] | None, count: int
    ) -> Answer:
        """Generates ``count`` tokens greedily; answers are cached, since many tests share them."""
        key = repr((list(prompt), steering, count))
        if key not in self._answers:
            self._answers[key] = self._generate(prompt, steering, count)
        return self._answers[key]

    @torch.no_grad()
    def score(
        self, prompt: Sequence[int], tokens: Sequence[int], steering: dict[str, Any] | None
    ) -> NDArray[np.float32]:
        """Log-probabilities ``[prompt + tokens, vocabulary]`` of the token after each position."""
        self._tokens = [*prompt, *tokens]
        with self._steered(steering, len(prompt)):
            return self._logprobs([*prompt, *tokens]).numpy()

    @torch.no_grad()
    def read(
        self, prompt: Sequence[int], tokens: Sequence[int], steering: dict[str, Any]
    ) -> NDArray[np.float32]:
        """Scores ``[reads, prompt + tokens]`` of a steering's reads; NaN where it reads nothing."""
        self._tokens = [*prompt, *tokens]
        seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._seen = seen
        try:
            with self._steered(steering, len(prompt)):
                self._logprobs(self._tokens)
        finally:
            self._seen = None
        position = torch.arange(len(self._tokens))
        return np.stack(
            [self._scores(each, seen, position, len(prompt)) for each in steering["read"]]
        )

    def _scores(
        self,
        choice: dict[str, Any],
        seen: dict[int, tuple[torch.Tensor, torch.Tensor]],
        position: torch.Tensor,
        prompt_len: int,
    ) -> NDArray[np.float32]:
        """Scores of one read, ``[tokens]``: mean over its layers of the projection onto the unit vector."""
        pack, _, name = choice["name"].partition("/")
        record = self._packs[pack].directions[name]
        found = []
        for layer in choice.get("layers") or record.default_layers or record.layers:
            before, after = seen[layer]
            stream = after if choice.get("when") == "after" else before
            _, vector = self._vector(choice["name"], layer, stream)
            found.append((stream.double() @ (vector.double() / vector.double().norm())).cpu())
        scores = torch.stack(found).mean(0)
        scores[~steered_positions(choice.get("at", "generated"), position, prompt_len)] = np.nan
        return scores.float().numpy()

    @torch.no_grad()
    def _generate(
        self, prompt: Sequence[int], steering: dict[str, Any] | None, count: int
    ) -> Answer:
        tokens, logprobs = list(prompt), []
        with self._steered(steering, len(prompt)):
            for _ in range(count):
                self._tokens = tokens
                last = self._logprobs(tokens)[-1]
                logprobs.append(last.numpy())
                tokens.append(int(last.argmax()))
        return Answer(tokens[len(prompt) :], np.stack(logprobs))

    def _logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 ``[tokens, vocabulary]``, on the host."""
        given = torch.tensor([list(ids)], device=self._model.device)
        logits = self._model(given, use_cache=False).logits[0]
        return logits.float().log_softmax(-1).cpu()

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
            stream = hidden[0].float()
            changed = self._changed(stream, layer, steering or {}, prompt_len)
            if self._seen is not None:
                self._seen[layer] = stream, changed
            steered = changed.to(hidden.dtype)[None]
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return change

    def _changed(
        self, stream: torch.Tensor, layer: int, steering: dict[str, Any], prompt_len: int
    ) -> torch.Tensor:
        """The residual stream after a block and all directions, float32 ``[tokens, width]``."""
        position = torch.arange(len(stream), device=stream.device)
        delta, restore = torch.zeros_like(stream), torch.zeros_like(position, dtype=torch.bool)
        for choice in steering.get("directions", ()):
            record, vector = self._vector(choice["name"], layer, stream)
            layers = choice.get("layers") or steering.get("layers")
            layers = layers or record.default_layers or record.layers
            if layer not in layers or vector is None:
                continue
            where = choice.get("positions") or steering.get("positions")
            where = where or plain_positions(record.positions)
            mask = steered_positions(where, position, prompt_len, self._tokens)
            mask &= before_trigger(
                steering.get("until_token_ids"), self._tokens, prompt_len, position
            )
            default = 1.0 if choice.get("op") == "ablate" else record.default_scale
            others = {
                key: self._vector(choice[key], layer, stream)[1]
                for key in ("plane", "read")
                if key in choice
            }
            scale = choice.get("scale", default)
            if "strength" in choice:
                scale = choice["strength"] * record.default_scale
            moved = apply_form(stream, vector, scale, choice, **others)
            own = moved - stream
            schedule = choice.get("schedule") or steering.get("schedule")
            if schedule:
                own = scheduled(schedule, position - prompt_len)[:, None] * own
            if choice.get("restore_norm"):
                restore |= mask
            if "gate" in choice:
                _, probe = self._vector(choice["gate"]["direction"], layer, stream)
                own = opened(stream, probe, choice["gate"])[:, None] * own
            delta[mask] += own[mask]
        changed = stream + delta
        lengths = stream.norm(dim=-1) / changed.norm(dim=-1)
        changed[restore] *= lengths[restore, None]
        return changed

    def _vector(
        self, full_name: str, layer: int, like: torch.Tensor
    ) -> tuple[DirectionRecord, Any]:
        """A direction's record and its vector at a layer, None if it has none."""
        pack, _, name = full_name.partition("/")
        record = self._packs[pack].directions[name]
        if layer not in record.layers:
            return record, None
        row = self._packs[pack].vectors[name][record.layers.index(layer)]
        return record, torch.tensor(row, device=like.device)


Score = Callable[[Sequence[int], Sequence[int], dict[str, Any] | None], NDArray[np.float32]]


@contextmanager
def scoring_process(
    model: str | os.PathLike[str], packs: Sequence[SteeringPack], dtype: str
) -> Iterator[Score]:
    """Yields :meth:`Reference.score` of a model in a separate process, on CUDA if available.

    Args:
        model: Checkpoint directory or hub id.
        packs: Packs that requests name.
        dtype: Name of the dtype to run in.

    Raises:
        EvaluationError: The process died or failed.
    """
    paths = tuple(pack.path for pack in packs)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def score(
            prompt: Sequence[int], tokens: Sequence[int], steering: dict[str, Any] | None
        ) -> NDArray[np.float32]:
            try:
                return pool.submit(
                    _score, str(model), paths, dtype, prompt, tokens, steering
                ).result()
            except BrokenProcessPool as error:
                raise EvaluationError(
                    "the process of the Hugging Face model died, possibly out of memory"
                ) from error
            # Any error there is reported to the caller.
            except Exception as error:
                raise EvaluationError(
                    f"the Hugging Face model failed: {type(error).__name__}: {error}"
                ) from error

        yield score


def _score(
    model: str,
    packs: tuple[Path, ...],
    dtype: str,
    prompt: Sequence[int],
    tokens: Sequence[int],
    steering: dict[str, Any] | None,
) -> NDArray[np.float32]:
    return _loaded(model, packs, dtype).score(prompt, tokens, steering)


@cache
def _loaded(model: str, packs: tuple[Path, ...], dtype: str) -> Reference:
    transformers.utils.logging.disable_progress_bar()
    return Reference(model, [load_pack(path) for path in packs], dtype, device=None)
