"""The method without a cache, as published, and its approximations with a cache.

The original recomputes the whole sequence for every token, so mu is the mean over prompt and answer so
far, of block outputs that steering of lower layers has reached. With a cache, past tokens are not recomputed.
There are three approximations: mu measured on the unsteered prompt; mu measured on the prompt while lower
layers are steered, which is plain addition too and what the server does; and a running mean.

All forms are run here by a forward pass over the whole sequence for each token. For the approximations that
equals a cache, since none of them looks ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_steer.offline.models.hooks import Change, changed
from vllm_steer.offline.models.loading import find_blocks


@dataclass(frozen=True, eq=False)
class Fusion:
    """The target of a prompt's steering.

    Attributes:
        prompt: Its token ids.
        reference: ``[layers, hidden_size]``; h.
        scales: ``[layers]``; the product of alpha and gamma.
    """

    prompt: tuple[int, ...]
    reference: Tensor
    scales: Tensor


def refreshed(fusion: Fusion) -> Change:
    """The original: mu is the mean over all tokens of the current forward pass."""

    def change(layer: int, output: Tensor) -> Tensor:
        return _toward(fusion, layer, output, output.mean(dim=1, keepdim=True))

    return change


def frozen(fusion: Fusion, prompt_mean: Tensor) -> Change:
    """Plain addition of a constant vector.

    Args:
        fusion: The target of steering.
        prompt_mean: ``[layers, hidden_size]``; mu, measured on the unsteered prompt.
    """

    def change(layer: int, output: Tensor) -> Tensor:
        return _toward(fusion, layer, output, prompt_mean[layer])

    return change


@torch.inference_mode()
def frozen_steered(model: PreTrainedModel, fusion: Fusion) -> Change:
    """The same with mu measured on the prompt while the layers below are steered."""
    means = []
    toward = refreshed(fusion)

    def measure(layer: int, output: Tensor) -> Tensor:
        means.append(output.mean(dim=1)[0])
        return toward(layer, output)

    next_logs(model, measure, fusion.prompt)
    return frozen(fusion, torch.stack(means))


def running_mean(fusion: Fusion) -> Change:
    """Mu is the mean over the prompt and the answer up to the token, each as it was computed.

    The prompt's tokens are shifted by the mean over the whole prompt, as in its prefill.
    """
    length = len(fusion.prompt)

    def change(layer: int, output: Tensor) -> Tensor:
        counts = torch.arange(1, output.shape[1] + 1, device=output.device)[:, None]
        means = output.cumsum(dim=1) / counts
        means[:, :length] = means[:, length - 1 : length].clone()
        return _toward(fusion, layer, output, means)

    return change


def unchanged(layer: int, output: Tensor) -> Tensor:
    """No steering."""
    return output


@torch.inference_mode()
def next_logs(model: PreTrainedModel, change: Change | None, tokens: Sequence[int]) -> Tensor:
    """Returns log-probabilities ``[vocabulary]`` of the token after a sequence.

    Args:
        model: A decoder-only model.
        change: Change of block outputs; None for none.
        tokens: The sequence.
    """
    with changed(_blocks(model) if change else [], change or unchanged):
        logits: Tensor = model(
            torch.tensor([list(tokens)], device=model.device), use_cache=False, logits_to_keep=1
        ).logits
    return logits[0, -1].float().log_softmax(dim=-1)


def continue_greedily(
    model: PreTrainedModel,
    change: Change | None,
    prompt: Sequence[int],
    count: int,
    end: int | None,
) -> list[int]:
    """Returns the greedy continuation of a prompt, the token that ends it included.

    Args:
        model: A decoder-only model.
        change: Change of block outputs; None for none.
        prompt: Token ids.
        count: Most tokens.
        end: Token that ends an answer; None for none.
    """
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != end):
        tokens.append(int(next_logs(model, change, tokens).argmax()))
    return tokens[len(prompt) :]


def forced_logs(
    model: PreTrainedModel, change: Change | None, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Returns log-probabilities ``[answer, vocabulary]`` of each token after those before it."""
    rows = [next_logs(model, change, [*prompt, *answer[:length]]) for length in range(len(answer))]
    return torch.stack(rows)


def _toward(fusion: Fusion, layer: int, output: Tensor, mean: Tensor) -> Tensor:
    return output + fusion.scales[layer] * (fusion.reference[layer] - mean)


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    return find_blocks(model, model.config.get_text_config().num_hidden_layers)
