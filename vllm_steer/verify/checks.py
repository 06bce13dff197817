"""The checks of answers: against the reference, against the same requests alone, through the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_steer.verify.cases import CachePair, Case
from vllm_steer.verify.compare import Difference, Tolerance, between, joined, to_reference
from vllm_steer.verify.engine_calls import Answer, answer_batch, forget_prefixes
from vllm_steer.verify.process import EngineProcess
from vllm_steer.verify.report import Check, judged

PARITY, ISOLATION, CACHE = "parity", "isolation", "prefix cache"
TOKENS = 16
# Log-probabilities compared per token: vLLM's default maximum.
TOP = 20
# Tokens of a prompt that fills prefix-cache blocks, unless one block is longer.
CACHED_PROMPT = 600
# Steering with a smaller effect on log-probabilities, in tolerances, cannot be distinguished from none.
DISCERNIBLE = 5

# Prompt, tokens after it and steering to log-probabilities ``[prompt + tokens, vocabulary]`` of the token
# after each.
Score = Callable[[Sequence[int], Sequence[int], dict[str, Any] | None], NDArray[np.float32]]
Step = Callable[[str], None]


def ask(engine: EngineProcess, cases: Sequence[Case]) -> list[Answer]:
    """Answers all cases in one batch, with an empty prefix cache."""
    engine.call(forget_prefixes)
    return engine.call(
        answer_batch, [case.prompt for case in cases], [case.extra for case in cases], TOKENS, TOP
    )


def check_parity(
    cases: Sequence[Case],
    answers: Sequence[Answer],
    score: Score,
    allowed: Tolerance,
    dtype: str,
    step: Step,
) -> Check:
    """Compares a batch's answers with the reference's log-probabilities of the same tokens.

    Args:
        cases: The requests.
        answers: The engine's answers in one batch.
        score: The reference.
        allowed: Tolerance for rounding.
        dtype: Dtype of engine and reference.
        step: Called with the name of each next step.
    """
    found: dict[str, Difference] = {}
    effects: dict[str, Difference] = {}
    for case, answer in zip(cases, answers, strict=True):
        step(f"Hugging Face: {case.name}")
        # The distribution at the prompt's last position is that of the first token.
        places = slice(len(case.prompt) - 1, -1)
        expected = score(case.prompt, answer.tokens, case.steering)[places]
        found[case.name] = to_reference(answer, expected)
        if case.steering is not None:
            plain = score(case.prompt, answer.tokens, None)[places]
            effects[case.name] = to_reference(answer, plain)
    total, effect = joined(found.values()), joined(effects.values())
    weak = [name for name, one in effects.items() if one.largest < DISCERNIBLE * allowed.largest]
    faults = _faults(found, allowed)
    if 2 * len(weak) > len(effects):
        faults.append(
            f"most steerings move log-probabilities by less than {DISCERNIBLE * allowed.largest:.2g}, too little "
            f"to distinguish from none; give a pack with larger default scales, or --dtype float32"
        )
    summary = (
        f"{len(cases)} requests of one batch, {TOKENS} tokens each, against Hugging Face in {dtype} with hooks, "
        f"on the engine's tokens: {_agreement(total, allowed)}. Without steering they would differ "
        f"by {effect.largest:.2g}, {effect.mean:.2g} on average."
    )
    if dtype == "float32" and not total.gaps:
        summary += " Greedy tokens are equal."
    if dtype != "float32":
        summary += " Smaller faults only show with --dtype float32."
    if weak:
        summary += f" Too weak to distinguish from unsteered: {', '.join(weak)}."
    figures = _figures(total, allowed) | {"effect": effect.largest, "too_weak": weak}
    return judged(PARITY, faults, summary, figures)


def alone(
    engine: EngineProcess, cases: Sequence[Case], answers: Sequence[Answer], step: Step
) -> dict[str, Difference]:
    """Sends each request of a batch alone; returns the differences from the batch's answers."""
    found = {}
    for case, answer in zip(cases, answers, strict=True):
        step(f"alone: {case.name}")
        (single,) = ask(engine, [case])
        found[f"{case.name}, alone"] = between(answer, single)
    return found


