"""Figures of an extraction, in the pack's directory: of every block and candidate token, for plots."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vllm_steer.errors import PackError
from vllm_steer.packs.pack import replace_file

FIGURES_FILE = "extraction_figures.safetensors"

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Figures:
    """Figures of all directions of a pack.

    Attributes:
        directions: Names, in the order of the first dimension.
        arrays: Name of the figure to ``[directions, blocks, candidates]``, float32; the last
            candidate is the prompt's last token. ``attention_mean`` and ``attention_max`` over
            prompts; where the enrichment was tested ``enrichment`` (the share of prompts and heads
            with p < 0.01), ``enrichment_p``, ``enrichment_q`` (false discovery rate over blocks) and
            ``enriched_heads`` (share of heads at a false discovery rate of 0.05). These three hold for a
            token that is named before; the manifest's hold for the one that attention chose.
    """

    directions: Sequence[str]
    arrays: Mapping[str, Floats]


def write_figures(pack: str | os.PathLike[str], figures: Figures) -> None:
    """Writes the figures into a pack's directory, atomically."""
    metadata = {"directions": json.dumps(list(figures.directions))}
    arrays = {name: np.ascontiguousarray(array) for name, array in figures.arrays.items()}
    replace_file(Path(pack) / FIGURES_FILE, save(arrays, metadata=metadata))


def read_figures(pack: str | os.PathLike[str]) -> Figures:
    """Reads the figures of a pack.

    Raises:
        PackError: The pack has no figures, or they cannot be read.
    """
    file = Path(pack) / FIGURES_FILE
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = json.loads(tensors.metadata()["directions"])
            return Figures(names, {key: tensors.get_tensor(key) for key in tensors.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PackError(
            f"{file}: no readable figures of an extraction ({error}); extract the pack again"
        ) from error
