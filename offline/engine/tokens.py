"""The engine's interface in token ids: answers to prompts, and likelihoods of given answers, steered or not.

Everything is batched, since steering is per request, and greedy unless a sampling is given. Answers are stored, so
that a killed run continues and loses at most half a minute of work.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.engine.answer_store import Store, model_state
from vllm_steer.offline.engine.llm import asking, start_engine, stop_engine
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.packs.pack import SteeringPack

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.inputs import TokensPrompt
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput

# Requests whose answers are stored in one file.
PART = 256
# An engine that answers this many within these seconds gets twice as many at once, up to the maximum, since
# the tail of each batch underuses it.
MOST_AT_ONCE = 2048
QUICK = 30.0
# Smallest request length that an engine has room for.
_ROOM = 1024
R = TypeVar("R")
Steering = Mapping[str, Any] | None


@dataclass(frozen=True)
class Asked:
    """A prompt, optionally with its answer.

    Attributes:
        prompt: Token ids of the prompt.
        answer: Token ids of the answer to score; empty to generate one.
        steering: Steering of prompt and answer as in a request; None for none.
        seed: Seed of a sampled answer; a greedy one has none.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    steering: Steering = None
    seed: int | None = None

    def to_json(self) -> list[Any]:
        """Returns everything that its answer depends on."""
        seeded = [] if self.seed is None else [self.seed]
        return [self.prompt, self.answer, self.steering, *seeded]


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, where they are not greedy.

    Attributes:
        temperature: What logits are divided by, above 0 and at most 2, which is vLLM's limit.
        top_p: Share of the probability that is sampled from.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= 2 or not 0 < self.top_p <= 1:
            raise EvaluationError(
                f"temperature {self.temperature:g} and top_p {self.top_p:g} cannot be sampled with: the first "
                f"must be above 0 and at most 2, "
                f"the second above 0 and at most 1"
            )


@dataclass(frozen=True)
class Generated:
    """An answer.

    Attributes:
        tokens: Its token ids; the last one ended it, if any did.
        text: Its text, without special tokens.
        log_likelihood: Log-likelihood of its tokens, as generated.
        finished: Whether it ended by itself.
    """

    tokens: tuple[int, ...]
    text: str
    log_likelihood: float
    finished: bool


