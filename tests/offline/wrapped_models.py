"""Tiny random models that see images, each with its language model inside, and that language model alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

TEXT: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
# As many blocks as the language model has.
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
IMAGE: dict[str, Any] = {"image_token_id": 599}
FAMILIES = ("llava", "gemma3", "qwen3_vl")


def wrapped(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model that sees images, and a model of its language model's weights alone."""
    torch.manual_seed(0)
    whole: PreTrainedModel
    alone: PreTrainedModel
    if family == "llava":
        text = LlamaConfig(**TEXT)
        whole = LlavaForConditionalGeneration(
            LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION), **IMAGE)
        )
        alone = LlamaForCausalLM(text)
    elif family == "gemma3":
        gemma = Gemma3TextConfig(**TEXT, sliding_window=512)
        whole = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=gemma,
                vision_config=SiglipVisionConfig(**VISION),
                mm_tokens_per_image=4,
                **IMAGE,
            )  # fmt: skip
        )
        alone = Gemma3ForCausalLM(gemma)
    else:
        rope = {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True,
        }  # fmt: skip
        vision = {
            "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 14, "deepstack_visual_indexes": [0],
        }  # fmt: skip
        whole = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **IMAGE
            )
        )
        alone = Qwen3ForCausalLM(
            Qwen3Config(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
        )
    alone.model.load_state_dict(whole.get_decoder().state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    return whole.eval(), alone.eval()
