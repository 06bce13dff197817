"""Every patched symbol of vLLM: why no public hook serves, and what would make the patch unnecessary.

The supported versions of vLLM have every symbol under the same name; ``python -m tests.vllm_versions`` checks
that from their wheels. Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from vllm_steer.vllm_compat.patches import PatchedSymbol, WrappedMethods

# Flags and configuration.
ADD_CLI_ARGS = PatchedSymbol(
    "vllm.engine.arg_utils",
    "EngineArgs.add_cli_args",
    ("parser",),
    reason="vLLM loads general plugins before it builds its parser, and passes none of them the parser.",
    upstream="A plugin group whose entry points add arguments to the parser.",
)
FROM_CLI_ARGS = PatchedSymbol(
    "vllm.engine.arg_utils",
    "EngineArgs.from_cli_args",
    ("args",),
    reason="Flags that are not fields of EngineArgs are dropped here, so a plugin's flags never reach its configuration.",
    upstream="The same plugin group, given the parsed arguments.",
)
CREATE_ENGINE_CONFIG = PatchedSymbol(
    "vllm.engine.arg_utils",
    "EngineArgs.create_engine_config",
    ("self", "usage_context"),
    reason="Only a platform may check and complete a configuration (check_and_update_config), and an engine has only one.",
    upstream="A hook for general plugins that checks and completes a VllmConfig before the engine starts.",
)
COMPUTE_HASH = PatchedSymbol(
    "vllm.config",
    "VllmConfig.compute_hash",
    ("self",),
    reason="additional_config may be an object with compute_hash, but vLLM's models read their own settings from "
    "it only if it is a dict.",
    upstream="Entries of additional_config with their own compute_hash.",
)

# Requests in the front end.
INPUT_PROCESSOR_INIT = PatchedSymbol(
    "vllm.v1.engine.input_processor",
    "InputProcessor.__init__",
    ("self", "vllm_config"),
    reason="No plugin is notified when a front end starts in its process, which must read packs and policy then.",
    upstream="A hook that runs when an engine's front end starts, with its VllmConfig.",
)
PROCESS_INPUTS = PatchedSymbol(
    "vllm.v1.engine.input_processor",
    "InputProcessor.process_inputs",
    ("self", "request_id", "prompt", "params"),
    reason="SamplingParams.extra_args are passed to the engine unchanged, and only here is the length of every prompt "
    "known, which positions depend on.",
    upstream="A validator of extra_args that plugins register, given the prompt's tokens, whose result is passed on.",
)
EXTRACT_PROMPT_LEN = PatchedSymbol(
    "vllm.entrypoints.serve.engine.serving",
    "BaseServing._extract_prompt_len",
    ("self", "prompt"),
    reason="A request must be refused before its response starts, and the method that builds its sampling parameters "
    "does not get the prompt's length.",
    upstream="The prompt's length as an argument of to_sampling_params.",
)
_SAMPLING_REASON = (
    "Errors of process_inputs are answered with 200 and an error in the stream, so steering is checked where the "
    "HTTP request becomes sampling parameters; plugins cannot add validators to these models."
)
_SAMPLING_UPSTREAM = (
    "Validators of a request's unknown fields and of vllm_xargs that plugins register by name."
)
TO_SAMPLING_PARAMS = (
    PatchedSymbol(
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest.to_sampling_params",
        ("self", "max_tokens"),
        reason=_SAMPLING_REASON,
        upstream=_SAMPLING_UPSTREAM,
    ),
    PatchedSymbol(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest.to_sampling_params",
        ("self", "max_tokens"),
        reason=_SAMPLING_REASON,
        upstream=_SAMPLING_UPSTREAM,
    ),
    PatchedSymbol(
        "vllm.entrypoints.openai.responses.protocol",
        "ResponsesRequest.to_sampling_params",
        ("self", "default_max_tokens"),
        reason=_SAMPLING_REASON,
        upstream=_SAMPLING_UPSTREAM,
    ),
)
_BEAM_REASON = "BeamSearchParams has no extra_args, so vLLM would answer without steering and without an error."
_BEAM_UPSTREAM = "extra_args in BeamSearchParams, passed on to each step's sampling parameters."
TO_BEAM_SEARCH_PARAMS = (
    PatchedSymbol(
        "vllm.entrypoints.openai.completion.protocol",
        "CompletionRequest.to_beam_search_params",
        ("self",),
        reason=_BEAM_REASON,
        upstream=_BEAM_UPSTREAM,
    ),
    PatchedSymbol(
        "vllm.entrypoints.openai.chat_completion.protocol",
        "ChatCompletionRequest.to_beam_search_params",
        ("self",),
        reason=_BEAM_REASON,
        upstream=_BEAM_UPSTREAM,
    ),
)
GENERATE = PatchedSymbol(
    "vllm.v1.engine.async_llm",
    "AsyncLLM.generate",
    ("self", "prompt", "sampling_params", "request_id"),
    reason="No hook can delay a request before the engine admits it, nor see the tokens of one request's answers.",
    upstream="A hook around generate, awaited before a request is added and given its outputs.",
)
CREATE_CHAT_COMPLETION = PatchedSymbol(
    "vllm.entrypoints.openai.chat_completion.serving",
    "OpenAIServingChat.create_chat_completion",
    ("self", "request"),
    reason="vllm run-batch calls it without HTTP, so no middleware sees its requests.",
    upstream="A run-batch that sends its requests through the ASGI application.",
)
_OUTPUT_REASON = (
    "Stat loggers are notified of finished requests, but not with --disable-log-stats, and a request's rows must "
    "become free however it ends."
)
_OUTPUT_UPSTREAM = "Callbacks for added, finished and aborted requests, independent of statistics."
OUTPUT_ADD_REQUEST = PatchedSymbol(
    "vllm.v1.engine.output_processor",
    "OutputProcessor.add_request",
    ("self", "request"),
    reason=_OUTPUT_REASON,
    upstream=_OUTPUT_UPSTREAM,
)
OUTPUT_FINISH_REQUEST = PatchedSymbol(
    "vllm.v1.engine.output_processor",
    "OutputProcessor._finish_request",
    ("self", "req_state"),
    reason=_OUTPUT_REASON,
    upstream=_OUTPUT_UPSTREAM,
)
OUTPUT_ABORT_REQUESTS = PatchedSymbol(
    "vllm.v1.engine.output_processor",
    "OutputProcessor.abort_requests",
    ("self", "request_ids"),
    reason=_OUTPUT_REASON,
    upstream=_OUTPUT_UPSTREAM,
)
_SCORES_REASON = "No output of the engine has a field for a plugin's values, nor passes any on with a request's answers."
_SCORES_UPSTREAM = (
    "A field for values of plugins in EngineCoreOutput, passed on in CompletionOutput."
)
PROCESS_OUTPUTS = PatchedSymbol(
    "vllm.v1.engine.output_processor",
    "OutputProcessor.process_outputs",
    ("self", "engine_core_outputs"),
    reason=_SCORES_REASON,
    upstream=_SCORES_UPSTREAM,
)
NEW_COMPLETION_OUTPUT = PatchedSymbol(
    "vllm.v1.engine.output_processor",
    "RequestState._new_completion_output",
    ("self", "token_ids", "finish_reason", "stop_reason"),
    reason=_SCORES_REASON,
    upstream=_SCORES_UPSTREAM,
)
# Called with the server's application while it is assembled.
SERVE_ROUTERS = PatchedSymbol(
    "vllm.entrypoints.serve",
    "register_vllm_serve_api_routers",
    ("app",),
    reason="--middleware is added outside vLLM's authentication, so bodies of clients without a key would be parsed; "
    "endpoint plugins load only where VLLM_PLUGINS names them.",
    upstream="Middleware inside authentication, or endpoint plugins that need no VLLM_PLUGINS.",
)

# The engine core.
PREPROCESS_ADD_REQUEST = PatchedSymbol(
    "vllm.v1.engine.core",
    "EngineCore.preprocess_add_request",
    ("self", "request"),
    reason="No hook checks a request in the engine core, and an error in a worker ends the whole engine.",
    upstream="A validator of requests that plugins register in the engine core and that fails the one request.",
)
FREE_REQUEST = PatchedSymbol(
    "vllm.v1.core.sched.scheduler",
    "Scheduler._free_request",
    ("self", "request"),
    reason="Only a KV connector is notified when a request leaves the scheduler, and every engine would need ours besides "
    "the user's.",
    upstream="Callbacks of the scheduler for requests that leave it.",
)
UPDATE_FROM_OUTPUT = PatchedSymbol(
    "vllm.v1.core.sched.scheduler",
    "Scheduler.update_from_output",
    ("self", "scheduler_output", "model_runner_output"),
    reason="Scores of a step belong to the tokens that the scheduler accepts, which it does not expose.",
    upstream="A field for values of plugins in ModelRunnerOutput, by token, which the scheduler trims as it does "
    "log-probabilities.",
)
CHECK_STOP = PatchedSymbol(
    "vllm.v1.core.sched.scheduler",
    "check_stop",
    ("request", "max_model_len"),
    reason="An external abort takes effect steps later, and gives neither a reason nor a token.",
    upstream="Stop conditions that plugins register, evaluated for each accepted token.",
)
# Called at the start, after the plugins are loaded.
INITIALIZE_KV_CACHES = PatchedSymbol(
    "vllm.v1.engine.core",
    "EngineCore._initialize_kv_caches",
    ("self", "vllm_config"),
    reason="Plugins are loaded before the engine core has its configuration, and no hook runs once it has.",
    upstream="A hook that runs when an engine core starts, with its VllmConfig.",
)
EXTRA_HASH_KEYS = PatchedSymbol(
    "vllm.v1.core.kv_cache_utils",
    "_gen_prompt_embeds_extra_hash_keys",
    ("request", "start_token_idx", "end_token_idx"),
    reason="cache_salt is hashed into the first block only, so requests whose steering starts later could not share "
    "their prefix with others.",
    upstream="A hook that returns extra keys for the blocks of a request, by their range of tokens.",
)

# The reason why an engine ended, which vLLM logs in another process.
_CAUSE_REASON = "vLLM logs why a process failed only in that process; the front end learns that one failed, not why."
_CAUSE_UPSTREAM = "Root causes in the errors of a failed start and of a dead engine."
START_ENGINE_CORES = PatchedSymbol(
    "vllm.v1.engine.utils",
    "CoreEngineProcManager.__init__",
    ("self", "local_engine_count"),
    reason=_CAUSE_REASON,
    upstream=_CAUSE_UPSTREAM,
)
WAIT_FOR_STARTUP = PatchedSymbol(
    "vllm.v1.engine.utils",
    "wait_for_engine_startup",
    ("handshake_socket",),
    reason=_CAUSE_REASON,
    upstream=_CAUSE_UPSTREAM,
)
ENGINE_DEAD = PatchedSymbol(
    "vllm.v1.engine.exceptions",
    "EngineDeadError.__init__",
    ("self", "args"),
    reason=_CAUSE_REASON,
    upstream=_CAUSE_UPSTREAM,
)
RUN_ENGINE_CORE = PatchedSymbol(
    "vllm.v1.engine.core",
    "EngineCoreProc.run_engine_core",
    ("args",),
    reason=_CAUSE_REASON,
    upstream=_CAUSE_UPSTREAM,
)
SEND_ENGINE_DEAD = PatchedSymbol(
    "vllm.v1.engine.core",
    "EngineCoreProc._send_engine_dead",
    ("self",),
    reason=_CAUSE_REASON,
    upstream=_CAUSE_UPSTREAM,
)
_MULTIPROC = "vllm.v1.executor.multiproc_executor"
WORKER_MAIN = PatchedSymbol(
    _MULTIPROC,
    "WorkerProc.worker_main",
    ("args", "kwargs"),
    reason=_CAUSE_REASON,
    upstream=_CAUSE_UPSTREAM,
)
WORKER_PROC_INIT = PatchedSymbol(
    _MULTIPROC,
    "WorkerProc.__init__",
    ("self", "vllm_config"),
    reason=_CAUSE_REASON,
    upstream=_CAUSE_UPSTREAM,
)
WAIT_FOR_WORKERS = PatchedSymbol(
    _MULTIPROC,
    "WorkerProc.wait_for_ready",
    ("unready_proc_handles",),
    reason=_CAUSE_REASON,
    upstream=_CAUSE_UPSTREAM,
)

# Workers and model runners.
INIT_DEVICE = PatchedSymbol(
    "vllm.v1.worker.worker_base",
    "WorkerWrapperBase.init_device",
    ("self",),
    reason="worker_extension_cls is a single class, the user's, and may add methods but not wrap those of the "
    "worker; a custom worker_cls would be tied to one platform.",
    upstream="Several worker extensions, with a hook after the device and one after the model are ready.",
)
WORKER = WrappedMethods(
    {"compile_or_warm_up_model": ()},
    (
        ("vllm.v1.worker.gpu_worker", "Worker"),
        ("vllm.v1.worker.cpu_worker", "CPUWorker"),
    ),
    reason="The self-test must run after the model is compiled and before any request, and no hook runs then.",
    upstream="A hook of worker extensions after warm-up.",
)
V1_RUNNER = WrappedMethods(
    {
        "load_model": (),
        "_update_states": ("scheduler_output",),
        "_prepare_inputs": ("scheduler_output", "num_scheduled_tokens"),
        "_dummy_run": ("num_tokens",),
        "execute_model": ("scheduler_output", "intermediate_tensors"),
        "sample_tokens": ("grammar_output",),
    },
    (
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
        ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner"),
    ),
    reason="No hook of this runner sees the requests and token positions of a step before the model runs; logits "
    "processors come after it, and KV connectors see no positions.",
    upstream="None expected: this runner is deprecated in favour of Model Runner V2.",
)
V2_RUNNER = WrappedMethods(
    {
        "load_model": (),
        "_dummy_run": ("num_tokens",),
        "execute_model": ("scheduler_output", "intermediate_tensors"),
        "sample_tokens": ("grammar_output",),
    },
    (
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
        ("vllm.v1.worker.cpu.model_runner", "CPUModelRunner"),
    ),
    reason="Blocks must be hooked after the model is loaded and before it is profiled or compiled, and no hook runs "
    "then; registering model classes instead would cover only listed architectures.",
    upstream="A hook for general plugins, given the loaded model.",
)
V2_MODEL_STATE = WrappedMethods(
    {
        "add_request": ("req_index", "new_req_data"),
        "remove_request": ("req_id",),
        "preprocess_state": ("input_batch",),
        "prepare_inputs": ("input_batch",),
        "prepare_dummy_inputs": (),
    },
    (
        ("vllm.v1.worker.gpu.model_states.interface", "ModelState"),
        ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState"),
        ("vllm.v1.worker.gpu.model_states.mamba_hybrid", "MambaHybridModelState"),
    ),
    reason="ModelState has these hooks, but each model brings its own class and plugins cannot add another.",
    upstream="Additional model states that plugins register, called together with the model's own.",
)


def patched_symbols() -> list[PatchedSymbol]:
    """Returns every patched symbol above."""
    values = list(globals().values())
    several = [item for value in values if isinstance(value, tuple) for item in value]
    return [item for item in [*values, *several] if isinstance(item, PatchedSymbol)]


def wrapped_methods() -> list[WrappedMethods]:
    """Returns every group of methods above that are wrapped on instances."""
    return [value for value in globals().values() if isinstance(value, WrappedMethods)]
