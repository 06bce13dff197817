"""Scores of directions, per token: each equals Hugging Face with hooks, whatever else happens in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.engine.cases import CHEERFUL, GLOOMY, HEIGHTS, SPIDERS
from vllm_steer.errors import EngineError
from vllm_steer.testing.engine import Engine, Output
from vllm_steer.testing.parity import TOLERANCE, assert_equals_hooks
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS = 24
Start = Callable[[str], Engine]

EVERYWHERE = {"name": SPIDERS, "at": "all"}
READ_CASES: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "the answer": {"read": [{"name": SPIDERS}]},
    "one layer, everywhere": {"read": [EVERYWHERE | {"layers": [1]}]},
    "three probes": {
        "read": [EVERYWHERE, {"name": GLOOMY, "at": "prompt"}, {"name": HEIGHTS, "layers": [2, 3]}]
    },
    "layers apart and their mean": {
        "read": [
            EVERYWHERE | {"layers": [1]},
            EVERYWHERE | {"layers": [3]},
            EVERYWHERE | {"layers": [1, 3]},
        ]
    },
    "ranges": {"read": [{"name": CHEERFUL, "at": [[2, 5], [-3, -1], [40, 44]]}]},
    "steering alone": {"directions": [{"name": CHEERFUL, "scale": 8.0}]},
    "what is steered, before and after": {
        "directions": [{"name": SPIDERS, "scale": 10.0}],
        "read": [EVERYWHERE, EVERYWHERE | {"when": "after"}, {"name": HEIGHTS, "at": "all"}],
    },
    "what is steered for a while": {
        "directions": [{"name": GLOOMY, "scale": 9.0, "positions": {"generated": [2, 9]}}],
        "read": [{"name": GLOOMY, "when": "after"}, {"name": GLOOMY}],
    },
}
AFFINE_CASES: dict[str, dict[str, Any] | None] = {
    "ablation": {
        "directions": [{"name": SPIDERS, "op": "ablate"}],
        "read": [EVERYWHERE, EVERYWHERE | {"when": "after"}],
    },
    "what keeps its length": {
        "directions": [{"name": HEIGHTS, "scale": 14.0, "restore_norm": True}],
        "read": [{"name": HEIGHTS, "at": "all", "when": "after"}],
    },
    "gate": {
        "directions": [
            {"name": SPIDERS, "scale": 9.0, "gate": {"direction": HEIGHTS, "above": 0.0}}
        ],
        "read": [{"name": HEIGHTS, "at": "all"}, EVERYWHERE | {"when": "after"}],
    },
}


def assert_scores_equal_hooks(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    steerings: Sequence[dict[str, Any] | None],
    outputs: Sequence[Output],
    cached: bool = False,
) -> None:
    """Every score equals the hooks', and there are none but those that were asked for."""
    for prompt, steering, output in zip(prompts, steerings, outputs, strict=True):
        if not steering or "read" not in steering:
            assert output.scores is None
            continue
        expected = reference.read(prompt, output.tokens, steering)
        # The last token went through no model.
        expected[:, -1] = np.nan
        if cached:
            expected[:, : output.cached] = np.nan
        assert output.scores is not None
        assert np.array_equal(np.isnan(output.scores), np.isnan(expected)), steering
        assert np.nanmax(np.abs(output.scores - expected), initial=0.0) < TOLERANCE, steering


def test_a_server_without_reads_names_the_flag(start: Start, prompts: list[list[int]]) -> None:
    with pytest.raises(EngineError, match="--steering-reads"):
        start("eager").generate(prompts[:1], [{"read": [{"name": SPIDERS}]}], 4)


