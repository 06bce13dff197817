"""Labelled hidden states to one unit vector: RFM and the difference of means.

Every estimator takes the rows of one block, in the interleaved order of ``labels.interleave``, and
runs in one thread, so that its result depends on neither the machine's cores nor its neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from xrfm.rfm_src import RFM

from offline.labels import min_max
from vllm_steer.errors import ExtractionError

Doubles = NDArray[np.float64]

# Above this size the top eigenvector comes from Lanczos iterations.
DENSE_EIGEN_SIZE = 512


@dataclass(frozen=True, eq=False)
class Rows:
    """Training and validation rows of one block.

    Attributes:
        name: What the rows belong to, for error messages.
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
        validation_r: |Pearson correlation| of labels and projections on the validation rows.
        choice: What the estimator chose on the way, such as the bandwidth.
    """

    vector: NDArray[np.float32]
    validation_r: float
    choice: Mapping[str, Any]


@dataclass(frozen=True)
class RfmOptions:
    """What the recursive feature machine leaves open.

    Attributes:
        ridge: Added to the kernel matrix's diagonal. A small one fits the differences of soft
            labels among the prefixed prompts too, and where prefixed and unprefixed prompts lie
            far apart those differences then rule the gradients.
        center_gradients: Whether the mean gradient is taken out before the outer products are
            averaged, as the authors do. That takes out the direction in which labels rise
            everywhere, which is the concept itself where the two kinds of prompts lie far apart.
        iterations: Matrices M_1 to M_n are candidates. The identity that the recursion starts from
            has no top eigenvector, only a random one, and is none. Each iteration attends more to
            the directions along which the labels change fastest.
        bandwidths: Bandwidths of the kernel to try. A small one sees near neighbours alone, and so
            the differences among the prefixed prompts more than those from the others.
    """

    ridge: float = 1e-3
    center_gradients: bool = True
    iterations: int = 9
    bandwidths: tuple[float, ...] = (1.0, 10.0, 100.0)


AUTHORS = RfmOptions()


def split_point(rows: int) -> int:
    """Returns the number of training rows: a fifth, at most 256, is left for validation.

    The number is even, so that interleaved rows split into whole pairs.
    """
    train = rows - min(int(0.2 * rows), 256)
    return train + train % 2


def fit_direction(
    estimator: str, rows: Rows, seed: int, options: RfmOptions = AUTHORS
) -> Direction:
    """Fits one direction in one thread and points it towards the concept.

    Args:
        estimator: A key of ``ESTIMATORS``.
        rows: The rows of one block.
        seed: Seed of the estimator's randomness.
        options: What the recursive feature machine leaves open.

    Raises:
        ExtractionError: The labels or hidden states are constant, or no direction correlates with
            the labels; the message begins with the name of the rows.
    """
    try:
        with _single_thread():
            return _signed(ESTIMATORS[estimator](_checked(rows), seed, options), rows)
    except (ExtractionError, RuntimeError, ValueError) as error:  # LinAlgErrors are of the latter
        raise ExtractionError(f"{rows.name}: {error}") from error


def rfm(rows: Rows, seed: int, options: RfmOptions) -> Direction:
    """Top eigenvector of the best AGOP matrix of a recursive feature machine.

    Rows are scaled to unit norm and centred by the training mean; labels are scaled to [0, 1]. Of
    all bandwidths, both ways to normalise the centred rows, and all iterations, the eigenvector
    with the largest |Pearson r| on the validation rows wins; a later configuration wins a tie.

    The recursion runs in float32, as the authors' does: in float64 it takes 1.75 times as long and,
    on the demo model, gives vectors of cosine at least 0.9999 to these.

    Raises:
        ExtractionError: No iteration of any configuration gave a usable matrix.
    """
    hidden = _unit_rows(rows.hidden.astype(np.float64))
    labels = min_max(rows.labels.astype(np.float64)).astype(np.float32)
    train = split_point(len(labels))
    centred = hidden - hidden[:train].mean(axis=0)
    best: Direction | None = None
    for bandwidth, normalise in itertools.product(options.bandwidths, (True, False)):
        states = (_unit_rows(centred) if normalise else centred).astype(np.float32)
        matrices = agop_matrices(states, labels, train, bandwidth, options)
        found = _best_iteration(states, labels, train, matrices, seed)
        if found and (best is None or found.validation_r >= best.validation_r):
            choice = {"bandwidth": bandwidth, "normalise": normalise, **found.choice}
            best = Direction(found.vector, found.validation_r, choice)
    if best is None:
        raise ExtractionError("no RFM configuration gave a usable matrix")
    return best


def mean_difference(rows: Rows, seed: int, options: RfmOptions) -> Direction:
    """Difference of the training rows' means with and without prefix; raw rows, no randomness."""
    del seed, options
    train = split_point(len(rows.labels))
    hidden, positive = rows.hidden[:train].astype(np.float64), rows.positive[:train]
    difference = hidden[positive].mean(axis=0) - hidden[~positive].mean(axis=0)
    norm = np.linalg.norm(difference)
    if norm == 0:
        raise ExtractionError("prefixed and unprefixed prompts have the same mean hidden state")
    vector = difference / norm
    r = pearson(rows.hidden[train:].astype(np.float64) @ vector, rows.labels[train:])
    return Direction(vector.astype(np.float32), abs(r), {})


