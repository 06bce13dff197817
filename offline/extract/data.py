"""The inputs of an extraction besides its settings: data, target pack and resources."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_steer.offline.models.prompts import AnswerPair, Concept
from vllm_steer.offline.questions.everyday import Everyday
from vllm_steer.offline.shards import Shards

# One scale for all directions, or one by concept.
Scales = Mapping[str, float] | float


@dataclass(frozen=True)
class ExtractionData:
    """The data that directions are learned from.

    Attributes:
        concepts: The concepts, each of which becomes a direction.
        positive_statements: Statements of the prefixed prompts; white space around them is dropped, but under
            ``compat`` kept.
        negative_statements: Statements of the unprefixed prompts; better different ones.
        pairs: Answer pairs by direction, in place of concepts and statements; method ``caa`` alone.
        questions: Questions, if directions are learned from answers; None for the built-in ones.
    """

    concepts: Sequence[Concept] = ()
    positive_statements: Sequence[str] = ()
    negative_statements: Sequence[str] = ()
    pairs: Mapping[str, Sequence[AnswerPair]] = field(default_factory=dict)
    questions: Everyday | None = None


@dataclass(frozen=True)
class PackTarget:
    """The pack that is written.

    Attributes:
        name: Its name.
        path: Its directory.
        default_scales: Scale (ε) used when a request names none; None for the method's, or one by the length of
            the residual stream, until it is calibrated.
        safe_scales: Largest |scale| that leaves the text fluent; None where it is unknown.
    """

    name: str
    path: str | os.PathLike[str]
    default_scales: Scales | None = None
    safe_scales: Scales | None = None


@dataclass(frozen=True)
class ComputeResources:
    """Where an extraction runs; none of it changes the result but the device's rounding.

    Attributes:
        workers: Processes that fit directions, at least 1.
        device: Device of the model; None for CUDA if available, else CPU.
        shards: Where concepts are learned.
        engine: More arguments of ``vllm.LLM``, which generates the answers.
    """

    workers: int = 1
    device: str | None = None
    shards: Shards = field(default_factory=Shards)
    engine: Mapping[str, Any] = field(default_factory=dict)
