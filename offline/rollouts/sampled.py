"""Sampled answers to every question, from the engine in the same batches, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from transformers import PreTrainedTokenizerBase

from vllm_steer.errors import EvaluationError, ExtractionError
from vllm_steer.offline.engine.tokens import Asked, TokenEngine
from vllm_steer.offline.evaluate.judges import Case, Judge
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.offline.questions.by_class import GENERAL, Question
from vllm_steer.offline.rollouts.data import Asking
from vllm_steer.offline.rollouts.settings import RolloutSettings


@dataclass(frozen=True)
class Rollout:
    """One answer.

    Attributes:
        question: Number of its question.
        side: Number of the instruction that it was asked after; 0 where there is none.
        draw: Number of the answer among those to the same prompt.
        prompt: Token ids of its prompt.
        answer: Token ids of the answer; the last one ended it, if any did.
        text: The answer.
        finished: Whether it ended by itself.
        score: 0 to 1; None where the judge failed.
    """

    question: int
    side: int
    draw: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    finished: bool
    score: float | None = None


def sampled(
    engine: TokenEngine,
    tokenizer: PreTrainedTokenizerBase,
    askings: Mapping[str, Sequence[Asking]],
    settings: RolloutSettings,
) -> dict[str, list[Rollout]]:
    """Returns the answers by name: to every question, after every instruction, ``settings.samples`` times.

    Args:
        engine: The engine.
        tokenizer: The model's tokenizer, with the format of prompts.
        askings: Questions by name.
        settings: The settings.

    Raises:
        ExtractionError: A prompt cannot be rendered.
        EvaluationError: The engine fails.
    """
    places: list[tuple[str, int, int, int]] = []
    asked: list[Asked] = []
    seeds = count(settings.seed)
    for name, questions in askings.items():
        for number, asking in enumerate(questions):
            for side, told in enumerate(asking.instructions):
                prompt = render_question(
                    tokenizer, asking.prompt, told, settings.prefix_role
                ).token_ids
                for draw in range(settings.samples):
                    places.append((name, number, side, draw))
                    asked.append(Asked(prompt, seed=next(seeds) % 2**31))
    answers = engine.generate(asked, settings.answer_length, "rollouts", settings.sampling)
    found: dict[str, list[Rollout]] = {name: [] for name in askings}
    for (name, number, side, draw), one, given in zip(places, asked, answers, strict=True):
        answer = (one.prompt, given.tokens, given.text, given.finished)
        found[name].append(Rollout(number, side, draw, *answer))
    return found


def scored(
    judge: Judge,
    askings: Mapping[str, Sequence[Asking]],
    rollouts: Mapping[str, Sequence[Rollout]],
) -> dict[str, list[Rollout]]:
    """Returns the answers with their scores; empty ones are not judged and score nothing.

    Raises:
        ExtractionError: The judge gave no answer of some name a score.
        EvaluationError: The judge fails as a whole.
    """
    kept = {name: [r for r in each if r.text.strip()] for name, each in rollouts.items()}
    cases = [
        Case(
            GENERAL,
            name,
            Question(asked[r.question].prompt, asked[r.question].prompt),
            r.text,
            r.finished,
            asked[r.question].reference,
        )
        for name, asked in askings.items()
        for r in kept[name]
    ]
    grades = judge.grade(cases)
    if len(grades) != len(cases):
        raise EvaluationError(f"the judge gave {len(grades)} grades for {len(cases)} answers")
    every = iter(grades)
    found = {}
    for name, each in kept.items():
        given = [next(every) for _ in each]
        if all(grade.value is None for grade in given):
            reason = next((grade.error for grade in given), "all answers are empty")
            raise ExtractionError(
                f"{name!r}: no answer was given a score; the first error: {reason}"
            )
        found[name] = list(_with(each, [grade.value for grade in given]))
    return found


def _with(rollouts: Sequence[Rollout], scores: Sequence[float | None]) -> Iterator[Rollout]:
    for rollout, score in zip(rollouts, scores, strict=True):
        if score is not None:
            yield replace(rollout, score=score)
