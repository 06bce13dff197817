"""``op: "feature"``: the edit of a sparse autoencoder's activation, as the rows of the bank hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.conftest import HIDDEN, calibrated, make_pack, plan, resolved, rewritten
from vllm_steer.engine.bank import BankShape, SteeringBank
from vllm_steer.engine.blocks import hook_blocks
from vllm_steer.engine.row_values import row_values
from vllm_steer.errors import PackError, RequestError
from vllm_steer.operations import FormChoice, Gate
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.capacity import check_capacity
from vllm_steer.plan.dose import relative_dose
from vllm_steer.plan.resolve import resolve
from vllm_steer.plan.row_layout import layout_of
from vllm_steer.request.schedule import factors
from vllm_steer.request.schema import parse
from vllm_steer.serving.receipt import LimitedPlan, Receipt

RANK, TOKENS = 4, 200
BIAS, THRESHOLD = -0.5, 1.5
RELU = {"op": "feature", "read": "w", "bias": BIAS}
JUMPRELU = RELU | {"threshold": THRESHOLD}


@pytest.fixture
def pack(tmp_path: Path) -> SteeringPack:
    """Decoder rows ``d`` and ``d2``, encoder columns ``w`` and ``w2`` of one layer; and others."""
    return make_pack(tmp_path / "p", "p", dict.fromkeys(("d", "w", "d2", "w2", "v"), [1]))


@pytest.fixture
def registry(pack: SteeringPack) -> PackRegistry:
    return PackRegistry([pack])


@pytest.fixture
def stream() -> torch.Tensor:
    return 3.0 * torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))


def vector(registry: PackRegistry, name: str) -> torch.Tensor:
    return torch.tensor(registry.find(f"p/{name}").at(1))


def steered(
    registry: PackRegistry, stream: torch.Tensor, *directions: dict[str, Any], first: int = 0
) -> torch.Tensor:
    """The stream after a block with the row of these directions, its tokens from position ``first`` on."""
    (segment,) = (s for s in plan(registry, *directions).segments if s.end is None)
    block = nn.Identity()
    shape = BankShape((1,), 2, HIDDEN, TOKENS, rank=RANK)
    bank = SteeringBank(shape, torch.float32, torch.device("cpu"))
    hook_blocks([(1, block)], bank)
    bank.write_row(1, row_values(segment, bank.index, RANK, HIDDEN, registry.by_digest))
    schedules = layout_of(segment, RANK).schedules
    positions = np.arange(first, first + len(stream))
    given = np.stack(
        [factors(positions, s.to_list()) if s else np.ones(len(stream)) for s in schedules]
    )
    bank.set_rows(np.ones(len(stream), dtype=np.int32), given.astype(np.float32))
    found: torch.Tensor = block(stream.clone())
    return found


def encoded(
    registry: PackRegistry, stream: torch.Tensor, read: str = "w", threshold: float = 0.0
) -> torch.Tensor:
    """The activation, as the tools' code computes it."""
    before = stream @ vector(registry, read) + BIAS
    return torch.relu(before) * (before > threshold)


