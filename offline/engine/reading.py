"""The engine asked what it reads: scores of directions, of tokens that are given or of its answers, one for each text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.engine.tokens import Asked, TokenEngine
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.probe import TextScore
from vllm_steer.plan.scores import read

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


class ReadingEngine(TokenEngine):
    """An engine that reads."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        packs: Sequence[SteeringPack],
        probes: int,
        options: Mapping[str, Any] | None = None,
        store: Path | None = None,
        quick: bool = False,
    ) -> None:
        """Names the engine; nothing is started yet.

        Args:
            model: Checkpoint directory or hub id.
            packs: Packs that reads and steerings name.
            probes: Most directions that a request reads.
            options: More arguments of ``vllm.LLM``.
            store: Directory of what was answered; None keeps nothing.
            quick: Whether little is asked, so that a start without compiling is worth more than speed.
        """
        super().__init__(model, packs, options, store, quick=quick)
        self._steering["reads"] = probes

    def answer(
        self, asked: Sequence[Asked], max_tokens: int, score: TextScore, name: str
    ) -> list[tuple[tuple[int, ...], list[float]]]:
        """Answers prompts greedily, and returns the tokens of each answer with its score for each read.

        All tokens of an answer but the last are read, as the model reads them. An answer of one token has NaN for scores.

        Args:
            asked: The prompts; what is read of the answers is in their steering, in ``read``, without positions.
            max_tokens: Longest answer.
            score: How the scores of its tokens become one.
            name: Text beside the progress bar.

        Raises:
            EvaluationError: As :meth:`generate`, or a token that is read has no finite score.
        """
        longest = max((len(a.prompt) for a in asked), default=0) + max_tokens
        rows = self._all(
            f"answer {max_tokens} {score}",
            asked,
            name,
            lambda part, bar: self._answer(part, max_tokens, score, longest, bar),
        )
        return [(tuple(tokens), row) for tokens, row in rows]

    def read(self, asked: Sequence[Asked], score: TextScore, name: str) -> list[list[float]]:
        """Returns the score of each text for each of its reads.

        Of an answer all tokens but the last are read, as in :meth:`answer`; of a prompt without an answer all tokens but
        the first, whose stream is many times as long as that of others.

        Args:
            asked: Texts; what is read of each is in its steering, in ``read``, without positions.
            score: How the scores of its tokens become one.
            name: Text beside the progress bar.

        Raises:
            EvaluationError: As :meth:`answer`.
        """
        longest = max((len(a.prompt) + len(a.answer) for a in asked), default=0) + 1
        return self._all(
            f"read {score}", asked, name, lambda part, bar: self._read(part, score, longest, bar)
        )

    def _answer(
        self,
        asked: Sequence[Asked],
        max_tokens: int,
        score: TextScore,
        longest: int,
        bar: tqdm,
    ) -> list[Any]:
        parameters = [
            {"max_tokens": max_tokens, "extra_args": {"steering": dict(one.steering or {})}}
            for one in asked
        ]
        outputs = self._run([one.prompt for one in asked], parameters, longest, bar)
        rows = []
        for output, one in zip(outputs, asked, strict=True):
            tokens = list(output.outputs[0].token_ids)
            end = len(one.prompt) + len(tokens) - 1
            rows.append([tokens, _scores(output, (len(one.prompt), end), score)])
        return rows

    def _read(
        self, asked: Sequence[Asked], score: TextScore, longest: int, bar: tqdm
    ) -> list[list[float]]:
        spans = [_span(one) for one in asked]
        parameters = [
            {"max_tokens": 1, "detokenize": False, "extra_args": {"steering": _request(one, span)}}
            for one, span in zip(asked, spans, strict=True)
        ]
        prompts = [one.prompt + one.answer for one in asked]
        outputs = self._run(prompts, parameters, longest, bar)
        return [_scores(output, span, score) for output, span in zip(outputs, spans, strict=True)]


def _scores(output: RequestOutput, span: tuple[int, int], score: TextScore) -> list[float]:
    """The score of a text for each read, of its tokens from the first that is read to before the last."""
    scores = read(output)[0, :, span[0] : span[1]].astype(np.float64)
    if not np.isfinite(scores).all():
        raise EvaluationError(
            "the residual stream of a text is not finite, so it has no score; try another dtype, such as by "
            """--engine '{"dtype": "float32"}'"""
        )
    if not scores.shape[1]:
        return [np.nan] * len(scores)
    if score == "last":
        return [float(value) for value in scores[:, -1]]
    return [float(v) for v in (scores.max(1) if score == "max" else scores.mean(1))]


def _span(one: Asked) -> tuple[int, int]:
    """First token that is read and the one after the last."""
    if one.answer:
        return len(one.prompt), len(one.prompt) + len(one.answer) - 1
    return 1, len(one.prompt)


def _request(one: Asked, span: tuple[int, int]) -> dict[str, Any]:
    steering = dict(one.steering or {})
    reads = [dict(each, at=[list(span)]) for each in steering["read"]]
    return steering | {"read": reads, "recompute": True}
