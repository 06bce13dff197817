"""Memory settings for an engine on a shared machine.

vLLM wants 92 % of a machine's memory and does not start where that is not free. On a CPU the memory
is everyone's; an accelerator's is mostly the engine's alone, and keeps vLLM's default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_steer.vllm_compat.model_shape import resolved_dtype

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Of the memory that is free, which weights and activations need as well.
_SHARE = 4
# For a model whose cache is not measured in tokens alone; what vLLM once took by default.
_UNKNOWN = 4 << 30
# Requests at once, by default: what vLLM runs on a CPU.
_SEQUENCES = 256
# vLLM's blocks of tokens on a CPU by default. A sequence ends within one; one more stays empty.
_BLOCK = 128
_CGROUPS = Path("/sys/fs/cgroup")
_SIZED = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")


def memory_settings(options: Mapping[str, Any], room: int | None = None) -> dict[str, Any]:
    """Returns arguments of ``LLM`` that fit into a shared machine; empty for an accelerator.

    The cache gets room for all requests that run at once, at the most a quarter of the free memory
    and at the least what one request needs.

    Args:
        options: Arguments of ``LLM``, the model among them. What they say of memory is left alone.
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
    # vLLM's own variable, in GiB, comes before the argument.
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
    """Bytes of keys and values of one token; None where layers keep states of another kind."""
    if model.is_hybrid or model.is_attention_free:
        return None
    # Multi-head latent attention keeps one vector for keys and values.
    vectors = 1 if model.use_mla else 2 * model.get_total_num_kv_heads()
    found = vectors * model.get_head_size() * model.get_total_num_hidden_layers()
    return found * resolved_dtype(model).itemsize or None


def available_bytes() -> int:
    """Bytes that a process may still take, by the machine and by the limits of its control groups."""
    import psutil

    free: int = psutil.virtual_memory().available
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """What each limited control group of this process, and each one around it, has left."""
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
        # In a container the path may be that of the host, and the container's group the root.
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
    # Pages of files that nobody has used for long are given back before anyone is refused.
    statistics = dict(line.split() for line in lines)
    cached = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
    return int(most) - int(taken) + int(cached)
