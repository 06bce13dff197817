"""Builds the steering fields of a request, for any client. Imports neither torch nor vllm."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vllm_steer.fields import PositionChoice
from vllm_steer.request.positions import PositionRange
from vllm_steer.request.schema import REQUEST_KEY, parse


def steer(
    directions: Mapping[str, float | Mapping[str, Any] | None] | Sequence[str] | str,
    *,
    layers: Sequence[int] | None = None,
    positions: PositionChoice | Sequence[PositionRange] | Mapping[str, Any] | None = None,
    by: Literal["scale", "strength"] = "scale",
    xargs: bool = False,
) -> dict[str, Any]:
    """Returns the fields to add to a request's body.

    With the OpenAI client they go into ``extra_body``; with ``LLM`` into
    ``SamplingParams(extra_args=...)``.

    Args:
        directions: Names to scales, ``{"fears/spiders": 9.0}``; None, or a name alone, takes the
            direction's default scale. Instead of a scale, any fields of a direction, such as
            ``{"op": "multiply", "scale": 2.0}``.
        layers: Layers to steer; None takes each direction's default layers.
        positions: Token positions to steer, in any form of a request, such as ``{"tokens": [13]}``; None takes
            each direction's default.
        by: Whether the numbers are scales, or strengths (multiples of the default scale of calibrated
            directions).
        xargs: Whether to build ``vllm_xargs``, for clients and routes that pass on only these.

    Raises:
        RequestError: A field is malformed; the message names it.

    Example:
        >>> steer({"fears/spiders": 9.0}, positions="generated")
        {'steering': {'directions': [{'name': 'fears/spiders', 'scale': 9.0}], 'positions': 'generated'}}
    """
    if isinstance(directions, str):
        directions = [directions]
    if not isinstance(directions, Mapping):
        directions = dict.fromkeys(directions)
    fields: dict[str, Any] = {
        "directions": [
            {"name": name} | (dict(given) if isinstance(given, Mapping) else _number(by, given))
            for name, given in directions.items()
        ]
    }
    if layers is not None:
        fields["layers"] = list(layers)
    if positions is not None:
        whole = isinstance(positions, (str, Mapping))
        fields["positions"] = positions if whole else [list(pair) for pair in positions]
    parse({REQUEST_KEY: fields})
    return {"vllm_xargs": {REQUEST_KEY: json.dumps(fields)}} if xargs else {REQUEST_KEY: fields}


def _number(by: str, given: float | None) -> dict[str, float]:
    """The field of a scale or strength; none for the default."""
    return {} if given is None else {by: float(given)}
