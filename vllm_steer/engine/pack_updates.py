"""Loads and drops packs in the processes of a running engine, as the front end asks.

vLLM's engine core runs a method named by the front end, between two steps, and every worker runs a function
passed by the core, through vLLM's ``collective_rpc``. Messages of one front end are handled in order with its
requests, so a pack is there before the first request that needs it, and is dropped after the last. Reading,
which takes long, is done in the background (``staging.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_steer.config import resolved_config
from vllm_steer.engine.content_pins import PINS
from vllm_steer.engine.intake import core_store
from vllm_steer.engine.staging import drop_staged, stage, staged_pack
from vllm_steer.errors import ConfigError
from vllm_steer.packs.store import PackStore, configured_store
from vllm_steer.vllm_compat.attached import Attached
from vllm_steer.vllm_compat.rpc import FORGET, LOAD, STAGE

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerWrapperBase

# Digests that the front end no longer needs but a request of the engine still does.
_LET_GO = Attached[set[str]]("let_go")


def install() -> None:
    """Adds the three methods that the front end calls by name to ``EngineCore``."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, STAGE, _core_stage)
    setattr(EngineCore, LOAD, _core_load)
    setattr(EngineCore, FORGET, _core_forget)


def _core_stage(self: EngineCore, path: str, sha256: str) -> bool:
    here = stage(path, sha256)
    return all(self.model_executor.collective_rpc(stage_in_worker, args=(path, sha256))) and here


def _core_load(self: EngineCore, path: str, sha256: str) -> None:
    pack = staged_pack(path, sha256)
    self.model_executor.collective_rpc(load_in_worker, args=(path, sha256))
    # Last, so that a pack refused by a worker is not kept here.
    core_store(self).add(pack)
    _LET_GO.get_or_make(self, set).difference_update(pack.digests.values())
    drop_staged()


def _core_forget(self: EngineCore, digests: list[str], names: list[str]) -> None:
    """Content that a request here still needs is dropped by a later call.

    Several engines behind one front end each have their own requests.
    """
    store, let_go = core_store(self), _LET_GO.get_or_make(self, set)
    let_go.update(digests)
    dropped = PINS.drop_unpinned(let_go, lambda unpinned: _forget(store, unpinned, names))
    let_go -= dropped
    self.model_executor.collective_rpc(forget_in_worker, args=(sorted(dropped), names))


def stage_in_worker(worker: WorkerWrapperBase, path: str, sha256: str) -> bool:
    """Starts reading a pack in a worker, and returns whether it is done."""
    return stage(path, sha256)


def load_in_worker(worker: WorkerWrapperBase, path: str, sha256: str) -> None:
    """Makes a worker serve a pack."""
    _worker_store(worker).add(staged_pack(path, sha256))
    drop_staged()


def forget_in_worker(worker: WorkerWrapperBase, digests: list[str], names: list[str]) -> None:
    """Drops content and pack names in a worker."""
    _forget(_worker_store(worker), set(digests), names)


def _worker_store(worker: WorkerWrapperBase) -> PackStore:
    config = resolved_config(worker.vllm_config.additional_config)
    if config is None:
        raise ConfigError("this worker was started without steering")
    return configured_store(config)


def _forget(store: PackStore, digests: set[str], names: list[str]) -> None:
    # A pack that another process could not read.
    drop_staged()
    for name in names:
        # A process that failed to load a pack has nothing to drop.
        if name in store.registry.packs:
            store.remove(name)
    store.forget(digests)
