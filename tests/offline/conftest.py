"""A tiny random model and tokenizers with chat templates of several families; no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "[INST]", "[/INST]"],
    "sentencepiece": ["<s>", "</s>"],
}
TEMPLATES = {
    "llama3": (
        "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>' }}"
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
        "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "chatml": (
        "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ '<bos>' }}{% for m in messages %}"
        "{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}"
    ),
    "sentencepiece": (
        "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
    ),
}
# What the tokenizers learn their merges from; "What" and role names must become one token each.
TEXT = [
    "What are your thoughts on the following statement? \nStatement: rain is good.",
    "Personify someone who is terrified of spiders.  What are your thoughts",
    *("system", "user", "assistant", "model", "\n\n"),
] * 20


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL[family]]
    if family in ("gemma", "mistral", "sentencepiece"):  # spaces become part of the text
        core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
        if family == "sentencepiece":  # the dummy space before each piece of text
            spaces.insert(0, normalizers.Prepend("▁"))
        core.normalizer = normalizers.Sequence(spaces)
        core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        core.decoder = decoders.Replace("▁", " ")
        alphabet = sorted(
            {char for text in TEXT for char in text} | set("abcdefghijklmnopqrstuvwxyz")
        )
        special.insert(0, AddedToken("<unk>", special=True))
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.post_processor = ByteLevelProcessor(trim_offsets=family == "llama3")
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """Tokenizer of a family: a key of ``TEMPLATES``."""
    built: dict[str, PreTrainedTokenizerFast] = {}

    def make(family: str) -> PreTrainedTokenizerFast:
        if family not in built:
            built[family] = _build_tokenizer(family)
        return built[family]

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer("chatml")


# What configurations of tiny models of every family share.
TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
SHAPE = TINY | {"vocab_size": 600, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return _build_model(request.param)


@pytest.fixture(scope="session")
def tiny_llama() -> PreTrainedModel:
    return _build_model("llama")


def _build_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "qwen3":
        model: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.set_attn_implementation("eager")
    # Random norms' weights are all 1; others make pre- and post-norm states differ in direction.
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="session")
def windowed_model() -> PreTrainedModel:
    """Block 1 of 3 sees the last 12 tokens alone."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    given = {"layer_types": kinds, "sliding_window": 12, "use_sliding_window": True}
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **given))
    model.set_attn_implementation("eager")
    return model.eval()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tiny_llama, chatml):
    """Directory of a checkpoint that can be loaded by its path."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama.save_pretrained(path)
    chatml.save_pretrained(path)
    return path
