"""Values of the plugin stored on vLLM's objects, with the same lifetime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Attached(Generic[T]):
    """One such value, stored as an attribute with the plugin's name."""

    def __init__(self, name: str) -> None:
        """Names the value.

        Args:
            name: Differs from those of all other attached values.
        """
        self._attribute = f"_vllm_steer_{name}"

    def get(self, owner: object) -> T | None:
        """Returns the value set on an object, None if there is none."""
        value: T | None = getattr(owner, self._attribute, None)
        return value

    def set(self, owner: object, value: T) -> T:
        """Sets a value on an object and returns it."""
        setattr(owner, self._attribute, value)
        return value

    def get_or_make(self, owner: object, make: Callable[[], T]) -> T:
        """Returns the value of an object, made and set if there was none."""
        if not hasattr(owner, self._attribute):
            setattr(owner, self._attribute, make())
        value: T = getattr(owner, self._attribute)
        return value
