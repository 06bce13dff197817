"""Loads and forgets packs in the processes of a running engine, on word from the front end.

vLLM's engine core runs a method that the front end names, between two steps, and so does a worker
that the core calls. A message from one front end is handled in the order of its requests, so a pack
is there before the first request that needs it, and goes after the last. What takes long, the reading,
is done beside the steps (``staging.py``).
"""

from __future__ import annotations

from typing import Any

from vllm_steer.config import ResolvedConfig
from vllm_steer.engine.holds import HOLDS
from vllm_steer.engine.intake import core_store
from vllm_steer.engine.staging import drop_staged, stage, staged_pack
from vllm_steer.packs.store import PackStore, configured_store
from vllm_steer.vllm_compat.rpc import FORGET, LOAD, STAGE

_LET_GO = "_vllm_steer_let_go"


def install(engine_core: type) -> None:
    """Gives ``EngineCore`` the three methods."""
    setattr(engine_core, STAGE, _core_stage)
    setattr(engine_core, LOAD, _core_load)
    setattr(engine_core, FORGET, _core_forget)


def install_in_worker(worker: Any, config: ResolvedConfig) -> None:
    """Gives one worker the three methods."""

    def load(path: str, sha256: str) -> None:
        configured_store(config).add(staged_pack(path, sha256))
        drop_staged()

    def forget(digests: list[str], names: list[str]) -> None:
        _forget(configured_store(config), set(digests), names)

    setattr(worker, STAGE, stage)
    setattr(worker, LOAD, load)
    setattr(worker, FORGET, forget)


def _core_stage(self: Any, path: str, sha256: str) -> bool:
    here = stage(path, sha256)
    return all(self.model_executor.collective_rpc(STAGE, args=(path, sha256))) and here


def _core_load(self: Any, path: str, sha256: str) -> None:
    pack = staged_pack(path, sha256)
    self.model_executor.collective_rpc(LOAD, args=(path, sha256))
    # Last, so that what a worker refuses is not kept here.
    core_store(self).add(pack)
    _let_go(self).difference_update(pack.digests.values())
    drop_staged()


def _core_forget(self: Any, digests: list[str], names: list[str]) -> None:
    """Content that a request here still needs is forgotten by a later call.

    Of several engines behind one front end each has requests of its own.
    """
    store, let_go = core_store(self), _let_go(self)
    let_go.update(digests)
    dropped = HOLDS.drop_unheld(let_go, lambda unheld: _forget(store, unheld, names))
    let_go -= dropped
    self.model_executor.collective_rpc(FORGET, args=(sorted(dropped), names))


def _let_go(engine: Any) -> set[str]:
    """What the front end has let go of and a request of the engine still needed then."""
    found: set[str] = engine.__dict__.setdefault(_LET_GO, set())
    return found


def _forget(store: PackStore, digests: set[str], names: list[str]) -> None:
    # One that another process could not read.
    drop_staged()
    for name in names:
        # A process that failed to load a pack has nothing to forget.
        if name in store.registry.packs:
            store.remove(name)
    store.forget(digests)
