"""``convert select-features``: reads examples, runs the model, chooses features, writes their pack and the report."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.activations import ActivationReader
from vllm_steer.offline.convert.model import MEASURED, NormSource, model_of, norms_of
from vllm_steer.offline.convert.sae import NamedFeature, for_model, write_features
from vllm_steer.offline.convert.sae_files import (
    MAX_FEATURES,
    Features,
    SaeOptions,
    check_alive,
    read_features,
)
from vllm_steer.offline.convert.selection import (
    PRESETS,
    Chosen,
    choose,
    read_examples,
    report_json,
)
from vllm_steer.offline.files import write_atomically
from vllm_steer.offline.models.loading import load_config, load_model
from vllm_steer.offline.train.directions import Target
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.request.positions import parse_positions


@dataclass(frozen=True)
class Selection:
    """What is chosen, and how.

    Attributes:
        preset: One of :data:`PRESETS`.
        examples: File of JSON lines.
        count: Most features.
        dtype: Data type that the model runs in.
        device: Its device; None for CUDA where there is one.
        batch_size: Examples in a forward pass.
        seed: Seed of random tokens.
    """

    preset: str
    examples: Path
    count: int = 10
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 8
    seed: int = 0


def select_features(
    path: str | os.PathLike[str],
    selection: Selection,
    target: Target,
    model_path: str | os.PathLike[str],
    options: SaeOptions,
    report: Path | None = None,
    norms: NormSource = MEASURED,
) -> tuple[SteeringPack, list[Chosen]]:
    """Chooses features of an autoencoder and writes their pack; their names are their numbers.

    Args:
        path: A folder of SAELens, or ``params.npz`` of Gemma Scope or its folder.
        selection: What is chosen.
        target: The pack that is written.
        model_path: Checkpoint directory or Hugging Face id of the model that it was trained on.
        options: What its files do not say.
        report: File of the report in JSON; None for none.
        norms: Where the model's residual norms are taken from, and the format of prompts.

    Returns:
        The pack, and the features, the best first.

    Raises:
        ConversionError: A file is not what it should be, or no feature does what the preset looks for.
        ExtractionError: The examples or the model cannot be read.
        PackError: The pack cannot be written.
    """
    if not 1 <= selection.count <= MAX_FEATURES or selection.batch_size < 1:
        raise ConversionError(f"--count must be 1 to {MAX_FEATURES}, and --batch-size at least 1")
    preset = PRESETS[selection.preset]
    lines = read_examples(selection.examples, selection.preset)
    identity = model_of(model_path, norms.chat)
    features = read_features(Path(path), None, identity, for_model(options, model_path))
    _, tokenizer = load_config(model_path, norms.chat)
    loaded = load_model(model_path, selection.dtype, selection.device)
    reader = ActivationReader(loaded, features, selection.batch_size)
    chosen = choose(
        preset.measure(reader, tokenizer, lines, selection.seed), features, selection.count
    )
    kept = _some(features, [each.feature for each in chosen])
    check_alive(Path(path), kept)
    if report is not None:
        text = report_json(selection.preset, chosen, features, len(lines), selection.seed)
        try:
            write_atomically(report, text)
        except OSError as error:
            raise ConversionError(
                f"--report: {report} cannot be written ({error.strerror})"
            ) from error
    settings: dict[str, JsonValue] = {
        "form": "sparse_autoencoder",
        "preset": selection.preset,
        "examples": len(lines),
        "count": selection.count,
        "seed": selection.seed,
        "residual_norms": "measured" if norms.given is None else "given",
        **norms.chat.model_dump(),
    }
    named = [
        NamedFeature(
            each.feature,
            str(each.feature),
            each.scale,
            {"score": each.score, "mean": each.mean, "mean_without": each.mean_without},
        )
        for each in chosen
    ]
    residual_norms = norms_of(model_path, norms, identity)
    positions = parse_positions(preset.positions)
    pack = write_features(kept, named, target, identity, residual_norms, settings, positions)
    return pack, chosen


def _some(features: Features, ids: list[int]) -> Features:
    at = np.array(ids)
    return Features(
        features.format,
        features.sha256,
        features.layer,
        features.hook,
        features.model_name,
        tuple(ids),
        features.encoder[at],
        features.bias[at],
        features.threshold[at],
        features.decoder[at],
    )
