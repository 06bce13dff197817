"""Packs of every arm of ``benchmarks.methods``, all from one set of forward passes.

This module alone touches the extraction. The prompts of a concept run once; tokens, labels,
estimators and choices of blocks differ afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from tqdm import tqdm

from offline.capture import Captured, capture
from offline.demo.concepts import prefix
from offline.demo.packs import FULL_METHOD
from offline.estimators import Doubles, RfmOptions, Rows, fit_direction, pearson, split_point
from offline.labels import choose_tokens, fixed_tokens, hard_labels, interleave, soft_labels
from offline.models import load_model, model_identity
from offline.prompts import count_candidates, render_prompt
from vllm_steer.pack import DirectionRecord, MethodRecord, ModelIdentity, SteeringPack, write_pack

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

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_INVERSE_PENALTIES = (1000.0, 10.0, 1.0, 0.1)
_BATCH = 64


@dataclass(frozen=True)
class Arm:
    """One way to learn directions.

    Attributes:
        token: ``attention``, or a fixed negative index.
        estimator: Name of the estimator.
        labels: ``soft`` or ``hard``.
        blocks: ``all``, or ``top 2``, ``bottom 2`` by attention to the prefix.
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
    model, tokenizer = load_model(model_path, "float32", "cpu")
    candidates = count_candidates(tokenizer)

    def run(statements: Sequence[str], wanted: str) -> Captured:
        prompts = [render_prompt(tokenizer, statement, wanted) for statement in statements]
        return capture(model, prompts, candidates=candidates, batch_size=_BATCH)

    prefixed = {
        concept: run(positives, prefix(concept)) for concept in tqdm(concepts, desc="prompts")
    }
    identity = model_identity(model_path, model, tokenizer)
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
            [_fit(rows, arm, seed) for rows in _rows(seen, captured, arm, tokens, layers)]
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
    )


def _blocks(seen: Seen, arm: Arm, captured: Captured, tokens: NDArray[np.int64]) -> list[int]:
    """Returns the blocks that an arm steers, ranked by the chosen token's attention to the prefix."""
    if arm.blocks == "all":
        return seen.layers
    end, count = arm.blocks.split()
    score = soft_labels(captured.attention, tokens).mean(axis=0)
    ranked = sorted(seen.layers, key=lambda layer: -score[layer])
    return sorted(ranked[: int(count)] if end == "top" else ranked[-int(count) :])


def _rows(
    seen: Seen, captured: Captured, arm: Arm, tokens: NDArray[np.int64], layers: Sequence[int]
) -> list[Rows]:
    sides = (captured, seen.unprefixed)
    order, positive = interleave(*(len(side.hidden) for side in sides))
    soft = np.concatenate([soft_labels(side.attention, tokens) for side in sides])[order]
    return [
        Rows(
            f"{arm.name}, block {layer}",
            np.concatenate([side.hidden[:, layer, tokens[layer]] for side in sides])[order],
            soft[:, layer] if arm.labels == "soft" else hard_labels(positive),
            positive,
        )
        for layer in layers
    ]


def _fit(rows: Rows, arm: Arm, seed: int) -> NDArray[np.float32]:
    if arm.estimator in _LINEAR:
        hidden = rows.hidden.astype(np.float64)
        states = hidden if arm.published or arm.estimator == "pca" else _centred_unit_rows(hidden)
        return _oriented(_LINEAR[arm.estimator](states, rows), rows)
    demo = RfmOptions(
        ridge=FULL_METHOD.rfm_ridge,
        center_gradients=FULL_METHOD.rfm_center_gradients,
        iterations=FULL_METHOD.rfm_iterations,
        bandwidths=FULL_METHOD.rfm_bandwidths,
    )
    return fit_direction(arm.estimator, rows, seed, RfmOptions() if arm.published else demo).vector


def _centred_unit_rows(hidden: Doubles) -> Doubles:
    unit = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    centred: Doubles = unit - unit[: split_point(len(unit))].mean(axis=0)
    return centred


def _ridge(states: Doubles, rows: Rows) -> Doubles:
    """Least squares without intercept; the penalty by validation error."""
    train = split_point(len(states))
    labels = rows.labels.astype(np.float64)
    fits = [
        Ridge(alpha=alpha, fit_intercept=False).fit(states[:train], labels[:train])
        for alpha in _RIDGES
    ]
    errors = [mean_squared_error(labels[train:], fit.predict(states[train:])) for fit in fits]
    return np.asarray(fits[int(np.argmin(errors))].coef_)


def _logistic(states: Doubles, rows: Rows) -> Doubles:
    """Logistic regression without intercept; the penalty by validation log-loss."""
    train = split_point(len(states))
    fits = [
        LogisticRegression(C=c, solver="liblinear", fit_intercept=False, tol=1e-3).fit(
            states[:train], rows.positive[:train]
        )
        for c in _INVERSE_PENALTIES
    ]
    losses = [log_loss(rows.positive[train:], fit.predict_proba(states[train:])) for fit in fits]
    return np.asarray(fits[int(np.argmin(losses))].coef_[0])


def _pca(states: Doubles, rows: Rows) -> Doubles:
    """First principal axis of the uncentred differences of pairs, prefixed less unprefixed."""
    train = split_point(len(states))
    hidden, positive = states[:train], rows.positive[:train]
    pairs = min(positive.sum(), (~positive).sum())
    axes: Doubles = np.linalg.svd(hidden[positive][:pairs] - hidden[~positive][:pairs])[2]
    return axes[0]


_LINEAR: Mapping[str, Callable[[Doubles, Rows], Doubles]] = {
    "ridge": _ridge,
    "logistic": _logistic,
    "pca": _pca,
}


def _oriented(vector: Doubles, rows: Rows) -> NDArray[np.float32]:
    sign = np.sign(pearson(rows.hidden.astype(np.float64) @ vector, rows.labels))
    return (sign * vector / np.linalg.norm(vector)).astype(np.float32)
