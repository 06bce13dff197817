"""Steered answers from the real engine, and their perplexity under the unsteered model.

Steering belongs to the request, so one engine answers every concept, scale and subset of layers in
the same batches. Answers are kept in files by what was asked; a run that was ended goes on there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from offline.files import write_atomically
from vllm_steer.errors import EvaluationError
from vllm_steer.pack import SteeringPack


@dataclass(frozen=True)
class Request:
    """One answer to ask for.

    Attributes:
        question: The user's text.
        direction: ``pack/direction``; None for an unsteered answer.
        scale: ε.
        layers: Layers to steer; None for all of the direction's.
    """

    question: str
    direction: str | None = None
    scale: float = 0.0
    layers: tuple[int, ...] | None = None

    def steering(self) -> dict[str, Any] | None:
        """Returns the request's steering as vllm-steer reads it."""
        if self.direction is None:
            return None
        chosen: dict[str, Any] = {"name": self.direction, "scale": self.scale}
        if self.layers is not None:
            chosen["layers"] = list(self.layers)
        return {"directions": [chosen]}


@dataclass(frozen=True)
class Answer:
    """What the engine answered.

    Attributes:
        text: The answer.
        finished: Whether it ended by itself within the token limit.
        perplexity: exp of the mean negative log-probability of its tokens, the one that ends it
            among them, under the unsteered model after the same question; None without tokens.
    """

    text: str
    finished: bool
    perplexity: float | None


@dataclass
class Generator:
    """Answers requests, greedily.

    Attributes:
        model: Checkpoint directory or hub id.
        packs: Steering packs that requests name.
        max_tokens: Longest answer.
        store: Directory of answers already given; None keeps none.
        engine: More arguments of ``vllm.LLM``.
        batch: Requests that are handed to the engine, and stored, at once.
        bar: Whether to show a progress bar.
    """

    model: str | os.PathLike[str]
    packs: Sequence[SteeringPack]
    max_tokens: int
    store: Path | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 2048
    bar: bool = True

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers all requests, in their order, under a progress bar.

        Raises:
            EvaluationError: The engine does not start, refuses a request, or a stored file is
                damaged.
        """
        answers: list[Answer] = []
        with tqdm(total=len(requests), desc="answers", unit="answer", disable=not self.bar) as bar:
            for start in range(0, len(requests), self.batch):
                part = requests[start : start + self.batch]
                answers += self._stored(part) or self._generate(part)
                bar.update(len(part))
        return answers

    def _stored(self, requests: Sequence[Request]) -> list[Answer] | None:
        file = self._file(requests)
        if file is None or not file.exists():
            return None
        try:
            found = [Answer(**row) for row in json.loads(file.read_text())]
        except (OSError, ValueError, TypeError) as error:
            raise EvaluationError(f"{file} is damaged ({error}); delete it") from error
        if len(found) != len(requests):
            raise EvaluationError(f"{file} has {len(found)} answers to {len(requests)} requests")
        return found

    def _file(self, requests: Sequence[Request]) -> Path | None:
        """Where the answers to exactly these requests are kept."""
        if self.store is None:
            return None
        content = {
            "model": _model_state(self.model),
            "packs": {pack.name: pack.manifest.tensors.sha256 for pack in self.packs},
            "max_tokens": self.max_tokens,
            "engine": dict(self.engine),
            "requests": [asdict(request) for request in requests],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self.store / f"{digest[:32]}.json"

    def _generate(self, requests: Sequence[Request]) -> list[Answer]:
        try:
            from vllm import SamplingParams
        except ModuleNotFoundError as error:
            raise EvaluationError(
                f"answers come from vLLM, and {error.name} is not installed; pip install "
                f"'vllm-steer[gpu]' or 'vllm-steer[cpu]'"
            ) from error
        steerings = [request.steering() for request in requests]
        parameters = [
            SamplingParams(
                temperature=0.0,
                max_tokens=self.max_tokens,
                extra_args={"steering": steering} if steering else None,
            )
            for steering in steerings
        ]
        chats = [[{"role": "user", "content": request.question}] for request in requests]
        try:
            outputs = self._llm.chat(chats, parameters, use_tqdm=False)
        except ValueError as error:
            raise EvaluationError(f"the engine refused a request: {error}") from error
        perplexities = self._perplexities(
            [
                (list(output.prompt_token_ids), list(output.outputs[0].token_ids))
                for output in outputs
            ]
        )
        answers = [
            Answer(output.outputs[0].text, output.outputs[0].finish_reason == "stop", perplexity)
            for output, perplexity in zip(outputs, perplexities, strict=True)
        ]
        file = self._file(requests)
        if file is not None:
            write_atomically(file, json.dumps([asdict(answer) for answer in answers], indent=0))
        return answers

    def _perplexities(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float | None]:
        """Returns the perplexity of each answer's tokens after its prompt's, without steering."""
        from vllm import SamplingParams

        # One token must be generated, for which the longest answers leave no room.
        room = self._llm.llm_engine.model_config.max_model_len - 1
        outputs = self._llm.generate(
            [{"prompt_token_ids": (prompt + answer)[:room]} for prompt, answer in pairs],
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        found: list[float | None] = []
        for output, (prompt, _) in zip(outputs, pairs, strict=True):
            ids, rows = output.prompt_token_ids, output.prompt_logprobs
            logs = [rows[at][ids[at]].logprob for at in range(len(prompt), len(ids))]
            found.append(math.exp(-sum(logs) / len(logs)) if logs else None)
        return found

    @cached_property
    def _llm(self) -> Any:
        """The engine, started when the first answer is not stored."""
        from vllm import LLM

        steering = {"packs": [str(pack.path) for pack in self.packs]}
        try:
            return LLM(
                str(self.model), additional_config={"steering": steering}, **dict(self.engine)
            )
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise EvaluationError(f"the engine does not start: {error}") from error

    def close(self) -> None:
        """Ends the engine, if it was started."""
        if "_llm" in self.__dict__:
            self._llm.llm_engine.engine_core.shutdown()
            del self.__dict__["_llm"]


def _model_state(model: str | os.PathLike[str]) -> list[Any]:
    """Changes when another checkpoint is written to the same directory."""
    files = sorted(Path(model).iterdir()) if Path(model).is_dir() else []
    return [str(model), *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)]


@contextmanager
def generating(*args: Any, **kwargs: Any) -> Iterator[Generator]:
    """A :class:`Generator` whose engine ends with the block."""
    generator = Generator(*args, **kwargs)
    try:
        yield generator
    finally:
        generator.close()
