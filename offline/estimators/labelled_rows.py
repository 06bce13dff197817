"""Input and output of estimators: labelled rows of one block, and a direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

# Number of validation rows below which nothing is chosen by them and none are held out. On pure noise the
# best of the recursive feature machine's 54 candidates has |r| of 1.0 on 2 rows, 0.93 on 4, 0.77 on 6, 0.5 on
# 8.
LEAST_VALIDATION = 8


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Training and validation rows of one block, in the order of ``labels.interleave``.

    Attributes:
        name: Name of the rows, for error messages.
        hidden: ``[rows, hidden_size]``, float32; raw hidden states.
        labels: ``[rows]``, float32; soft or hard.
        positive: ``[rows]``, bool; whether the row's prompt had the prefix.
    """

    name: str
    hidden: NDArray[np.float32]
    labels: NDArray[np.float32]
    positive: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Direction:
    """A learned vector.

    Attributes:
        vector: ``[hidden_size]``, float32, unit norm, pointing towards the concept.
        validation_r: |Pearson correlation| of labels and projections on the validation rows; NaN if all rows
            were learned from. With several candidates it is the best one's on the rows used for the choice,
            so higher than on others.
        choice: Choices of the estimator, such as the bandwidth.
        length: Length of the difference of means; 1 for estimators without a length.
        validation_rows: Number of validation rows.
        candidates: Number of candidates that the validation rows chose among; 1 without a choice.
    """

    vector: NDArray[np.float32]
    validation_r: float
    choice: Mapping[str, Any]
    length: float = 1.0
    validation_rows: int = 0
    candidates: int = 1


def split_point(rows: int) -> int:
    """Returns the number of training rows: a fifth, at most 256, is left for validation.

    The number is even, so that interleaved rows split into whole pairs.
    """
    train = rows - min(int(0.2 * rows), 256)
    return train + train % 2


def training_rows(rows: int) -> int:
    """Returns the number of rows to learn from: all, if fewer than ``LEAST_VALIDATION`` would be left."""
    train = split_point(rows)
    return train if rows - train >= LEAST_VALIDATION else rows


def pearson(projection: NDArray[Any], labels: NDArray[Any]) -> float:
    """Returns Pearson's correlation of two ``[rows]`` arrays; NaN when either is constant."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (projection, labels))
    a, b = a - a.mean(), b - b.mean()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale else float("nan")


def unit_rows(hidden: Doubles) -> Doubles:
    """Returns rows scaled to unit norm; rows of zeros stay."""
    norms = np.linalg.norm(hidden, axis=1, keepdims=True)
    unit: Doubles = hidden / np.where(norms == 0, 1.0, norms)
    return unit


def centred_unit_rows(hidden: NDArray[np.float32], train: int) -> Doubles:
    """Returns rows of unit norm less the mean of the first ``train`` of them, float64."""
    unit = unit_rows(hidden.astype(np.float64))
    centred: Doubles = unit - unit[:train].mean(axis=0)
    return centred
