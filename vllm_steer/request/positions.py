"""Token positions: the choices of a request, and the resulting absolute ranges.

Position 0 is the prompt's first token; the first generated token is at the prompt's length.
Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_args

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from vllm_steer.errors import RequestError
from vllm_steer.fields import PositionChoice

MAX_RANGES = 64
# Token ids of one choice of positions.
MAX_TOKEN_IDS = 256
# Characters of a choice in a message.
_SHOWN = 80
# First position and the position after the last; negative ones count from the prompt's end, None has no end.
PositionRange = tuple[int, int | None]
# Far beyond any context length, and within the int32 of the engine's tables.
_LIMIT = 2**30
# Python takes more for a number, as digits of other scripts and underscores between them.
_SLICE = re.compile(r"(?:-?[0-9]{1,10})?:(?:-?[0-9]{1,10})?")
_WANTED = (
    f"must be {', '.join(repr(name) for name in get_args(PositionChoice))} or a list of up to {MAX_RANGES} "
    "[start, end] pairs: end is not included and null has no end, and negative numbers count from the prompt's "
    'end, such as [[-4, null]]; or {"generated": [start, end]}, counted from the first generated token; or {"prompt": '
    "pairs}, which null and a prompt that is shorter end at the prompt's end; directions may also have token ids, as "
    '{"tokens": ids} or {"from_tokens": ids}'
)
_WANTED_TOKENS = (
    f'must be {{"tokens": ids}} for the tokens with one of 1 to {MAX_TOKEN_IDS} token ids, or {{"from_tokens": ids}} for '
    'the first of them and all that follow it, either with "within", the positions that count; "all" if it is not given'
)


@dataclass(frozen=True)
class GeneratedRange:
    """Positions counted from the first generated token; ``end`` is not included, None has no end."""

    start: int
    end: int | None


@dataclass(frozen=True)
class PromptRanges:
    """Positions of the prompt alone: an end of None is the prompt's, and ranges are cut where a prompt is shorter."""

    ranges: tuple[PositionRange, ...]


# Positions that a prompt's length alone decides.
PlainPositions = PositionChoice | GeneratedRange | PromptRanges | tuple[PositionRange, ...]


@dataclass(frozen=True)
class TokenPositions:
    """Positions of tokens with given ids, or of all tokens from the first of them on.

    Attributes:
        tokens: The ids, ascending.
        onward: Whether all tokens from the first on are meant.
        within: The positions that count. With ``onward``, the first token is looked for from the first of them on.
    """

    tokens: tuple[int, ...]
    onward: bool
    within: PlainPositions


AnyPositions = PlainPositions | TokenPositions


def parse_positions(value: Any) -> AnyPositions:
    """Checks a choice of positions.

    Args:
        value: A name, a list of ``[start, end]`` pairs, one pair as ``{"generated": pair}``, pairs as
            ``{"prompt": pairs}``, or token ids as ``{"tokens": ids}`` or ``{"from_tokens": ids}``.

    Raises:
        PydanticCustomError: It is none of these; the message says what would be valid.
    """
    if isinstance(value, TokenPositions):
        return value
    if isinstance(value, dict) and {"tokens", "from_tokens"} & value.keys():
        return _token_positions(value)
    return _plain(value)


def _token_positions(value: dict[str, Any]) -> TokenPositions:
    onward = "from_tokens" in value
    ids = value["from_tokens" if onward else "tokens"]
    if (
        set(value) - {"within"} != {"from_tokens" if onward else "tokens"}
        or not isinstance(ids, (list, tuple))
        or not 1 <= len(ids) <= MAX_TOKEN_IDS
        or not all(isinstance(each, int) and not isinstance(each, bool) for each in ids)
        or not all(0 <= each < 2**31 for each in ids)
    ):
        raise PydanticCustomError("positions", _WANTED_TOKENS)
    return TokenPositions(tuple(sorted(set(ids))), onward, _plain(value.get("within", "all")))


def _plain(value: Any) -> PlainPositions:
    if isinstance(value, str) and value in get_args(PositionChoice):
        return value  # type: ignore[return-value]  # membership does not narrow to a Literal
    if isinstance(value, GeneratedRange | PromptRanges):
        return value
    if isinstance(value, dict) and set(value) == {"prompt"}:
        return PromptRanges(_pairs(value["prompt"]))
    if isinstance(value, dict) and set(value) == {"generated"}:
        start, end = _pair(value["generated"])
        if start < 0 or (end is not None and end < 0):
            raise PydanticCustomError("positions", _WANTED)
        return GeneratedRange(start, end)
    return _pairs(value)


def _pairs(value: Any) -> tuple[PositionRange, ...]:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_RANGES:
        raise PydanticCustomError("positions", _WANTED)
    return tuple(_pair(pair) for pair in value)


def _pair(pair: Any) -> PositionRange:
    if (
        not isinstance(pair, (list, tuple))
        or len(pair) != 2
        or not _is_position(pair[0])
        or not (pair[1] is None or _is_position(pair[1]))
    ):
        raise PydanticCustomError("positions", _WANTED)
    start, end = pair
    if end is not None and (start < 0) == (end < 0) and start >= end:
        raise PydanticCustomError(
            "positions",
            "the range [{start}, {end}] is empty; end must be greater than start",
            {"start": start, "end": end},
        )
    return start, end


