"""Every vLLM symbol that is patched or relied on, named and checked at start.

A symbol that is missing or takes other parameters than those known stops the start: a patch that
no longer fits would serve unsteered text. The supported versions of vLLM have every symbol under
the same name; ``python -m tests.vllm_versions`` makes this check from the files of their wheels.
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

    def resolve(self) -> tuple[Any, str]:
        """Returns the object that holds the symbol and the attribute's name.

        Raises:
            CompatibilityError: The symbol is missing or has other parameters.
        """
        *path, attribute = self.name.split(".")
        try:
            holder: Any = importlib.import_module(self.module)
            for part in path:
                holder = getattr(holder, part)
        except (ImportError, AttributeError) as error:
            raise CompatibilityError(
                f"{self.module}.{self.name} is missing ({error}); {versions.advice()}"
            ) from error
        _check(holder, attribute, self.parameters, f"{self.module}.{self.name}")
        return holder, attribute


def check_methods(instance: Any, methods: Mapping[str, tuple[str, ...]]) -> None:
    """Checks the methods that are about to be wrapped on an instance.

    Args:
        instance: A worker, model runner or model state of vLLM.
        methods: Method name to the leading parameters that it must have, ``self`` left out.

    Raises:
        CompatibilityError: A method is missing or has other parameters.
    """
    kind = type(instance)
    for name, parameters in methods.items():
        _check(instance, name, parameters, f"{kind.__module__}.{kind.__qualname__}.{name}")


def _check(holder: Any, attribute: str, parameters: tuple[str, ...], full_name: str) -> None:
    if not hasattr(holder, attribute):
        raise CompatibilityError(f"{full_name} is missing; {versions.advice()}")
    found = inspect.signature(getattr(holder, attribute)).parameters
    names = tuple(found)[: len(parameters)]
    if names != parameters:
        raise CompatibilityError(
            f"{full_name} takes {names}, where {parameters} was expected; {versions.advice()}"
        )


ADD_CLI_ARGS = VllmSymbol("vllm.engine.arg_utils", "EngineArgs.add_cli_args", ("parser",))
FROM_CLI_ARGS = VllmSymbol("vllm.engine.arg_utils", "EngineArgs.from_cli_args", ("args",))
CREATE_ENGINE_CONFIG = VllmSymbol(
    "vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self", "usage_context")
)
COMPUTE_HASH = VllmSymbol("vllm.config", "VllmConfig.compute_hash", ("self",))
INPUT_PROCESSOR_INIT = VllmSymbol(
    "vllm.v1.engine.input_processor", "InputProcessor.__init__", ("self", "vllm_config")
)
PROCESS_INPUTS = VllmSymbol(
    "vllm.v1.engine.input_processor",
    "InputProcessor.process_inputs",
    ("self", "request_id", "prompt", "params"),
)
EXTRACT_PROMPT_LEN = VllmSymbol(
    "vllm.entrypoints.serve.engine.serving", "BaseServing._extract_prompt_len", ("self", "prompt")
)
GENERATE = VllmSymbol(
    "vllm.v1.engine.async_llm",
    "AsyncLLM.generate",
    ("self", "prompt", "sampling_params", "request_id"),
)
CREATE_CHAT_COMPLETION = VllmSymbol(
    "vllm.entrypoints.openai.chat_completion.serving",
    "OpenAIServingChat.create_chat_completion",
    ("self", "request"),
)
OUTPUT_ADD_REQUEST = VllmSymbol(
    "vllm.v1.engine.output_processor", "OutputProcessor.add_request", ("self", "request")
)
OUTPUT_FINISH_REQUEST = VllmSymbol(
    "vllm.v1.engine.output_processor", "OutputProcessor._finish_request", ("self", "req_state")
)
OUTPUT_ABORT_REQUESTS = VllmSymbol(
    "vllm.v1.engine.output_processor", "OutputProcessor.abort_requests", ("self", "request_ids")
)
PREPROCESS_ADD_REQUEST = VllmSymbol(
    "vllm.v1.engine.core", "EngineCore.preprocess_add_request", ("self", "request")
)
FREE_REQUEST = VllmSymbol(
    "vllm.v1.core.sched.scheduler", "Scheduler._free_request", ("self", "request")
)
UPDATE_FROM_OUTPUT = VllmSymbol(
    "vllm.v1.core.sched.scheduler",
    "Scheduler.update_from_output",
    ("self", "scheduler_output", "model_runner_output"),
)
CHECK_STOP = VllmSymbol("vllm.v1.core.sched.scheduler", "check_stop", ("request", "max_model_len"))
PROCESS_OUTPUTS = VllmSymbol(
    "vllm.v1.engine.output_processor",
    "OutputProcessor.process_outputs",
    ("self", "engine_core_outputs"),
)
NEW_COMPLETION_OUTPUT = VllmSymbol(
    "vllm.v1.engine.output_processor",
    "RequestState._new_completion_output",
    ("self", "token_ids", "finish_reason", "stop_reason"),
)
# Called at the start, after the plugins are loaded.
INITIALIZE_KV_CACHES = VllmSymbol(
    "vllm.v1.engine.core", "EngineCore._initialize_kv_caches", ("self", "vllm_config")
)
EXTRA_HASH_KEYS = VllmSymbol(
    "vllm.v1.core.kv_cache_utils",
    "_gen_prompt_embeds_extra_hash_keys",
    ("request", "start_token_idx", "end_token_idx"),
)
# An engine that ends says why in another process.
START_ENGINE_CORES = VllmSymbol(
    "vllm.v1.engine.utils", "CoreEngineProcManager.__init__", ("self", "local_engine_count")
)
WAIT_FOR_STARTUP = VllmSymbol(
    "vllm.v1.engine.utils", "wait_for_engine_startup", ("handshake_socket",)
)
ENGINE_DEAD = VllmSymbol("vllm.v1.engine.exceptions", "EngineDeadError.__init__", ("self", "args"))
RUN_ENGINE_CORE = VllmSymbol("vllm.v1.engine.core", "EngineCoreProc.run_engine_core", ("args",))
SEND_ENGINE_DEAD = VllmSymbol("vllm.v1.engine.core", "EngineCoreProc._send_engine_dead", ("self",))
_MULTIPROC = "vllm.v1.executor.multiproc_executor"
WORKER_MAIN = VllmSymbol(_MULTIPROC, "WorkerProc.worker_main", ("args", "kwargs"))
WORKER_PROC_INIT = VllmSymbol(_MULTIPROC, "WorkerProc.__init__", ("self", "vllm_config"))
WAIT_FOR_WORKERS = VllmSymbol(_MULTIPROC, "WorkerProc.wait_for_ready", ("unready_proc_handles",))
INIT_DEVICE = VllmSymbol("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_device", ("self",))
TO_SAMPLING_PARAMS = (
    VllmSymbol(
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest.to_sampling_params",
        ("self", "max_tokens"),
    ),
    VllmSymbol(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest.to_sampling_params",
        ("self", "max_tokens"),
    ),
    VllmSymbol(
        "vllm.entrypoints.openai.responses.protocol",
        "ResponsesRequest.to_sampling_params",
        ("self", "default_max_tokens"),
    ),
)
TO_BEAM_SEARCH_PARAMS = (
    VllmSymbol(
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest.to_beam_search_params",
        ("self",),
    ),
    VllmSymbol(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest.to_beam_search_params",
        ("self",),
    ),
)
# Called while the server's application is put together, with it at hand.
SERVE_ROUTERS = VllmSymbol("vllm.entrypoints.serve", "register_vllm_serve_api_routers", ("app",))

# Wrapped on one instance in each worker, not on the class.
V1_RUNNER = {
    "load_model": (),
    "_update_states": ("scheduler_output",),
    "_prepare_inputs": ("scheduler_output", "num_scheduled_tokens"),
    "_dummy_run": ("num_tokens",),
    "sample_tokens": ("grammar_output",),
}
V2_RUNNER = {
    "load_model": (),
    "_dummy_run": ("num_tokens",),
    "sample_tokens": ("grammar_output",),
}
V2_MODEL_STATE = {
    "add_request": ("req_index", "new_req_data"),
    "remove_request": ("req_id",),
    "preprocess_state": ("input_batch",),
    "prepare_inputs": ("input_batch",),
    "prepare_dummy_inputs": (),
}
WORKER = {"compile_or_warm_up_model": ()}

# Where these methods are defined, as (module, class), for the check from a wheel's files alone.
METHOD_OWNERS = (
    (
        V1_RUNNER,
        (
            ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
            ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner"),
        ),
    ),
    (
        V2_RUNNER,
        (
            ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
            ("vllm.v1.worker.cpu.model_runner", "CPUModelRunner"),
        ),
    ),
    (
        V2_MODEL_STATE,
        (
            ("vllm.v1.worker.gpu.model_states.interface", "ModelState"),
            ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState"),
            ("vllm.v1.worker.gpu.model_states.mamba_hybrid", "MambaHybridModelState"),
        ),
    ),
    (
        WORKER,
        (
            ("vllm.v1.worker.gpu_worker", "Worker"),
            ("vllm.v1.worker.cpu_worker", "CPUWorker"),
        ),
    ),
)

_PATCHED = "__vllm_steer__"


def patch(symbol: VllmSymbol, wrap: Callable[[Any], Any]) -> None:
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


def replace(symbol: VllmSymbol, function: Callable[..., Any]) -> None:
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


def original(symbol: VllmSymbol) -> Any:
    """Returns what vLLM has for a symbol, patched or not."""
    found = getattr(*symbol.resolve())
    return inspect.unwrap(found, stop=lambda function: not getattr(function, _PATCHED, False))
