"""Questions of the demo model, and what prefixed models answer to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.extract.answers import Example
from vllm_steer.offline.models.prompts import RenderedPrompt, render_question
from vllm_steer.offline.questions.statements import statements

# Of an engine that many tests ask, beside others on the machine.
ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**27}
# In the form that the demo model was trained on, each in one line.
QUESTIONS = [user_text(statement.text).replace("\n", "") for statement in statements("extract")]


def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The answer of Hugging Face."""
    found = model.generate(
        torch.tensor([list(prompt)]), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return tuple(found[0, len(prompt) :].tolist())


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, question: str, prefix: str
) -> tuple[RenderedPrompt, RenderedPrompt]:
    """A question without and with its prefix."""
    return render_question(tokenizer, question), render_question(tokenizer, question, prefix)


def examples_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    questions: Sequence[str],
    count: int,
) -> list[Example]:
    """What the model itself answers to the prefixed questions; how likely, nobody asks."""
    found = []
    for question in questions:
        plain, prefixed = prompts_of(tokenizer, question, prefix)
        answer = greedy(model, prefixed.token_ids, count)
        found.append(Example(plain, prefixed, answer, 0.0))
    return found
