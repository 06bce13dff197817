"""Labelled hidden states to one unit vector, by a given estimator.

Every estimator takes the rows of one block and runs in one thread, so that its result does not depend on the
machine's cores or other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.estimators.labelled_rows import (
    Direction,
    LabelledRows,
    pearson,
    split_point,
)
from vllm_steer.offline.estimators.linear import (
    logistic,
    mean_difference,
    pca,
    ridge,
    unit_mean_difference,
)
from vllm_steer.offline.estimators.rfm import AUTHORS, RfmOptions, rfm


@dataclass(frozen=True)
class FitOptions:
    """Everything besides its rows that a fit depends on.

    Attributes:
        seed: Seed of the estimator's randomness.
        compat: Whether ridge and logistic regression see raw rows, as in the authors' code.
        held_out: Whether some rows are held out for validation; else differences of means use all rows.
        rfm: Options of the recursive feature machine.
    """

    seed: int = 0
    compat: bool = False
    held_out: bool = True
    rfm: RfmOptions = AUTHORS


DEFAULTS = FitOptions()

ESTIMATORS: Mapping[str, Callable[[LabelledRows, FitOptions], Direction]] = MappingProxyType(
    {
        "rfm": lambda rows, options: rfm(rows, options.seed, options.rfm),
        "ridge": lambda rows, options: ridge(rows, options.compat),
        "logistic": lambda rows, options: logistic(rows, options.seed, options.compat),
        "pca": lambda rows, options: pca(rows, options.seed),
        "mean_difference": lambda rows, options: mean_difference(rows, options.held_out),
        "unit_mean_difference": lambda rows, options: unit_mean_difference(rows, options.held_out),
    }
)


def fit_direction(estimator: str, rows: LabelledRows, options: FitOptions = DEFAULTS) -> Direction:
    """Fits one direction in one thread and points it towards the concept.

    Args:
        estimator: A key of ``ESTIMATORS``.
        rows: The rows of one block.
        options: The other options of the fit.

    Raises:
        ExtractionError: The labels or hidden states are constant, or no direction correlates with
            the labels; the message begins with the name of the rows.
    """
    try:
        with _single_thread():
            return _signed(ESTIMATORS[estimator](_checked(rows, options), options), rows)
    except (ExtractionError, RuntimeError, ValueError) as error:  # LinAlgErrors are of the latter
        raise ExtractionError(f"{rows.name}: {error}") from error


def _checked(rows: LabelledRows, options: FitOptions) -> LabelledRows:
    if not (rows.positive.any() and not rows.positive.all()):
        raise ExtractionError("both prefixed and unprefixed prompts are needed")
    if options.held_out and split_point(len(rows.labels)) > len(rows.labels) - 2:
        raise ExtractionError(
            f"{len(rows.labels)} rows are too few to learn and validate from; give more statements of each side"
        )
    if np.ptp(rows.labels) == 0:
        raise ExtractionError("all labels are equal: the chosen token pays the prefix no attention")
    return rows


def _signed(found: Direction, rows: LabelledRows) -> Direction:
    """Returns the direction with the sign for which projections and labels of all rows correlate.

    The authors take the last block's labels for every block; this uses each block's own.
    """
    r = pearson(rows.hidden.astype(np.float64) @ found.vector, rows.labels)
    if not np.isfinite(r) or r == 0:
        raise ExtractionError("the direction found does not correlate with the labels")
    return replace(found, vector=np.sign(r).astype(np.float32) * found.vector)


@contextmanager
def _single_thread() -> Iterator[None]:
    """One thread for torch and for the BLAS under numpy and scipy, as found afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)
