"""How far the forms that a cache allows are from the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from offline.fusion.original import (
    Fusion,
    continue_greedily,
    forced_logs,
    frozen,
    frozen_steered,
    refreshed,
    running_mean,
)
from offline.hooks import Change


@dataclass(frozen=True)
class Distance:
    """One form against the original, over prompts.

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
        cases: What to steer to, and ``[layers, hidden_size]`` the mean over the unsteered prompt.
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


def _distance(rows: Sequence[tuple[bool, np.ndarray, np.ndarray]]) -> Distance:
    answers, tokens, divergences = zip(*rows, strict=True)
    divergence = np.concatenate(divergences)
    return Distance(
        same_answers=float(np.mean(answers)),
        same_tokens=float(np.concatenate(tokens).mean()),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
    )
