"""Recursive feature machines: the top eigenvector of the best average gradient outer product.

Two solvers compute the same recursion. ``xrfm`` is the authors' library and works with matrices of
``hidden_size × hidden_size``. ``gram`` uses that each of these matrices is ``GᵀG`` of gradients that
are combinations of the n training rows: G = H X. It keeps H, ``n × n``, and never forms the matrix,
which is faster where the hidden size exceeds the number of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray
from xrfm.rfm_src import RFM

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
from vllm_steer.offline.estimators.labels import min_max

Solver = Literal["auto", "xrfm", "gram"]

# Above this size the top eigenvector comes from Lanczos iterations.
DENSE_EIGEN_SIZE = 512


@dataclass(frozen=True)
class RfmOptions:
    """Options of the recursive feature machine.

    Attributes:
        ridge: Added to the kernel matrix's diagonal. A small one fits the differences of soft
            labels among the prefixed prompts too, and if prefixed and unprefixed prompts lie far apart those
            differences dominate the gradients.
        center_gradients: Whether the mean gradient is subtracted before the outer products are averaged, as
            the authors do. That removes the direction in which labels rise everywhere, which is the concept
            itself if the two kinds of prompts lie far apart.
        iterations: Matrices M_1 to M_n are candidates. The initial identity is not, since its top eigenvector
            is random. Each iteration attends more to the directions along which the labels change fastest.
        bandwidths: Bandwidths of the kernel to try. A small one sees only near neighbours, and so the
            differences among the prefixed prompts more than those from the others.
        solver: ``xrfm``, ``gram``, or ``auto`` for the faster one: ``gram`` where the hidden size
            exceeds the number of training rows.
    """

    ridge: float = 1e-3
    center_gradients: bool = True
    iterations: int = 9
    bandwidths: tuple[float, ...] = (1.0, 10.0, 100.0)
    solver: Solver = "auto"


AUTHORS = RfmOptions()


def rfm(rows: LabelledRows, seed: int, options: RfmOptions = AUTHORS) -> Direction:
    """Top eigenvector of the best AGOP matrix of a recursive feature machine.

    Rows are scaled to unit norm and centred by the training mean; labels are scaled to [0, 1]. Of
    all bandwidths, both ways to normalise the centred rows, and all iterations, the eigenvector
    with the largest |Pearson r| on the validation rows wins; a later configuration wins a tie. If too few
    rows are left for validation, all are learned from, and nothing is chosen: the smallest bandwidth,
    normalised rows and the last iteration are used, which recover a planted direction best from few rows; the
    difference of means recovers it better.

    Args:
        rows: The rows of one block.
        seed: Seed of the iterative eigenvalue solver's start.
        options: Options of the recursion.

    Raises:
        ExtractionError: No iteration of any configuration gave a usable matrix.
    """
    labels = min_max(rows.labels.astype(np.float64))
    train = training_rows(len(labels))
    held = len(labels) - train
    centred = centred_unit_rows(rows.hidden, train)
    solver = options.solver
    if solver == "auto":
        # With 320 training rows, the two are equally fast at a hidden size of 256.
        solver = "gram" if centred.shape[1] > train else "xrfm"
    candidates = gram_eigenvectors if solver == "gram" else xrfm_eigenvectors
    prepared = {True: unit_rows(centred), False: centred}
    best: Direction | None = None
    tried = list(itertools.product(options.bandwidths, (True, False)))
    for bandwidth, normalise in tried if held else [(min(options.bandwidths), True)]:
        states = prepared[normalise]
        vectors = candidates(states, labels, train, bandwidth, options, seed)
        found = (
            _best_iteration(states, labels, train, vectors) if held else _last_iteration(vectors)
        )
        if found and (best is None or found.validation_r >= best.validation_r):
            choice = {"bandwidth": bandwidth, "normalise": normalise, **found.choice}
            best = replace(
                found,
                choice=choice,
                validation_rows=held,
                candidates=len(tried) * options.iterations if held else 1,
            )
    if best is None:
        raise ExtractionError("no RFM configuration gave a usable matrix")
    return best


def xrfm_eigenvectors(
    states: Doubles, labels: Doubles, train: int, bandwidth: float, options: RfmOptions, seed: int
) -> Iterator[Doubles | None]:
    """Yields the top eigenvector of each matrix of ``agop_matrices``; None for one without any.

    The recursion runs in float32, as the authors' does: in float64 it takes 1.75 times as long and,
    on the demo model, gives vectors of cosine at least 0.9999 to these.
    """
    single, y = states.astype(np.float32), labels.astype(np.float32)
    for matrix in agop_matrices(single, y, train, bandwidth, options):
        usable = torch.isfinite(matrix).all() and matrix.any()
        yield top_eigenvector(matrix.double().numpy(), seed) if usable else None


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
    # It requires validation rows, whose results are not used here.
    held = slice(train if train < len(x) else 0, None)
    # l2_high_dim uses M itself, as the authors do, where l2 takes a matrix square root each time.
    model = RFM(kernel="l2_high_dim", bandwidth=bandwidth, exponent=1.0, device="cpu")
    matrices: list[torch.Tensor] = model.fit(
        (x[:train], y[:train]),
        (x[held], y[held]),
        iters=options.iterations,
        method="lstsq",
        reg=options.ridge,
        center_grads=options.center_gradients,
        return_Ms=True,
        early_stop_rfm=False,
        verbose=False,
    )
    return matrices


def gram_eigenvectors(
    states: Doubles, labels: Doubles, train: int, bandwidth: float, options: RfmOptions, seed: int
) -> Iterator[Doubles | None]:
    """Yields the top eigenvector of M_1 … M_n from only n × n matrices, float64.

    With A = X Xᵀ and M = c GᵀG, G = H X: X M Xᵀ = c SᵀS and X M = c SᵀH X, where S = H A. The next
    gradients are G = B X M with B = K̃ diag(α) − diag(K̃ α). The largest entry of GᵀG stands on its
    diagonal, so c is the largest squared norm of a column of H X. The top eigenvector of GᵀG is
    Gᵀw, w that of G Gᵀ = S Hᵀ.

    Args:
        states: ``[rows, hidden_size]``, float64, centred; the first ``train`` rows are learned from.
        labels: ``[rows]``, float64.
        train: Number of training rows.
        bandwidth: Bandwidth of the kernel.
        options: Ridge, centring and n.
        seed: Seed of the Lanczos iterations' start.
    """
    x, y = states[:train], labels[:train]
    gram = x @ x.T
    # The norms of columns tolerate rounding; in float32 their product takes half the time.
    single = x.astype(np.float32)
    products, moved = gram, None  # X M Xᵀ, and W with X M = W X, None for the identity
    for _ in range(options.iterations):
        mixing = _gradient_mixing(products, y, bandwidth, options.ridge)
        if mixing is None:
            yield None
            return
        gradients = mixing if moved is None else mixing @ moved
        if options.center_gradients:
            gradients -= gradients.mean(axis=0)
        largest = float(np.square(gradients.astype(np.float32) @ single).sum(axis=0).max())
        if not (np.isfinite(largest) and largest > 0):
            yield None
            return
        # H is scaled so that M = (H X)ᵀ(H X) has the largest entry 1.
        gradients /= np.sqrt(largest)
        projected = gradients @ gram
        yield _combination(gradients, projected, x, seed)
        products, moved = projected.T @ projected, projected.T @ gradients


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


def _gradient_mixing(
    products: Doubles, labels: Doubles, bandwidth: float, ridge: float
) -> Doubles | None:
    """Returns B, ``[n, n]``, with which the gradients are B X M; None where K + λI is singular.

    Args:
        products: X M Xᵀ, ``[n, n]``.
        labels: ``[n]``.
        bandwidth: Bandwidth of the kernel.
        ridge: λ.
    """
    norms = np.diagonal(products)
    distance = np.sqrt(np.maximum(norms[:, None] + norms - products - products.T, 0))
    np.fill_diagonal(distance, 0)
    kernel = np.exp(distance / -bandwidth)
    try:
        factor = scipy.linalg.cho_factor(kernel + ridge * np.eye(len(kernel)), lower=True)
    except scipy.linalg.LinAlgError:
        return None
    alpha = scipy.linalg.cho_solve(factor, labels)
    ratio = np.divide(kernel, distance, out=np.zeros_like(kernel), where=distance > 0)
    mixing: Doubles = ratio * alpha
    mixing[np.diag_indices_from(mixing)] -= ratio @ alpha
    return mixing


def _combination(gradients: Doubles, projected: Doubles, x: Doubles, seed: int) -> Doubles:
    """Returns the unit vector Xᵀ Hᵀ w, w the top eigenvector of H A Hᵀ."""
    size = len(gradients)
    operator = scipy.sparse.linalg.LinearOperator(
        (size, size), matvec=lambda v: projected @ (gradients.T @ v.ravel()), dtype=np.float64
    )
    start = np.random.default_rng(seed).standard_normal(size)
    _, vectors = scipy.sparse.linalg.eigsh(operator, k=1, which="LA", v0=start)
    vector: Doubles = x.T @ (gradients.T @ vectors[:, 0])
    return vector / np.linalg.norm(vector)


def _best_iteration(
    states: Doubles, labels: Doubles, train: int, vectors: Iterator[Doubles | None]
) -> Direction | None:
    """Returns the best of the iterations' eigenvectors, the first of equals; None if all fail."""
    best: Direction | None = None
    for iteration, vector in enumerate(vectors, start=1):
        if vector is None:
            continue
        r = abs(pearson(states[train:] @ vector, labels[train:]))
        if np.isfinite(r) and (best is None or r > best.validation_r):
            best = Direction(vector.astype(np.float32), r, {"iteration": iteration})
    return best


def _last_iteration(vectors: Iterator[Doubles | None]) -> Direction | None:
    """Returns the last of the iterations' eigenvectors; None if all fail."""
    usable = [(number, v) for number, v in enumerate(vectors, start=1) if v is not None]
    if not usable:
        return None
    iteration, vector = usable[-1]
    return Direction(vector.astype(np.float32), float("nan"), {"iteration": iteration})
