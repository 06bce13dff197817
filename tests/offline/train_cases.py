"""Plain readings of the papers that are trained after: one sequence at a time, one formula at a time, nothing padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_steer.offline.train.examples import Answered, Contrast, Preference

# States of one sequence, [length, hidden], to others.
Edit = Callable[[Tensor], Tensor]
LAYER = 1
ANSWERED = [
    Answered((5, 6, 7, 8, 9, 10), (11, 12, 13), prefixed=(5, 90, 91, 6, 7, 8, 9, 10)),
    Answered((5, 20, 21, 22), (23, 24, 25, 26, 27), prefixed=(5, 90, 91, 20, 21, 22)),
    Answered((5, 30, 31, 32, 33, 34, 35), (36, 37), prefixed=(5, 90, 91, 30, 31, 32, 33, 34, 35)),
]
PREFERRED = [
    Preference((5, 6, 7, 8), (11, 12, 13), (14, 15)),
    Preference((5, 20, 21), (23, 24), (25, 26, 27, 28)),
    Preference((5, 30, 31, 32, 33), (36,), (38, 39)),
]
CONTRASTED = [
    Contrast((5, 6, 7, 8), (5, 90, 91, 6, 7, 8), (11, 12), (13, 14, 15)),
    Contrast((5, 20, 21), (5, 92, 20, 21), (23, 24, 25), (26, 27)),
]


def states_and_logits(
    model: PreTrainedModel, tokens: Sequence[int], edits: dict[int, Edit]
) -> tuple[dict[int, Tensor], Tensor]:
    """The outputs of all blocks before they are edited, ``[length, hidden]``, and logits ``[length, vocabulary]``."""
    seen: dict[int, Tensor] = {}
    handles = []
    for number, block in enumerate(model.model.layers):

        def hook(module, args, output, number=number):
            whole = output[0] if isinstance(output, tuple) else output
            seen[number] = whole[0]
            if number not in edits:
                return output
            edited = edits[number](whole[0])[None]
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handles.append(block.register_forward_hook(hook))
    try:
        logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


def log_likelihood(
    model: PreTrainedModel,
    prompt: Sequence[int],
    answer: Sequence[int],
    edits: dict[int, Edit] | None = None,
) -> Tensor:
    """log p(answer | prompt) while states are edited."""
    _, logits = states_and_logits(model, [*prompt, *answer], edits or {})
    total = torch.zeros(())
    for place, token in enumerate(answer):
        total = total + logits[len(prompt) + place - 1].log_softmax(-1)[token]
    return total


def only_at(positions: Sequence[int], edit: Edit) -> Edit:
    """An edit at some positions alone."""

    def edited(hidden: Tensor) -> Tensor:
        rows = [edit(row[None])[0] if at in positions else row for at, row in enumerate(hidden)]
        return torch.stack(rows)

    return edited


def likelihood_loss(
    model: PreTrainedModel,
    examples: Sequence[Answered],
    edits: Callable[[Answered], dict[int, Edit]],
) -> Tensor:
    """Mean negative log-likelihood of a token of the answers."""
    total = sum(log_likelihood(model, e.prompt, e.answer, edits(e)) for e in examples)
    return -total / sum(len(e.answer) for e in examples)


def bipo_loss(
    model: PreTrainedModel,
    examples: Sequence[Preference],
    vector: Tensor,
    direction: int,
    beta: float,
) -> Tensor:
    """Equation 3 of arXiv 2406.00045 for a draw of d, mean over the pairs."""
    edits: dict[int, Edit] = {LAYER: lambda hidden: hidden + direction * vector}
    losses = []
    for example in examples:
        ratios = []
        for answer in (example.positive, example.negative):
            steered = log_likelihood(model, example.prompt, answer, edits)
            ratios.append(steered - log_likelihood(model, example.prompt, answer).detach())
        inside = direction * beta * ratios[0] - direction * beta * ratios[1]
        losses.append(-torch.log(torch.sigmoid(inside)))
    return sum(losses) / len(losses)


def reft_r1_loss(
    model: PreTrainedModel,
    examples: Sequence[Answered],
    unit: Tensor,
    *,
    skipped: int,
    strongest: int,
    sparsity: float,
) -> Tensor:
    """Language modelling while Mean(TopK(ReLU(h·w)))·w is added, and the mean of all other detections."""
    found, others = torch.zeros(()), []
    for example in examples:
        kept: list[Tensor] = []

        def edit(hidden: Tensor, kept=kept) -> Tensor:
            detections = torch.relu(hidden[skipped:] @ unit)
            order = sorted(range(len(detections)), key=lambda at: -detections[at].detach().item())
            top = order[:strongest]
            kept.append(
                sum(d for at, d in enumerate(detections) if at not in top) / len(detections)
            )
            strength = sum(detections[at] for at in top) / strongest
            return torch.cat([hidden[:skipped], hidden[skipped:] + strength * unit])

        found = found + log_likelihood(model, example.prompt, example.answer, {LAYER: edit})
        others += kept
    tokens = sum(len(example.answer) for example in examples)
    return -found / tokens + sparsity * sum(others) / len(examples)


def cdas_loss(
    model: PreTrainedModel, examples: Sequence[Contrast], unit: Tensor, skipped: int
) -> Tensor:
    """D⁺ + D⁻ of arXiv 2602.05234, mean over the examples."""
    total = torch.zeros(())
    for e in examples:
        for base, source, answer in (
            (e.prompt, e.prefixed, e.positive),
            (e.prefixed, e.prompt, e.negative),
        ):
            states, wanted = states_and_logits(model, [*source, *answer], {})
            there = states[LAYER][len(source) - 1].detach() @ unit

            def edit(hidden: Tensor, there=there) -> Tensor:
                changed = [h + (there - h @ unit) * unit for h in hidden[skipped:]]
                return torch.cat([hidden[:skipped], torch.stack(changed)])

            _, found = states_and_logits(model, [*base, *answer], {LAYER: edit})
            divergences = []
            for place in range(len(answer)):
                p = found[len(base) + place - 1].softmax(-1)
                q = wanted[len(source) + place - 1].softmax(-1).detach()
                m = (p + q) / 2
                divergences.append(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
            total = total + sum(divergences) / len(divergences)
    return total / len(examples)