@pytest.mark.parametrize(("form", "threshold"), [(RELU, 0.0), (JUMPRELU, THRESHOLD)])
@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"scale": 4.0}, lambda a: torch.full_like(a, 4.0)),
        ({"scale": -2.0}, lambda a: torch.full_like(a, -2.0)),
        ({"scale": 0.0}, torch.zeros_like),
        ({"scale": 2.5, "activation": "multiply"}, lambda a: 2.5 * a),
        ({"scale": 0.0, "activation": "multiply"}, torch.zeros_like),
        ({"scale": -1.0, "activation": "multiply"}, lambda a: -a),
    ],
)
def test_the_activation_becomes_what_is_asked(
    form: dict[str, Any],
    threshold: float,
    asked: dict[str, Any],
    wanted: Any,
    registry: PackRegistry,
    stream: torch.Tensor,
) -> None:
    active = encoded(registry, stream, threshold=threshold)
    assert 0.1 < (active > 0).float().mean() < 0.9
    expected = stream + torch.outer(wanted(active) - active, vector(registry, "d"))
    found = steered(registry, stream, {"name": "d"} | form | asked)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_features_and_other_directions_of_a_layer_read_the_same_stream(
    registry: PackRegistry, stream: torch.Tensor
) -> None:
    """The difference of the decodings of all edited activations, beside what else is asked for."""
    other = JUMPRELU | {"name": "d2", "read": "w2", "scale": 0.5, "activation": "multiply"}
    choices = [{"name": "d", "scale": 3.0} | RELU, other, {"name": "v", "scale": 2.0}]
    one, two = encoded(registry, stream), encoded(registry, stream, "w2", THRESHOLD)
    expected = (
        stream
        + torch.outer(3.0 - one, vector(registry, "d"))
        + torch.outer(-0.5 * two, vector(registry, "d2"))
        + 2.0 * vector(registry, "v")
    )
    for order in (choices, choices[::-1]):
        found = steered(registry, stream, *order)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_an_ablation_beside_a_feature_does_not_change_what_it_reads(
    registry: PackRegistry, stream: torch.Tensor
) -> None:
    unit = vector(registry, "w") / vector(registry, "w").norm()
    active = encoded(registry, stream)
    expected = stream - torch.outer(stream @ unit, unit)
    expected = expected - torch.outer(active, vector(registry, "d"))
    found = steered(
        registry, stream, {"name": "w", "op": "ablate"}, {"name": "d", "scale": 0.0} | RELU
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_what_is_set_has_no_schedule_beside_what_has(
    registry: PackRegistry, stream: torch.Tensor
) -> None:
    """The vector of a row has one schedule; a feature needs it at every token."""
    falling = {"start": 1.0, "end": 0.0, "tokens": 50}
    choices = [{"name": "v", "scale": 2.0, "schedule": falling}, {"name": "d", "scale": 3.0} | RELU]
    passed = torch.arange(len(stream)).float()
    share = (1.0 - passed / 50).clamp(min=0.0)
    expected = (
        stream
        + torch.outer(3.0 - encoded(registry, stream), vector(registry, "d"))
        + torch.outer(2.0 * share, vector(registry, "v"))
    )
    for order in (choices, choices[::-1]):
        found = steered(registry, stream, *order, first=10)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_its_rank_is_one(registry: PackRegistry) -> None:
    two = [{"name": "d", "scale": 3.0} | RELU, {"name": "d2", "scale": 1.0} | JUMPRELU]
    check_capacity(plan(registry, *two), resolved(ops="affine", rank=2))
    with pytest.raises(RequestError, match="a total rank of 3, and the limit is 2"):
        check_capacity(
            plan(registry, *two, {"name": "v", "op": "ablate"}), resolved(ops="affine", rank=2)
        )
    with pytest.raises(RequestError, match="--steering-ops affine"):
        check_capacity(plan(registry, *two[:1]), resolved())


def feature_pack(pack: SteeringPack, **changes: Any) -> SteeringPack:
    form = FormChoice(**(JUMPRELU | changes.pop("form", {})))
    return rewritten(pack, d={"form": form, "default_scale": 6.0, "safe_scale": 12.0} | changes)


def test_a_pack_s_feature_needs_only_its_name(pack: SteeringPack) -> None:
    registry = PackRegistry([feature_pack(pack)])
    (term,) = plan(registry, {"name": "d"}).terms
    assert (term.scale, term.form.bias, term.form.threshold) == (6.0, BIAS, THRESHOLD)
    assert term.form.activation == "set"
    (removed,) = plan(registry, {"name": "d", "scale": 0.0}).terms
    assert removed.form == term.form
    (halved,) = plan(
        registry, {"name": "d", "op": "feature", "activation": "multiply", "scale": 0.5}
    ).terms
    assert (halved.form.threshold, halved.form.activation) == (THRESHOLD, "multiply")
    with pytest.raises(RequestError, match="activation 'multiply' needs a scale"):
        plan(registry, {"name": "d", "op": "feature", "activation": "multiply"})
    (added,) = plan(registry, {"name": "d", "op": "add", "scale": 6.0}).terms
    assert added.form.partner is None


def test_its_strength_is_of_the_form_that_was_calibrated(pack: SteeringPack) -> None:
    registry = PackRegistry([feature_pack(pack, calibration=calibrated(fluent_dose=None))])
    (term,) = plan(registry, {"name": "d", "strength": 0.5}).terms
    assert term.scale == 3.0
    # Twice the default scale is the largest at which text was fluent.
    assert relative_dose(plan(registry, {"name": "d", "scale": 12.0}), registry) == 1.0
    multiplied = {"name": "d", "op": "feature", "activation": "multiply"}
    with pytest.raises(RequestError, match="was calibrated on layers"):
        plan(registry, multiplied | {"strength": 0.5})
    # A form that nobody measured has its raw dose: an activation of up to 10, taken away from a stream of 10.
    removed = plan(registry, multiplied | {"scale": 0.0})
    assert relative_dose(removed, registry) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "form", [{"read": None, "bias": None}, {"gate": Gate(direction="w", above=0.0)}]
)
def test_a_pack_of_half_a_feature(form: dict[str, Any], pack: SteeringPack) -> None:
    with pytest.raises(PackError, match="op 'feature', which needs read, and takes no gate"):
        feature_pack(pack, form=form)


def test_receipts_say_what_was_done(pack: SteeringPack) -> None:
    registry = PackRegistry([feature_pack(pack)])
    request = parse({"steer": ["d:9"]})
    assert request is not None
    bound = bind(request, registry)
    receipt = Receipt.of(LimitedPlan(resolve(bound, 4), 0.0), bound.names, 4).to_json()
    (said,) = receipt["directions"]
    assert {
        key: said[key] for key in ("op", "scale", "read", "bias", "threshold", "activation")
    } == {
        "op": "feature",
        "scale": 9.0,
        "read": "p/w",
        "bias": BIAS,
        "threshold": THRESHOLD,
        "activation": "set",
    }
    assert said["read_digest"] == registry.find("p/w").digest


def test_a_feature_of_another_pack_is_read_only_where_that_may_be_used(
    pack: SteeringPack, tmp_path: Path
) -> None:
    """The names that a request gives are checked; those of a pack's own form belong to it."""
    registry = PackRegistry([feature_pack(pack), make_pack(tmp_path / "q", "q", {"w": [1]})])
    asked: list[str] = []
    for direction in ({"name": "p/d"}, {"name": "p/d", "op": "feature", "read": "q/w"}):
        request = parse({"steering": {"directions": [direction]}})
        assert request is not None
        bind(request, registry, lambda field, name, full: asked.append(full))
    assert asked == ["p/d", "p/d", "q/w"]