# Those that the tests below use again come last.
KINDS = {
    "reads-async-eager": READ_CASES,
    "reads-compiled": READ_CASES,
    "reads-v2-eager": READ_CASES,
    "reads-affine-eager": READ_CASES | AFFINE_CASES,
    "reads-draft-eager": READ_CASES,
    "reads-tp2-eager": READ_CASES,
    "reads-pp2-eager": READ_CASES,
    "reads-ngram-eager": READ_CASES,
    "reads-eager": READ_CASES,
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_hooks(
    kind: str, start: Start, prompts: list[list[int]], reference: Reference
) -> None:
    steerings = list(KINDS[kind].values())
    prompts = (prompts * 2)[: len(steerings)]
    engine = start(kind)
    outputs = engine.generate(prompts, steerings, TOKENS)
    assert_equals_hooks(reference, prompts, steerings, outputs, TOKENS)
    assert_scores_equal_hooks(reference, prompts, steerings, outputs)
    if kind in ("reads-ngram-eager", "reads-draft-eager"):
        metrics = engine.metrics()
        drafted = metrics["vllm:spec_decode_num_draft_tokens"]
        accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
        # Both happen, so scores of accepted and of rejected drafts were told apart.
        assert 0 < accepted < drafted, (accepted, drafted)


def test_preempted_and_recomputed(
    start: Start, prompts: list[list[int]], reference: Reference
) -> None:
    engine = start("reads-tiny-eager")
    steerings = [READ_CASES["three probes"], READ_CASES["what is steered, before and after"]] * 4
    longer = [(prompt * 4)[:90] for prompt in prompts[: len(steerings)]]
    outputs = engine.generate(longer, steerings, 60)
    assert engine.metrics()["vllm:num_preemptions"] > 0
    assert_scores_equal_hooks(reference, longer, steerings, outputs)


def test_what_the_prefix_cache_had_has_no_score_unless_it_is_recomputed(
    start: Start, prompts: list[list[int]], reference: Reference
) -> None:
    engine, prompt = start("reads-cached-eager"), (prompts[0] * 4)[:100]
    steering = {"read": [EVERYWHERE, {"name": GLOOMY}]}
    again = [steering, steering, steering | {"recompute": True}]
    found = [engine.generate([prompt], [each], TOKENS)[0] for each in again]
    # Reading shares the cache with who does not read, and leaves it as it is.
    found += engine.generate([prompt], [None], TOKENS)
    assert [output.cached for output in found] == [0, 96, 0, 96]
    assert_scores_equal_hooks(reference, [prompt] * 4, [*again, None], found, cached=True)
    assert len({tuple(output.tokens) for output in found}) == 1


@pytest.mark.parametrize("kind", ["reads-eager", "reads-ngram-eager"])
def test_a_probe_ends_the_answer_one_token_after_it_fired(
    kind: str, start: Start, prompts: list[list[int]], reference: Reference
) -> None:
    engine, prompt = start(kind), prompts[1]
    steering: dict[str, Any] = {"read": [{"name": HEIGHTS}, {"name": SPIDERS}]}
    (whole,) = engine.generate([prompt], [steering], TOKENS)
    scores = reference.read(prompt, whole.tokens, steering)[1, len(prompt) : -1]
    assert whole.reasons == ("length", None)
    for tokens in (1, 2):
        windows = np.lib.stride_tricks.sliding_window_view(scores, tokens).min(-1)
        above = between(windows)
        last = int(np.argmax(windows > above)) + tokens - 1
        rule = {"read": 1, "above": above, "for": tokens}
        ruled = [steering | {"stop_when": rule}, steering | {"abort_when": rule}]
        outputs = engine.generate([prompt] * 2, ruled, TOKENS)
        for output, reason in zip(outputs, ("stop", "abort"), strict=True):
            assert output.tokens == whole.tokens[: last + 2]
            assert output.reasons == (reason, f"{SPIDERS} above {above:g}")
        assert_scores_equal_hooks(reference, [prompt] * 2, ruled, outputs)


def between(values: np.ndarray) -> float:
    """A number that about half of the values are greater than, and none is near."""
    ordered = np.sort(values)
    low, high = ordered[:-1], ordered[1:]
    middle = np.argsort(np.abs(np.arange(len(low)) - len(low) / 2))
    first = next(number for number in middle if high[number] - low[number] > 10 * TOLERANCE)
    return float((low[first] + high[first]) / 2)


def test_samples_of_one_prompt_have_scores_of_their_own(
    start: Start, prompts: list[list[int]], reference: Reference
) -> None:
    steering, prompt = READ_CASES["three probes"], prompts[2][::-1]
    outputs = start("reads-eager").generate([prompt], [steering], TOKENS, n=3, temperature=2.0)
    assert len({tuple(output.tokens) for output in outputs}) > 1
    assert_scores_equal_hooks(reference, [prompt] * 3, [steering] * 3, outputs)


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"read": [{"name": "fears/snakes"}]}, "read.0.name"),
        ({"read": [{"name": SPIDERS, "layers": [77]}]}, "no vector for layers"),
        (
            {"read": [{"name": n} for n in (SPIDERS, HEIGHTS, CHEERFUL, GLOOMY)]},
            "4 distinct probes",
        ),
        ({"read": [{"name": SPIDERS, "at": [[400, None]]}]}, "no token is read"),
        (
            {"read": [EVERYWHERE], "stop_when": {"read": 0, "above": 1.0}},
            "recompute",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(
    steering: dict[str, Any], message: str, start: Start, prompts: list[list[int]]
) -> None:
    with pytest.raises(EngineError, match=message):
        start("reads-eager").generate(prompts[:1], [steering], 4)
