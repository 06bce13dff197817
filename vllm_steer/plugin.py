"""Entry point of the ``vllm.general_plugins`` group: adds steering to vLLM.

vLLM calls :func:`register` in every process that it starts: API server, engine core, workers and
the model-inspection process. Until an engine is configured with steering, the patches only read
the configuration and refuse requests that ask for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from vllm_steer.errors import CompatibilityError
from vllm_steer.vllm_compat import patched_symbols as symbols
from vllm_steer.vllm_compat import patches, versions

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerWrapperBase

# vLLM runs this module in a separate process to inspect model classes, without an engine.
_INSPECTION_PROCESS = "vllm.model_executor.models.registry"


def register() -> None:
    """Installs the patches; calling it again changes nothing.

    Raises:
        CompatibilityError: This vLLM is not supported or lacks a symbol that steering relies on.
    """
    if getattr(sys.modules["__main__"].__spec__, "name", None) == _INSPECTION_PROCESS:
        return
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise CompatibilityError(
            "with VLLM_USE_RUST_FRONTEND requests bypass the Python front end, so their "
            "steering would be ignored; unset it or uninstall vllm-steer"
        )
    versions.check()
    from vllm_steer.engine import compile_cache, content_pins, intake, pack_updates, unsent_scores
    from vllm_steer.engine.prefix_cache import steered_extra_keys
    from vllm_steer.serving import (
        admission,
        batch_requests,
        configure,
        engine_requests,
        flags,
        guard,
        request_hooks,
        request_tracking,
        scores,
    )
    from vllm_steer.vllm_compat import failures

    patches.patch(symbols.ADD_CLI_ARGS, flags.add_flags)
    patches.patch(symbols.FROM_CLI_ARGS, flags.read_flags)
    patches.patch(symbols.CREATE_ENGINE_CONFIG, configure.resolve_config)
    patches.patch(symbols.COMPUTE_HASH, compile_cache.hash_graph_alone)
    patches.patch(symbols.INPUT_PROCESSOR_INIT, admission.remember_engine)
    patches.patch(symbols.PROCESS_INPUTS, request_hooks.plan_inputs)
    for symbol in symbols.TO_SAMPLING_PARAMS:
        patches.patch(symbol, request_hooks.check_sampling)
    for symbol in symbols.TO_BEAM_SEARCH_PARAMS:
        patches.patch(symbol, request_hooks.refuse_beam_search)
    patches.patch(symbols.EXTRACT_PROMPT_LEN, request_hooks.remember_prompt_len)
    patches.patch(symbols.GENERATE, request_tracking.follow)
    patches.patch(symbols.CREATE_CHAT_COMPLETION, batch_requests.follow_chat)
    patches.patch(symbols.OUTPUT_ADD_REQUEST, engine_requests.note_arrival)
    patches.patch(symbols.PROCESS_OUTPUTS, scores.take_scores)
    patches.patch(symbols.NEW_COMPLETION_OUTPUT, scores.hand_on_scores)
    patches.patch(symbols.OUTPUT_FINISH_REQUEST, engine_requests.note_finish)
    patches.patch(symbols.OUTPUT_ABORT_REQUESTS, engine_requests.note_abort)
    patches.patch(symbols.SERVE_ROUTERS, guard.add_guard)
    patches.patch(symbols.EXTRA_HASH_KEYS, steered_extra_keys)
    patches.patch(symbols.INITIALIZE_KV_CACHES, intake.read_packs)
    patches.patch(symbols.PREPROCESS_ADD_REQUEST, intake.check_intake)
    patches.patch(symbols.FREE_REQUEST, content_pins.unpin_freed)
    patches.patch(symbols.UPDATE_FROM_OUTPUT, unsent_scores.send_scores)
    patches.patch(symbols.CHECK_STOP, unsent_scores.stop_by_scores)
    pack_updates.install()
    patches.patch(symbols.INIT_DEVICE, _attach)
    patches.patch(symbols.START_ENGINE_CORES, failures.name_file)
    patches.patch(symbols.WAIT_FOR_STARTUP, failures.explain_start)
    patches.patch(symbols.ENGINE_DEAD, failures.explain_death)
    patches.patch(symbols.SEND_ENGINE_DEAD, failures.report_death)
    patches.patch(symbols.WAIT_FOR_WORKERS, failures.watch_workers)
    patches.patch(symbols.WORKER_PROC_INIT, failures.report_worker)
    patches.replace(symbols.RUN_ENGINE_CORE, failures.run_engine_core)
    patches.replace(symbols.WORKER_MAIN, failures.worker_main)


def _attach(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``WorkerWrapperBase.init_device``: the model runner exists, but not yet its model."""

    def init_device(self: WorkerWrapperBase) -> None:
        original(self)
        # Imported here because only workers need it, and it imports torch.
        from vllm_steer.engine.attach import attach_to_worker

        # Every worker with a model runner is one, or derives from it.
        attach_to_worker(cast("Worker", self.worker))

    return init_device
