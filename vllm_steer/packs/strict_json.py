"""Untrusted JSON: parsed in bounded time and memory, or refused with a reason.

Common parsers accept too much: they keep the last of duplicate keys, accept NaN, and turn a few megabytes of
brackets into gigabytes of objects. Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parse_json(data: bytes, max_values: int) -> Any:
    """Parses a JSON text.

    Python itself bounds the rest: integers to 4,300 digits and nesting to its recursion limit.

    Args:
        data: UTF-8 text; the caller bounds its size.
        max_values: Largest number of values. Commas and brackets are counted before parsing, including those
            in strings, so the count is never too small.

    Raises:
        ValueError: It is not JSON, has too many values, a duplicate key, NaN or Infinity, or is nested too
            deeply.
    """
    count = data.count(b",") + data.count(b"[") + data.count(b"{")
    if count > max_values:
        raise ValueError(f"has more values than the limit of {max_values}")
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
