"""The model that directions are learned from: loading, finding its blocks, naming it in packs."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.hub import cached_file

from vllm_steer.errors import ExtractionError, one_line
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.packs.pack import ModelIdentity

# Weights that a plain language model does not have: other towers, draft heads, and computed tables.
_ELSEWHERE = re.compile(
    r"(^|\.)(vision|visual|audio|image|multi_modal|mm_|mtp|draft|eagle|medusa)|rotary_emb\.inv_freq$"
)
# Characters of another library's message.
_LINE = 500
_UNQUANTISED = "give the unquantised model that it was made from"


def read_config(model_path: str | os.PathLike[str]) -> PreTrainedConfig:
    """Reads the configuration of a language model, alone or inside a vision-language model.

    Raises:
        ExtractionError: There is none, it cannot be read, or it is not that of a language model.
    """
    local = Path(model_path)
    if local.is_file():
        raise ExtractionError(
            f"{str(model_path)!r} is a file; give the directory of a checkpoint, which vllm-steer model --gguf FILE --out "
            f"DIR writes of a GGUF file"
        )
    adapter = local / "adapter_config.json"
    if adapter.is_file() and not (local / "config.json").exists():
        base = re.search(
            r'"base_model_name_or_path":\s*"([^"]*)"', adapter.read_text(errors="replace")
        )
        raise ExtractionError(
            f"{str(model_path)!r} is an adapter without its model{f', {base[1]}' if base else ''}; merge it into that, with "
            f"merge_and_unload() of PEFT, and give the directory of the merged checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(model_path)
    # Errors of reading foreign files have no common class.
    except Exception as error:
        absent = not local.exists() and str(model_path).startswith((os.sep, "."))
        why = "there is no such directory" if absent else one_line(error, _LINE)
        raise ExtractionError(
            f"cannot load a model from {str(model_path)!r}: {why}; give a checkpoint directory with a config.json "
            f"that transformers reads, or the id of one on the hub"
        ) from error
    text = config.get_text_config()
    if not all(hasattr(text, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")):
        raise ExtractionError(
            f"{str(model_path)!r} is a {config.model_type}, which has no language model; give one that writes text"
        )
    return config


def load_config(
    model_path: str | os.PathLike[str], chat: ChatFormat | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Loads a model's configuration and tokenizer alone.

    Args:
        model_path: Checkpoint directory or Hugging Face model id.
        chat: Format that the tokenizer renders prompts by; None for its own.

    Raises:
        ExtractionError: There is no such model, it cannot be loaded, or has no such format.
    """
    config = read_config(model_path)
    return config, (chat or ChatFormat()).apply_to(read_tokenizer(model_path, config))


