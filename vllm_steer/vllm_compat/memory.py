"""Memory settings for an engine on a shared machine.

vLLM reserves 92 % of a machine's memory and does not start if that is not free. A CPU's memory is shared; an
accelerator's is mostly used by the engine alone, so vLLM's default is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_steer.vllm_compat.model_shape import resolved_dtype

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Share of the free memory, since weights and activations need memory too.
_SHARE = 4
# For a model whose cache is not measured only in tokens; an earlier default of vLLM.
_UNKNOWN = 4 << 30
# Concurrent requests by default: vLLM's default on a CPU.
_SEQUENCES = 256
# vLLM's default block size on a CPU. A sequence ends within one block; one more stays empty.
_BLOCK = 128
_CGROUPS = Path("/sys/fs/cgroup")
_SIZED = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")


def memory_settings(options: Mapping[str, Any], room: int | None = None) -> dict[str, Any]:
    """Returns arguments of ``LLM`` for a shared machine; empty for an accelerator.

    The cache gets room for all concurrent requests, at most a quarter of the free memory and at least enough
    for one request.

    Args:
        options: Arguments of ``LLM``, including the model. Memory settings among them are kept.
        room: Most tokens of a request; None for the model's context.

    Raises:
        Exception: vLLM refuses the model or an option.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    model = EngineArgs(**options).create_model_config()
    chosen: dict[str, Any] = {}
    length = model.max_model_len
    if room is not None and "max_model_len" not in options:
        length = chosen["max_model_len"] = min(length, room)
    # vLLM's own variable, in GiB, takes precedence over the argument.
    if not any(name in options for name in _SIZED) and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        chosen["kv_cache_memory_bytes"] = _cache_bytes(model, options, length)
    return chosen


def _cache_bytes(model: ModelConfig, options: Mapping[str, Any], length: int) -> int:
    workers = int(options.get("tensor_parallel_size") or 1)
    workers *= int(options.get("pipeline_parallel_size") or 1)
    share = available_bytes() // _SHARE // workers
    token = _token_bytes(model)
    if token is None:
        return min(_UNKNOWN, share)
    request = token * (length + 2 * int(options.get("block_size") or _BLOCK))
    sequences = int(options.get("max_num_seqs") or _SEQUENCES)
    return max(request, min(request * sequences, share))


def _token_bytes(model: ModelConfig) -> int | None:
    """Bytes of keys and values of one token; None if layers keep other kinds of state."""
    if model.is_hybrid or model.is_attention_free:
        return None
    # Multi-head latent attention keeps one vector for keys and values.
    vectors = 1 if model.use_mla else 2 * model.get_total_num_kv_heads()
    found = vectors * model.get_head_size() * model.get_total_num_hidden_layers()
    return found * resolved_dtype(model).itemsize or None


def available_bytes() -> int:
    """Bytes that a process may still allocate, given the machine and its control groups' limits."""
    import psutil

    free: int = psutil.virtual_memory().available
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Remaining bytes of each limited control group of this process, including parents."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = _CGROUPS / kinds
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if kinds
            else ("memory.max", "memory.current")
        )
        group = root / path.lstrip("/")
        # In a container the path may be the host's, and the container's group the root.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (left := _left(folder, limit, used)) is not None:
                yield left


def _left(folder: Path, limit: str, used: str) -> int | None:
    try:
        most, taken = ((folder / name).read_text().strip() for name in (limit, used))
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    if not most.isdecimal():
        return None
    # The kernel reclaims inactive file pages before it refuses an allocation.
    statistics = dict(line.split() for line in lines)
    cached = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
    return int(most) - int(taken) + int(cached)
