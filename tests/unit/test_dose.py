"""The dose: what adds up over layers and directions, what sets counts once, and what 1 means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError

from tests.unit.conftest import calibrated, plan, rewritten
from tests.unit.front_end import started
from vllm_steer.operations import FormChoice
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.pack import raw_dose as offline_raw_dose
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.dose import raw_dose, relative_dose, scaled
from vllm_steer.serving.admission import Wanted
from vllm_steer.serving.policy import Policy


@pytest.fixture
def pack(pack_at: Callable[..., SteeringPack]) -> SteeringPack:
    """Unit vectors beside a residual stream of norm 10."""
    return pack_at("p", {"a": [0, 1, 2], "b": [0, 1, 2, 3]})


@pytest.fixture
def registry(pack: SteeringPack) -> PackRegistry:
    return PackRegistry([pack])


def dose(registry: PackRegistry, *directions: dict[str, Any], **fields: Any) -> float:
    return relative_dose(plan(registry, *directions, **fields), registry)


def test_the_raw_dose_of_an_addition_is_its_sum_over_layers() -> None:
    assert raw_dose(-3.0, {0: 1.0, 4: 2.0}, {0: 10.0, 4: 30.0, 9: 1.0}) == pytest.approx(0.5)
    assert raw_dose(0.0, {0: 1.0}, {0: 10.0}) == 0.0
    assert offline_raw_dose is raw_dose


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ({"scale": -4.0}, 1.2),
        ({"scale": 4.0, "layers": [1]}, 0.4),
        ({"op": "rotate", "plane": "b", "scale": 60.0}, 3.0),
        ({"op": "affine", "read": "b", "bias": 5.0, "scale": 2.0}, 9.0),
        ({"op": "ablate"}, 1.0),
        ({"op": "ablate", "scale": 0.5}, 0.5),
        # What one layer has turned round is there to be turned round again.
        ({"op": "ablate", "scale": 2.0}, 1.0 + 3.0),
        ({"op": "ablate", "scale": -1.0}, 3.0),
        ({"op": "clamp", "scale": 0.0}, 1.0),
        ({"op": "clamp", "scale": -5.0}, 1.0 + 1.5),
        ({"op": "angle", "plane": "b", "scale": 5.0}, 2.0),
    ],
)
def test_what_adds_adds_up_and_what_sets_counts_once(
    direction: dict[str, Any], expected: float, registry: PackRegistry
) -> None:
    assert dose(registry, {"name": "a"} | direction) == pytest.approx(expected)


def test_a_schedule_counts_where_it_is_strongest(registry: PackRegistry) -> None:
    falling = {"start": 1.5, "end": -0.5, "tokens": 4}
    assert dose(registry, {"name": "a", "scale": 4.0}, schedule=falling) == pytest.approx(1.8)
    # From 0.75 taken away to 0.25 put in at three layers.
    ablation = {"name": "a", "op": "ablate", "scale": 0.5}
    assert dose(registry, ablation, schedule=falling) == pytest.approx(0.75)
    rising = falling | {"end": -1.0}
    assert dose(registry, ablation, schedule=rising) == pytest.approx(1.5)


@pytest.fixture
def measured(pack: SteeringPack) -> PackRegistry:
    """``a`` is safe up to 4 on its default layers, ``b`` likewise by another measurement."""
    lengths = {layer: float(np.linalg.norm(pack.vectors["a"][layer])) for layer in (1, 2)}
    fluent = raw_dose(4.0, lengths, dict.fromkeys(range(4), 10.0))
    assert fluent == pytest.approx(0.8)
    found = calibrated(fluent_dose=fluent)
    return PackRegistry(
        [
            rewritten(
                pack,
                a={"calibration": found, "default_layers": [1, 2], "safe_scale": 4.0},
                b={"calibration": calibrated(fluent_dose=2.0), "safe_scale": 4.0},
            )
        ]
    )


def test_one_is_the_largest_fluent_dose(measured: PackRegistry) -> None:
    assert dose(measured, {"name": "a", "scale": -4.0}) == pytest.approx(1.0)
    assert dose(measured, {"name": "a", "scale": 2.0}) == pytest.approx(0.5)
    # On more layers the same scale is more.
    assert dose(measured, {"name": "a", "scale": 4.0, "layers": [0, 1, 2]}) == pytest.approx(1.5)


def test_doses_of_directions_add_up_each_by_its_own_measure(measured: PackRegistry) -> None:
    both = [{"name": "a", "scale": 4.0}, {"name": "b", "scale": -5.0}]
    assert dose(measured, *both) == pytest.approx(1.0 + 2.0 / 2.0)
    apart = [both[0] | {"positions": "prompt"}, both[1] | {"positions": "generated"}]
    assert dose(measured, *apart) == pytest.approx(1.0)
    # They need not share a layer.
    assert dose(measured, both[0] | {"layers": [0]}, both[1] | {"layers": [3]}) == pytest.approx(
        0.4 / 0.8 + 0.5 / 2.0
    )


def test_what_was_measured_of_a_form_says_nothing_of_another(
    measured: PackRegistry, pack: SteeringPack
) -> None:
    assert dose(measured, {"name": "a", "op": "ablate"}) == pytest.approx(1.0)
    found = {"calibration": calibrated(fluent_dose=0.5), "form": FormChoice(op="ablate")}
    ablating = PackRegistry([rewritten(pack, a=found)])
    assert dose(ablating, {"name": "a", "scale": 1.0}) == pytest.approx(2.0)
    assert dose(ablating, {"name": "a", "op": "add", "scale": 4.0}) == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("form", "safe", "asked", "expected"),
    [
        ({"op": "ablate"}, 1.0, {"scale": 0.5}, 0.5),
        ({"op": "clamp"}, 5.0, {"scale": -10.0}, (1.0 + 2.0) / (1.0 + 1.0)),
        ({"op": "angle", "plane": "b"}, 80.0, {"scale": 30.0}, 1.0),
        ({"op": "rotate", "plane": "b"}, 60.0, {"scale": 60.0, "layers": [0, 1, 2]}, 1.5),
        ({"op": "rotate", "plane": "b"}, 360.0, {"scale": 60.0}, 0.5),
        ({"op": "rotate", "plane": "b"}, None, {"scale": 60.0}, 2.0),
        ({"op": "affine", "read": "b"}, 4.0, {"scale": 2.0}, 4.0),
    ],
)
def test_other_forms_know_by_their_safe_scale(
    form: dict[str, Any],
    safe: float | None,
    asked: dict[str, Any],
    expected: float,
    pack: SteeringPack,
) -> None:
    """Whatever the vector's length, so that no calibration need say it in doses."""
    found = {
        "calibration": calibrated(fluent_dose=None),
        "default_layers": [1, 2],
        "safe_scale": safe,
        "form": FormChoice(**form),
    }
    registry = PackRegistry([rewritten(pack, a=found)])
    assert dose(registry, {"name": "a"} | asked) == pytest.approx(expected)
    if safe is not None and safe < 180.0 and form["op"] != "affine":
        assert dose(registry, {"name": "a", "scale": safe}) == pytest.approx(1.0)