def read_tokenizer(
    model_path: str | os.PathLike[str], config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    """Reads a model's tokenizer, with the chat template of its processor if it has none.

    Raises:
        ExtractionError: It is missing or cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        if tokenizer.chat_template is None and config.get_text_config() is not config:
            # In older vision-language models, only the processor has the template file.
            processor, _ = ProcessorMixin.get_processor_dict(model_path)
            tokenizer.chat_template = processor.get("chat_template")
    # Tokenizer readers, and a checkpoint's own code, raise arbitrary errors.
    except Exception as error:
        raise ExtractionError(
            f"cannot load a tokenizer from {str(model_path)!r}: {one_line(error, _LINE)}; put the files of the model's "
            f"tokenizer, such as tokenizer.json, beside its config.json"
        ) from error
    return tokenizer


def check_quantisation(config: PreTrainedConfig, model_path: str | os.PathLike[str]) -> None:
    """Checks that weights, if they are quantised, can be read here.

    Raises:
        ExtractionError: They cannot.
    """
    if (quantised := _quantisation(config)) is None:
        return
    try:
        quantizer = AutoHfQuantizer.from_config(quantised, pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    # Every quantiser is a separate library.
    except Exception as error:
        raise _unreadable(model_path, quantised, error) from error


def chosen_dtype(dtype: str, device: str | None) -> str:
    """Returns the name of a dtype; ``auto`` is bfloat16 if the device computes in it, else float32.

    Args:
        dtype: Name of the dtype, or ``auto``.
        device: Device of the model; None for CUDA if available, else CPU.
    """
    if dtype != "auto":
        return dtype
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    # Without AMX a CPU multiplies bfloat16 more slowly than float32.
    # Older versions of torch do not report it.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if device == "cpu" and capabilities.get("amx_bf16") else "float32"


def load_model(
    model_path: str | os.PathLike[str],
    dtype: str,
    device: str | None,
    attention: str | None = "eager",
) -> PreTrainedModel:
    """Loads a model, by default in eager attention, the only one that returns its weights.

    Args:
        model_path: Checkpoint directory or Hugging Face model id.
        dtype: Name of the dtype to run in, such as ``float32``.
        device: Device of the model; None for CUDA if available, else CPU.
        attention: Implementation of attention; None for the library's choice among those that match the
            model's training.

    Raises:
        ExtractionError: There is no such model, or it cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    # The error depends on the cause.
    except (RuntimeError, AssertionError) as error:
        raise ExtractionError(
            f"there is no device {device!r} here ({one_line(error, _LINE)}); give cpu, or another one, such as cuda:0"
        ) from error
    config = read_config(model_path)
    check_quantisation(config, model_path)
    model: PreTrainedModel
    report: dict[str, Any]
    try:
        # With the report it returns a pair, contrary to its type annotations.
        loaded: Any = _loader(config).from_pretrained(
            model_path,
            dtype=getattr(torch, dtype),
            attn_implementation=attention or _faithful(config),
            output_loading_info=True,
            # Refused below, by their names.
            ignore_mismatched_sizes=True,
        )
        model, report = loaded
    # File readers, quantisers and a checkpoint's own code raise arbitrary errors.
    except Exception as error:
        raise _unreadable(model_path, _quantisation(config), error) from error
    _check_loaded(model, report, model_path)
    return model.to(device).eval()  # type: ignore[arg-type]  # untyped decorator


def _faithful(config: PreTrainedConfig) -> str | None:
    """Eager attention if the library's own choice would compute something else, else None.

    Torch's fused kernel does not support soft-capping of attention logits (Gemma 2), and the library omits
    it.
    """
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _loader(config: PreTrainedConfig) -> Any:
    """The class that loads a checkpoint: a language model, or a vision-language model with one."""
    inside = config.get_text_config() is not config
    if inside and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _check_loaded(
    model: PreTrainedModel, report: Mapping[str, Any], model_path: str | os.PathLike[str]
) -> None:
    """Checks that a model matches its checkpoint; the library only warns.

    Raises:
        ExtractionError: Weights are missing, are left over, or are quantised in a way that was not undone.
    """
    found = {
        "lacks {} weights of the model": sorted(report["missing_keys"]),
        "has {} weights that the model has no place for": sorted(
            key for key in report["unexpected_keys"] if not _ELSEWHERE.search(key)
        ),
        "has {} weights of another shape": sorted(map(str, report["mismatched_keys"])),
    }
    for what, keys in found.items():
        if keys:
            raise ExtractionError(
                f"the checkpoint {str(model_path)!r} {what.format(len(keys))}, such as {keys[0]!r}, so what is loaded "
                f"would not compute what it was trained to; {_UNQUANTISED}, or a version of transformers that reads this one"
            )
    if getattr(model, "hf_quantizer", None) is not None:
        return
    if getattr(model.config, "quantization_config", None):
        raise ExtractionError(
            f"the checkpoint {str(model_path)!r} is quantised in a way that transformers leaves as it is; {_UNQUANTISED}, "
            f"whose pack is served with the quantised one too"
        )
    _check_stored(model_path)


def _check_stored(model_path: str | os.PathLike[str]) -> None:
    """Checks that weights are stored at full precision; others would be cast without their scale.

    Raises:
        ExtractionError: Some are integers, or floats of fewer than 16 bits.
    """
    config = cached_file(os.fspath(model_path), "config.json")
    for file in sorted(Path(str(config)).parent.glob("model*.safetensors")):
        with safe_open(os.fspath(file), framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                dtype = stream.get_slice(name).get_dtype()
                # Masks are stored as biases, and positions under separate names.
                if name.endswith("weight") and dtype not in ("F64", "F32", "F16", "BF16"):
                    raise ExtractionError(
                        f"the checkpoint {str(model_path)!r} stores {name!r} as {dtype} and says nothing of how it was "
                        f"quantised; {_UNQUANTISED}, whose pack is served with the quantised one too"
                    )


def _quantisation(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The quantisation of a checkpoint; None if there is none."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    return None if not found else dict(found)


def _unreadable(
    model_path: str | os.PathLike[str], quantised: Mapping[str, Any] | None, error: Exception
) -> ExtractionError:
    why = one_line(error, _LINE)
    if quantised is None:
        return ExtractionError(
            f"cannot load a model from {str(model_path)!r}: {why}; fetch it again if it is damaged"
        )
    method = quantised.get("quant_method", "in an unnamed way")
    return ExtractionError(
        f"the checkpoint {str(model_path)!r} is quantised ({method}) and cannot be read here: {_UNQUANTISED}, whose pack is "
        f"served with the quantised one too ({why})"
    )


def find_blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """Returns a model's decoder blocks, found by structure rather than by name.

    Args:
        model: The model; for a vision-language model, its language model is used.
        count: Its number of decoder blocks, from the configuration.

    Raises:
        ExtractionError: Not exactly one outermost ``ModuleList`` has ``count`` entries.
    """
    if isinstance(model, PreTrainedModel) and model.config.get_text_config() is not model.config:
        model = model.get_decoder()
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
    """Returns a pack's record of its model; of a local path only the last part.

    The type is that of the language model, alone or inside a vision-language model.
    """
    text = config.get_text_config()
    local = Path(model_path)
    return ModelIdentity(
        name=local.resolve().name if local.exists() else str(model_path),
        architecture=(config.architectures or [config.model_type])[0],
        model_type=text.model_type,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        chat_template_sha256=None if tokenizer is None else template_digest(tokenizer),
    )


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the sha256 of a tokenizer's chat template; None if it has none, or several by name."""
    template = tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None


def checkpoint_state(model_path: str | os.PathLike[str]) -> list[tuple[str, int, int]]:
    """Returns name, size and time of each file of a local checkpoint; a hub id names its content."""
    root = Path(model_path)
    if not root.is_dir():
        return [(str(model_path), 0, 0)]
    files = ((file, file.stat()) for file in sorted(root.iterdir()) if file.is_file())
    return [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in files]


def public_name(model: str | os.PathLike[str]) -> str:
    """Returns a model's display name: a hub id, or the last part of a path."""
    local = Path(model)
    return local.resolve().name if local.exists() else str(model)
