"""The method without a cache, held against its formula written out, and its stand-ins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vllm_steer.offline.fusion.distance import distances
from vllm_steer.offline.fusion.original import (
    Fusion,
    continue_greedily,
    forced_logs,
    frozen,
    frozen_steered,
    next_logs,
    refreshed,
    running_mean,
)
from vllm_steer.offline.models.hooks import changed, watched
from vllm_steer.offline.models.loading import find_blocks

PROMPT = (5, 17, 300, 41, 8, 99)
ANSWER = (7, 450, 23, 12, 301)


def blended(reference: Tensor, alpha: float, gamma: float) -> Any:
    """The method's formula as it was published, with both of its factors."""

    def change(layer: int, output: Tensor) -> Tensor:
        mean = output.mean(dim=1, keepdim=True)
        shifted = output + gamma * (reference[layer] - mean)
        return alpha * shifted + (1 - alpha) * output

    return change


@pytest.fixture(scope="module")
def reference(tiny_llama: PreTrainedModel) -> Tensor:
    config = tiny_llama.config
    shape = config.num_hidden_layers, config.hidden_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def fusion(reference: Tensor, *scales: float) -> Fusion:
    return Fusion(PROMPT, reference, torch.tensor(scales))


@torch.inference_mode()
def prompt_mean(model: PreTrainedModel) -> Tensor:
    blocks = find_blocks(model, model.config.num_hidden_layers)
    means: list[Tensor] = []
    with watched(blocks, lambda layer, output: means.append(output.mean(dim=1)[0])):
        model(torch.tensor([PROMPT]), use_cache=False)
    return torch.stack(means)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 0.6), (0.6, 0.5), (1.0, 0.3), (0.3, 1.0)])
def test_only_the_product_counts(
    tiny_model: PreTrainedModel, reference: Tensor, alpha: float, gamma: float
) -> None:
    found = next_logs(tiny_model, blended(reference, alpha, gamma), PROMPT)
    expected = next_logs(tiny_model, refreshed(fusion(reference, 0.3, 0.3, 0.3)), PROMPT)
    assert (found - expected).abs().max() < 1e-5
    other = next_logs(tiny_model, blended(reference, alpha, 0.9 * gamma), PROMPT)
    assert (other - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("alpha", "gamma"), [(0.0, 0.7), (0.7, 0.0)])
def test_a_factor_of_zero_is_no_steering(
    tiny_model: PreTrainedModel, reference: Tensor, alpha: float, gamma: float
) -> None:
    found = next_logs(tiny_model, blended(reference, alpha, gamma), PROMPT)
    zero = next_logs(tiny_model, refreshed(fusion(reference, 0.0, 0.0, 0.0)), PROMPT)
    plain = next_logs(tiny_model, None, PROMPT)
    assert (found - plain).abs().max() < 1e-5
    assert torch.equal(zero, plain)


@torch.inference_mode()
def test_at_full_strength_the_mean_is_the_reference(
    tiny_model: PreTrainedModel, reference: Tensor
) -> None:
    blocks = find_blocks(tiny_model, tiny_model.config.num_hidden_layers)
    for change in (
        blended(reference, 1.0, 1.0),
        refreshed(fusion(reference, 1.0, 1.0, 1.0)),
        running_mean(fusion(reference, 1.0, 1.0, 1.0)),
    ):
        seen: dict[int, Tensor] = {}
        with changed(blocks, change), watched(blocks, seen.__setitem__):
            tiny_model(torch.tensor([PROMPT]), use_cache=False)
        for layer, output in seen.items():
            assert (output.mean(dim=1)[0] - reference[layer]).abs().max() < 1e-5


def test_the_mean_of_the_original_is_refreshed(
    tiny_llama: PreTrainedModel, reference: Tensor
) -> None:
    """A scale at one layer alone: what its mean is, is told by a plain forward."""
    given = fusion(reference, 0.0, 0.5, 0.0)
    blocks = find_blocks(tiny_llama, 3)
    tokens = [*PROMPT, *ANSWER]
    seen: dict[int, Tensor] = {}
    with torch.inference_mode(), watched(blocks, seen.__setitem__):
        tiny_llama(torch.tensor([tokens]), use_cache=False)
    whole = seen[1].mean(dim=1)[0]
    expected = next_logs(tiny_llama, frozen(given, torch.stack([whole] * 3)), tokens)
    assert (next_logs(tiny_llama, refreshed(given), tokens) - expected).abs().max() < 1e-5
    stale = next_logs(tiny_llama, frozen(given, prompt_mean(tiny_llama)), tokens)
    assert (stale - expected).abs().max() > 1e-3


