"""Untrusted JSON: parsed in bounded time and memory, or refused with its reason.

The parsers at hand let pass what a file that others wrote should not hold: of duplicate keys they
keep the last, they take NaN, and a few megabytes of brackets become gigabytes of objects. Importing
this module imports neither torch nor vllm.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parse_json(data: bytes, max_values: int) -> Any:
    """Parses a JSON text.

    Python itself bounds what is left: integers to 4,300 digits and nesting to its recursion limit.

    Args:
        data: UTF-8 text; its size is the caller's to bound.
        max_values: Most values that it may hold. Commas and brackets are counted before parsing, in
            strings too, so the count never comes out too small.

    Raises:
        ValueError: It is no JSON, holds too many values, a key twice, NaN or Infinity, or is nested
            too deeply.
    """
    count = data.count(b",") + data.count(b"[") + data.count(b"{")
    if count > max_values:
        raise ValueError(f"holds more than the {max_values} values that it may have")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("Invalid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"Invalid JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
