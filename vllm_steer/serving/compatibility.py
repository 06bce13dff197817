"""Engine features that cannot be steered correctly, refused at start with the reason."""

from __future__ import annotations

from typing import Any

from vllm_steer.errors import CompatibilityError


def refuse_unsupported(vllm_config: Any) -> None:
    """Refuses an engine configuration that would steer wrongly or not at all.

    Args:
        vllm_config: The complete ``VllmConfig``.

    Raises:
        CompatibilityError: Names every unsupported feature and what to do instead.
    """
    parallel = vllm_config.parallel_config
    reasons = []
    if vllm_config.model_config.runner_type != "generate":
        reasons.append(
            "pooling models generate nothing to steer; serve them without --enable-steering"
        )
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        reasons.append(
            "tensor and pipeline parallelism are not tested with steering yet; use one device per replica"
        )
    if parallel.data_parallel_size > 1:
        reasons.append(
            "data parallelism is not tested with steering yet; start one server per replica"
        )
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False):
        reasons.append("dual-batch overlap splits the tokens of a step; leave out --enable-dbo")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        reasons.append("prefill context parallelism splits the tokens of a prompt; set it to 1")
    if vllm_config.speculative_config is not None:
        reasons.append(
            "speculative decoding is not tested with steering yet; leave out --speculative-config"
        )
    if vllm_config.kv_transfer_config is not None:
        reasons.append(
            "key-value connectors are not tested with steering yet; leave out --kv-transfer-config"
        )
    if vllm_config.lora_config is not None:
        reasons.append("LoRA is not tested with steering yet; leave out --enable-lora")
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        reasons.append(
            "fast prefill runs some blocks on a part of the tokens; leave out --kv-sharing-fast-prefill"
        )
    if reasons:
        raise CompatibilityError("steering cannot start: " + "; ".join(reasons))
