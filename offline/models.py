"""The model that directions are learned from: loading, finding its blocks, naming it in packs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vllm_steer.errors import ExtractionError
from vllm_steer.pack import ModelIdentity


def load_config(
    model_path: str | os.PathLike[str],
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Loads a model's configuration and tokenizer alone.

    Raises:
        ExtractionError: There is no such model, or it cannot be loaded.
    """
    try:
        return (
            AutoConfig.from_pretrained(model_path),
            AutoTokenizer.from_pretrained(model_path),
        )
    except (OSError, ValueError) as error:
        raise ExtractionError(f"cannot load a model from {str(model_path)!r}: {error}") from error


def load_model(
    model_path: str | os.PathLike[str], dtype: str, device: str | None
) -> PreTrainedModel:
    """Loads a model in eager attention, the only one that hands out its attention weights.

    Args:
        model_path: Checkpoint directory or Hugging Face model id.
        dtype: Name of the dtype to run in, such as ``float32``.
        device: Device of the model; None for CUDA where there is one, else CPU.

    Raises:
        ExtractionError: There is no such model, or it cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
    except (OSError, ValueError) as error:
        raise ExtractionError(f"cannot load a model from {str(model_path)!r}: {error}") from error
    return model.to(device).eval()  # type: ignore[arg-type]  # untyped decorator


def find_blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """Returns a model's decoder blocks, found by structure rather than by name.

    Args:
        model: The model.
        count: Its number of decoder blocks, from the configuration.

    Raises:
        ExtractionError: Not exactly one outermost ``ModuleList`` has ``count`` entries.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    # Experts inside a block may come in the same number; only outermost lists are blocks.
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ExtractionError(
            f"{type(model).__name__} has {len(outer)} lists of {count} modules {outer}; decoder "
            f"blocks are known only where there is exactly one"
        )
    return lists[outer[0]]


def model_identity(
    model_path: str | os.PathLike[str],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> ModelIdentity:
    """Returns what a pack says of its model; of a local path only its last part."""
    text = config.get_text_config()
    template = None if tokenizer is None else tokenizer.chat_template
    local = Path(model_path)
    return ModelIdentity(
        name=local.resolve().name if local.exists() else str(model_path),
        architecture=(config.architectures or [config.model_type])[0],
        model_type=config.model_type,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        chat_template_sha256=(
            hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None
        ),
    )
