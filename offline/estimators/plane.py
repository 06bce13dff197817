"""The plane of Angular Steering: two axes from the blocks' candidate directions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from vllm_steer.errors import ExtractionError

Floats = NDArray[np.float32]

# The sine below which two axes are refused as a plane by the server.
_LEAST_SINE = 1e-3


def steering_plane(candidates: Floats) -> tuple[Floats, Floats]:
    """Returns the axes of one plane for all blocks, as the authors of arXiv 2510.26243 choose them.

    Args:
        candidates: ``[blocks, hidden_size]``, float32; a difference of means of each block.

    Returns:
        first: ``[hidden_size]``, unit norm; the candidate with the largest mean cosine to all of them.
        second: Likewise; the first principal component of the candidates about their mean, whose sign is
        arbitrary. It need not be orthogonal to the first.

    Raises:
        ExtractionError: The candidates do not span two directions.
    """
    found = candidates.astype(np.float64)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    first = unit[(unit @ unit.T).mean(axis=1).argmax()]
    if len(found) < 2 or not np.ptp(found, axis=0).any():
        raise ExtractionError("a plane needs the directions of two layers that differ")
    second = PCA(n_components=1, svd_solver="full").fit(found).components_[0]
    if np.linalg.norm(second - (first @ second) * first) < _LEAST_SINE:
        raise ExtractionError("the layers' directions lie on one line and span no plane")
    return first.astype(np.float32), second.astype(np.float32)
