"""Packs of every arm of ``benchmarks.methods``, all from one set of forward passes.

This module alone touches the extraction. The prompts of a concept run once; tokens, labels,
estimators and choices of blocks differ afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vllm_steer.offline.demo.concepts import prefix
from vllm_steer.offline.demo.packs import FULL_METHOD
from vllm_steer.offline.estimators.fit import FitOptions, fit_direction
from vllm_steer.offline.estimators.labelled_rows import LabelledRows
from vllm_steer.offline.estimators.labels import (
    choose_tokens,
    fixed_tokens,
    hard_labels,
    interleave,
    soft_labels,
)
from vllm_steer.offline.estimators.rfm import RfmOptions
from vllm_steer.offline.extract.capture import Captured, CaptureOptions, capture
from vllm_steer.offline.extract.enrichment import PermutationTest
from vllm_steer.offline.models.loading import load_config, load_model, model_identity
from vllm_steer.offline.models.prompts import count_candidates, render_prompt
from vllm_steer.packs.pack import (
    DirectionRecord,
    MethodRecord,
    ModelIdentity,
    PackContent,
    SteeringPack,
    write_pack,
)

ATTENTION = "attention"
ESTIMATORS: tuple[tuple[str, str], ...] = (
    ("rfm", "soft"),
    ("rfm", "hard"),
    ("ridge", "soft"),
    ("ridge", "hard"),
    ("logistic", "hard"),
    ("pca", "hard"),
    ("mean_difference", "hard"),
)
"""Estimator and labels. The last three fit 0 and 1 whatever the labels are."""

_BATCH = 64
_PERMUTATIONS = 999


@dataclass(frozen=True)
class Arm:
    """One way to learn directions.

    Attributes:
        token: ``attention``, or a fixed negative index.
        estimator: Name of the estimator.
        labels: ``soft`` or ``hard``.
        blocks: ``all``, or ``top 2``, ``bottom 2`` by enrichment, then by attention to the prefix.
        published: Whether the estimator is as its authors run it: the RFM with their settings and
            not the demo model's, ridge and logistic regression on raw rows.
    """

    token: str | int
    estimator: str
    labels: str
    blocks: str = "all"
    published: bool = False

    @property
    def name(self) -> str:
        """Name of the arm, and of its pack."""
        token = "attention" if self.token == ATTENTION else f"token{self.token}"
        blocks = "" if self.blocks == "all" else "_" + self.blocks.replace(" ", "-")
        published = "_published" if self.published else ""
        return f"{token}_{self.estimator}_{self.labels}{blocks}{published}"


@dataclass(frozen=True, eq=False)
class Seen:
    """Forward passes of a model, shared by all arms.

    Attributes:
        identity: The model.
        prefixed: Concept to what its prefixed prompts left.
        unprefixed: What the unprefixed prompts left.
        candidates: Number of candidate tokens.
    """

    identity: ModelIdentity
    prefixed: Mapping[str, Captured]
    unprefixed: Captured
    candidates: int

    @property
    def layers(self) -> list[int]:
        """Blocks that directions are learned for: all but block 0."""
        return list(range(1, self.unprefixed.hidden.shape[1]))

    def attention(self) -> NDArray[np.float32]:
        """``[blocks, candidates]``: attention to the prefix, mean over concepts and prompts."""
        means = [captured.attention.mean(axis=0) for captured in self.prefixed.values()]
        mean: NDArray[np.float32] = np.mean(means, axis=0)
        return mean


def see(
    model_path: Path, concepts: Sequence[str], positives: Sequence[str], negatives: Sequence[str]
) -> Seen:
    """Runs every prompt of every concept once."""
    config, tokenizer = load_config(model_path)
    model = load_model(model_path, "float32", "cpu")
    candidates = count_candidates(tokenizer)

    def run(statements: Sequence[str], wanted: str) -> Captured:
        prompts = [render_prompt(tokenizer, statement, wanted) for statement in statements]
        longest = max(len(prompt.token_ids) for prompt in prompts)
        test = PermutationTest(_PERMUTATIONS, 0, longest) if wanted else None
        options = CaptureOptions(permutations=test)
        return capture(model, prompts, candidates=candidates, batch_size=_BATCH, options=options)

    prefixed = {
        concept: run(positives, prefix(concept)) for concept in tqdm(concepts, desc="prompts")
    }
    identity = model_identity(model_path, config, tokenizer)
    return Seen(identity, prefixed, run(negatives, ""), candidates)


def write_arms(seen: Seen, arms: Sequence[Arm], out: Path, seed: int) -> list[SteeringPack]:
    """Fits every arm and writes each as a pack of all concepts."""
    return [_write(seen, arm, out / arm.name, seed) for arm in tqdm(arms, desc="arms", unit="arm")]


def _write(seen: Seen, arm: Arm, path: Path, seed: int) -> SteeringPack:
    records, vectors = [], {}
    for concept, captured in seen.prefixed.items():
        tokens = (
            choose_tokens(captured.attention)
            if arm.token == ATTENTION
            else fixed_tokens(int(arm.token), *captured.attention.shape[1:])
        )
        layers = _blocks(seen, arm, captured, tokens)
        vectors[concept] = np.stack(
            [
                fit_direction(arm.estimator, rows, _options(arm, seed)).vector
                for rows in _rows(seen, captured, arm, tokens, layers)
            ]
        )
        records.append(
            DirectionRecord(
                name=concept,
                layers=layers,
                default_scale=1.0,
                safe_scale=1.0,
                positions="all",
                metrics={"token": tokens[layers].tolist()},
            )
        )
    return write_pack(
        path,
        PackContent(
            name=arm.name,
            model=seen.identity,
            directions=records,
            vectors=vectors,
            method=MethodRecord(
                name="benchmark",
                settings={"arm": arm.name},
                libraries={},
                seed=seed,
                data_sha256="0" * 64,
            ),
            residual_norms=dict(enumerate(seen.unprefixed.residual_norms.tolist())),
        ),
    )


def _blocks(seen: Seen, arm: Arm, captured: Captured, tokens: NDArray[np.int64]) -> list[int]:
    """Returns the blocks that an arm steers, ranked at the chosen token.

    Several blocks may have the same enrichment; attention to the prefix then decides.
    """
    if arm.blocks == "all":
        return seen.layers
    end, count = arm.blocks.split()
    if captured.enrichment is None:
        raise ValueError("the prefixed prompts were captured without a permutation test")
    score = captured.enrichment.score[np.arange(len(tokens)), tokens]
    attention = soft_labels(captured.attention, tokens).mean(axis=0)
    ranked = sorted(seen.layers, key=lambda layer: (-score[layer], -attention[layer]))
    return sorted(ranked[: int(count)] if end == "top" else ranked[-int(count) :])


def _rows(
    seen: Seen, captured: Captured, arm: Arm, tokens: NDArray[np.int64], layers: Sequence[int]
) -> list[LabelledRows]:
    sides = (captured, seen.unprefixed)
    order, positive = interleave(*(len(side.hidden) for side in sides))
    soft = np.concatenate([soft_labels(side.attention, tokens) for side in sides])[order]
    return [
        LabelledRows(
            f"{arm.name}, block {layer}",
            np.concatenate([side.hidden[:, layer, tokens[layer]] for side in sides])[order],
            soft[:, layer] if arm.labels == "soft" else hard_labels(positive),
            positive,
        )
        for layer in layers
    ]


def _options(arm: Arm, seed: int) -> FitOptions:
    if arm.published:
        return FitOptions(seed, compat=True)
    method = FULL_METHOD
    rfm = RfmOptions(
        ridge=method.rfm_ridge,
        center_gradients=method.rfm_center_gradients,
        iterations=method.rfm_iterations,
        bandwidths=method.rfm_bandwidths,
    )
    return FitOptions(seed, rfm=rfm)
