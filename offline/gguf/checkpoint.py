"""A language model in a GGUF file to a Hugging Face checkpoint in float32.

transformers reads the configuration, the tokenizer and the tensors, which it dequantises. Its
``from_pretrained(gguf_file=...)`` would do so as well, but requires ``accelerate``. Two things that it
ignores are handled here: how a vocabulary splits digits, and tensors that it leaves out.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vllm_steer.errors import ConversionError, one_line
from vllm_steer.offline.gguf.header import Header, Limits, read_header

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# More than any model has: a vocabulary of two million, a chat template of a mebibyte.
# Characters of another library's message.
_LINE: Final = 300
_LIMITS: Final = Limits(fields=10_000, tensors=100_000, dimensions=4, array=2**21, string=2**20)
# Vocabularies, as ``tokenizer.ggml.pre`` names them, whose merges were learnt from text in which every
# digit stood alone; else they split text as GPT-2 does. So llama.cpp's llm_tokenizer_bpe has it.
_DIGITS_ALONE: Final = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
)
_LIKE_GPT2: Final = frozenset({"default", "gpt-2", "mpt", "olmo", "jais", "trillion"})
_SPECIAL: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def write_checkpoint(file: Path, folder: Path, notice: Callable[[str], None]) -> None:
    """Writes the checkpoint of a GGUF file: configuration, tokenizer, chat template and tensors.

    Args:
        file: The GGUF file.
        folder: An empty directory.
        notice: Called with a line if the checkpoint may differ from the model in the file.

    Raises:
        ConversionError: transformers cannot read the model, or it is damaged; the message says what is wrong.
        OSError: The checkpoint cannot be written.
    """
    try:
        from transformers import AutoConfig, PreTrainedTokenizerFast

        header = _model_header(file)
        # Alone in its directory, so that other files are not taken for parts of the model.
        with tempfile.TemporaryDirectory() as alone:
            link = Path(alone, "model.gguf")
            link.symlink_to(file.absolute())
            config = AutoConfig.from_pretrained(alone, gguf_file=link.name)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=link.name)
            model = _model(link, config, header)
    except ConversionError as error:
        raise ConversionError(f"{file}: {error}") from error
    except ImportError as error:
        raise ConversionError(
            f"{one_line(error, _LINE)}; pip install 'vllm-steer[offline]'"
        ) from error
    # Errors of reading foreign files have no common class.
    except Exception as error:
        raise ConversionError(
            f"{file}: transformers cannot read it ({type(error).__name__}: {one_line(error, _LINE)}); give another "
            f"GGUF file, or use a Hugging Face checkpoint, which needs no conversion"
        ) from error
    _split_as_learnt(tokenizer, header, notice)
    _name_special_tokens(tokenizer, header)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = getattr(
        config, "max_position_embeddings", tokenizer.model_max_length
    )
    # How this process found the files; not part of the tokenizer.
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    for written in folder.iterdir():
        # safetensors writes files that only the owner can read.
        written.chmod((folder / "config.json").stat().st_mode)


def _model_header(file: Path) -> Header:
    """Returns the header of a file, after checking that the file is complete."""
    from gguf import GGML_QUANT_SIZES

    try:
        with file.open("rb") as stream:
            header = read_header(stream, _LIMITS)
        architecture = header.fields.get("general.architecture")
        if not isinstance(architecture, str):
            raise ValueError("it names no architecture")
        # Every block has tensors, and a model with all claimed blocks is built before they are read.
        blocks = header.fields.get(f"{architecture}.block_count", 0)
        if not isinstance(blocks, int) or blocks > len(header.tensors):
            raise ValueError(f"it claims {blocks} blocks and has {len(header.tensors)} tensors")
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        end = 0
        for tensor in header.tensors:
            if tensor.kind not in sizes:
                raise ValueError(f"{tensor.name} has the unknown type {tensor.kind}")
            block, width = sizes[tensor.kind]
            count = math.prod(tensor.shape)
            end = max(end, header.data_start + tensor.offset + count // block * width)
        if file.stat().st_size < end:
            raise ValueError(
                f"it is truncated: {file.stat().st_size} of at least {end} bytes; fetch it again"
            )
    except (OSError, ValueError) as error:
        raise ConversionError(f"not a readable GGUF file ({error})") from error
    return header


def _model(file: Path, config: PreTrainedConfig, header: Header) -> PreTrainedModel:
    """Returns the model with every tensor of the file in it, and no other."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    tensors: dict[str, Tensor] = read["tensors"]
    given = sum(math.prod(tensor.shape) for tensor in header.tensors)
    taken = sum(tensor.numel() for tensor in tensors.values())
    if given != taken:
        raise ConversionError(
            f"transformers takes {taken:,} of its {given:,} numbers and leaves others out"
            f"{_left_out(model, header)}, which would be another model; give another GGUF file of it"
        )
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    bare = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if bare:
        raise ConversionError(
            f"{len(bare)} of the model's tensors are not in it, such as {bare[0]}; give another GGUF file"
        )
    return model


def _left_out(model: PreTrainedModel, header: Header) -> str:
    """Returns the names of tensors that transformers has no place for, in brackets."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(str(header.fields["general.architecture"]), TensorProcessor)
    known = get_gguf_hf_weights_map(model, processor())
    # The experts of a block are known without the ending.
    known = {name.removesuffix(".weight") for name in known}
    names = [t.name for t in header.tensors if t.name.removesuffix(".weight") not in known]
    return f" ({', '.join(names[:3])})" if names else ""


def _split_as_learnt(
    tokenizer: PreTrainedTokenizerFast, header: Header, notice: Callable[[str], None]
) -> None:
    """Sets how text is split before it is merged, where transformers falls back to GPT-2's way."""
    from tokenizers import pre_tokenizers

    core = tokenizer.backend_tokenizer
    if header.fields.get("tokenizer.ggml.model") != "gpt2" or not isinstance(
        core.pre_tokenizer, pre_tokenizers.ByteLevel
    ):
        return
    split = header.fields.get("tokenizer.ggml.pre", "default")
    if split in _DIGITS_ALONE:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), core.pre_tokenizer]
        )
    elif split not in _LIKE_GPT2:
        notice(
            f"text is split as in GPT-2, since transformers does not know how {split!r} does it: some of "
            f"it may become other tokens than in training"
        )


def _name_special_tokens(tokenizer: PreTrainedTokenizerFast, header: Header) -> None:
    """Assigns the special tokens by the file's ids; some versions of transformers mix them up."""
    for name, key in _SPECIAL.items():
        number = header.fields.get(f"tokenizer.ggml.{key}")
        if isinstance(number, int) and 0 <= number < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
