"""What is added to steer a prompt by given scales: mu is measured while the blocks below are steered.

Steering of a block moves what all blocks above it read, so a mu of the unsteered prompt is soon that of
another text: what it lacks adds up from block to block, and on thirty of them the prompt lands far
beyond the reference. One steered pass over the prompt measures each block's mu where the original does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from vllm_steer.offline.extract.capture import check_finite
from vllm_steer.offline.fusion.references import References
from vllm_steer.offline.fusion.search import Case
from vllm_steer.offline.models.batches import make_batches
from vllm_steer.offline.models.hooks import changed
from vllm_steer.offline.models.loading import find_blocks
from vllm_steer.offline.models.prompts import RenderedPrompt


@torch.inference_mode()
def steered_deltas(
    model: PreTrainedModel, references: References, cases: Sequence[Case], batch_size: int = 32
) -> NDArray[np.float32]:
    """Returns what is added at every block and token, ``[cases, layers, hidden_size]``, float32.

    Args:
        model: The model that references were measured on.
        references: Prompts and references of all questions.
        cases: Questions with the scales they are steered by.
        batch_size: Prompts in a forward pass; the result does not depend on it.

    Raises:
        ExtractionError: The blocks cannot be found, or an output is not finite.
    """
    blocks = find_blocks(model, references.reference.shape[1])
    given = np.array([case.layer_scales for case in cases], dtype=np.float32)
    prompts = [RenderedPrompt("", ids, (0, len(ids))) for ids in references.prompts]
    prompts = [prompts[case.question] for case in cases]
    deltas = np.zeros((len(cases), *references.reference.shape[1:]), dtype=np.float32)
    for batch in make_batches(prompts, 1, batch_size, 0, model.device):
        rows, real = list(batch.indices), batch.real[..., None]
        wanted = references.reference[[cases[row].question for row in rows]]
        reference = torch.from_numpy(wanted).to(model.device)
        scales = torch.from_numpy(given[rows]).to(model.device)

        def steer(
            block: int,
            output: Tensor,
            rows: list[int] = rows,
            real: Tensor = real,
            reference: Tensor = reference,
            scales: Tensor = scales,
        ) -> Tensor:
            mean = (output.float() * real).sum(dim=1) / real.sum(dim=1)
            delta = scales[:, block, None] * (reference[:, block] - mean)
            deltas[rows, block] = delta.cpu().numpy()
            return output + delta[:, None].to(output.dtype)

        with changed(blocks, steer):
            model.base_model(
                input_ids=batch.token_ids, attention_mask=batch.attention_mask, use_cache=False
            )
    check_finite(deltas[:, :, None])
    return deltas
