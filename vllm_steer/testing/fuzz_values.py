"""Steering objects with any JSON value in any place, drawn by Hypothesis from the request's JSON schema.

A valid object is drawn from the schema, then places of it are replaced, removed or added to. What
pydantic refuses must be answered by a 4xx that names the field; the rest by an answer or a 4xx.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_steer.request.schema import NONE, SteeringRequest

SCHEMA = SteeringRequest.model_json_schema()
# Fields that hold the name of a direction.
_NAMES = ("name", "plane", "read", "direction")
_BIG = 10**400

# Lone surrogates too: JSON can escape them, UTF-8 cannot encode them.
_TEXT = st.one_of(st.text(max_size=12), st.sampled_from(["\ud800", "steer\udfff"]))
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, -(2**63) - 1, 2**64, _BIG, -_BIG]),
    st.floats(),
    _TEXT,
    st.sampled_from([NONE, "all", "{}", "[]", "null", "generated", "9", "a" * 301, "\x00"]),
)
ANY_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXT, inner, max_size=4)),
    max_leaves=8,
)
"""Any JSON value, NaN and Inf among them."""


def from_schema(schema: Mapping[str, Any], names: Sequence[str]) -> st.SearchStrategy[Any]:
    """Draws values that a JSON schema allows.

    Args:
        schema: The part of :data:`SCHEMA` to draw from.
        names: Directions that a server has, for the fields that name one.
    """
    if "$ref" in schema:
        return from_schema(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], names)
    if "anyOf" in schema:
        return st.one_of([from_schema(one, names) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema["type"]
    if kind == "object":
        fields = {
            key: st.sampled_from(names)
            if key in _NAMES and _is_text(value)
            else from_schema(value, names)
            for key, value in schema["properties"].items()
        }
        needed = {key: fields.pop(key) for key in schema.get("required", ())}
        return st.fixed_dictionaries(needed, optional=fields)
    if kind == "array":
        least = schema.get("minItems", 0)
        inner = from_schema(schema["items"], names)
        return st.lists(inner, min_size=least, max_size=min(schema["maxItems"], least + 3))
    if kind == "integer":
        return st.integers(schema.get("minimum", -8), 8)
    return {
        "number": st.floats(-9, 9),
        "string": st.text(min_size=1),
        "boolean": st.booleans(),
        "null": st.none(),
    }[kind]


def _is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a part of the schema is text, or text or null."""
    return any(one.get("type") == "string" for one in schema.get("anyOf", [schema]))


@st.composite
def mutated(draw: st.DrawFn, names: Sequence[str]) -> Any:
    """Draws a valid object and changes one to three places of it."""
    holder = {"steering": deepcopy(draw(from_schema(SCHEMA, names)))}
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(_places(holder)))
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if change == "replace" or parent is holder:
            parent[key] = draw(ANY_JSON)
        elif change == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(_TEXT)] = draw(ANY_JSON)
        else:
            parent.insert(key, draw(ANY_JSON))
    return holder["steering"]


def refused_by_pydantic(value: Any) -> bool:
    """Whether a value of the field ``steering`` is no steering by its form."""
    if value is None or value == NONE:
        return False
    try:
        if isinstance(value, str):
            SteeringRequest.model_validate_json(value)
        else:
            SteeringRequest.model_validate(value)
    except ValidationError:
        return True
    return False


def fault_of(value: Any, status: int, answer: str) -> str:
    """Returns what is wrong with the answer to a value of ``steering``, in words or empty."""
    if status == 200 and not refused_by_pydantic(value):
        return ""
    if not 400 <= status < 500:
        return f"answered by {status}"
    # A number too long for Python's parser is refused with the body as a whole.
    if "steering" not in answer and "parsing the body" not in answer:
        return "the message names no field"
    return ""


def content_of(body: Mapping[str, Any]) -> bytes:
    """The body as JSON, with NaN and Inf, which a well-behaved client would not write."""
    return json.dumps(body).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a value as the container and the key or index in it."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    return found + [
        place
        for key in keys
        if isinstance(value[key], (dict, list))
        for place in _places(value[key])
    ]