class TokenEngine:
    """An engine that is started at the first request without a stored answer."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        packs: Sequence[SteeringPack] = (),
        options: Mapping[str, Any] | None = None,
        store: Path | None = None,
        bar: bool = True,
        quick: bool = False,
    ) -> None:
        """Configures the engine without starting it.

        Args:
            model: Checkpoint directory or hub id.
            packs: Packs named by steerings.
            options: More arguments of ``vllm.LLM``.
            store: Directory of stored answers; None stores nothing.
            bar: Whether to show progress bars.
            quick: Whether there are few requests, so that a start without compiling matters more than speed.
        """
        self.model, self.packs = model, list(packs)
        self._options = {**({"enforce_eager": True} if quick else {}), **(options or {})}
        self._bar, self._room, self._quick = bar, 0, quick
        self._steering: dict[str, Any] = _needed(self.packs)
        self._llm: LLM | None = None
        common = {
            "model": model_state(model),
            "packs": {pack.name: pack.manifest.tensors.sha256 for pack in packs},
            "engine": self._options,
        }
        self._store = Store(store, common)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        asked: Sequence[Asked],
        max_tokens: int,
        name: str,
        sampling: Sampling | None = None,
    ) -> list[Generated]:
        """Answers prompts, in their order.

        Args:
            asked: The prompts, with a seed each if they are sampled.
            max_tokens: Longest answer.
            name: Label of the progress bar.
            sampling: How answers are sampled; None for greedy ones.

        Raises:
            EvaluationError: The engine does not start, dies or refuses a request, or a stored file is
                damaged.
        """
        longest = max((len(a.prompt) for a in asked), default=0) + max_tokens
        chosen = {} if sampling is None else asdict(sampling)
        rows = self._all(
            " ".join(["generate", str(max_tokens), *(f"{key}={chosen[key]:g}" for key in chosen)]),
            asked,
            name,
            lambda part, bar: self._generate(
                part, {"max_tokens": max_tokens, **chosen}, longest, bar
            ),
        )
        return [Generated(tuple(row[0]), *row[1:]) for row in rows]

    def score(self, asked: Sequence[Asked], name: str) -> list[float]:
        """Returns the log-likelihood of each answer's tokens after its prompt, natural logarithm.

        Args:
            asked: Prompts with their answers.
            name: Label of the progress bar.

        Raises:
            EvaluationError: As for :meth:`generate`.
        """
        longest = max((len(a.prompt) + len(a.answer) for a in asked), default=0) + 1
        return self._all("score", asked, name, lambda part, bar: self._score(part, longest, bar))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The engine's tokenizer, with the packs' format; loaded without starting the engine.

        Raises:
            EvaluationError: It cannot be loaded.
            ExtractionError: The packs have several formats, or one that is not the model's.
        """
        names = {"trust_remote_code": "trust_remote_code", "tokenizer_revision": "revision"}
        options = {
            names[key]: value for key, value in self._options.items() if key in names and value
        }
        source = self._options.get("tokenizer") or self.model
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"cannot load a tokenizer from {str(source)!r}: {error}"
            ) from error
        return ChatFormat.of_packs(self.packs).apply_to(tokenizer)

    @property
    def dtype(self) -> str:
        """Dtype of the engine, such as ``bfloat16``."""
        return str(self._engine(1).llm_engine.model_config.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Ends the engine, if it was started."""
        if self._llm is not None:
            stop_engine(self._llm)
            self._llm = None

    def _all(
        self,
        kind: str,
        asked: Sequence[Asked],
        name: str,
        answer: Callable[[Sequence[Asked], tqdm], list[R]],
    ) -> list[R]:
        parts = [asked[at : at + PART] for at in range(0, len(asked), PART)]
        keys = [[one.to_json() for one in part] for part in parts]
        with tqdm(total=len(asked), desc=name, unit="request", disable=not self._bar) as bar:
            found: dict[int, list[R]] = {}
            for at, key in enumerate(keys):
                if (rows := self._store.load(kind, key)) is not None:
                    found[at] = rows
            bar.update(sum(map(len, found.values())))
            missing = [at for at in range(len(parts)) if at not in found]
            many = 1
            while missing:
                now, missing = missing[:many], missing[many:]
                started = time.monotonic()
                given = iter(answer([one for at in now for one in parts[at]], bar))
                for at in now:
                    found[at] = list(islice(given, len(parts[at])))
                    self._store.keep(kind, keys[at], found[at])
                if time.monotonic() - started < QUICK:
                    many = min(2 * many, MOST_AT_ONCE // PART)
        return [row for at in range(len(parts)) for row in found[at]]

    def _generate(
        self, asked: Sequence[Asked], chosen: Mapping[str, Any], longest: int, bar: tqdm
    ) -> list[Any]:
        outputs = self._run(
            [one.prompt for one in asked],
            [
                {**chosen, "logprobs": 0, "seed": one.seed, "extra_args": _extra(one)}
                for one in asked
            ],
            longest,
            bar,
        )
        rows = []
        for output in outputs:
            first = output.outputs[0]
            tokens = list(first.token_ids)
            found = first.logprobs or ()
            logs = [_logprob(row, token) for row, token in zip(found, tokens, strict=True)]
            rows.append([tokens, first.text, sum(logs), first.finish_reason == "stop"])
        return rows

    def _score(self, asked: Sequence[Asked], longest: int, bar: tqdm) -> list[float]:
        scored = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        outputs = self._run(
            [one.prompt + one.answer for one in asked],
            [{**scored, "extra_args": _extra(one)} for one in asked],
            longest,
            bar,
        )
        found: list[float] = []
        for output, one in zip(outputs, asked, strict=True):
            ids, rows = output.prompt_token_ids, output.prompt_logprobs
            if ids is None or rows is None:
                raise EvaluationError("the engine returned no log-probabilities of a prompt")
            answer = range(len(one.prompt), len(ids))
            found.append(sum(_logprob(rows[at], ids[at]) for at in answer))
        return found

    def _run(
        self,
        prompts: Sequence[tuple[int, ...]],
        parameters: Sequence[Mapping[str, Any]],
        longest: int,
        bar: tqdm,
    ) -> list[RequestOutput]:
        """Returns vLLM's output for each prompt, and advances the bar."""
        llm = self._engine(longest)
        from vllm import SamplingParams

        requests: list[TokensPrompt] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with asking():
            outputs = llm.generate(
                requests,
                [SamplingParams(**{"temperature": 0.0, **given}) for given in parameters],
                use_tqdm=_moving(bar),
            )
        failed = sum(output.outputs[0].finish_reason == "error" for output in outputs)
        if failed:
            raise EvaluationError(
                f"the engine failed {failed} of {len(outputs)} requests; what it wrote before says why"
            )
        return outputs

    def _engine(self, longest: int) -> LLM:
        if self._llm is not None and longest > self._llm.llm_engine.model_config.max_model_len:
            self.close()
        if self._llm is None:
            paths = [str(pack.path) for pack in self.packs]
            # A scored answer leaves room for a token after it.
            self._room = max(self._room, longest + 1, _ROOM)
            self._llm = start_engine(
                self.model,
                paths,
                self._options,
                room=self._room,
                steering=self._steering,
                quick=self._quick,
            )
            limit = self._llm.llm_engine.model_config.max_model_len
            if longest > limit:
                self.close()
                raise EvaluationError(
                    f"a prompt with its answer has {longest} tokens, and the engine has room for {limit}"
                )
        return self._llm


def _needed(packs: Sequence[SteeringPack]) -> dict[str, Any]:
    """Fields of the configuration of an engine in which all directions of some packs can act."""
    forms = [record.form for pack in packs for record in pack.directions.values() if record.form]
    if not any(f.op not in (None, "add") or f.gate or f.restore_norm for f in forms):
        return {}
    return {"ops": "affine"} | (
        {"multiply": True} if any(f.op == "multiply" for f in forms) else {}
    )


def _logprob(found: Mapping[int, Logprob] | None, token: int) -> float:
    """Returns the log-probability of a token from vLLM's values for its position."""
    if found is None:
        raise EvaluationError("the engine returned no log-probabilities of a token")
    return found[token].logprob


def _extra(one: Asked) -> dict[str, Any] | None:
    """Returns the extra arguments of a request."""
    return None if one.steering is None else {"steering": dict(one.steering)}


def _moving(bar: tqdm) -> Callable[..., tqdm]:
    """A ``tqdm`` for vLLM that shows nothing and advances ``bar`` with every finished request."""

    class Moving(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"file": io.StringIO(), "leave": False})

        def update(self, n: float | None = 1) -> bool | None:
            # With an iterable it counts the rendered prompts.
            if self.iterable is None:
                bar.update(n)
            return super().update(n)

    return Moving