def test_the_mean_under_steering_is_that_of_the_original_on_the_prompt(
    tiny_model: PreTrainedModel, reference: Tensor
) -> None:
    given = fusion(reference, 0.4, 0.2, 0.3)
    original = next_logs(tiny_model, refreshed(given), PROMPT)
    steered = next_logs(tiny_model, frozen_steered(tiny_model, given), PROMPT)
    assert (steered - original).abs().max() < 1e-5
    unsteered = next_logs(tiny_model, frozen(given, prompt_mean(tiny_model)), PROMPT)
    assert (unsteered - original).abs().max() > 1e-2


@torch.inference_mode()
def cached_logs(model: PreTrainedModel, change: Any) -> Tensor:
    """Log-probabilities of the token after the prompt and after each of the answer's, with a cache."""
    blocks = find_blocks(model, model.config.num_hidden_layers)
    cache, rows = DynamicCache(config=model.config), []
    with changed(blocks, change):
        for tokens in (PROMPT, *((token,) for token in ANSWER[:-1])):
            logits = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits
            rows.append(logits[0, -1].log_softmax(dim=-1))
    return torch.stack(rows)


def test_the_running_mean_is_what_a_cache_gives(
    tiny_model: PreTrainedModel, reference: Tensor
) -> None:
    given = fusion(reference, 0.4, 0.2, 0.3)
    sums, counts = torch.zeros_like(reference), [0] * len(reference)

    def change(layer: int, output: Tensor) -> Tensor:
        sums[layer] += output.sum(dim=1)[0]
        counts[layer] += output.shape[1]
        mean = sums[layer] / counts[layer]
        return output + given.scales[layer] * (reference[layer] - mean)

    expected = cached_logs(tiny_model, change)
    found = forced_logs(tiny_model, running_mean(given), PROMPT, ANSWER)
    assert (found - expected).abs().max() < 1e-4
    first = forced_logs(tiny_model, frozen_steered(tiny_model, given), PROMPT, ANSWER)
    assert (found[0] - first[0]).abs().max() < 1e-5
    assert (found[-1] - first[-1]).abs().max() > 1e-3


def test_the_frozen_form_is_what_a_cache_gives(
    tiny_model: PreTrainedModel, reference: Tensor
) -> None:
    form = frozen(fusion(reference, 0.4, 0.2, 0.3), prompt_mean(tiny_model))
    found = forced_logs(tiny_model, form, PROMPT, ANSWER)
    assert (found - cached_logs(tiny_model, form)).abs().max() < 1e-4


def test_a_greedy_answer_ends_at_its_end_and_at_its_limit(tiny_llama: PreTrainedModel) -> None:
    tokens = continue_greedily(tiny_llama, None, PROMPT, 8, None)
    assert len(tokens) == 8
    assert tokens[3] == int(next_logs(tiny_llama, None, [*PROMPT, *tokens[:3]]).argmax())
    first = tokens.index(tokens[4])
    assert continue_greedily(tiny_llama, None, PROMPT, 8, tokens[4]) == tokens[: first + 1]


def test_distances(tiny_llama: PreTrainedModel, reference: Tensor) -> None:
    mean = prompt_mean(tiny_llama)
    none = distances(tiny_llama, [(fusion(reference, 0.0, 0.0, 0.0), mean)], 6, None)
    for distance in none.values():
        assert (distance.same_answers, distance.same_tokens) == (1.0, 1.0)
        assert distance.max_kl == pytest.approx(0.0, abs=1e-6)
    some = distances(tiny_llama, [(fusion(reference, 0.3, 0.3, 0.3), mean)], 6, None)
    assert some["unsteered"].mean_kl > some["frozen"].mean_kl > 1e-3
    for distance in some.values():
        assert 0.0 <= distance.same_tokens <= 1.0
        assert 0.0 < distance.mean_kl <= distance.max_kl