def without_plugin(
    plain: EngineProcess, cases: Sequence[Case], answers: Sequence[Answer], step: Step
) -> dict[str, Difference]:
    """Sends a batch's prompts to plain vLLM; returns the differences of the unsteered answers."""
    step("plain vLLM: the same batch")
    expected = ask(plain, [Case(case.name, case.prompt, None) for case in cases])
    return {
        f"{case.name}, in plain vLLM": between(answer, other)
        for case, answer, other in zip(cases, answers, expected, strict=True)
        if case.steering is None
    }


def check_isolation(
    singles: dict[str, Difference], unsteered: dict[str, Difference], allowed: Tolerance
) -> Check:
    """Judges the results of :func:`alone` and :func:`without_plugin`."""
    one, other = joined(singles.values()), joined(unsteered.values())
    summary = (
        f"{len(singles)} requests of a mixed batch get the same answers as alone: {_agreement(one, allowed)}. Its "
        f"{len(unsteered)} unsteered ones get those of plain vLLM: {_agreement(other, allowed)}."
    )
    faults = _faults(singles | unsteered, allowed)
    figures = {"alone": _figures(one, allowed), "plain": _figures(other, allowed)}
    return judged(ISOLATION, faults, summary, figures)


def check_cache(
    engine: EngineProcess,
    pairs: Sequence[CachePair],
    prompt: list[int],
    allowed: Tolerance,
    step: Step,
) -> Check:
    """Sends pairs of requests one after the other, and checks the second's cache hits.

    Args:
        engine: The engine, with its prefix cache on.
        pairs: The pairs.
        prompt: Token ids of a prompt that fills blocks.
        allowed: Tolerance for rounding.
        step: Called with the name of each next step.
    """
    faults, found = [], {}
    cached: dict[str, int] = {}
    for pair in pairs:
        step(f"prefix cache: {pair.name}")
        first, second = (
            Case(pair.name, prompt, steering) for steering in (pair.first, pair.second)
        )
        (computed,) = ask(engine, [second])
        ask(engine, [first])
        (answer,) = engine.call(answer_batch, [prompt], [second.extra], TOKENS, TOP)
        cached[pair.name] = answer.cached
        if bool(answer.cached) != pair.shared:
            wanted = "finds nothing" if pair.shared else f"finds {answer.cached} tokens"
            faults.append(f"{pair.name}: the second request {wanted} in the cache")
        found[pair.name] = between(answer, computed)
    total = joined(found.values())
    hits = [cached[pair.name] for pair in pairs if pair.shared]
    summary = (
        f"{len(pairs)} pairs of requests with one prompt of {len(prompt)} tokens: those with different steering find 0 "
        f"cached tokens, those with equal steering of the prompt {min(hits)}. Their answers equal those without the "
        f"cache: {_agreement(total, allowed)}."
    )
    if faults:
        summary = f"{len(pairs)} pairs of requests with one prompt of {len(prompt)} tokens."
    return judged(
        CACHE,
        faults + _faults(found, allowed),
        summary,
        _figures(total, allowed) | {"cached_tokens": cached},
    )


def long_prompt(prompts: Iterable[list[int]], block: int, room: int) -> list[int]:
    """Returns prompts joined and repeated until they fill two blocks of the prefix cache.

    Args:
        prompts: Token ids.
        block: Tokens of a block.
        room: Most tokens that fit.
    """
    together = [token for prompt in prompts for token in prompt]
    length = min(max(CACHED_PROMPT, 2 * block + 1), room)
    return (together * (length // len(together) + 1))[:length]


def _faults(found: dict[str, Difference], allowed: Tolerance) -> list[str]:
    named = ((name, one.fault(allowed)) for name, one in found.items())
    return [f"{name}: {fault}" for name, fault in named if fault is not None]


def _agreement(one: Difference, allowed: Tolerance) -> str:
    tied = ""
    if one.gaps:
        tied = f"; {len(one.gaps)} of {one.tokens} tokens differ, with gaps of at most {max(one.gaps):.2g}"
    return (
        f"log-probabilities differ by at most {one.largest:.2g} (allowed {allowed.largest:.2g}), on average "
        f"{one.mean:.2g} (allowed {allowed.mean:.2g}){tied}"
    )


def _figures(one: Difference, allowed: Tolerance) -> dict[str, Any]:
    return {
        "largest": one.largest,
        "mean": one.mean,
        "allowed_largest": allowed.largest,
        "allowed_mean": allowed.mean,
        "tokens": one.tokens,
        "tokens_that_differ": len(one.gaps),
    }
