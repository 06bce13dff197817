"""Engine features that cannot be steered correctly, refused at startup with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import envs

from vllm_steer.errors import CompatibilityError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Connectors that find keys and values by vLLM's block hashes, which include the steering.
HASHED_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector")


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Refuses an engine configuration that would steer incorrectly or not at all.

    Args:
        vllm_config: The complete ``VllmConfig``.

    Raises:
        CompatibilityError: A feature is unsupported; the message names each and the alternative.
    """
    parallel = vllm_config.parallel_config
    passes = vllm_config.compilation_config.pass_config
    connector = vllm_config.kv_transfer_config
    reasons = []
    if vllm_config.model_config.runner_type != "generate":
        reasons.append(
            "pooling models generate nothing to steer; serve them without --enable-steering"
        )
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False):
        reasons.append("dual-batch overlap splits the tokens of a step; leave out --enable-dbo")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        reasons.append("prefill context parallelism splits the tokens of a prompt; set it to 1")
    if getattr(passes, "enable_sp", False):
        reasons.append(
            "the sequence-parallel compiler pass splits the tokens of a step over ranks; set pass_config.enable_sp to "
            "false"
        )
    if getattr(parallel, "use_sequence_parallel_moe", False):
        reasons.append(
            "sequence-parallel mixture-of-experts layers split the tokens of a step over ranks; use another "
            "--all2all-backend, or leave out --enable-expert-parallel"
        )
    if connector is not None and connector.kv_connector not in HASHED_CONNECTORS:
        reasons.append(
            f"key-value connector {connector.kv_connector} may find keys and values by token ids alone, and so give "
            f"steered ones to unsteered requests; use one of {', '.join(HASHED_CONNECTORS)}, or none"
        )
    if envs.VLLM_WEIGHT_OFFLOADING_DISABLE_UVA and _offloads_weights(vllm_config):
        reasons.append(
            "weight offloading without unified virtual addressing runs each block through functional_call, which "
            "would add the vectors twice; unset VLLM_WEIGHT_OFFLOADING_DISABLE_UVA"
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        reasons.append(
            "fast prefill runs some blocks on only part of the tokens; leave out --kv-sharing-fast-prefill"
        )
    if getattr(vllm_config.speculative_config, "enable_adaptive_verification", False):
        reasons.append(
            "adaptive verification assigns the tokens of a step to requests only on the device; leave "
            "enable_adaptive_verification out of --speculative-config"
        )
    if reasons:
        raise CompatibilityError("steering cannot start: " + "; ".join(reasons))


def refuse_unread(vllm_config: VllmConfig) -> None:
    """Refuses an engine configuration that could lose scores.

    Args:
        vllm_config: The complete ``VllmConfig`` of an engine with reads.

    Raises:
        CompatibilityError: A feature is unsupported; the message names each and the alternative.
    """
    reasons = []
    if vllm_config.scheduler_config.scheduler_cls is not None:
        reasons.append("a custom scheduler may lose scores; leave out --scheduler-cls")
    if reasons:
        raise CompatibilityError("steering cannot read: " + "; ".join(reasons))


def _offloads_weights(vllm_config: VllmConfig) -> bool:
    offload = getattr(vllm_config, "offload_config", None)
    return offload is not None and offload.uva.cpu_offload_gb > 0
