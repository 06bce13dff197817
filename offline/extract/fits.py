"""Between settings and the fits of a concept's blocks: what a fit is told, and what is kept of the fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_steer.offline.estimators.fit import FitOptions
from vllm_steer.offline.estimators.labelled_rows import Direction
from vllm_steer.offline.estimators.plane import steering_plane
from vllm_steer.offline.estimators.rfm import RfmOptions
from vllm_steer.offline.extract.methods import METHODS
from vllm_steer.offline.extract.settings import ExtractionSettings

Floats = NDArray[np.float32]


def fit_options(settings: ExtractionSettings) -> FitOptions:
    """Returns what the settings say of a fit."""
    return FitOptions(
        seed=settings.seed,
        compat=settings.compat,
        held_out=settings.held_out,
        rfm=RfmOptions(
            ridge=settings.rfm_ridge,
            center_gradients=settings.rfm_center_gradients,
            iterations=settings.rfm_iterations,
            bandwidths=settings.rfm_bandwidths,
            solver=settings.rfm_solver,
        ),
    )


def fitted_vectors(
    settings: ExtractionSettings, found: Sequence[Direction]
) -> tuple[Floats, Floats | None]:
    """Returns the vectors of the blocks, and the second axes where the method has a plane."""
    vectors = np.stack([direction.vector for direction in found])
    lengths = np.array([[direction.length] for direction in found], dtype=np.float32)
    if METHODS[settings.method].plane:
        first, second = steering_plane(vectors * lengths)
        return np.stack([first] * len(found)), np.stack([second] * len(found))
    return (vectors if settings.unit else vectors * lengths), None


def validation_metrics(found: Sequence[Direction]) -> dict[str, Any]:
    """Returns what a manifest says of the validation of one concept's directions, a list entry for each.

    ``validation_r`` is null where nothing was held back; else it is the best of
    ``validation_candidates`` on the same ``validation_rows``.
    """
    return {
        "validation_r": [None if np.isnan(one.validation_r) else one.validation_r for one in found],
        "validation_rows": [one.validation_rows for one in found],
        "validation_candidates": [one.candidates for one in found],
    }
