"""Strength and default layers: what a request need not know of a calibrated direction."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.unit.conftest import calibrated, plan, rewritten
from tests.unit.front_end import manager_of, started
from vllm_steer.client import steer
from vllm_steer.config import SteeringConfig
from vllm_steer.errors import ConfigError, DoseError, RequestError
from vllm_steer.operations import FormChoice
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.resolve import resolve
from vllm_steer.plan.steering_plan import Term
from vllm_steer.request.schema import SteeringRequest
from vllm_steer.serving.admission import Wanted
from vllm_steer.serving.configure import _policy_path
from vllm_steer.serving.policy import Policy


@pytest.fixture
def pack(pack_at: Callable[..., SteeringPack]) -> SteeringPack:
    """``add`` and ``turn`` are calibrated, ``turn`` with a plane; ``plain`` is not."""
    names = ["add", "turn", "plain"]
    found = {"calibration": calibrated(), "default_layers": [1, 2]}
    turn = FormChoice(op="rotate", plane="plain")
    return rewritten(
        pack_at("p", dict.fromkeys(names, [0, 1, 2, 3])),
        add=found | {"default_scale": -2.5},
        turn=found | {"default_scale": 30.0, "form": turn},
    )


@pytest.fixture
def registry(pack: SteeringPack) -> PackRegistry:
    return PackRegistry([pack])


def term(registry: PackRegistry, **direction: Any) -> Term:
    (segment,) = plan(registry, direction).segments
    (found,) = segment.terms
    return found


def test_a_request_that_names_no_layers_steers_the_default_ones(registry: PackRegistry) -> None:
    assert term(registry, name="add").layers == (1, 2)
    assert term(registry, name="plain").layers == (0, 1, 2, 3)
    assert term(registry, name="add", layers=[0]).layers == (0,)
    (segment,) = plan(registry, {"name": "add"}, layers=[3, 0]).segments
    assert segment.terms[0].layers == (0, 3)


def test_strength_is_a_multiple_of_the_default_scale(registry: PackRegistry) -> None:
    assert term(registry, name="add", strength=1.0) == term(registry, name="add")
    assert term(registry, name="add", strength=-0.4).scale == pytest.approx(1.0)
    assert term(registry, name="turn", strength=0.5).scale == pytest.approx(15.0)
    assert term(registry, name="add", strength=2, layers=[2, 1]).scale == pytest.approx(-5.0)
    # The same form said once more, and a gate, which chooses tokens, as positions do.
    assert term(registry, name="add", strength=1.0, op="add").scale == -2.5
    said = {"op": "rotate", "plane": "p/plain"}
    assert term(registry, name="turn", strength=1.0, **said).scale == 30.0
    gate = {"direction": "plain", "above": 0.1}
    assert term(registry, name="add", strength=2.0, gate=gate).scale == -5.0
    assert not plan(registry, {"name": "add", "strength": 0.0}).segments


@pytest.mark.parametrize(
    ("direction", "fields", "message"),
    [
        ({"name": "add", "strength": 1.0, "scale": 1.0}, {}, "0: give either scale or strength"),
        (
            {"name": "plain", "strength": 1.0},
            {},
            "0.strength: direction 'p/plain' is not calibrated; give scale, or calibrate the pack with "
            "`vllm-steer calibrate`",
        ),
        (
            {"name": "add", "strength": 1.0, "layers": [1]},
            {},
            "0.strength: the strength of 'p/add' was calibrated on layers 1-2, for its own op 'add'; give scale",
        ),
        ({"name": "add", "strength": 1.0}, {"layers": [0, 1, 2]}, "calibrated on layers 1-2"),
        ({"name": "add", "strength": 1.0, "op": "ablate"}, {}, "for its own op 'add'; give scale"),
        ({"name": "turn", "strength": 1.0, "op": "add"}, {}, "for its own op 'rotate'; give scale"),
        ({"name": "turn", "strength": 1.0, "op": "rotate", "plane": "add"}, {}, "its own op"),
        ({"name": "add", "strength": 1.0, "restore_norm": True}, {}, "its own op"),
        ({"name": "add", "strength": float("nan")}, {}, "0.strength:"),
        ({"name": "add", "strength": "1"}, {}, "0.strength:"),
        ({"name": "add", "strengh": 1.0}, {}, "did you mean 'strength'"),
        ({"name": "turn", "strength": 13.0}, {}, "0.strength: 390 is an angle in degrees"),
    ],
)
def test_strengths_that_mean_nothing(
    direction: dict[str, Any], fields: dict[str, Any], message: str, registry: PackRegistry
) -> None:
    with pytest.raises(RequestError) as refused:
        plan(registry, direction, **fields)
    assert message in str(refused.value)
    assert str(refused.value).startswith("steering.directions.0")


def test_a_strength_that_is_far_too_large_is_told_of_as_one(registry: PackRegistry) -> None:
    with pytest.raises(DoseError, match=r"^steering.directions.0.strength: -25000 would add"):
        plan(registry, {"name": "add", "strength": 1e4})


def test_what_was_found_fluent_is_said_where_it_was(
    pack: SteeringPack, registry: PackRegistry
) -> None:
    with pytest.raises(DoseError, match="the text was fluent up to 4"):
        plan(registry, {"name": "add", "scale": 1e6})
    unknown = PackRegistry([rewritten(pack, add={"safe_scale": None})])
    with pytest.raises(DoseError, match=r"\|scale\| must be at most 10000$"):
        plan(unknown, {"name": "add", "scale": 1e6})


def receipt_of(pack: SteeringPack, *directions: dict[str, Any], **policy: Any) -> dict[str, Any]:
    admission = started(pack, ops="affine", rank=4)
    admission.policy = Policy(**policy)
    request = admission.parse({"steering": {"directions": list(directions)}})
    assert request is not None
    receipt: dict[str, Any] = admission.admit(Wanted(request), 10).receipt.to_json()
    return receipt


def test_the_receipt_has_the_strength_where_there_is_one(pack: SteeringPack) -> None:
    directions: list[dict[str, Any]] = [
        {"name": "add", "scale": -5.0},
        {"name": "add", "strength": 0.3},
        {"name": "add", "scale": 1.0, "layers": [1]},
        {"name": "plain"},
        {"name": "turn"},
    ]
    found = receipt_of(pack, *directions)["directions"]
    shown = {(d["name"], d["scale"], d.get("strength")) for d in found}
    assert shown == {
        ("p/add", -5.0, 2.0),
        ("p/add", -0.75, 0.3),
        ("p/add", 1.0, None),
        ("p/plain", 2.0, None),
        ("p/turn", 30.0, 1.0),
    }
    assert sum("strength" in d for d in found) == 3


def test_the_receipt_has_the_strength_that_was_carried_out(pack: SteeringPack) -> None:
    receipt = receipt_of(pack, {"name": "add", "strength": 4.0}, max_dose=1.0, dose_action="reduce")
    (direction,) = receipt["directions"]
    assert receipt["dose_factor"] == pytest.approx(1.0 / 2.5)
    assert direction["strength"] == pytest.approx(1.6)
    assert direction["scale"] == pytest.approx(-4.0)


def test_equal_content_has_the_strength_of_the_one_that_was_asked_for(
    pack: SteeringPack, tmp_path: Path
) -> None:
    other = rewritten(pack, tmp_path / "q", "q", add={"default_scale": 1.0})
    admission = started(pack, other)
    for name, strength in (("p/add", -2.0), ("q/add", 5.0)):
        request = admission.parse({"steering": {"directions": [{"name": name, "scale": 5.0}]}})
        assert request is not None
        (direction,) = admission.admit(Wanted(request), 10).receipt.to_json()["directions"]
        assert (direction["name"], direction["strength"]) == (name, strength)


def test_aliases_and_defaults_take_it(
    pack: SteeringPack, registry: PackRegistry, tmp_path: Path
) -> None:
    steering = {"directions": [{"name": "add", "strength": 2.0}]}
    file = tmp_path / "policy.json"
    config = SteeringConfig(packs=[str(pack.path)], policy=str(file))
    file.write_text(json.dumps({"aliases": {"x": steering}, "default": steering}))
    assert _policy_path(config, registry) == str(file)
    policy = Policy.model_validate_json(file.read_text())
    for request in policy.steerings().values():
        assert resolve(bind(request, registry), 10).segments[0].terms[0].scale == -5.0
    # A name that stands for it would answer nothing but 400.
    steering["directions"][0]["name"] = "plain"
    file.write_text(json.dumps({"aliases": {"x": steering}}))
    with pytest.raises(ConfigError, match="aliases.x.directions.0.strength: .*not calibrated"):
        _policy_path(config, registry)


def test_aliases_that_come_later_take_it(pack: SteeringPack) -> None:
    admission = started(pack)
    body = b'{"directions": [{"name": "%s", "strength": 2.0}]}'
    with manager_of(admission) as manager:
        asyncio.run(manager.set_alias("x", body % b"add", None))
        assert admission.policy.aliases["x"].directions[0].strength == 2.0
        with pytest.raises(RequestError, match="strength: direction 'p/plain' is not calibrated"):
            asyncio.run(manager.set_alias("y", body % b"plain", None))
        both = b'{"directions": [{"name": "add", "strength": 2.0, "scale": 1.0}]}'
        with pytest.raises(RequestError, match=r"directions.0: give either scale or strength"):
            asyncio.run(manager.set_alias("z", both, None))


def test_the_helper_takes_strengths() -> None:
    wanted = {"directions": [{"name": "p/add", "strength": 0.5}, {"name": "plain"}]}
    assert steer({"p/add": 0.5, "plain": None}, by="strength") == {"steering": wanted}
    assert steer("p/add", by="strength") == steer("p/add")
    with pytest.raises(RequestError, match="unknown key"):
        steer({"p/add": 0.5}, by="power")  # type: ignore[arg-type]


def test_a_request_keeps_it() -> None:
    request = SteeringRequest.model_validate({"directions": [{"name": "a", "strength": 1.5}]})
    assert SteeringRequest.model_validate_json(request.model_dump_json()) == request
    with pytest.raises(ValidationError):
        SteeringRequest.model_validate({"strength": 1.0, "directions": [{"name": "a"}]})
