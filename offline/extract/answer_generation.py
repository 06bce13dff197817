"""The prefixed model's answers to everyday questions, from the engine, with all concepts in the same
batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.engine.tokens import Asked, Generated, TokenEngine
from vllm_steer.offline.extract.answers import ConceptAnswers, Example
from vllm_steer.offline.measures.fluency import repetition
from vllm_steer.offline.models.prompts import Concept, PrefixRole, RenderedPrompt, render_question

# Share of repeated word pairs above which an answer counts as looping.
LOOPING = 0.2
# Shorter answers are not learned from.
_SHORTEST = 2


@dataclass(frozen=True)
class AnswerSettings:
    """Settings of the prefixed model's answers.

    Attributes:
        max_tokens: Longest answer.
        role: Message with the prefix.
        share: Share of the answers to keep, both for learning and for stopping.
    """

    max_tokens: int
    role: PrefixRole = "user"
    share: float = 1.0


def prefixed_answers(
    engine: TokenEngine,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[str],
    questions: Sequence[str],
    max_tokens: int,
    role: PrefixRole = "user",
) -> list[list[Example]]:
    """Answers every question after every prefix.

    Args:
        engine: The engine.
        tokenizer: The model's tokenizer.
        prefixes: Prefixes, one for each concept.
        questions: The questions.
        max_tokens: Longest answer.
        role: Message with the prefix.

    Returns:
        For each prefix the examples, in the order of the questions, without empty answers.

    Raises:
        ExtractionError: A prompt cannot be rendered.
        EvaluationError: The engine fails.
    """
    plain = [render_question(tokenizer, question) for question in questions]
    prefixed = [
        [render_question(tokenizer, question, prefix, role) for question in questions]
        for prefix in prefixes
    ]
    asked = [Asked(prompt.token_ids) for prompts in prefixed for prompt in prompts]
    answers = iter(engine.generate(asked, max_tokens, "answers to the prefixed prompts"))
    return [_examples(plain, prompts, [next(answers) for _ in prompts]) for prompts in prefixed]


def concept_answers(
    engine: TokenEngine,
    tokenizer: PreTrainedTokenizerBase,
    concepts: Sequence[Concept],
    learned: Sequence[str],
    stopping: Sequence[str],
    settings: AnswerSettings,
) -> dict[str, ConceptAnswers]:
    """Returns the answers for learning each concept, by name.

    Many answers show nothing of their prefix, so only the most telling are kept.

    Args:
        engine: The engine.
        tokenizer: The model's tokenizer.
        concepts: The concepts.
        learned: Questions to learn from.
        stopping: Questions for stopping.
        settings: The settings.

    Raises:
        ExtractionError: A prompt cannot be rendered, or all answers of a concept are empty.
        EvaluationError: The engine fails.
    """
    questions = [*learned, *stopping]
    prefixes = [prefix for _, prefix in concepts]
    every = prefixed_answers(
        engine, tokenizer, prefixes, questions, settings.max_tokens, settings.role
    )
    first = {render_question(tokenizer, question).text for question in learned}
    groups = []
    for examples in every:
        groups.append(_without_loops([e for e in examples if e.plain.text in first], tokenizer))
        groups.append(tuple(e for e in examples if e.plain.text not in first))
    telling = iter(_telling(engine, groups, settings.share))
    found = {}
    for name, _ in concepts:
        parts = ConceptAnswers(next(telling), next(telling))
        if not parts.learned or not parts.stopping:
            raise ExtractionError(
                f"concept {name!r}: the model's answers to its prefixed questions are empty; try another prefix"
            )
        found[name] = parts
    return found


def _without_loops(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[Example, ...]:
    """Leaves out looping answers, which would teach looping; at least a quarter is kept."""
    loops = [
        repetition(str(tokenizer.decode(list(e.answer), skip_special_tokens=True)))
        for e in examples
    ]
    limit = max(LOOPING, sorted(loops)[len(loops) // 4]) if loops else LOOPING
    return tuple(e for e, found in zip(examples, loops, strict=True) if found <= limit)


def _telling(
    engine: TokenEngine, groups: Sequence[Sequence[Example]], share: float
) -> list[tuple[Example, ...]]:
    """Keeps, of each group, the answers that the prefix makes most likely relative to the plain prompt."""
    asked = [Asked(e.plain.token_ids, e.answer) for examples in groups for e in examples]
    plain = iter(engine.score(asked, "answers after the plain prompts"))
    kept = []
    for examples in groups:
        # A sum over tokens grows linearly with the concept's effect, and with the square root by chance.
        telling = [(e.log_likelihood - next(plain)) / len(e.answer) ** 0.5 for e in examples]
        count = math.ceil(share * len(examples))
        best = set(sorted(range(len(examples)), key=lambda at: -telling[at])[:count])
        kept.append(tuple(e for at, e in enumerate(examples) if at in best))
    return kept


def _examples(
    plain: Sequence[RenderedPrompt],
    prefixed: Sequence[RenderedPrompt],
    answers: Sequence[Generated],
) -> list[Example]:
    rows = zip(plain, prefixed, answers, strict=True)
    return [
        Example(first, second, answer.tokens, answer.log_likelihood)
        for first, second, answer in rows
        if len(answer.tokens) >= _SHORTEST
    ]
