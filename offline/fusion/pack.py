"""The steering pack of Fusion Steering: a direction for each question and each set of scales tried on it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_steer.offline.extract.parts import library_versions
from vllm_steer.offline.fusion.questions import GoldQuestion
from vllm_steer.offline.fusion.search import Case
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.packs.pack import (
    DirectionRecord,
    MethodRecord,
    ModelIdentity,
    PackContent,
    SteeringPack,
    write_pack,
)


@dataclass(frozen=True, eq=False)
class FusionDeltas:
    """The vectors that steer each question by the scales of its cases.

    Attributes:
        questions: All questions.
        cases: Their cases.
        deltas: ``[cases, layers, hidden_size]``, the added vectors.
        residual_norms: ``[layers]``, mean norm of the block output over the prompts' tokens.
    """

    questions: Sequence[GoldQuestion]
    cases: Sequence[Case]
    deltas: NDArray[np.float32]
    residual_norms: NDArray[np.float64]


def write_deltas(
    path: str | os.PathLike[str],
    name: str,
    identity: ModelIdentity,
    measured: FusionDeltas,
    dtype: torch.dtype,
    chat: ChatFormat | None = None,
) -> SteeringPack:
    """Writes a pack whose directions, at scale 1, steer each question by the scales of its cases.

    Other scales than 1 do not correspond to the method, since the vectors were measured under their scales.

    Args:
        path: Directory of the pack.
        name: Name of the pack.
        identity: The model that it was measured on.
        measured: The measurements.
        dtype: The model's dtype then.
        chat: Format that prompts were rendered by; None for the tokenizer's own.

    Raises:
        PackError: The pack cannot be written.
    """
    layers = list(range(measured.deltas.shape[1]))
    content = json.dumps([question.model_dump() for question in measured.questions], sort_keys=True)
    return write_pack(
        path,
        PackContent(
            name=name,
            model=identity,
            directions=[
                DirectionRecord(
                    name=case.name,
                    layers=layers,
                    default_scale=1.0,
                    safe_scale=1.0,
                    positions="all",
                    metrics={"question": case.question, "scales": list(case.scales)},
                )
                for case in measured.cases
            ],
            vectors={
                case.name: delta
                for case, delta in zip(measured.cases, measured.deltas, strict=True)
            },
            method=MethodRecord(
                name="fusion",
                settings={
                    "dtype": str(dtype).removeprefix("torch."),
                    "mu": "steered",
                    **(chat or ChatFormat()).model_dump(),
                },
                libraries=library_versions(),
                seed=0,
                data_sha256=hashlib.sha256(content.encode()).hexdigest(),
            ),
            residual_norms=dict(enumerate(measured.residual_norms)),
        ),
    )
