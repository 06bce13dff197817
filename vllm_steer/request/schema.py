"""The steering fields of a request: parsing and validation.

A request names directions, each with a scale or a strength, layers and positions. Importing this
module imports neither torch nor vllm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Annotated, Any
from unicodedata import normalize

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from vllm_steer.errors import RequestError, choices
from vllm_steer.operations import FormChoice, Gate
from vllm_steer.request.positions import Positions, count_ranges, parse_slice
from vllm_steer.request.reads import MAX_READS, Layers, ReadChoice, StopChoice
from vllm_steer.request.schedule import ScheduleChoice
from vllm_steer.request.stop_tokens import TokenIds

REQUEST_KEY = "steering"
FLAT_KEYS = {
    "steer": 'The directions: a list of `"name:scale"` or `"name"`, or a single one. The scale follows the last '
    "colon; without it the direction's default is used.",
    "steer_layers": "List of layers for all directions.",
    "steer_positions": "For all directions: `all`, `prompt`, `generated`, `last_prompt`, or a list of slices "
    '`"start:end"` of absolute positions; either part may be empty, and negative numbers count from the '
    "prompt's end.",
}
MAX_DIRECTIONS = 64
# Total ranges of positions over all directions.
MAX_REQUEST_RANGES = 128
PLAN_KEY = "_vllm_steer_plan"
# Misspelt keys are looked for only among this many with a steering prefix, of at most this length.
MOST_MISSPELT = 64
_MOST_LIKELY = 2**12
_LONGEST_MISSPELT = 24
# How a key may begin that was meant for steering: blanks, marks, case, and what clients put before a name that is
# not of the API itself.
_LIKELY = re.compile(r"[sStTxXvV_.\s-]|[^\x00-\x7f]")
_ANY_LIKELY = re.compile(rf"\n(?:{_LIKELY.pattern})")
_MEANT = re.compile(r"[\s.-]*(?:(?:x|vllm)[-_])?steer", re.IGNORECASE)
_MAY_BE_MISSPELT = re.compile(r"[\s.-]*[sStT_]|[^\x00-\x7f]")
# Python takes more for a number, as digits of other scripts and underscores between them.
_NUMBER = re.compile(r" *[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)? *")
_MOST_CHARACTERS = 2**18
_MOST_KEYS = 64
_MOST_VALUES = 20_000
# Client arguments whose content belongs at the top level; some clients send them unchanged.
WRAPPERS = ("extra_body", "extra_args")
# The value of ``steering`` that turns off a server's default.
NONE = "none"

Scale = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DirectionChoice(FormChoice):
    """One direction of a request.

    Attributes:
        name: ``pack/direction``, or ``direction`` where only one loaded pack has it.
        scale: ε, the factor of the vector, or as the op defines it; None takes the direction's default.
        strength: Multiple of the default scale of a calibrated direction, instead of a scale: 1 is the
            calibrated scale. It is valid for the calibrated form and layers.
        layers: Layers to steer, 0-based block outputs; None takes the request's, else the direction's default
            layers.
        positions: Token positions to steer; None takes the request's, else the direction's default.
        schedule: Strength over the generated tokens; None takes the request's, else the strength is constant.
    """

    name: Annotated[str, Field(min_length=1, max_length=300)]
    scale: Scale | None = None
    strength: Scale | None = None
    layers: Layers | None = None
    positions: Positions | None = None
    schedule: ScheduleChoice | None = None

    @model_validator(mode="after")
    def _says_it_once(self) -> DirectionChoice:
        if self.scale is not None and self.strength is not None:
            raise PydanticCustomError("strength", "give either scale or strength, not both")
        return self


class SteeringRequest(_Strict):
    """The ``steering`` object of a request.

    Attributes:
        directions: The directions, summed at positions they share.
        layers: Layers for directions without their own.
        positions: For directions without their own: ``all``, ``prompt``, ``generated`` (positions from the
            prompt's length on), ``last_prompt``, or ``[start, end]`` pairs of absolute positions; end is not
            included and null has no end, negative numbers count from the prompt's end. ``{"generated":
            [start, end]}`` counts from the first generated token; ``{"prompt": pairs}`` stays within the
            prompt, which null ends. ``{"tokens": ids}`` are the tokens with one of these ids, and
            ``{"from_tokens": ids}`` the first of them and all that follow; ``within`` beside either holds one
            of the other choices, where tokens count.
        schedule: Strength over the generated tokens, for directions without their own.
        until_token_ids: Steering ends after the first generated token with one of these ids.
        read: Directions whose scores are returned, with or without directions that steer. Needs a server
            started with ``--steering-reads``.
        recompute: Whether the prompt bypasses the prefix cache, so that all of its tokens have scores.
        stop_when: Ends the answer when a probe fires, with ``finish_reason`` ``stop``. The token that fired
            is read when the next one is sampled, which is the last of the answer.
        abort_when: The same with ``finish_reason`` ``abort``.
    """

    directions: Annotated[list[DirectionChoice], Field(max_length=MAX_DIRECTIONS)] = []
    layers: Layers | None = None
    positions: Positions | None = None
    schedule: ScheduleChoice | None = None
    until_token_ids: TokenIds | None = None
    read: Annotated[list[ReadChoice], Field(max_length=MAX_READS)] = []
    recompute: bool = False
    stop_when: StopChoice | None = None
    abort_when: StopChoice | None = None

    @property
    def rules(self) -> list[tuple[str, StopChoice]]:
        """The rules by which reads end an answer, with their fields."""
        rules = (("stop_when", self.stop_when), ("abort_when", self.abort_when))
        return [(field, rule) for field, rule in rules if rule is not None]

    @model_validator(mode="after")
    def _asks_for_something(self) -> SteeringRequest:
        if not self.directions and not self.read:
            raise PydanticCustomError(
                "empty", "needs directions to steer or to read; give 'directions' or 'read'"
            )
        if self.recompute and not self.read:
            raise PydanticCustomError("recompute", "recompute needs read, which is missing")
        for field, rule in self.rules:
            if rule.read >= len(self.read):
                raise PydanticCustomError(
                    "rule",
                    "{field}.read: there is no read with index {read}; there are {count}",
                    {"field": field, "read": rule.read, "count": len(self.read)},
                )
        return self

    @model_validator(mode="after")
    def _has_few_ranges(self) -> SteeringRequest:
        """Each range costs time at admission and in every step, so their number is checked first."""
        chosen = [choice.positions or self.positions or "all" for choice in self.directions]
        chosen += [choice.at for choice in self.read]
        count = sum(map(count_ranges, chosen))
        if count > MAX_REQUEST_RANGES:
            raise PydanticCustomError(
                "ranges",
                "the directions have {count} ranges of positions in total; the limit is {most}; give "
                "fewer or longer ranges",
                {"count": count, "most": MAX_REQUEST_RANGES},
            )
        return self


def parse(extra_args: Mapping[str, Any] | None) -> SteeringRequest | None:
    """Reads the steering of a request from its extra arguments.

    There are two forms: ``steering``, the object (or its JSON text, since ``vllm_xargs`` holds no objects),
    and the flat ``steer``, a list of ``"name:scale"``, with ``steer_layers`` and ``steer_positions``, a name
    or a list of ``"start:end"``.

    Args:
        extra_args: ``SamplingParams.extra_args`` or ``vllm_xargs``.

    Returns:
        The request, or None without steering or with ``"none"``.

    Raises:
        RequestError: It is malformed; the message names the field and what would be valid.
    """
    if not extra_args:
        return None
    if PLAN_KEY in extra_args:
        raise RequestError(f"{PLAN_KEY!r} is internal; send {REQUEST_KEY!r}")
    known = (REQUEST_KEY, *FLAT_KEYS)
    for key in steering_keys(extra_args):
        if key not in known:
            raise RequestError(f"unknown steering argument {key!r}; {choices(key, known)}")
    flat = [key for key in FLAT_KEYS if key in extra_args]
    if extra_args.get(REQUEST_KEY) is None:
        return _parse_flat(extra_args) if flat else None
    if flat:
        raise RequestError(f"send either {REQUEST_KEY!r} or {flat[0]!r}, not both")
    value = extra_args[REQUEST_KEY]
    if value == NONE:
        return None
    try:
        if isinstance(value, str):
            value = _object_of(value)
        if isinstance(value, dict):
            _check_size(value)
            return SteeringRequest.model_validate(value)
    except ValidationError as error:
        raise RequestError(_explain(error)) from error
    raise RequestError(
        f'{REQUEST_KEY} must be an object such as {{"directions": [{{"name": "pack/direction"}}]}} or its JSON text, '
        f"not {type(value).__name__}"
    )


def _object_of(text: str) -> Any:
    if len(text) > _MOST_CHARACTERS:
        raise RequestError(
            f"{REQUEST_KEY}: its JSON text has {len(text)} characters; the limit is {_MOST_CHARACTERS}"
        )
    try:
        # A lone surrogate is not valid text, so not valid JSON.
        return from_json(text.encode(errors="surrogatepass"))
    except ValueError as error:
        raise RequestError(f"{REQUEST_KEY}: Invalid JSON: {error}") from error


def _check_size(value: Any) -> None:
    """Raises RequestError if the object exceeds any valid size, before anything else is checked."""
    left, waiting = _MOST_VALUES, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if len(each) > _MOST_KEYS:
                raise RequestError(
                    f"{REQUEST_KEY}: an object in it has {len(each)} keys; the limit is {_MOST_KEYS}"
                )
            waiting += each.values()
        elif isinstance(each, list):
            left -= len(each)
            if left < 0:
                raise RequestError(
                    f"{REQUEST_KEY}: its lists have more than {_MOST_VALUES} entries in total"
                )
            waiting += each


def steering_keys(keys: Iterable[Any]) -> list[str]:
    """Returns the keys that were meant for steering and must not be ignored: first those that say so, then misspelt ones.

    A body may have hundreds of thousands of keys, so only the first few that may be misspelt are compared, and the
    first few that say so are returned, more of which than there are known ones.
    """
    names = [key for key in keys if isinstance(key, str)]
    joined = "\n".join(("", *names))
    if _ANY_LIKELY.search(joined) is None:
        return []
    likely = [*filter(_LIKELY.match, names)]
    # Of many, one search is quicker than to match each.
    found: list[str] = []
    if len(likely) < _MOST_LIKELY or "steer" in joined.lower():
        found += islice(filter(_MEANT.match, likely), _MOST_KEYS)
    others = filter(_MAY_BE_MISSPELT.match, islice(likely, _MOST_LIKELY))
    short = (key for key in others if len(key) <= _LONGEST_MISSPELT and not _MEANT.match(key))
    found += filter(_is_misspelt, islice(short, MOST_MISSPELT))
    return found


def _is_misspelt(key: str) -> bool:
    # What is not seen, as a blank of no width, and the same letters of other forms.
    plain = "".join(each for each in normalize("NFKC", key) if each.isprintable()).lower()
    if _MEANT.match(plain):
        return True
    return bool(get_close_matches(plain, (REQUEST_KEY, *FLAT_KEYS), n=1, cutoff=0.8))


def is_steering_key(key: str) -> bool:
    """Whether a key was meant for steering, and is not misspelt."""
    return _MEANT.match(key) is not None


def first_steering_key(keys: Iterable[Any]) -> str | None:
    """Returns the first key that was meant for steering."""
    return next(iter(steering_keys(keys)), None)


def wrapped_steering(value: Any, *, text: bool = False, depth: int = 4) -> bool:
    """Whether an object contains steering at any depth where a client may have wrapped it.

    Args:
        value: The object.
        text: Whether JSON text is searched too; other fields of it may contain the word.
        depth: Depth of the search.
    """
    if isinstance(value, str):
        return text and '"steer' in value
    if not isinstance(value, dict) or not depth:
        return False
    if first_steering_key(value) is not None:
        return True
    inner = islice(value.values(), _MOST_KEYS)
    return any(wrapped_steering(each, text=text, depth=depth - 1) for each in inner)


def _parse_flat(extra_args: Mapping[str, Any]) -> SteeringRequest:
    items = extra_args.get("steer")
    if isinstance(items, str):
        items = [items]
    if isinstance(items, list) and len(items) > MAX_DIRECTIONS:
        raise RequestError(
            f"steer: {len(items)} directions are given; the limit is {MAX_DIRECTIONS}"
        )
    if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
        raise RequestError(
            'steer must be a list of "name:scale" or "name", such as ["fears/spiders:12"]'
        )
    fields: dict[str, Any] = {"directions": [_parse_item(item) for item in items]}
    if "steer_layers" in extra_args:
        fields["layers"] = extra_args["steer_layers"]
    if "steer_positions" in extra_args:
        fields["positions"] = _parse_slices(extra_args["steer_positions"])
    try:
        return SteeringRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestError(_explain(error)) from error


def _parse_item(item: str) -> dict[str, Any]:
    name, colon, scale = item.rpartition(":")
    if not colon:
        return {"name": item}
    if not _NUMBER.fullmatch(scale):
        raise RequestError(f'steer: {item!r} must be "name:scale" with a number after the colon')
    return {"name": name, "scale": float(scale)}


def _parse_slices(value: Any) -> Any:
    """The slices of ``steer_positions`` as pairs; everything else is left to validation."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return value
    try:
        return [parse_slice(item) for item in value]
    except ValueError:
        raise RequestError(
            f'steer_positions: {value!r} must be a name or a list of "start:end", such as ["-4:"]'
        ) from None


def _explain(error: ValidationError) -> str:
    faults = []
    for fault in error.errors(include_url=False)[:5]:
        where = ".".join([REQUEST_KEY, *map(str, fault["loc"])])
        if fault["type"] == "extra_forbidden":
            model: type[BaseModel] = SteeringRequest
            if "directions" in fault["loc"]:
                model = Gate if "gate" in fault["loc"] else DirectionChoice
            if "schedule" in fault["loc"]:
                model = ScheduleChoice
            if "read" in fault["loc"][:1]:
                model = ReadChoice
            elif {"stop_when", "abort_when"} & set(fault["loc"][:1]):
                model = StopChoice
            faults.append(f"{where}: unknown key; {choices(str(fault['loc'][-1]), _names(model))}")
        else:
            faults.append(f"{where}: {fault['msg']}")
    return "; ".join(faults)


def _names(model: type[BaseModel]) -> list[str]:
    """The fields of a model as a request writes them."""
    return [field.alias or name for name, field in model.model_fields.items()]
