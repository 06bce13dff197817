"""Each objective and form equals a plain reading of its paper, loss and gradients, on a tiny random Llama."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import get_scheduler

from tests.offline.train_cases import (
    ANSWERED,
    CONTRASTED,
    LAYER,
    PREFERRED,
    bipo_loss,
    cdas_loss,
    likelihood_loss,
    log_likelihood,
    only_at,
    reft_r1_loss,
)
from vllm_steer.offline.models.likelihood import AnswerModel
from vllm_steer.offline.train.directions import low_rank_directions, scaled_directions
from vllm_steer.offline.train.examples import Row
from vllm_steer.offline.train.forms import (
    LowRank,
    ScaledDimensions,
    ScaledVectors,
    UnitVectors,
    Vectors,
)
from vllm_steer.offline.train.objectives.detection import DetectionSteering
from vllm_steer.offline.train.objectives.distribution import DistributionMatching, jensen_shannon
from vllm_steer.offline.train.objectives.likelihood import Likelihood
from vllm_steer.offline.train.objectives.objective import Moment, Objective
from vllm_steer.offline.train.objectives.preference import BidirectionalPreference
from vllm_steer.offline.train.positions import Positions
from vllm_steer.offline.train.schedule import factor
from vllm_steer.offline.train.trainer import Lesson, Trainer, TrainerOptions
from vllm_steer.verify.oracle_forms import apply_form

HIDDEN = 32


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_loss(
    objective: Objective, examples: Sequence, size: int, moment: Moment | None = None
) -> Tensor:
    """The loss of a step of all examples, in parts of a size."""
    tokens = sum(example.tokens for example in examples)
    rows = [Row(0, example, tokens, len(examples)) for example in examples]
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return sum(objective.loss(part, moment or Moment(0, 10)) for part in parts)


def assert_same(found: Tensor, expected: Tensor, **leaves: tuple[Tensor, Tensor]) -> None:
    """Losses are equal, and their gradients by pairs of leaves."""
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    ours = torch.autograd.grad(found, [pair[0] for pair in leaves.values()])
    # Several losses are held against one reading.
    plain = torch.autograd.grad(expected, [pair[1] for pair in leaves.values()], retain_graph=True)
    for name, one, other in zip(leaves, ours, plain, strict=True):
        one = one.reshape(other.shape)
        assert float(other.norm()) > 1e-4, name
        assert float((one - other).norm() / other.norm()) < 1e-3, name


def lengths(example) -> tuple[int, int]:
    return len(example.prompt), len(example.prompt) + len(example.answer)


PLACES = {
    "all": lambda start, end: range(end),
    "prompt": lambda start, end: range(start),
    "generated": lambda start, end: range(start, end),
    "last_prompt": lambda start, end: [start - 1],
    "f2+l2": lambda start, end: {0, 1, start - 2, start - 1},
    "f1": lambda start, end: [0],
    "l3": lambda start, end: [start - 3, start - 2, start - 1],
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("positions", PLACES)
def test_vectors_at_positions(tiny_llama, positions, size) -> None:
    form = Vectors(draw(1, 2, HIDDEN), torch.tensor([[2.0, 5.0]]))
    objective = Likelihood(AnswerModel(tiny_llama, (0, 2)), form, Positions.parse(positions))
    # A coordinate of 1 is the norm over the root of the width.
    steps = form.steps[0].detach().clone().requires_grad_(True)
    vectors = steps * torch.tensor([[2.0], [5.0]]) / HIDDEN**0.5
    expected = likelihood_loss(
        tiny_llama,
        ANSWERED,
        lambda e: {
            layer: only_at(list(PLACES[positions](*lengths(e))), lambda h, k=k: h + vectors[k])
            for k, layer in enumerate((0, 2))
        },
    )
    assert_same(whole_loss(objective, ANSWERED, size), expected, steps=(form.steps, steps))


def test_a_template_is_left_out(tiny_llama) -> None:
    vectors = draw(1, 1, HIDDEN)
    form = Vectors(vectors, torch.ones(1, 1))
    objective = Likelihood(AnswerModel(tiny_llama, (LAYER,)), form, Positions.parse("all", 2))
    expected = likelihood_loss(
        tiny_llama,
        ANSWERED,
        lambda e: {LAYER: only_at(range(2, 99), lambda h: h + vectors[0, 0])},
    )
    assert float(whole_loss(objective, ANSWERED, 3).detach()) == pytest.approx(
        float(expected), rel=1e-4
    )


@pytest.mark.parametrize("direction", [1, -1])
def test_bipo(tiny_llama, direction) -> None:
    start = draw(1, 1, HIDDEN)
    form = Vectors(start, torch.full((1, 1), HIDDEN**0.5))
    objective = BidirectionalPreference(
        AnswerModel(tiny_llama, (LAYER,)), form, Positions("all"), beta=0.1, seed=0
    )
    step = next(step for step in range(20) if objective.sign(step) == direction)
    plain = start[0, 0].clone().requires_grad_(True)
    expected = bipo_loss(tiny_llama, PREFERRED, plain, direction, 0.1)
    for size in (1, 3):
        found = whole_loss(objective, PREFERRED, size, Moment(step, 20))
        assert_same(found, expected, vector=(form.steps, plain))


def test_bipo_draws_both_directions(tiny_llama) -> None:
    form = Vectors(torch.zeros(1, 1, HIDDEN), torch.ones(1, 1))
    given = (AnswerModel(tiny_llama, (LAYER,)), form, Positions("all"), 0.1)
    signs = [BidirectionalPreference(*given, seed=1).sign(step) for step in range(400)]
    assert set(signs) == {1, -1}
    assert abs(sum(signs)) < 80
    assert signs != [BidirectionalPreference(*given, seed=2).sign(step) for step in range(400)]
    # Without a vector no answer is preferred, whatever the direction.
    objective = BidirectionalPreference(*given, seed=1)
    with torch.no_grad():
        assert objective.score(0, PREFERRED, 2) == pytest.approx(-np.log(2), rel=1e-5)


@pytest.mark.parametrize("step", [0, 7])
def test_reft_r1(tiny_llama, step) -> None:
    form = UnitVectors(draw(1, 1, HIDDEN, seed=3), tangent=True)
    objective = DetectionSteering(
        AnswerModel(tiny_llama, (LAYER,)), form, Positions.parse("all", 1), 2, 0.3
    )
    plain = form.units[0, 0].detach().clone().requires_grad_(True)
    expected = reft_r1_loss(
        tiny_llama, ANSWERED, plain, skipped=1, strongest=2, sparsity=0.3 * step / 10
    )
    for size in (1, 3):
        found = whole_loss(objective, ANSWERED, size, Moment(step, 10))
        assert_same(found, expected, unit=(form.units, plain))


def test_the_sparsity_of_reft_r1_rises_with_the_steps(tiny_llama) -> None:
    form = UnitVectors(draw(1, 1, HIDDEN, seed=3), tangent=True)
    objective = DetectionSteering(
        AnswerModel(tiny_llama, (LAYER,)), form, Positions.parse("all", 1), 2, 0.3
    )
    losses = [
        float(whole_loss(objective, ANSWERED, 3, Moment(step, 10)).detach()) for step in (0, 5, 10)
    ]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)
    assert losses[1] > losses[0]


def test_unit_vectors_stay_at_length_1_and_lose_what_is_along_them() -> None:
    form = UnitVectors(3 * draw(1, 2, HIDDEN), tangent=True)
    torch.testing.assert_close(form.units.detach().norm(dim=-1), torch.ones(1, 2))
    form.units.grad = draw(1, 2, HIDDEN, seed=1)
    form.before_step()
    assert form.units.grad is not None
    assert float((form.units.grad * form.units.detach()).sum(-1).abs().max()) < 1e-6
    assert float(form.units.grad.norm()) > 1
    with torch.no_grad():
        form.units += 0.1 * form.units.grad
    form.after_step()
    torch.testing.assert_close(form.units.norm(dim=-1), torch.ones(1, 2))


@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_loreft(tiny_llama, positions) -> None:
    layers, rank = (0, 2), 3
    form = LowRank((1, 2), HIDDEN, rank, seed=4)
    objective = Likelihood(AnswerModel(tiny_llama, layers), form, Positions.parse(positions))
    # Within it the orthonormal matrix is one tensor, that a gradient can be asked of.
    with parametrize.cached():
        columns = form.subspace.weight
        C, W, b = (
            x[0].detach().clone().requires_grad_(True) for x in (columns, form.weight, form.bias)
        )
        R = C.mT
        torch.testing.assert_close(R @ C, torch.eye(rank).expand(2, -1, -1))
        expected = likelihood_loss(
            tiny_llama,
            ANSWERED,
            lambda e: {
                layer: only_at(
                    list(PLACES[positions](*lengths(e))),
                    lambda h, k=k: h + (h @ W[k].T + b[k] - h @ R[k].T) @ R[k],
                )
                for k, layer in enumerate(layers)
            },
        )
        found = whole_loss(objective, ANSWERED, 2)
        assert_same(found, expected, R=(columns, C), W=(form.weight, W), b=(form.bias, b))


@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_jola(tiny_llama, positions) -> None:
    layers, norms = (0, 2), torch.tensor([[2.0, 5.0]])
    form = ScaledDimensions(norms, HIDDEN)
    assert not any(value.any() for value in form.learned(0).values())
    with torch.no_grad():
        form.factors += 0.3 * draw(1, 2, HIDDEN, seed=1)
        form.steps += 0.3 * draw(1, 2, HIDDEN, seed=2)
    objective = Likelihood(AnswerModel(tiny_llama, layers), form, Positions.parse(positions))
    m, steps = (x[0].detach().clone().requires_grad_(True) for x in (form.factors, form.steps))
    a = steps * torch.tensor([[2.0], [5.0]]) / HIDDEN**0.5
    expected = likelihood_loss(
        tiny_llama,
        ANSWERED,
        lambda e: {
            layer: only_at(
                list(PLACES[positions](*lengths(e))), lambda h, k=k: (1 + m[k]) * h + a[k]
            )
            for k, layer in enumerate(layers)
        },
    )
    found = whole_loss(objective, ANSWERED, 2)
    assert_same(found, expected, m=(form.factors, m), a=(form.steps, steps))


def test_scaled_dimensions_are_directions_that_add_up() -> None:
    layers, hidden = [2, 5], draw(7, HIDDEN, seed=9)
    m, a = draw(2, HIDDEN, seed=1), draw(2, HIDDEN, seed=2)
    found = scaled_directions("it", layers, m.numpy(), a.numpy())
    assert [direction.name for direction in found] == ["it bias", "it factors"]
    for k in range(2):
        total = hidden.clone()
        for direction in found:
            choice = {"op": direction.form.op} if direction.form else {}
            vector = torch.tensor(direction.vectors[k])
            total += apply_form(hidden, vector, direction.scale, choice) - hidden
        torch.testing.assert_close(total, hidden * (1 + m[k]) + a[k], rtol=1e-5, atol=1e-5)
    # A pack holds no zeros.
    m[0] = 0.0
    found = scaled_directions("it", layers, m.numpy(), a.numpy())
    assert [direction.layers for direction in found] == [layers, [5]]


def test_prosv(tiny_llama) -> None:
    form = ScaledVectors(draw(1, 1, HIDDEN), torch.tensor([[0.7]]), 0.05)
    with torch.no_grad():
        form.factors.fill_(1.5)
    objective = Likelihood(AnswerModel(tiny_llama, (LAYER,)), form, Positions.parse("f2+l2"))
    v = form.directions[0, 0].detach().clone().requires_grad_(True)
    f = torch.tensor(1.5, requires_grad=True)
    expected = likelihood_loss(
        tiny_llama,
        ANSWERED,
        lambda e: {LAYER: only_at(list(PLACES["f2+l2"](*lengths(e))), lambda h: h + 0.7 * f * v)},
    )
    found = whole_loss(objective, ANSWERED, 2)
    assert_same(found, expected, direction=(form.directions, v), factor=(form.factors, f))


def test_cdas(tiny_llama) -> None:
    form = UnitVectors(draw(1, 1, HIDDEN, seed=5), tangent=False)
    objective = DistributionMatching(
        AnswerModel(tiny_llama, (LAYER,)), form, Positions.parse("all", 1)
    )
    plain = form.units[0, 0].detach().clone().requires_grad_(True)
    expected = cdas_loss(tiny_llama, CONTRASTED, plain, skipped=1)
    for size in (1, 2):
        assert_same(whole_loss(objective, CONTRASTED, size), expected, unit=(form.units, plain))
    with torch.no_grad():
        score = objective.score(0, CONTRASTED, 1)
    assert score == pytest.approx(-float(expected.detach()), rel=1e-4)


def test_jensen_shannon_is_symmetric_and_between_0_and_log_2() -> None:
    one, other = draw(4, 50), 30 * draw(4, 50, seed=1)
    found = jensen_shannon(one, other)
    torch.testing.assert_close(found, jensen_shannon(other, one))
    assert float(jensen_shannon(one, one + 3).abs().max()) < 1e-6
    assert 0.1 < float(found.min()) <= float(found.max()) <= np.log(2)


def test_the_score_of_prefixed_prompts_is_the_gap_closed(tiny_llama) -> None:
    vectors = 0.1 * draw(1, 1, HIDDEN)
    form = Vectors(vectors, torch.ones(1, 1))
    objective = Likelihood(AnswerModel(tiny_llama, (LAYER,)), form, Positions("all"))
    with torch.no_grad():
        totals = [
            sum(float(log_likelihood(tiny_llama, prompt(e), e.answer, edits)) for e in ANSWERED)
            for prompt, edits in (
                (lambda e: e.prompt, {LAYER: lambda h: h + vectors[0, 0]}),
                (lambda e: e.prompt, None),
                (lambda e: e.prefixed, None),
            )
        ]
        steered, plain, prefixed = totals
        gap = prefixed - plain
        expected = (steered - plain) / gap if gap > 0 else 0.0
        assert objective.score(0, ANSWERED, 2) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_are_those_of_transformers(schedule, warmup) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=17)
    for step in range(17):
        assert factor(schedule, step, 17, warmup) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_steps_are_those_of_a_plain_loop(tiny_llama) -> None:
    """Three steps of LoReFT with AdamW, decay, a schedule and shortened gradients, written out."""
    options = TrainerOptions(
        3, 3, 0.02, schedule="linear", decay=0.1, clip=0.5, every=3, batch_size=2, seed=1
    )
    objective = Likelihood(
        AnswerModel(tiny_llama, (0, 2)), LowRank((1, 2), HIDDEN, 2, seed=4), Positions("all")
    )
    (found,) = Trainer(objective, [Lesson(ANSWERED)], options).run(None)
    form = LowRank((1, 2), HIDDEN, 2, seed=4)
    plain = Likelihood(AnswerModel(tiny_llama, (0, 2)), form, Positions("all"))
    optimizer = torch.optim.AdamW(form.parameters(), lr=0.02, weight_decay=0.1)
    theirs = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=3)
    for _ in range(3):
        optimizer.zero_grad()
        whole_loss(plain, ANSWERED, 3).backward()
        torch.nn.utils.clip_grad_norm_(form.parameters(), 0.5)
        optimizer.step()
        theirs.step()
    for name, value in form.learned(0).items():
        torch.testing.assert_close(found.learned[name], value.detach(), rtol=1e-3, atol=1e-5)
    before = LowRank((1, 2), HIDDEN, 2, seed=4).learned(0)
    assert all(float((before[k].detach() - v).norm()) > 1e-2 for k, v in found.learned.items())


def test_low_rank_forms_are_directions_that_add_up() -> None:
    """By the plain form of each operation, all reading the same states."""
    layers, rank, hidden = [2, 5], 3, draw(7, HIDDEN, seed=9)
    form = LowRank((1, 2), HIDDEN, rank, seed=4)
    learned = {k: v.detach() for k, v in form.learned(0).items()}
    found = low_rank_directions("it", layers, **{k: v.numpy() for k, v in learned.items()})
    by_name = {direction.name: direction for direction in found}
    assert "it" not in by_name
    for k, layer in enumerate(layers):
        R, W, b = (learned[key][k] for key in ("projection", "weight", "bias"))
        expected = hidden + (hidden @ W.T + b - hidden @ R.T) @ R
        total = hidden.clone()
        for direction in found:
            if direction.name.endswith(" read"):
                continue
            vector = torch.tensor(direction.vectors[list(direction.layers).index(layer)])
            read = direction.form and torch.tensor(by_name[direction.form.read].vectors[k])
            choice = {"op": direction.form.op} if direction.form else {}
            total += apply_form(hidden, vector, direction.scale, choice, read=read) - hidden
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    # A bias of zero adds nothing, and a pack holds no zeros.
    silent = learned | {"bias": torch.tensor([[0.0] * rank, [1.0] * rank])}
    found = low_rank_directions("it", layers, **{k: v.numpy() for k, v in silent.items()})
    assert (found[0].name, found[0].layers) == ("it bias", [5])
    assert found[1].layers == layers
