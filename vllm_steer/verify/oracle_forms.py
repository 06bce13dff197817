"""The effect of a direction on hidden states, with a separate formula for each form.

A simple counterpart of ``vllm_steer.engine.row_values``, and independent of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def apply_form(
    hidden: torch.Tensor,
    vector: torch.Tensor,
    scale: float,
    choice: dict[str, Any],
    plane: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns hidden states after one direction.

    Args:
        hidden: Float32 ``[tokens, width]``.
        vector: The direction, ``[width]``.
        scale: ε.
        choice: The direction as a request gives it.
        plane: Vector of its second direction.
        read: Vector of the direction to read.

    Raises:
        ValueError: The form lacks its second direction.
    """
    unit = vector / vector.norm()
    op = choice.get("op", "add")
    if op == "add":
        return hidden + scale * vector
    if op == "ablate":
        return hidden - scale * torch.outer(hidden @ unit, unit)
    if op == "clamp":
        return hidden - torch.outer(hidden @ unit, unit) + scale * unit
    if op == "multiply":
        return hidden * (1.0 + scale * vector)
    if op == "affine" and read is not None:
        return hidden + torch.outer(scale * (hidden @ read + choice.get("bias", 0.0)), vector)
    if op == "feature" and read is not None:
        before = hidden @ read + choice.get("bias", 0.0)
        active = torch.where(before > choice.get("threshold", 0.0), before, 0.0)
        wanted = scale * active if choice.get("activation") == "multiply" else scale
        return hidden + torch.outer(wanted - active, vector)
    if plane is None:
        raise ValueError(f"op {op!r} needs a second direction")
    other = plane - (plane @ unit) * unit
    other = other / other.norm()
    x, y = hidden @ unit, hidden @ other
    rest = hidden - torch.outer(x, unit) - torch.outer(y, other)
    angle = torch.deg2rad(torch.tensor(float(scale)))
    if op == "rotate":
        angle = angle + torch.atan2(y, x)
    length = torch.hypot(x, y)
    return rest + torch.outer(length * angle.cos(), unit) + torch.outer(length * angle.sin(), other)


def opened(hidden: torch.Tensor, probe: torch.Tensor, gate: dict[str, Any]) -> torch.Tensor:
    """The share of its change that a gate lets through, ``[tokens]``.

    Args:
        hidden: Float32 ``[tokens, width]``.
        probe: The gate's direction, ``[width]``.
        gate: The gate as a request gives it, with a number as its threshold.
    """
    beyond = hidden @ probe - gate["above"]
    if gate.get("slope") is None:
        return (beyond > 0).float()
    return torch.sigmoid(gate["slope"] * beyond)


def scheduled(schedule: dict[str, Any], passed: torch.Tensor) -> torch.Tensor:
    """The factor of each token, by its distance from the first generated one."""
    start, end, tokens = schedule["start"], schedule["end"], schedule["tokens"]
    if schedule.get("shape", "linear") == "linear":
        values = [start + (end - start) * min(max(g, 0) / tokens, 1.0) for g in passed.tolist()]
    else:
        values = [end + (start - end) * math.e ** -(max(g, 0) / tokens) for g in passed.tolist()]
    return torch.tensor(values, device=passed.device)


def before_trigger(
    triggers: Sequence[int] | None, tokens: Sequence[int], prompt_len: int, position: torch.Tensor
) -> torch.Tensor:
    """Mask of the positions up to and including the first generated trigger."""
    for place in range(prompt_len, len(tokens)):
        if tokens[place] in (triggers or ()):
            return position <= place
    return torch.ones_like(position, dtype=torch.bool)


def steered_positions(
    choice: str | dict[str, Any] | list[Any],
    position: torch.Tensor,
    prompt_len: int,
    tokens: Sequence[int] = (),
) -> torch.Tensor:
    """Mask of the absolute positions in a choice, in the shape of ``position``.

    Args:
        choice: The choice as a request gives it.
        position: Every position from 0 on.
        prompt_len: Tokens of the prompt.
        tokens: The token at each position, where token ids are chosen.
    """
    if isinstance(choice, dict) and {"tokens", "from_tokens"} & choice.keys():
        within = steered_positions(choice.get("within", "all"), position, prompt_len)
        wanted = choice.get("tokens") or choice["from_tokens"]
        found = torch.tensor([token in wanted for token in tokens], device=position.device)
        if "tokens" in choice or not within.any():
            return found & within
        found[: int(within.nonzero()[0])] = False
        return found.cumsum(0).bool() & within
    if isinstance(choice, str):
        return {
            "all": position >= 0,
            "prompt": position < prompt_len,
            "generated": position >= prompt_len,
            "last_prompt": position == prompt_len - 1,
        }[choice]
    if isinstance(choice, dict) and "prompt" in choice:
        pairs = [[low, prompt_len if high is None else high] for low, high in choice["prompt"]]
        pairs = [[max(low, -prompt_len), high] for low, high in pairs]
        return steered_positions(pairs, position, prompt_len) & (position < prompt_len)
    if isinstance(choice, dict):
        low, high = choice["generated"]
        end_of = position.max() + 1 if high is None else prompt_len + high
        return (position >= prompt_len + low) & (position < end_of)
    mask = torch.zeros_like(position, dtype=torch.bool)
    for start, end in choice:
        first = start + prompt_len if start < 0 else start
        last = prompt_len + 10**6 if end is None else end + prompt_len if end < 0 else end
        mask |= (first <= position) & (position < last)
    return mask
