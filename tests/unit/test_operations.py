"""Forms: what requests and packs may say, what an engine has room for, and the values of a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.unit.conftest import HIDDEN, resolved
from vllm_steer.engine.row_values import BIAS, SHARE, SLOPE, THRESHOLD, TURN, RowValues, row_values
from vllm_steer.errors import PackError, RequestError
from vllm_steer.operations import FormChoice, Gate
from vllm_steer.packs.pack import DirectionRecord, PackContent, SteeringPack, load_pack, write_pack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.capacity import check_capacity
from vllm_steer.plan.dose import relative_dose, scaled
from vllm_steer.plan.message import decode_plan, encode_plan
from vllm_steer.plan.resolve import resolve
from vllm_steer.plan.steering_plan import SteeringPlan
from vllm_steer.request.schema import parse

AFFINE: dict[str, Any] = {"ops": "affine", "rank": 4}
MULTIPLY = AFFINE | {"multiply": True}
GATED: dict[str, Any] = {"gate": {"direction": "q/b", "above": 0.0, "slope": 2.0}}
PROMPT = 10


@pytest.fixture
def registry(pack_at: Callable[..., SteeringPack]) -> PackRegistry:
    return PackRegistry(
        [pack_at("p", {"a": [0, 1], "b": [0, 1], "c": [1]}), pack_at("q", {"b": [0, 1]}, seed=1)]
    )


def plan(registry: PackRegistry, *directions: dict[str, Any]) -> SteeringPlan:
    request = parse({"steering": {"directions": list(directions)}})
    assert request is not None
    return resolve(bind(request, registry), PROMPT)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"op": "erase"}, "directions.0.op:"),
        (
            {"op": "ablate", "plane": "b"},
            "plane belongs to op 'rotate' and 'angle'; op is 'ablate'",
        ),
        ({"read": "b"}, "read belongs to op 'affine' and 'feature'; op is None"),
        ({"op": "affine", "read": "b", "threshold": 1.0}, "threshold belongs to op 'feature'"),
        ({"activation": "multiply"}, "activation belongs to op 'feature'; op is None"),
        (
            {"op": "feature", "read": "q/b", "activation": "add"},
            "activation: .*'set' or 'multiply'",
        ),
        ({"op": "feature", "read": "q/b", "threshold": -1.0}, "threshold: .*greater than or equal"),
        ({"op": "feature", "scale": 1.0}, "directions.0.read: op 'feature' needs the name"),
        ({"op": "feature", "read": "q/b"}, "directions.0.scale: op 'feature' needs a scale"),
        (
            {
                "op": "feature",
                "read": "q/b",
                "scale": 1.0,
                "gate": {"direction": "c", "above": 0.0},
            },
            "directions.0.gate: op 'feature' acts only where the feature is active",
        ),
        (
            {
                "op": "feature",
                "read": "q/b",
                "scale": 1.0,
                "schedule": {"start": 1, "end": 0, "tokens": 2},
            },
            "directions.0.schedule: op 'feature' has no strength",
        ),
        ({"op": "feature", "read": "c", "scale": 1.0}, r"read: .*no vector for layers \[0\]"),
        ({"op": "feature", "read": "q/b", "scale": 1e5}, r"\|scale\| must be at most 10000"),
        (
            {"op": "feature", "read": "q/b", "activation": "multiply", "scale": 1001.0},
            r"\|scale\| must be at most 1000$",
        ),
        ({"op": "rotate", "scale": 10.0}, "directions.0.plane: op 'rotate' needs the name"),
        ({"op": "affine", "scale": 1.0}, "directions.0.read: op 'affine' needs the name"),
        ({"op": "clamp"}, "directions.0.scale: op 'clamp' needs a scale"),
        ({"op": "rotate", "plane": "a", "scale": 1.0}, "are parallel at layer 0"),
        ({"op": "rotate", "plane": "c", "scale": 1.0}, r"plane: .*no vector for layers \[0\]"),
        ({"op": "rotate", "plane": "z", "scale": 1.0}, "directions.0.plane: no loaded"),
        ({"op": "rotate", "plane": "p/b", "scale": 361.0}, "angle in degrees"),
        ({"op": "clamp", "scale": 1e5}, r"\|scale\| must be at most 10000"),
        ({"op": "ablate", "scale": 1001.0}, r"\|scale\| must be at most 1000$"),
        ({"gate": {"direction": "b"}}, "directions.0.gate: give either above"),
        ({"gate": {"direction": "b", "over": 1.0}}, "gate.over: unknown key; .*above"),
        ({"gate": {"direction": "nobody", "above": 1.0}}, "directions.0.gate.direction: no loaded"),
        ({"gate": {"direction": "b", "above": 1.0, "slope": 0.0}}, "gate.slope: .*greater than"),
        ({"gate": {"direction": "b", "above": 1.0, "slope": -1.0}}, "gate.slope: "),
        ({"gate": {"direction": "b", "above": 1.0, "slope": 1e300}}, "gate.slope: "),
        ({"gate": {"direction": "b", "above": 1.0, "slope": math.nan}}, "gate.slope: "),
        ({"op": "multiply"}, "directions.0.scale: op 'multiply' needs a scale"),
        ({"op": "multiply", "plane": "b", "scale": 1.0}, "plane belongs to op"),
        ({"op": "multiply", "scale": 1e6}, r"\|scale\| must be at most"),
    ],
)
def test_malformed_forms(direction: dict[str, Any], message: str, registry: PackRegistry) -> None:
    with pytest.raises(RequestError, match=message):
        plan(registry, {"name": "a"} | direction)


def test_a_partner_is_looked_for_in_the_direction_s_own_pack(registry: PackRegistry) -> None:
    """Alone, ``b`` would be ambiguous."""
    (segment,) = plan(
        registry, {"name": "p/a", "op": "rotate", "plane": "b", "scale": 9.0}
    ).segments
    own = registry.find("p/b").digest
    assert segment.terms[0].form.partner == own
    (segment,) = plan(
        registry, {"name": "p/a", "op": "rotate", "plane": "q/b", "scale": 9.0}
    ).segments
    assert segment.terms[0].form.partner == registry.find("q/b").digest != own


def test_plans_travel_unchanged_and_forms_have_identities_of_their_own(
    registry: PackRegistry,
) -> None:
    forms: list[dict[str, Any]] = [
        {},
        {"op": "ablate"},
        {"op": "clamp"},
        {"op": "rotate", "plane": "b"},
        {"op": "rotate", "plane": "q/b"},
        {"op": "angle", "plane": "b"},
        {"op": "affine", "read": "b"},
        {"op": "affine", "read": "b", "bias": 1.0},
        {"op": "feature", "read": "b"},
        {"op": "feature", "read": "q/b"},
        {"op": "feature", "read": "b", "bias": 1.0},
        {"op": "feature", "read": "b", "threshold": 1.0},
        {"op": "feature", "read": "b", "activation": "multiply"},
        {"gate": {"direction": "b", "above": 1.0}},
        {"gate": {"direction": "b", "above": 2.0}},
        {"gate": {"direction": "b", "above": 2.0, "slope": 1.0}},
        {"gate": {"direction": "b", "above": 2.0, "slope": 2.0}},
        {"op": "multiply"},
        {"op": "multiply", "gate": {"direction": "b", "above": 2.0}},
        {"restore_norm": True},
    ]
    plans = [plan(registry, {"name": "p/a", "scale": 2.0} | form) for form in forms]
    assert [decode_plan(encode_plan(p)) for p in plans] == plans
    assert len({p.segments[0].key for p in plans}) == len(forms)


def test_what_changes_nothing_is_left_out(registry: PackRegistry) -> None:
    idle: list[dict[str, Any]] = [
        {"op": "ablate"},
        {"op": "rotate", "plane": "b"},
        {"op": "multiply"},
        {},
    ]
    for form in idle:
        assert not plan(registry, {"name": "p/a", "scale": 0.0} | form).segments
    assert plan(registry, {"name": "p/a", "scale": 0.0, "op": "clamp"}).segments
    feature = {"name": "p/a", "op": "feature", "read": "b"}
    assert not plan(registry, feature | {"scale": 1.0, "activation": "multiply"}).segments
    for scale in (0.0, 1.0):
        assert plan(registry, feature | {"scale": scale}).segments


@pytest.mark.parametrize(
    ("directions", "config", "message"),
    [
        ([{"op": "ablate"}], {}, "started with --steering-ops affine"),
        ([{"gate": {"direction": "q/b", "above": 0.0}}], {}, "--steering-ops affine"),
        ([{"restore_norm": True}], {}, "--steering-ops affine"),
        ([{"op": "ablate"}] * 5, AFFINE, "those at layer 0 have a total rank of 5, .*limit is 4"),
        ([{"restore_norm": True}, {}], AFFINE, "set restore_norm for all"),
        ([{"op": "rotate", "plane": "b", "scale": 9.0}] * 2, AFFINE, None),
        ([{"op": "ablate"}, {}], AFFINE, None),
        ([{"op": "multiply"}], {}, "started with --steering-ops affine"),
        ([{"op": "multiply"}], AFFINE, "--steering-ops affine --steering-multiply"),
        ([{"op": "multiply"}] * 4, MULTIPLY, None),
        ([{"op": "multiply"}] * 5, MULTIPLY, "total rank of 5"),
        ([{"op": "multiply"}, {"op": "multiply"} | GATED], MULTIPLY, "at layer 0 the same gate"),
        ([{"op": "multiply"} | GATED] * 2, MULTIPLY, None),
    ],
)
def test_limits(
    directions: list[dict[str, Any]],
    config: dict[str, Any],
    message: str | None,
    registry: PackRegistry,
) -> None:
    given = [{"name": "p/a", "scale": 1.0 + i} | d for i, d in enumerate(directions)]
    found = plan(registry, *given)
    if message is None:
        check_capacity(found, resolved(**config))
        return
    with pytest.raises(RequestError, match=message):
        check_capacity(found, resolved(**config))


def test_positions_keep_forms_apart(registry: PackRegistry) -> None:
    """Rank counts where directions meet, not over a request."""
    apart = [{"name": "p/a", "op": "ablate", "positions": [[i, i + 1]]} for i in range(3)]
    check_capacity(plan(registry, *apart), resolved(ops="affine", rank=2))


@pytest.mark.parametrize(
    ("direction", "dose"),
    [
        ({"op": "ablate"}, 1.0),
        ({"op": "ablate", "scale": -2.0}, 2.0),
        ({"op": "clamp", "scale": -5.0}, 1.5),
        ({"op": "rotate", "plane": "b", "scale": 60.0}, 1.0),
        ({"op": "angle", "plane": "b", "scale": 1.0}, 2.0),
        ({"op": "affine", "read": "b", "bias": 5.0, "scale": 2.0}, 3.0),
        ({"gate": {"direction": "q/b", "above": -9.0, "slope": 2.0}, "scale": 3.0}, 0.3),
        # What is taken away: of an activation of up to 10, and of 15.
        ({"op": "feature", "read": "b", "scale": 0.0}, 1.0),
        ({"op": "feature", "read": "b", "bias": 5.0, "scale": 0.0}, 1.5),
        ({"op": "feature", "read": "b", "bias": -5.0, "scale": 0.0}, 1.0),
        ({"op": "feature", "read": "b", "scale": -20.0}, 3.0),
        ({"op": "feature", "read": "b", "scale": 4.0, "activation": "multiply"}, 3.0),
    ],
)
def test_dose_bounds_the_change(
    direction: dict[str, Any], dose: float, registry: PackRegistry
) -> None:
    """Unit vectors beside a residual stream of norm 10; no stream of that norm is changed more."""
    found = plan(registry, {"name": "p/a", "layers": [0]} | direction)
    assert relative_dose(found, registry) == pytest.approx(dose)
    values = values_of(found, registry)
    stream = np.random.default_rng(0).standard_normal((2000, HIDDEN))
    stream *= 10.0 / np.linalg.norm(stream, axis=1, keepdims=True)
    largest = np.linalg.norm(change(values, 0, stream), axis=1).max() / 10.0
    assert 0.3 * dose < largest <= dose * (1 + 1e-6)


def test_only_proportional_forms_are_weakened(registry: PackRegistry) -> None:
    ablation = plan(registry, {"name": "p/a", "op": "ablate"})
    weaker = scaled(ablation, 0.5)
    assert weaker is not None
    assert relative_dose(weaker, registry) == pytest.approx(0.5)
    assert scaled(plan(registry, {"name": "p/a", "op": "clamp", "scale": 1.0}), 0.5) is None
    feature = {"name": "p/a", "op": "feature", "read": "b", "scale": 1.0}
    assert scaled(plan(registry, feature), 0.5) is None


def values_of(found: SteeringPlan, registry: PackRegistry) -> RowValues:
    (segment,) = found.segments
    index, find = {0: 0, 1: 1}, registry.by_digest
    return row_values(segment, index, AFFINE["rank"], HIDDEN, find, multiply=True)


def change(values: RowValues, at: int, stream: np.ndarray) -> np.ndarray:
    """The general form, component by component."""
    rank = values.left.shape[1]
    total = np.tile(values.vectors[at].astype(np.float64), (len(stream), 1))
    read = stream @ values.readers[at].T.astype(np.float64)
    share = np.zeros(len(stream))
    for k in range(rank):
        pair = read[:, k - k % 2 : k - k % 2 + 2]
        numbers = values.numbers[at, :, k].astype(np.float64)
        value = read[:, k] + numbers[BIAS] + numbers[TURN] * np.linalg.norm(pair, axis=1)
        beyond = read[:, rank + k] - numbers[THRESHOLD]
        gate = 1 / (1 + np.exp(-numbers[SLOPE] * beyond)) if numbers[SLOPE] else beyond > 0
        total += np.outer(value * gate, values.left[at, k])
        share += numbers[SHARE] * gate
    return total + share[:, None] * values.diagonal[at] * stream


def test_rows_hold_planes_and_single_components_together(registry: PackRegistry) -> None:
    """A plane finds its pair whatever stands before it; the changes of all forms add up."""
    choices: list[dict[str, Any]] = [
        {"name": "p/a", "op": "ablate"},
        {"name": "q/b", "op": "angle", "plane": "p/a", "scale": 30.0},
        {"name": "p/b", "scale": 3.0},
        {"name": "p/b", "scale": 2.0, "gate": {"direction": "q/b", "above": 0.5}},
    ]
    stream = np.random.default_rng(1).standard_normal((50, HIDDEN))
    together = change(values_of(plan(registry, *choices), registry), 1, stream)
    apart = sum(change(values_of(plan(registry, c), registry), 1, stream) for c in choices)
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_dimensions_are_multiplied_behind_one_gate(registry: PackRegistry) -> None:
    """Those at one layer share the component of the first, and a soft gate lets a part of them through."""
    choices = [
        {"name": name, "op": "multiply", "scale": scale} | GATED
        for name, scale in (("p/a", 3.0), ("p/b", -2.0))
    ]
    stream = np.random.default_rng(3).standard_normal((50, HIDDEN))
    a, b, probe = (registry.find(name).at(0).astype(float) for name in ("p/a", "p/b", "q/b"))
    gate = 1 / (1 + np.exp(-2.0 * (stream @ probe)))
    wanted = gate[:, None] * stream * (3.0 * a - 2.0 * b)
    found = change(values_of(plan(registry, *choices), registry), 0, stream)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_dose_of_multiplication_is_its_largest_factor(registry: PackRegistry) -> None:
    choice = {"name": "p/a", "op": "multiply", "scale": -2.0}
    sizes = [np.abs(registry.find("p/a").at(layer)).max() for layer in (0, 1)]
    assert relative_dose(plan(registry, choice), registry) == pytest.approx(2.0 * sum(sizes))


def test_rotation_turns_by_its_angle_and_keeps_the_length(registry: PackRegistry) -> None:
    a = registry.find("p/a").at(0).astype(np.float64)
    b = registry.find("p/b").at(0).astype(np.float64)
    b -= (a @ b) / (a @ a) * a
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    stream = np.random.default_rng(2).standard_normal((50, HIDDEN))
    for op, angle in (("rotate", 40.0), ("angle", 250.0)):
        found = plan(registry, {"name": "p/a", "op": op, "plane": "b", "scale": angle})
        after = stream + change(values_of(found, registry), 0, stream)
        np.testing.assert_allclose(
            np.linalg.norm(after, axis=1), np.linalg.norm(stream, axis=1), rtol=1e-6
        )
        before = np.arctan2(stream @ b, stream @ a) if op == "rotate" else 0.0
        turned = np.arctan2(after @ b, after @ a) - before - math.radians(angle)
        np.testing.assert_allclose(np.cos(turned), 1.0, atol=1e-6)


@pytest.fixture
def moods(pack_at: Callable[..., SteeringPack]) -> SteeringPack:
    return pack_at("moods", {"calm": [1, 2], "low": [0, 1, 2]})


def pack_with(moods: SteeringPack, form: FormChoice) -> SteeringPack:
    first, *others = moods.manifest.directions
    records = [DirectionRecord(**(dict(first) | {"form": form})), *others]
    return write_pack(
        moods.path,
        PackContent(
            name=moods.name,
            model=moods.manifest.model,
            directions=records,
            vectors=moods.vectors,
            method=moods.manifest.method,
            residual_norms={int(k): v for k, v in moods.manifest.residual_norms.items()},
        ),
    )


def test_a_pack_names_the_form_of_its_directions(moods: SteeringPack) -> None:
    first, second = (record.name for record in moods.manifest.directions[:2])
    form = FormChoice(op="rotate", plane=second, gate=Gate(direction=second, above=0.5))
    registry = PackRegistry([load_pack(pack_with(moods, form).path)])
    term = plan(registry, {"name": first}).segments[0].terms[0]
    assert (term.form.op, term.scale) == ("rotate", moods.directions[first].default_scale)
    assert term.form.gate == registry.find(f"moods/{second}").digest
    other = plan(registry, {"name": first, "op": "ablate"}).segments[0].terms[0]
    assert (other.form.op, other.scale, other.form.gate) == ("ablate", 1.0, None)
    ungated = plan(registry, {"name": first, "op": "rotate", "scale": 5.0}).segments[0].terms[0]
    assert ungated.form == term.form


def test_a_hard_gate_is_written_as_older_versions_read_it(moods: SteeringPack) -> None:
    second = moods.manifest.directions[1].name
    for slope in (None, 2.0):
        gate = Gate(direction=second, above=0.5, slope=slope)
        written = pack_with(moods, FormChoice(op="ablate", gate=gate))
        manifest = (written.path / "steering_config.json").read_text()
        assert ('"slope"' in manifest) == (slope is not None)
        (form,) = [d.form for d in load_pack(written.path).manifest.directions if d.form]
        assert form.gate == gate


def test_a_pack_whose_form_names_a_stranger(moods: SteeringPack) -> None:
    with pytest.raises(PackError, match="names 'nobody', which must be a direction of this pack"):
        pack_with(moods, FormChoice(op="rotate", plane="nobody"))
