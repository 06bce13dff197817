"""How long the residual stream is: what steps are relative to, and what a pack says of its model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from vllm_steer.offline.models.hooks import watched
from vllm_steer.offline.models.loading import find_blocks
from vllm_steer.offline.train.examples import Tokens


@torch.no_grad()
def residual_norms(model: PreTrainedModel, prompts: Sequence[Tokens]) -> NDArray[np.float64]:
    """Returns the median norm of every block's output over the prompts' tokens but the first of each, ``[blocks]``.

    Args:
        model: A decoder-only model.
        prompts: Prompts of at least two tokens, each of which is read alone.

    Raises:
        ExtractionError: The model's blocks cannot be found.
    """
    blocks = find_blocks(model, model.config.get_text_config().num_hidden_layers)
    norms: list[list[NDArray[np.float32]]] = [[] for _ in blocks]
    with watched(
        blocks, lambda at, h: norms[at].append(h[0, 1:].float().norm(dim=-1).cpu().numpy())
    ):
        for prompt in prompts:
            model(torch.tensor([prompt], device=model.device), use_cache=False, logits_to_keep=1)
    return np.array([float(np.median(np.concatenate(each))) for each in norms])
