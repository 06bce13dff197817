"""What a request may say, and what it is told when it says something else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_steer.errors import RequestError
from vllm_steer.request.schema import (
    DirectionChoice,
    SteeringRequest,
    first_steering_key,
    parse,
    steering_keys,
)
from vllm_steer.testing.fuzz_values import ANY_JSON, mutated, refused_by_pydantic


def test_no_steering() -> None:
    assert parse(None) is None
    assert parse({}) is None
    assert parse({"kv_transfer_params": {"a": 1}, "stream_options": 1}) is None
    assert parse({"steering": None}) is None


def test_the_forms_agree() -> None:
    expected = SteeringRequest(
        directions=[
            DirectionChoice(name="fears/spiders", scale=12.0),
            DirectionChoice(name="calm"),
        ],
        layers=[1, 2],
        positions="generated",
    )
    typed: dict[str, Any] = {
        "directions": [{"name": "fears/spiders", "scale": 12}, {"name": "calm"}],
        "layers": [1, 2],
        "positions": "generated",
    }
    flat = {
        "steer": ["fears/spiders:12", "calm"],
        "steer_layers": [1, 2],
        "steer_positions": "generated",
    }
    assert parse({"steering": typed}) == expected
    assert parse({"steering": json.dumps(typed)}) == expected
    assert parse(flat) == expected


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"steering": {}}, "steering: needs directions to steer or to read"),
        ({"steering": {"directions": []}}, "steering: needs directions to steer"),
        (
            {"steering": {"directions": "spiders"}},
            "steering.directions:",
        ),
        ({"steering": {"directions": [{"nam": "a"}]}}, "nam: unknown key; did you mean 'name'"),
        ({"steering": {"direction": []}}, "direction: unknown key; did you mean 'directions'"),
        (
            {"steering": {"directions": [{"name": "a", "scale": "1"}]}},
            "0.scale:",
        ),
        (
            {"steering": {"directions": [{"name": "a", "scale": True}]}},
            "0.scale:",
        ),
        (
            {"steering": {"directions": [{"name": "a", "scale": float("nan")}]}},
            "0.scale:",
        ),
        (
            {"steering": {"directions": [{"name": "a", "layers": [-1]}]}},
            "layers.0:",
        ),
        (
            {"steering": {"directions": [{"name": "a", "layers": []}]}},
            "layers:",
        ),
        (
            {"steering": {"directions": [{"name": "a", "positions": "odd"}]}},
            "positions: must be 'all', 'prompt'",
        ),
        (
            {"steering": {"directions": [{"name": "a"}] * 65}},
            "directions:",
        ),
        ({"steering": []}, "steering must be an object such as"),
        ({"steering": 3}, "steering must be an object such as"),
        ({"steering": "{"}, "steering:"),
        ({"steer": []}, "steer must be a list"),
        ({"steer": [1]}, "steer must be a list"),
        ({"steer_layers": [1]}, "steer must be a list"),
        ({"steer": ["a:b"]}, "'a:b' must be \"name:scale\" with a number"),
        ({"steer": ["a:nan"]}, "'a:nan' must be \"name:scale\" with a number"),
        ({"steer": ["a:1e999"]}, "0.scale:"),
        ({"steer": ["a:1_0"]}, "'a:1_0' must be \"name:scale\" with a number"),
        ({"steer": ["a:\u0661"]}, 'must be "name:scale" with a number'),
        ({"steer": ["a:\n1"]}, 'must be "name:scale" with a number'),
        ({"steer": ["a"], "steer_positions": ["1_0:"]}, "must be a name or a list of"),
        ({"steer": ["a"], "steer_positions": ["\uff11:"]}, "must be a name or a list of"),
        ({"steer": ["a"], "steer_positions": ["1:2:3"]}, "must be a name or a list of"),
        ({"steer": ["a"], "steer_layer": [1]}, "'steer_layer'; did you mean 'steer_layers'"),
        (
            {"steering": {"directions": [{"name": "a"}]}, "steer": ["a"]},
            "send either 'steering' or ",
        ),
        ({"sterring": {}}, "unknown steering argument 'sterring'; did you mean 'steering'"),
        ({"_vllm_steer_plan": []}, "is internal; send 'steering'"),
    ],
)
def test_malformed(extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(extra_args)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([], "must be 'all'"),
        ([[1]], "must be 'all'"),
        ({"prompt": []}, "must be 'all'"),
        ({"prompt": [1, 2]}, "must be 'all'"),
        ({"prompt": [[4, 4]]}, r"the range [4, 4] is empty"),
        ({"prompt": [[0, 2]], "generated": [0, 1]}, "must be 'all'"),
        ([[1, 2, 3]], "must be 'all'"),
        ([[None, 2]], "must be 'all'"),
        ([[True, 2]], "must be 'all'"),
        ([[1.5, 2]], "must be 'all'"),
        ([[0, 2**40]], "must be 'all'"),
        ([[0, 1]] * 65, "must be 'all'"),
        ([[4, 4]], r"the range [4, 4] is empty"),
        ([[-1, -2]], r"the range [-1, -2] is empty"),
    ],
)
def test_malformed_positions(positions: Any, message: str) -> None:
    for args in (
        {"steering": {"directions": [{"name": "a"}], "positions": positions}},
        {"steering": json.dumps({"directions": [{"name": "a", "positions": positions}]})},
        {"steer": ["a"], "steer_positions": positions},
    ):
        with pytest.raises(RequestError) as refused:
            parse(args)
        assert message in str(refused.value)


def test_flat_positions_are_slices() -> None:
    slices = parse({"steer": ["a"], "steer_positions": ["-4:", "0:2", ":7"]})
    assert slices is not None
    assert slices.positions == ((-4, None), (0, 2), (0, 7))
    name = parse({"steer": ["a"], "steer_positions": "last_prompt"})
    assert name is not None
    assert name.positions == "last_prompt"
    with pytest.raises(RequestError, match='a list of "start:end"'):
        parse({"steer": ["a"], "steer_positions": ["4"]})


@settings(deadline=None, database=None, max_examples=500)
@given(mutated(["fears/spiders"]))
def test_any_value_in_any_place_is_understood_or_refused(value: Any) -> None:
    """Never another exception, and the message can be sent."""
    if refused_by_pydantic(value):
        with pytest.raises(RequestError, match="^steering") as caught:
            parse({"steering": value})
        str(caught.value).encode()
    else:
        found = parse({"steering": value})
        assert (found is None) == (value is None or value == "none")


@settings(deadline=None, database=None, max_examples=500)
@given(st.sampled_from(["steer", "steer_layers", "steer_positions"]), ANY_JSON)
def test_any_value_of_the_flat_form_is_understood_or_refused(key: str, value: Any) -> None:
    try:
        found = parse({"steer": ["fears/spiders:3"]} | {key: value})
    except RequestError as error:
        str(error).encode()
    else:
        assert isinstance(found, SteeringRequest)


@pytest.mark.parametrize(
    ("text", "scale"),
    [("2", 2.0), (" -2.5 ", -2.5), ("+.5", 0.5), ("3.", 3.0), ("1e+07", 1e7), ("-0", -0.0)],
)
def test_scales_of_the_flat_form(text: str, scale: float) -> None:
    found = parse({"steer": [f"a:{text}"]})
    assert found is not None
    assert found.directions[0].scale == scale


def test_near_misses_are_sought_among_few_and_short_keys() -> None:
    """A body may have hundreds of thousands of keys."""
    for key in (
        "steering",
        "steer_x",
        "Steering",
        "sterring",
        "teering",
        "_steering",
        "\udfffsteering",
        "STEERING",
        "STEER",
        " steering",
        "\tsteer ",
        "-steering",
        "X-Steering",
        "vllm_steering",
        "\ufeffsteering",
        "s\u200bteering_layer_s",
        "\uff33teering",
    ):
        assert first_steering_key(["model", "prompt", "stream", key]) == key
    assert steering_keys(["stream", "stop", "seed", "top_p", "temperature", 3, None]) == []
    many = [f"s{number}" for number in range(100)]
    assert steering_keys([*many, "sterring", "steer"]) == ["steer"]
    assert steering_keys(["s" * 10**6 + "teering"]) == []
    with pytest.raises(RequestError, match="an object in it has 300000 keys; the limit is 64"):
        parse({"steering": {f"k{number}": 1 for number in range(300_000)}})
    with pytest.raises(RequestError, match="lists have more than 20000 entries"):
        parse({"steering": {"directions": [{"name": "a", "layers": [0] * 4096}] * 64}})
    with pytest.raises(RequestError, match="its JSON text has 300001 characters"):
        parse({"steering": "[" * 300_001})
    with pytest.raises(RequestError, match="steer: 300000 directions are given; the limit is 64"):
        parse({"steer": ["a"] * 300_000})
