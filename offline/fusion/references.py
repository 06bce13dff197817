"""References of questions, over all layers: where steering goes.

The reference of a question at layer l is h_l, the mean output of block l over the tokens of the gold
answer and its explanation. With it comes the mean over the tokens of the unsteered prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.extract.capture import check_finite
from vllm_steer.offline.fusion.questions import GoldQuestion
from vllm_steer.offline.models.batches import make_batches
from vllm_steer.offline.models.hooks import watched
from vllm_steer.offline.models.loading import find_blocks
from vllm_steer.offline.models.prompts import RenderedPrompt, apply_template


@dataclass(frozen=True, eq=False)
class References:
    """The measurements of each question.

    Attributes:
        prompts: Token ids of each question's chat prompt.
        reference: ``[questions, layers, hidden_size]``, float32; h.
        prompt: ``[questions, layers, hidden_size]``, float32; mean over the unsteered prompt.
        residual_norms: ``[layers]``, float64; median norm of the block output over the prompts' tokens,
            without the first of all, as everywhere.
    """

    prompts: tuple[tuple[int, ...], ...]
    reference: NDArray[np.float32]
    prompt: NDArray[np.float32]
    residual_norms: NDArray[np.float64]


def render_question(
    tokenizer: PreTrainedTokenizerBase, question: GoldQuestion
) -> tuple[RenderedPrompt, RenderedPrompt]:
    """Returns a question's chat prompt and its reference text.

    The prompt's span holds all of its tokens, that of the reference text every token that overlaps
    the answer or the explanation.

    Raises:
        ExtractionError: The tokenizer has no chat template or gives no offsets.
    """
    if not tokenizer.is_fast:
        raise ExtractionError(
            f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer "
            f"(one with a tokenizer.json)"
        )
    prompt = apply_template(tokenizer, question.question, add_generation_prompt=True)
    ids = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    asked = question.reference_question or question.question
    opened = apply_template(tokenizer, asked, add_generation_prompt=True)
    text = opened + question.reference
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # The ends of the spans ascend, also where a tokenizer leaves white space out of them.
    first = bisect_right([end for _, end in encoding["offset_mapping"]], len(opened))
    reference = tuple(encoding["input_ids"])
    return (
        RenderedPrompt(prompt, ids, (0, len(ids))),
        RenderedPrompt(text, reference, (first, len(reference))),
    )


def measure_references(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[GoldQuestion],
    batch_size: int = 32,
) -> References:
    """Runs every prompt and every reference text once.

    Args:
        model: A decoder-only model.
        tokenizer: Its tokenizer.
        questions: The questions; at least one.
        batch_size: Texts in a forward pass.

    Raises:
        ExtractionError: The model's blocks cannot be found or give something that is not finite, or
            the tokenizer cannot be used.
    """
    rendered = [render_question(tokenizer, question) for question in questions]
    prompts = [prompt for prompt, _ in rendered]
    prompt, norms = span_means(model, prompts, batch_size)
    reference, _ = span_means(model, [text for _, text in rendered], batch_size)
    return References(tuple(p.token_ids for p in prompts), reference, prompt, norms)


@torch.inference_mode()
def span_means(
    model: PreTrainedModel, prompts: Sequence[RenderedPrompt], batch_size: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Returns the mean block outputs over each prompt's span.

    Args:
        model: A decoder-only model.
        prompts: Prompts with spans that are not empty.
        batch_size: Prompts in a forward pass; the result does not depend on it.

    Returns:
        ``[prompts, blocks, hidden_size]``, float32, the last block's before the final norm; and
        ``[blocks]``, float64, the median norm of the block output over the tokens of all spans, but
        for a prompt's first: that one is an attention sink, far longer than the others.

    Raises:
        ExtractionError: The blocks cannot be found, or an output is not finite.
    """
    config = model.config.get_text_config()
    blocks = find_blocks(model, config.num_hidden_layers)
    means = np.zeros((len(prompts), len(blocks), config.hidden_size), dtype=np.float32)
    norms: list[list[torch.Tensor]] = [[] for _ in blocks]
    for batch in make_batches(prompts, 1, batch_size, 0, model.device):
        rows, inside = list(batch.indices), batch.prefix[..., None]
        counted = batch.prefix.bool()
        counted[:, 0] = False

        def see(
            block: int,
            output: torch.Tensor,
            rows: list[int] = rows,
            inside: torch.Tensor = inside,
            counted: torch.Tensor = counted,
        ) -> None:
            kept = output.float() * inside
            means[rows, block] = (kept.sum(dim=1) / inside.sum(dim=1)).cpu().numpy()
            norms[block].append(kept.norm(dim=-1)[counted].cpu())

        with watched(blocks, see):
            model.base_model(
                input_ids=batch.token_ids, attention_mask=batch.attention_mask, use_cache=False
            )
    check_finite(means[:, :, None])
    return means, np.array([float(np.median(torch.cat(found).numpy())) for found in norms])
