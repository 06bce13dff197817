"""Entry point of the ``vllm.general_plugins`` group: puts steering into vLLM.

vLLM calls :func:`register` in every process that it starts: API server, engine core, workers and
the model-inspection process. Until an engine is configured with steering, the patches only read
the configuration and refuse requests that ask for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from vllm_steer import seams, versions
from vllm_steer.errors import CompatibilityError

# vLLM runs this module as a process of its own to look at model classes; no engine lives there.
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
            "VLLM_USE_RUST_FRONTEND answers requests without the Python front end, which would ignore their "
            "steering; unset it or uninstall vllm-steer"
        )
    versions.check()
    from vllm_steer import failures
    from vllm_steer.engine import compile_cache, holds, intake, runtime
    from vllm_steer.engine.prefix_cache import steered_extra_keys
    from vllm_steer.serving import (
        admission,
        configure,
        engine_requests,
        entry,
        flags,
        guard,
        outcome,
        unrouted,
    )

    seams.patch(seams.ADD_CLI_ARGS, flags.add_flags)
    seams.patch(seams.FROM_CLI_ARGS, flags.read_flags)
    seams.patch(seams.CREATE_ENGINE_CONFIG, configure.resolve_config)
    seams.patch(seams.COMPUTE_HASH, compile_cache.hash_graph_alone)
    seams.patch(seams.INPUT_PROCESSOR_INIT, admission.remember_engine)
    seams.patch(seams.PROCESS_INPUTS, entry.plan_inputs)
    for seam in seams.TO_SAMPLING_PARAMS:
        seams.patch(seam, entry.check_sampling)
    for seam in seams.TO_BEAM_SEARCH_PARAMS:
        seams.patch(seam, entry.refuse_beam_search)
    seams.patch(seams.EXTRACT_PROMPT_LEN, entry.remember_prompt_len)
    seams.patch(seams.GENERATE, outcome.follow)
    seams.patch(seams.CREATE_CHAT_COMPLETION, unrouted.follow_chat)
    seams.patch(seams.OUTPUT_ADD_REQUEST, engine_requests.note_arrival)
    seams.patch(seams.OUTPUT_FINISH_REQUEST, engine_requests.note_finish)
    seams.patch(seams.OUTPUT_ABORT_REQUESTS, engine_requests.note_abort)
    seams.patch(seams.SERVE_ROUTERS, guard.add_guard)
    seams.patch(seams.EXTRA_HASH_KEYS, steered_extra_keys)
    seams.patch(seams.INITIALIZE_KV_CACHES, intake.read_packs)
    seams.patch(seams.PREPROCESS_ADD_REQUEST, intake.check_intake)
    seams.patch(seams.FREE_REQUEST, holds.release_held)
    runtime.install(seams.PREPROCESS_ADD_REQUEST.resolve()[0])
    seams.patch(seams.INIT_DEVICE, _attach)
    seams.patch(seams.START_ENGINE_CORES, failures.name_file)
    seams.patch(seams.WAIT_FOR_STARTUP, failures.explain_start)
    seams.patch(seams.ENGINE_DEAD, failures.explain_death)
    seams.patch(seams.SEND_ENGINE_DEAD, failures.report_death)
    seams.patch(seams.WAIT_FOR_WORKERS, failures.watch_workers)
    seams.patch(seams.WORKER_PROC_INIT, failures.report_worker)
    seams.replace(seams.RUN_ENGINE_CORE, failures.run_engine_core)
    seams.replace(seams.WORKER_MAIN, failures.worker_main)


def _attach(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``WorkerWrapperBase.init_device``: the model runner exists, its model does not yet."""

    def init_device(self: Any) -> Any:
        result = original(self)
        # Here and not above: only a worker needs it, and it imports torch.
        from vllm_steer.engine.attach import attach_to_worker

        attach_to_worker(self.worker)
        return result

    return init_device
