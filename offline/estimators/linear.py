"""The paper's baseline estimators: ridge, logistic, PCA and the difference of means.

Ridge and logistic regression see rows of unit norm centred by the training mean, as the recursive
feature machine does. Under ``compat`` they see raw rows and have no intercept, as in the authors' code.
If too few rows are left for validation (``labelled_rows.LEAST_VALIDATION``) their regularisation strength is
1.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.estimators.labelled_rows import (
    Direction,
    Doubles,
    LabelledRows,
    centred_unit_rows,
    pearson,
    training_rows,
    unit_rows,
)

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
INVERSE_STRENGTHS = (1000.0, 10.0, 1.0, 0.1)
# Of both, without a choice.
_DEFAULT = (1.0,)


def ridge(rows: LabelledRows, compat: bool) -> Direction:
    """Coefficients of a ridge regression of the labels, for the λ with the smallest validation error.

    scikit-learn solves the dual problem where the hidden size exceeds the number of rows.

    Args:
        rows: The rows of one block; soft or hard labels.
        compat: See the module.
    """
    train = training_rows(len(rows.labels))
    states = _states(rows, train, compat)
    labels = rows.labels.astype(np.float64)
    fits = []
    held = train < len(labels)
    for strength in RIDGES if held else _DEFAULT:
        model = Ridge(alpha=strength, fit_intercept=not compat, solver="cholesky")
        model.fit(states[:train], labels[:train])
        error = mean_squared_error(labels[train:], model.predict(states[train:])) if held else 0.0
        fits.append((error, strength, model.coef_))
    _, strength, coefficients = min(fits, key=lambda fit: fit[0])
    return _direction(coefficients, states, rows, train, {"ridge": strength}, len(fits))


def logistic(rows: LabelledRows, seed: int, compat: bool) -> Direction:
    """Coefficients of a logistic regression of prefixed against unprefixed prompts.

    The strength with the smallest validation log-loss is used; labels must be hard.

    Args:
        rows: The rows of one block.
        seed: Seed of the solver.
        compat: See the module.

    Raises:
        ExtractionError: The labels are soft.
    """
    if not np.array_equal(rows.labels, rows.positive):
        raise ExtractionError("logistic regression needs hard labels; set labels to 'hard'")
    train = training_rows(len(rows.labels))
    states = _states(rows, train, compat)
    fits = []
    held = train < len(rows.labels)
    for strength in INVERSE_STRENGTHS if held else _DEFAULT:
        model = LogisticRegression(
            C=strength,
            fit_intercept=False,
            solver="liblinear",
            tol=1e-3,
            max_iter=1000,
            random_state=seed,
        )
        model.fit(states[:train], rows.positive[:train])
        loss = 0.0
        if held:
            chances = model.predict_proba(states[train:])[:, 1]
            loss = log_loss(rows.positive[train:], chances, labels=[False, True])
        fits.append((loss, strength, model.coef_[0]))
    _, strength, coefficients = min(fits, key=lambda fit: fit[0])
    return _direction(coefficients, states, rows, train, {"inverse_strength": strength}, len(fits))


def pca(rows: LabelledRows, seed: int) -> Direction:
    """First principal axis of the differences between prefixed and unprefixed prompts, uncentred.

    Raw training rows are paired in their order; an unpaired rest is left out.

    Args:
        rows: The rows of one block.
        seed: Seed of the iterative solver's start.
    """
    train = training_rows(len(rows.labels))
    hidden, positive = rows.hidden[:train].astype(np.float64), rows.positive[:train]
    pairs = min(int(positive.sum()), int((~positive).sum()))
    differences = hidden[positive][:pairs] - hidden[~positive][:pairs]
    if not differences.any():
        raise ExtractionError("prefixed and unprefixed prompts have the same hidden states")
    svd = TruncatedSVD(n_components=1, algorithm="arpack", random_state=seed).fit(differences)
    return _direction(svd.components_[0], rows.hidden.astype(np.float64), rows, train, {})


def mean_difference(rows: LabelledRows, held_out: bool) -> Direction:
    """Difference of the raw rows' means with and without prefix.

    Args:
        rows: The rows of one block.
        held_out: Whether the means use only the training rows.
    """
    hidden = rows.hidden.astype(np.float64)
    train = training_rows(len(hidden)) if held_out else len(hidden)
    with_prefix, without = _means(hidden[:train], rows.positive[:train])
    return _difference(with_prefix - without, hidden, rows, train)


def unit_mean_difference(rows: LabelledRows, held_out: bool) -> Direction:
    """Unit difference of the two means of unit rows, as in Angular Steering."""
    hidden = unit_rows(rows.hidden.astype(np.float64))
    train = training_rows(len(hidden)) if held_out else len(hidden)
    means = unit_rows(np.stack(_means(hidden[:train], rows.positive[:train])))
    return _difference(means[0] - means[1], hidden, rows, train)


def _means(hidden: Doubles, positive: NDArray[np.bool_]) -> tuple[Doubles, Doubles]:
    return hidden[positive].mean(axis=0), hidden[~positive].mean(axis=0)


def _difference(difference: Doubles, hidden: Doubles, rows: LabelledRows, train: int) -> Direction:
    if not difference.any():
        raise ExtractionError("prefixed and unprefixed prompts have the same mean hidden state")
    found = _direction(difference, hidden, rows, train, {})
    return replace(found, length=float(np.linalg.norm(difference)))


def _states(rows: LabelledRows, train: int, compat: bool) -> Doubles:
    return rows.hidden.astype(np.float64) if compat else centred_unit_rows(rows.hidden, train)


def _direction(
    vector: Doubles,
    states: Doubles,
    rows: LabelledRows,
    train: int,
    choice: dict[str, float],
    candidates: int = 1,
) -> Direction:
    """Returns the vector at unit norm, with its correlation on the validation rows, if any."""
    norm = np.linalg.norm(vector)
    if not norm > 0:
        raise ExtractionError("the fitted coefficients are zero or not finite")
    unit = vector / norm
    held = len(rows.labels) - train
    r = abs(pearson(states[train:] @ unit, rows.labels[train:])) if held else float("nan")
    return Direction(
        unit.astype(np.float32), r, choice, validation_rows=held, candidates=candidates
    )