def plain_positions(positions: AnyPositions) -> Any:
    """Returns positions as they are written in JSON."""
    if isinstance(positions, TokenPositions):
        ids = {"from_tokens" if positions.onward else "tokens": list(positions.tokens)}
        within = plain_positions(positions.within)
        return ids if within == "all" else ids | {"within": within}
    if isinstance(positions, GeneratedRange):
        return {"generated": [positions.start, positions.end]}
    if isinstance(positions, PromptRanges):
        return {"prompt": [list(pair) for pair in positions.ranges]}
    return positions if isinstance(positions, str) else [list(pair) for pair in positions]


def show_positions(positions: AnyPositions) -> str:
    """Returns positions in one line, as a request gives them."""
    return positions if isinstance(positions, str) else json.dumps(plain_positions(positions))


def count_ranges(positions: AnyPositions) -> int:
    """Returns how many ranges a choice has at most."""
    if isinstance(positions, TokenPositions):
        return count_ranges(positions.within)
    if isinstance(positions, PromptRanges):
        return len(positions.ranges)
    return len(positions) if isinstance(positions, tuple) else 1


_PAIR_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 2,
    "maxItems": 2,
    "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
}
_PAIRS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_RANGES,
    "items": _PAIR_SCHEMA,
}
_PLAIN_SCHEMAS: list[dict[str, Any]] = [
    {"enum": list(get_args(PositionChoice))},
    _PAIRS_SCHEMA,
    *(
        {
            "type": "object",
            "properties": {key: schema},
            "required": [key],
            "additionalProperties": False,
        }
        for key, schema in (("generated", _PAIR_SCHEMA), ("prompt", _PAIRS_SCHEMA))
    ),
]
# Positions that depend on the prompt's length, and on no token.
Ranges = Annotated[
    PlainPositions,
    PlainValidator(_plain),
    PlainSerializer(plain_positions),
    WithJsonSchema({"anyOf": _PLAIN_SCHEMAS}),
]
_IDS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_TOKEN_IDS,
    "items": {"type": "integer", "minimum": 0},
}
_TOKENS_SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {key: _IDS_SCHEMA, "within": {"anyOf": _PLAIN_SCHEMAS}},
        "required": [key],
        "additionalProperties": False,
    }
    for key in ("tokens", "from_tokens")
]
Positions = Annotated[
    AnyPositions,
    PlainValidator(parse_positions),
    PlainSerializer(plain_positions),
    WithJsonSchema({"anyOf": [*_PLAIN_SCHEMAS, *_TOKENS_SCHEMAS]}),
]


def parse_slice(text: str) -> list[int | None]:
    """Reads ``"start:end"`` of the flat form; a missing start is 0, a missing end is None.

    Raises:
        ValueError: The text is not of that form.
    """
    if not _SLICE.fullmatch(text):
        raise ValueError(f'{text!r} must be "start:end"')
    start, _, end = text.partition(":")
    return [int(start or "0"), int(end) if end else None]


def absolute_ranges(
    positions: AnyPositions,
    prompt_len: int,
    max_len: int | None = None,
) -> list[PositionRange]:
    """Returns the absolute ranges of a choice for one prompt.

    Args:
        positions: The choice; of token ids, the positions that count.
        prompt_len: Tokens of the prompt.
        max_len: Most tokens of prompt and answer together, None when unknown.

    Raises:
        RequestError: A range starts before the prompt, is empty, or can never be reached.
    """
    if isinstance(positions, TokenPositions):
        positions = positions.within
    if isinstance(positions, str):
        return [
            {
                "all": (0, None),
                "prompt": (0, prompt_len),
                "generated": (prompt_len, None),
                "last_prompt": (prompt_len - 1, prompt_len),
            }[positions]
        ]
    if isinstance(positions, PromptRanges):
        return _within_prompt(positions, prompt_len)
    if isinstance(positions, GeneratedRange):
        last = positions.end
        end_of = None if last is None else prompt_len + last
        positions = ((prompt_len + positions.start, end_of),)
    ranges = []
    for first, last in positions:
        start = first + prompt_len if first < 0 else first
        end = last + prompt_len if last is not None and last < 0 else last
        if start < 0:
            raise RequestError(
                f"{_shown(first, last)} starts before the prompt, which has {prompt_len} tokens; start must be at least "
                f"{-prompt_len}"
            )
        if end is not None and start >= end:
            raise RequestError(
                f"{_shown(first, last)} is empty for this prompt of {prompt_len} tokens"
            )
        if max_len is not None and start >= max_len:
            raise RequestError(
                f"{_shown(first, last)} is never reached: prompt and answer have at most {max_len} tokens"
            )
        ranges.append((start, end))
    return ranges


def absolute_positions(positions: AnyPositions, prompt_len: int) -> Any:
    """Returns the choice for one prompt as it is written in JSON, with absolute ranges alone.

    Args:
        positions: The choice.
        prompt_len: Tokens of the prompt.

    Raises:
        RequestError: As :func:`absolute_ranges`.
    """
    ranges = absolute_ranges(positions, prompt_len)
    if isinstance(positions, TokenPositions):
        return plain_positions(replace(positions, within=tuple(ranges)))
    return plain_positions(tuple(ranges))


def _shown(first: int, last: int | None) -> str:
    return f"[{first}, {'null' if last is None else last}]"


def _within_prompt(positions: PromptRanges, prompt_len: int) -> list[PositionRange]:
    ranges: list[PositionRange] = []
    for first, last in positions.ranges:
        start = first + prompt_len if first < 0 else first
        end = prompt_len if last is None else last + prompt_len if last < 0 else last
        start, end = max(start, 0), min(end, prompt_len)
        if start < end:
            ranges.append((start, end))
    if not ranges:
        raise RequestError(
            f"{show_positions(positions)[:_SHOWN]} has no position in this prompt of {prompt_len} tokens"
        )
    return ranges


def _is_position(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LIMIT
