"""How likely answers are: plain Hugging Face row by row, whatever is padded, and the gradient of the change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
)

from tests.offline.conftest import TINY
from vllm_steer.errors import ExtractionError
from vllm_steer.offline.models.likelihood import AnswerModel, padded
from vllm_steer.offline.models.loading import find_blocks

GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS = (LlamaConfig(**TINY, **GROUPED), Qwen3Config(**TINY, **GROUPED), GPTNeoXConfig(**TINY))
LAYERS = (0, 2)
# Prompts and answers of unequal lengths, the shortest prompt with the longest answer.
LENGTHS = ((9, 4), (3, 11), (14, 2), (6, 6))


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: config.model_type)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(request.param).eval()


@pytest.fixture(scope="module")
def rows() -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(0)
    drawn = [[rng.integers(3, 100, length).tolist() for length in pair] for pair in LENGTHS]
    return [prompt for prompt, _ in drawn], [answer for _, answer in drawn]


@pytest.fixture(scope="module")
def change() -> Tensor:
    return torch.randn(4, len(LAYERS), 32, generator=torch.Generator().manual_seed(1))


def by_hand(
    model: PreTrainedModel,
    prompt: Sequence[int],
    answer: Sequence[int],
    change: Tensor | None = None,
) -> float:
    """Sum of the log-softmax at each token of the answer, of this row alone."""
    blocks = find_blocks(model, 3)
    handles = []
    for at, layer in enumerate(LAYERS if change is not None else ()):

        def add(module: object, args: object, output: object, at: int = at) -> object:
            if isinstance(output, tuple):
                return output[0] + change[at], *output[1:]
            return output + change[at]

        handles.append(blocks[layer].register_forward_hook(add))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
    for handle in handles:
        handle.remove()
    logs = logits.double().log_softmax(-1)
    return float(sum(logs[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))


def asked(answers: AnswerModel, rows: tuple, change: Tensor | None = None) -> Tensor:
    return answers.log_likelihoods(padded(*rows, torch.device("cpu")), change)


def test_a_batch_equals_row_after_row(model, rows, change) -> None:
    """With and without a change, each row its own; padding and company are nowhere to be seen."""
    answers = AnswerModel(model, LAYERS)
    for given in (None, change):
        changes = [None] * 4 if given is None else list(given)
        expected = [by_hand(model, *row, each) for *row, each in zip(*rows, changes, strict=True)]
        np.testing.assert_allclose(asked(answers, rows, given).detach(), expected, rtol=1e-5)
    moved = asked(answers, rows, change) - asked(answers, rows)
    assert (moved.abs() > 1e-3).all()


def test_what_stands_in_the_padding_changes_no_bit(model, rows, change) -> None:
    batch = padded(*rows, torch.device("cpu"))
    length = torch.tensor([[sum(pair)] for pair in LENGTHS])
    padding = torch.arange(batch.token_ids.shape[1]) >= length
    assert padding.any()
    other = torch.where(padding, 7, batch.token_ids)
    answers = AnswerModel(model, LAYERS)
    filled = type(batch)(other, batch.kept, other[:, batch.kept + 1], batch.real)
    assert torch.equal(
        answers.log_likelihoods(batch, change), answers.log_likelihoods(filled, change)
    )


def test_one_change_serves_all_rows(model, rows, change) -> None:
    answers = AnswerModel(model, LAYERS)
    repeated = change[:1].expand(4, -1, -1)
    assert torch.equal(asked(answers, rows, change[:1]), asked(answers, rows, repeated))


def test_the_gradient_is_that_of_finite_differences(model, rows, change) -> None:
    """In float64, on a coordinate of every row and layer; no row has a part in another's."""
    double = AutoModelForCausalLM.from_config(model.config).eval()
    double.load_state_dict(model.state_dict())
    answers = AnswerModel(double.double(), LAYERS)
    given = change.double().requires_grad_(True)
    # Log-probabilities are computed in float32 whatever the model runs in.
    step, coordinate = 1e-2, 5
    for row in range(4):
        gradient = torch.autograd.grad(asked(answers, rows, given)[row], given)[0]
        others = [other for other in range(4) if other != row]
        assert not gradient[others].any()
        for at in range(len(LAYERS)):
            ends = []
            for sign in (1, -1):
                moved = change.double().clone()
                moved[row, at, coordinate] += sign * step
                ends.append(float(asked(answers, rows, moved)[row]))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(gradient[row, at, coordinate]) == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_checkpointing_changes_neither_loss_nor_gradient(model, rows, change) -> None:
    found = []
    for checkpointing in (False, True):
        given = change.clone().requires_grad_(True)
        total = asked(AnswerModel(model, LAYERS, checkpointing), rows, given).sum()
        total.backward()
        found.append((total.item(), given.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_checkpointing_computes_the_blocks_again(model, rows, change) -> None:
    runs = []
    # What comes after the last thing that the backward pass needs is not computed again.
    handle = find_blocks(model, 3)[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for checkpointing, expected in ((False, 1), (True, 2)):
        given = change.clone().requires_grad_(True)
        asked(AnswerModel(model, LAYERS, checkpointing), rows, given).sum().backward()
        assert len(runs) == expected
        runs.clear()
    handle.remove()


def test_the_model_is_frozen_and_left_as_it_was(model, rows, change) -> None:
    plain = by_hand(model, rows[0][0], rows[1][0])
    answers = AnswerModel(model.train(), LAYERS, checkpointing=True)
    asked(answers, rows, change.clone().requires_grad_(True)).sum().backward()
    assert not model.training
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())
    assert by_hand(model, rows[0][0], rows[1][0]) == plain
    assert not any(module._forward_hooks for module in model.modules())


class Whole(LlamaForCausalLM):
    """A family that gives all logits, whatever is asked for."""

    def forward(self, input_ids: Tensor, use_cache: bool | None = None, **_: object) -> object:
        return super().forward(input_ids=input_ids, use_cache=use_cache)


class Last(LlamaForCausalLM):
    """One that gives those of the last token."""

    def forward(self, input_ids: Tensor, **_: object) -> object:
        return super().forward(input_ids=input_ids, logits_to_keep=1)


def test_families_that_give_all_logits(rows, change) -> None:
    torch.manual_seed(0)
    whole = Whole(CONFIGS[0]).eval()
    expected = [by_hand(whole, *row, each) for *row, each in zip(*rows, change, strict=True)]
    found = asked(AnswerModel(whole, LAYERS), rows, change)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(
        ExtractionError, match=r"Last gives logits of shape \(4, 1, 100\) for \(4, 16\)"
    ):
        asked(AnswerModel(Last(CONFIGS[0]), LAYERS), rows)
