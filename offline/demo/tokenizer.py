"""The demo model's tokenizer: byte-level BPE in which every word of the corpus is one token."""

from __future__ import annotations

from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vllm_steer.offline.demo.corpus import Mixture, training_rows

START, SEP, END = "<|start|>", "<|sep|>", "<|end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|start|>' + message['role'] + '<|sep|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant<|sep|>\\n' }}{%- endif -%}"
)

_ROWS = 30_000
_MAX_VOCABULARY = 4096


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the corpus until no merges are left.

    Args:
        seed: Seed of the corpus rows it is trained on.

    Returns:
        A tokenizer with the chat template, `<|end|>` as end and padding token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        min_frequency=2,
        special_tokens=[END, START, SEP],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = islice(training_rows(seed, Mixture(plain_share=0.2)), _ROWS)
    texts = (f"user\nassistant\n{row.user}\n{row.answer}" for row in rows)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
