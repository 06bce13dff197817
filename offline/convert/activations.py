"""Activations of a sparse autoencoder's features on token sequences, pooled over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.sae_files import Features
from vllm_steer.offline.models.hooks import watched
from vllm_steer.offline.models.loading import find_blocks


class Pool(Enum):
    """How the activations of some tokens become one."""

    MEAN = "mean"
    MAX = "max"


@dataclass(frozen=True)
class Reading:
    """A sequence, and its tokens whose activations are pooled.

    Attributes:
        token_ids: The whole sequence.
        start: First token that counts; the first of the sequence never does, if there is another.
        end: After the last one.
    """

    token_ids: Sequence[int]
    start: int
    end: int


class ActivationReader:
    """Runs a model on batches of sequences and encodes the output of one block."""

    def __init__(self, model: PreTrainedModel, features: Features, batch_size: int) -> None:
        """Takes a model.

        Args:
            model: A decoder-only model.
            features: The features, at one of its layers.
            batch_size: Sequences in a forward pass.

        Raises:
            ExtractionError: Its blocks are not found.
        """
        blocks = find_blocks(model, model.config.get_text_config().num_hidden_layers)
        self._model, self._block, self._batch_size = model, blocks[features.layer], batch_size

        def put(values: NDArray[np.floating]) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(model.device)

        self._encoder, self._bias = put(features.encoder), put(features.bias)
        self._threshold = put(features.threshold)

    def encode(self, hidden: Tensor) -> Tensor:
        """Returns activations ``[..., features]`` of hidden states ``[..., hidden_size]``, float32."""
        before = hidden.float() @ self._encoder.T + self._bias
        return torch.where(before > self._threshold, before, 0.0)

    def pooled(self, readings: Sequence[Reading], pool: Pool) -> NDArray[np.float64]:
        """Returns ``[readings, features]``, float64.

        Raises:
            ConversionError: A sequence has no token that counts or is too long, or the model's states are not finite.
        """
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        for number, each in enumerate(readings, start=1):
            if self._start(each) >= each.end:
                raise ConversionError(f"example {number} has no tokens to read; leave it out")
            if most is not None and len(each.token_ids) > most:
                raise ConversionError(
                    f"example {number} has {len(each.token_ids)} tokens, and the model takes {most}; shorten it"
                )
        found = np.zeros((len(readings), len(self._bias)))
        order = sorted(range(len(readings)), key=lambda at: len(readings[at].token_ids))
        self._model.train(False)
        for first in range(0, len(order), self._batch_size):
            rows = order[first : first + self._batch_size]
            for at, hidden in zip(rows, self._outputs([readings[at] for at in rows]), strict=True):
                each = readings[at]
                active = self.encode(hidden[self._start(each) : each.end])
                one = active.mean(dim=0) if pool is Pool.MEAN else active.amax(dim=0)
                found[at] = one.double().cpu().numpy()
        if not np.isfinite(found).all():
            raise ConversionError("the model gives NaN or Inf; run it in float32 or bfloat16")
        return found

    @property
    def vocabulary(self) -> int:
        """Token ids that the model knows."""
        embeddings = cast(torch.nn.Embedding, self._model.get_input_embeddings())
        return embeddings.weight.shape[0]

    @staticmethod
    def _start(reading: Reading) -> int:
        """The first token that counts."""
        return max(reading.start, min(1, len(reading.token_ids) - 1))

    @torch.inference_mode()
    def _outputs(self, readings: Sequence[Reading]) -> Tensor:
        """Outputs ``[rows, length, hidden_size]`` of the block; padding on the right is not seen by what is before it."""
        length = max(len(each.token_ids) for each in readings)
        ids = [[*each.token_ids, *[0] * (length - len(each.token_ids))] for each in readings]
        kept: list[Tensor] = []
        with watched([self._block], lambda _, output: kept.append(output)):
            self._model.base_model(
                input_ids=torch.tensor(ids, device=self._model.device), use_cache=False
            )
        return kept[0]
