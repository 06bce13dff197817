"""The distance of forms that allow a cache from the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_steer.offline.fusion.original import (
    Fusion,
    continue_greedily,
    forced_logs,
    frozen,
    frozen_steered,
    refreshed,
    running_mean,
    unchanged,
)
from vllm_steer.offline.models.hooks import Change, changed, watched
from vllm_steer.offline.models.loading import find_blocks


@dataclass(frozen=True)
class Distance:
    """One form compared with the original, over prompts.

    Attributes:
        same_answers: Share of greedy answers that are the original's to the last token.
        same_tokens: Share of tokens of the original's greedy answers that the form, after the same
            tokens, finds likeliest too.
        mean_kl: Mean over these tokens of the divergence KL(original || form) of the next token, in
            nats.
        max_kl: The largest.
    """

    same_answers: float
    same_tokens: float
    mean_kl: float
    max_kl: float


def distances(
    model: PreTrainedModel,
    cases: Sequence[tuple[Fusion, Tensor]],
    count: int,
    end: int | None,
) -> dict[str, Distance]:
    """Compares every form, and no steering at all, with the original.

    Args:
        model: The model.
        cases: Targets of steering, and ``[layers, hidden_size]``, the mean over the unsteered prompt.
        count: Longest answer.
        end: Token that ends an answer.
    """
    found: dict[str, list[tuple[bool, np.ndarray, np.ndarray]]] = {}
    for fusion, prompt_mean in cases:
        whole = refreshed(fusion)
        answer = continue_greedily(model, whole, fusion.prompt, count, end)
        original = forced_logs(model, whole, fusion.prompt, answer)
        forms: Mapping[str, Change | None] = {
            "frozen": frozen(fusion, prompt_mean),
            "frozen, lower layers steered": frozen_steered(model, fusion),
            "running mean": running_mean(fusion),
            "unsteered": None,
        }
        for name, form in forms.items():
            logs = forced_logs(model, form, fusion.prompt, answer)
            divergence = (original.exp() * (original - logs)).sum(dim=-1)
            same = logs.argmax(dim=-1) == original.argmax(dim=-1)
            own = continue_greedily(model, form, fusion.prompt, count, end)
            row = own == answer, same.cpu().numpy(), divergence.cpu().numpy()
            found.setdefault(name, []).append(row)
    return {name: _distance(rows) for name, rows in found.items()}


@torch.inference_mode()
def displacement(
    model: PreTrainedModel, fusion: Fusion, change: Change | None, prompt_mean: Tensor
) -> float:
    """Returns how far a form moves the last block's mean over the prompt, in units of the distance to the
    reference.

    For the original at scale 1 it is 1: it moves the mean to the reference.

    Args:
        model: The model.
        fusion: The target of steering.
        change: Change of block outputs; None for none.
        prompt_mean: ``[layers, hidden_size]``, the mean over the unsteered prompt.
    """
    seen: dict[int, Tensor] = {}
    blocks = find_blocks(model, len(prompt_mean))
    with changed(blocks, change or unchanged), watched(blocks, seen.__setitem__):
        model.base_model(
            input_ids=torch.tensor([fusion.prompt], device=model.device), use_cache=False
        )
    last = len(prompt_mean) - 1
    moved = seen[last].float().mean(dim=1)[0] - prompt_mean[last]
    return float(moved.norm() / (fusion.reference[last] - prompt_mean[last]).norm())


def _distance(rows: Sequence[tuple[bool, np.ndarray, np.ndarray]]) -> Distance:
    answers, tokens, divergences = zip(*rows, strict=True)
    divergence = np.concatenate(divergences)
    return Distance(
        same_answers=float(np.mean(answers)),
        same_tokens=float(np.concatenate(tokens).mean()),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
    )
