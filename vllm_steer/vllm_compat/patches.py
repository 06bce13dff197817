"""Checks vLLM's symbols at start and patches them; ``patched_symbols.py`` names them.

A symbol that is missing or takes other parameters than those known stops the start: a patch that
no longer fits would serve unsteered text.
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
        module: Module that holds it.
        name: Qualified name in the module, ``Class.method`` or a function.
        parameters: Leading parameters that it must have, in this order.
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
        upstream: What change of vLLM would make the patch unnecessary.
    """

    reason: str
    upstream: str


@dataclass(frozen=True)
class WrappedMethods:
    """Methods that are wrapped on one instance in each worker, not on the class.

    Attributes:
        methods: Name to the leading parameters that it must have, ``self`` left out.
        owners: Where they are defined, as module and class, for the check from a wheel's files alone.
        reason: Why no public hook of vLLM serves.
        upstream: What change of vLLM would make the wrapping unnecessary.
    """

    methods: Mapping[str, tuple[str, ...]]
    owners: tuple[tuple[str, str], ...]
    reason: str
    upstream: str


def check_methods(instance: object, wrapped: WrappedMethods) -> None:
    """Checks the methods that are about to be wrapped on an instance.

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
        wrap: Makes the replacement from the original; for a class method, from its function.
    """
    holder, attribute = symbol.resolve()
    original = getattr(holder, attribute)
    if getattr(original, _PATCHED, False):
        return
    kind = inspect.getattr_static(holder, attribute)
    function = kind.__func__ if isinstance(kind, classmethod) else original
    # Keeps name, documentation and, through __wrapped__, the signature that others inspect.
    replacement = functools.update_wrapper(wrap(function), function)
    setattr(replacement, _PATCHED, True)
    rewrap = (
        type(kind) if isinstance(kind, (staticmethod, classmethod)) else (lambda function: function)
    )
    setattr(holder, attribute, rewrap(replacement))


def override(instance: object, **methods: Callable[..., object]) -> None:
    """Gives one object methods of its own in the place of its class's; other objects keep those.

    Args:
        instance: A worker, model runner or model state of vLLM, whose methods were checked.
        methods: The methods by name.
    """
    for name, method in methods.items():
        setattr(instance, name, method)


def replace(symbol: VllmSymbol, function: Callable[..., object]) -> None:
    """Puts a module's function in the place of a static method that vLLM starts a process with.

    A process that is not forked finds what it runs by module and name. Those of the function remain
    its own, where those of :func:`patch` would lead to vLLM's method.

    Args:
        symbol: The symbol.
        function: What calls :func:`original` of it.
    """
    holder, attribute = symbol.resolve()
    before = getattr(holder, attribute)
    if getattr(before, _PATCHED, False):
        return
    function.__dict__.update({"__wrapped__": before, _PATCHED: True})
    setattr(holder, attribute, staticmethod(function))


def original(symbol: VllmSymbol) -> Callable[..., Any]:
    """Returns what vLLM has for a symbol, patched or not."""
    found: Callable[..., Any] = getattr(*symbol.resolve())
    unwrapped: Callable[..., Any] = inspect.unwrap(
        found, stop=lambda function: not getattr(function, _PATCHED, False)
    )
    return unwrapped
