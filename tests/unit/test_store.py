"""The packs of a process: of each engine its own, and changed without anybody seeing half of it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import pytest

from tests.unit.conftest import resolved
from tests.unit.front_end import started
from vllm_steer.config import ResolvedConfig
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.store import PackStore, configured_store, keep_store


@pytest.mark.parametrize("removed", [True, False], ids=["removes", "adds"])
def test_content_is_found_whenever_another_thread_changes_the_packs(
    pack_at: Callable[..., SteeringPack], removed: bool
) -> None:
    """The engine takes requests in on another thread than the one that replaces packs."""
    pack = pack_at("p", {"a": [0]})
    for moment in range(60):
        store = PackStore(PackRegistry([pack]))
        change = partial(store.remove, "p")
        if not removed:
            store.remove("p")
            change = partial(store.add, pack)
        with at_opcode(moment, change):
            assert store.by_digest(pack.digests["a"]).full_name == "p/a"


@contextmanager
def at_opcode(moment: int, change: Callable[[], object]) -> Iterator[None]:
    """Within it ``change`` runs in the midst of ``PackStore.by_digest``, as another thread's would."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if frame.f_code is not PackStore.by_digest.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if count == moment:
                sys.settrace(None)
                change()
                sys.settrace(trace)
            count += 1
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def test_a_replaced_direction_stays_until_it_is_forgotten(
    pack_at: Callable[..., SteeringPack],
) -> None:
    pack = pack_at("p", {"a": [0], "b": [1]})
    store = PackStore(PackRegistry([pack]))
    before = store.registry
    store.remove("p")
    assert before.find("p/a").digest == pack.digests["a"]
    assert store.retired == set(pack.digests.values())
    store.forget({pack.digests["a"]})
    assert store.retired == {pack.digests["b"]}
    store.add(pack)
    assert store.retired == set()


def test_a_second_engine_leaves_the_first_its_packs(pack_at: Callable[..., SteeringPack]) -> None:
    one, other = pack_at("one", {"a": [0]}), pack_at("other", {"a": [0]})
    first = config_of(one)
    keep_store(first, PackRegistry([one]))
    held = configured_store(first)
    held.remove("one")
    keep_store(config_of(other), PackRegistry([other]))
    gc.collect()
    assert configured_store(first) is held


def test_what_one_engine_loads_another_that_was_started_alike_does_not_have(
    pack_at: Callable[..., SteeringPack],
) -> None:
    pack, more = pack_at("p", {"a": [0]}), pack_at("more", {"a": [0]})
    one, other = started(pack), started(pack)
    assert one.store is not None
    assert other.store is not None
    one.store.add(more)
    assert list(one.store.registry.packs) == ["p", "more"]
    assert list(other.store.registry.packs) == ["p"]


def config_of(pack: SteeringPack) -> ResolvedConfig:
    return resolved(packs=[str(pack.path)], digests=[pack.manifest.tensors.sha256])