ESTIMATORS: Mapping[str, Callable[[Rows, int, RfmOptions], Direction]] = MappingProxyType(
    {"rfm": rfm, "mean_difference": mean_difference}
)


def agop_matrices(
    states: NDArray[Any],
    labels: NDArray[Any],
    train: int,
    bandwidth: float,
    options: RfmOptions = AUTHORS,
) -> list[torch.Tensor]:
    """Returns M_1 … M_n of one RFM run with a Laplace kernel, each ``[hidden_size, hidden_size]``.

    Args:
        states: ``[rows, hidden_size]``, float32 or float64, centred; the first ``train`` rows are
            learned from. The matrices have the same dtype.
        labels: ``[rows]``, the same dtype.
        train: Number of training rows.
        bandwidth: Bandwidth of the kernel.
        options: Ridge, centring and n.
    """
    x, y = torch.from_numpy(states), torch.from_numpy(labels)
    # l2_high_dim uses M itself, as the authors do, where l2 takes a matrix square root each time.
    model = RFM(kernel="l2_high_dim", bandwidth=bandwidth, exponent=1.0, device="cpu")
    matrices: list[torch.Tensor] = model.fit(
        (x[:train], y[:train]),
        (x[train:], y[train:]),
        iters=options.iterations,
        method="lstsq",
        reg=options.ridge,
        center_grads=options.center_gradients,
        return_Ms=True,
        early_stop_rfm=False,
        verbose=False,
    )
    return matrices


def top_eigenvector(matrix: Doubles, seed: int) -> Doubles:
    """Returns the unit eigenvector of the largest eigenvalue of a symmetric matrix, float64."""
    size = len(matrix)
    vectors: Doubles
    if size <= DENSE_EIGEN_SIZE:
        _, vectors = scipy.linalg.eigh(matrix, subset_by_index=[size - 1, size - 1])
    else:
        start = np.random.default_rng(seed).standard_normal(size)
        _, vectors = scipy.sparse.linalg.eigsh(matrix, k=1, which="LA", v0=start)
    return vectors[:, 0]


def pearson(projection: NDArray[Any], labels: NDArray[Any]) -> float:
    """Returns Pearson's correlation of two ``[rows]`` arrays; NaN when either is constant."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (projection, labels))
    a, b = a - a.mean(), b - b.mean()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale else float("nan")


def _best_iteration(
    states: NDArray[Any],
    labels: NDArray[Any],
    train: int,
    matrices: Sequence[torch.Tensor],
    seed: int,
) -> Direction | None:
    """Returns the best of the iterations' eigenvectors, the first of equals; None if all fail."""
    best: Direction | None = None
    for iteration, matrix in enumerate(matrices, start=1):
        if not torch.isfinite(matrix).all() or not matrix.any():
            continue
        vector = top_eigenvector(matrix.double().numpy(), seed)
        r = abs(pearson(states[train:] @ vector, labels[train:]))
        if np.isfinite(r) and (best is None or r > best.validation_r):
            best = Direction(vector.astype(np.float32), r, {"iteration": iteration})
    return best


def _unit_rows(hidden: Doubles) -> Doubles:
    norms = np.linalg.norm(hidden, axis=1, keepdims=True)
    unit: Doubles = hidden / np.where(norms == 0, 1.0, norms)
    return unit


def _checked(rows: Rows) -> Rows:
    if not (rows.positive.any() and not rows.positive.all()):
        raise ExtractionError("both prefixed and unprefixed prompts are needed")
    if split_point(len(rows.labels)) > len(rows.labels) - 2:
        raise ExtractionError(f"{len(rows.labels)} rows are too few to learn and validate from")
    if np.ptp(rows.labels) == 0:
        raise ExtractionError("all labels are equal: the chosen token pays the prefix no attention")
    return rows


def _signed(found: Direction, rows: Rows) -> Direction:
    """Returns the direction turned so that projections and labels of all rows correlate.

    The authors take the last block's labels for every block; this takes the block's own.
    """
    r = pearson(rows.hidden.astype(np.float64) @ found.vector, rows.labels)
    if not np.isfinite(r) or r == 0:
        raise ExtractionError("the direction found does not correlate with the labels")
    return Direction(np.sign(r).astype(np.float32) * found.vector, found.validation_r, found.choice)


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