def test_without_a_fluent_dose_it_is_the_raw_one(pack: SteeringPack) -> None:
    unsafe = rewritten(pack, a={"calibration": calibrated(fluent_dose=None)})
    assert dose(PackRegistry([unsafe]), {"name": "a", "scale": 4.0}) == pytest.approx(1.2)


@pytest.mark.parametrize("order", [1, -1])
def test_equal_content_is_measured_once(order: int, pack: SteeringPack, tmp_path: Path) -> None:
    found = {"calibration": calibrated(fluent_dose=2.4)}
    copy = rewritten(pack, tmp_path / "copy", "copy", a=found)
    registry = PackRegistry([pack, copy][::order])
    assert dose(registry, {"name": "p/a", "scale": 4.0}) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("directions", "factor", "expected"),
    [
        ([{"scale": 8.0}, {"name": "b", "scale": -5.0}], 1.5 / 3.0, 1.5),
        ([{"scale": 30.0}], 1.5 / 7.5, 1.5),
        ([{"op": "affine", "read": "b", "scale": 3.0, "layers": [0]}], 1.5 / 3.0, 1.5),
        ([{"op": "ablate", "scale": -1.0}], 1.5 / 2.0, 1.5),
        # A reflection becomes what takes away alone, which is less than its share.
        ([{"op": "ablate", "scale": 2.0}], 0.5, 1.0),
        ([{"scale": 4.0}], 1.0, 1.0),
    ],
)
def test_scales_are_reduced(
    directions: list[dict[str, Any]], factor: float, expected: float, measured: PackRegistry
) -> None:
    admission = started(*measured.packs.values(), ops="affine")
    asked = [{"name": "a"} | direction for direction in directions]
    request = admission.parse({"steering": {"directions": asked}})
    assert request is not None
    admission.policy = Policy(max_dose=1.5, dose_action="reduce")
    receipt = admission.admit(Wanted(request), 10).receipt
    assert receipt.dose_factor == pytest.approx(factor)
    assert receipt.dose == pytest.approx(expected)
    assert relative_dose(receipt.plan, measured) == pytest.approx(receipt.dose)
    scales = sorted(t.scale for t in receipt.plan.segments[0].terms)
    assert scales == pytest.approx(sorted(factor * d["scale"] for d in directions))
    admission.policy = Policy(max_dose=1.5)
    if factor < 1.0:
        with pytest.raises(
            VLLMValidationError, match=f"dose is {1.5 / factor:.4g}, and this server allows"
        ):
            admission.admit(Wanted(request), 10)


def test_forms_that_are_not_weakened_are_refused(measured: PackRegistry) -> None:
    admission = started(*measured.packs.values(), ops="affine")
    admission.policy = Policy(max_dose=1.5, dose_action="reduce")
    clamp = {"name": "a", "op": "clamp", "scale": 5.0}
    request = admission.parse({"steering": {"directions": [clamp]}})
    assert request is not None
    with pytest.raises(VLLMValidationError, match="total dose is 2, .*could not be reduced"):
        admission.admit(Wanted(request), 10)
    assert scaled(plan(measured, clamp), 0.5) is None
