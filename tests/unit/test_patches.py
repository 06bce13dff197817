"""The patches fit this vLLM, and one that does not fit stops the start."""

from __future__ import annotations

import pytest

from vllm_steer.errors import CompatibilityError
from vllm_steer.plugin import register
from vllm_steer.vllm_compat import patches
from vllm_steer.vllm_compat.patched_symbols import patched_symbols, wrapped_methods


@pytest.mark.parametrize("symbol", patched_symbols(), ids=lambda symbol: symbol.name)
def test_fits_and_is_patched_once(symbol: patches.VllmSymbol) -> None:
    register()
    holder, attribute = symbol.resolve()
    patched = getattr(holder, attribute)
    register()
    assert getattr(holder, attribute) == patched
    assert getattr(patched, "__vllm_steer__", False)


@pytest.mark.parametrize(
    "patched",
    [*patched_symbols(), *wrapped_methods()],
    ids=lambda patched: getattr(patched, "name", "methods"),
)
def test_says_why_and_what_would_end_it(
    patched: patches.PatchedSymbol | patches.WrappedMethods,
) -> None:
    for sentence in (patched.reason, patched.upstream):
        assert len(sentence.split()) > 4
        assert sentence.endswith(".")


def test_a_missing_symbol_is_named() -> None:
    symbol = patches.VllmSymbol("vllm.engine.arg_utils", "EngineArgs.no_such_method", ())
    with pytest.raises(
        CompatibilityError, match="EngineArgs.no_such_method is missing.*supports vLLM 0.26"
    ):
        symbol.resolve()


def test_other_parameters_are_named() -> None:
    symbol = patches.VllmSymbol(
        "vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self", "usage")
    )
    with pytest.raises(CompatibilityError, match="takes .'self', 'usage_context'., where"):
        symbol.resolve()


def test_the_rust_front_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(CompatibilityError, match="unset it or uninstall vllm-steer"):
        register()
