"""The plain form that the engine is held against: Hugging Face with forward hooks adding ε·v.

No cache, no batch, no compilation: every token is computed anew from the whole sequence, and the
vector is added to the output of each block at the positions asked for. A prompt, its steering and tokens
that may follow go in, log-probabilities come out.
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

from offline.models import find_blocks, load_model
from vllm_steer.errors import EvaluationError
from vllm_steer.pack import SteeringPack, load_pack


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
        """Loads the model, with the plain form of attention: others leave out soft-capping.

        Args:
            model: Checkpoint directory or hub id.
            packs: Packs that requests name.
            dtype: Name of the dtype to run in.
            device: Device of the model; None for CUDA where there is one, else CPU.

        Raises:
            ExtractionError: There is no such model, or it cannot be loaded.
        """
        self._model = load_model(model, dtype, device)
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
    ) -> NDArray[np.float32]:
        """Log-probabilities ``[prompt + tokens, vocabulary]`` of the token after each position."""
        with self._steered(steering, len(prompt)):
            return self._logprobs([*prompt, *tokens]).numpy()

    @torch.no_grad()
    def _generate(
        self, prompt: Sequence[int], steering: dict[str, Any] | None, count: int
    ) -> Answer:
        tokens, logprobs = list(prompt), []
        with self._steered(steering, len(prompt)):
            for _ in range(count):
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
        def add(_block: Any, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            position = torch.arange(hidden.shape[1], device=hidden.device)
            delta = torch.zeros_like(hidden, dtype=torch.float32)
            for choice in (steering or {}).get("directions", ()):
                pack, _, name = choice["name"].partition("/")
                record = self._packs[pack].directions[name]
                layers = choice.get("layers") or (steering or {}).get("layers") or record.layers
                if layer not in layers:
                    continue
                where = (
                    choice.get("positions") or (steering or {}).get("positions") or record.positions
                )
                mask = steered_positions(where, position, prompt_len)
                row = self._packs[pack].vectors[name][record.layers.index(layer)]
                vector = torch.tensor(row, device=hidden.device)
                delta[0, mask] += choice.get("scale", record.default_scale) * vector
            steered = (hidden.float() + delta).to(hidden.dtype)
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return add


def steered_positions(
    choice: str | list[Any], position: torch.Tensor, prompt_len: int
) -> torch.Tensor:
    """Which of the absolute positions a choice means, as a mask in the shape of ``position``."""
    if isinstance(choice, str):
        return {
            "all": position >= 0,
            "prompt": position < prompt_len,
            "generated": position >= prompt_len,
            "last_prompt": position == prompt_len - 1,
        }[choice]
    mask = torch.zeros_like(position, dtype=torch.bool)
    for start, end in choice:
        first = start + prompt_len if start < 0 else start
        last = prompt_len + 10**6 if end is None else end + prompt_len if end < 0 else end
        mask |= (first <= position) & (position < last)
    return mask


Score = Callable[[Sequence[int], Sequence[int], dict[str, Any] | None], NDArray[np.float32]]


@contextmanager
def scoring_process(
    model: str | os.PathLike[str], packs: Sequence[SteeringPack], dtype: str
) -> Iterator[Score]:
    """Gives :meth:`Reference.score` of a model in a process of its own, on CUDA where there is one.

    Args:
        model: Checkpoint directory or hub id.
        packs: Packs that requests name.
        dtype: Name of the dtype to run in.

    Raises:
        EvaluationError: The process died, or could not do what it was asked for.
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
                    "the process of the Hugging Face model died, perhaps for lack of memory"
                ) from error
            # Whatever went wrong over there is what the caller is told.
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
