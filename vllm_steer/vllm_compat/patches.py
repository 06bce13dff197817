"""Checks vLLM's symbols at startup and patches them; ``patched_symbols.py`` names them.

If a symbol is missing or has unexpected parameters, the engine does not start: a patch that no longer fits
would serve unsteered text.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_steer.errors import CompatibilityError
from vllm_steer.vllm_compat import versions


@dataclass(frozen=True)
class VllmSymbol:
    """One symbol of vLLM.

    Attributes:
        module: Its module.
        name: Qualified name in the module, ``Class.method`` or a function.
        parameters: Required leading parameters, in this order.
    """

    module: str
    name: str
    parameters: tuple[str, ...]

    def resolve(self) -> tuple[object, str]:
        """Returns the object that holds the symbol and the attribute's name.

        Raises:
            CompatibilityError: The symbol is missing or has other parameters.
        """
        *path, attribute = self.name.split(".")
        try:
            holder: object = importlib.import_module(self.module)
            for part in path:
                holder = getattr(holder, part)
        except (ImportError, AttributeError) as error:
            raise CompatibilityError(
                f"{self.module}.{self.name} is missing ({error}); {versions.advice()}"
            ) from error
        _check(holder, attribute, self.parameters, f"{self.module}.{self.name}")
        return holder, attribute


@dataclass(frozen=True)
class PatchedSymbol(VllmSymbol):
    """A symbol that is patched.

    Attributes:
        reason: Why no public hook of vLLM serves.
        upstream: Change of vLLM that would make the patch unnecessary.
    """

    reason: str
    upstream: str


@dataclass(frozen=True)
class WrappedMethods:
    """Methods that are wrapped on one instance in each worker, not on the class.

    Attributes:
        methods: Name to required leading parameters, without ``self``.
        owners: Module and class that define them, for the check from a wheel's files.
        reason: Why no public hook of vLLM serves.
        upstream: Change of vLLM that would make the wrapping unnecessary.
    """

    methods: Mapping[str, tuple[str, ...]]
    owners: tuple[tuple[str, str], ...]
    reason: str
    upstream: str


def check_methods(instance: object, wrapped: WrappedMethods) -> None:
    """Checks methods before they are wrapped on an instance.

    Args:
        instance: A worker, model runner or model state of vLLM.
        wrapped: The methods.

    Raises:
        CompatibilityError: A method is missing or has other parameters.
    """
    kind = type(instance)
    for name, parameters in wrapped.methods.items():
        _check(instance, name, parameters, f"{kind.__module__}.{kind.__qualname__}.{name}")


def _check(holder: object, attribute: str, parameters: tuple[str, ...], full_name: str) -> None:
    if not hasattr(holder, attribute):
        raise CompatibilityError(f"{full_name} is missing; {versions.advice()}")
    found = inspect.signature(getattr(holder, attribute)).parameters
    names = tuple(found)[: len(parameters)]
    if names != parameters:
        raise CompatibilityError(
            f"{full_name} takes {names}, where {parameters} was expected; {versions.advice()}"
        )


_PATCHED = "__vllm_steer__"


def patch(symbol: VllmSymbol, wrap: Callable[[Callable[..., Any]], Callable[..., object]]) -> None:
    """Replaces a symbol by ``wrap(symbol)``, once per process.

    Args:
        symbol: The symbol.
        wrap: Returns the replacement for the original; for a class method, for its function.
    """
    holder, attribute = symbol.resolve()
    original = getattr(holder, attribute)
    if getattr(original, _PATCHED, False):
        return
    kind = inspect.getattr_static(holder, attribute)
    function = kind.__func__ if isinstance(kind, classmethod) else original
    # Keeps name, documentation and, through __wrapped__, the signature.
    replacement = functools.update_wrapper(wrap(function), function)
    setattr(replacement, _PATCHED, True)
    rewrap = (
        type(kind) if isinstance(kind, (staticmethod, classmethod)) else (lambda function: function)
    )
    setattr(holder, attribute, rewrap(replacement))


def override(instance: object, **methods: Callable[..., object]) -> None:
    """Replaces methods on one object; other objects keep those of the class.

    Args:
        instance: A worker, model runner or model state of vLLM, with checked methods.
        methods: The methods by name.
    """
    for name, method in methods.items():
        setattr(instance, name, method)


def replace(symbol: VllmSymbol, function: Callable[..., object]) -> None:
    """Replaces a static method that vLLM starts a process with by a module's function.

    A process that is not forked finds its function by module and name. Those of the function are kept,
    whereas those set by :func:`patch` would lead to vLLM's method.

    Args:
        symbol: The symbol.
        function: A function that calls :func:`original` of the symbol.
    """
    holder, attribute = symbol.resolve()
    before = getattr(holder, attribute)
    if getattr(before, _PATCHED, False):
        return
    function.__dict__.update({"__wrapped__": before, _PATCHED: True})
    setattr(holder, attribute, staticmethod(function))


def original(symbol: VllmSymbol) -> Callable[..., Any]:
    """Returns vLLM's original of a symbol, patched or not."""
    found: Callable[..., Any] = getattr(*symbol.resolve())
    unwrapped: Callable[..., Any] = inspect.unwrap(
        found, stop=lambda function: not getattr(function, _PATCHED, False)
    )
    return unwrapped
