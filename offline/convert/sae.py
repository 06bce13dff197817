"""Features of sparse autoencoders to packs: a decoder row that ``op: "feature"`` writes, an encoder column it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

from pydantic import JsonValue, TypeAdapter, ValidationError

from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.model import MEASURED, NormSource, model_of, norms_of
from vllm_steer.offline.convert.sae_files import Features, SaeOptions, check_alive, read_features
from vllm_steer.offline.extract.records import explain
from vllm_steer.offline.models.loading import read_config
from vllm_steer.offline.train.directions import Direction, Target
from vllm_steer.packs.pack import (
    FormChoice,
    MethodRecord,
    ModelIdentity,
    PackContent,
    PackName,
    SteeringPack,
    write_pack,
)
from vllm_steer.request.positions import AnyPositions, parse_positions

ENCODER: Final = "encoder"
"""Word after the name of a feature: the direction that it reads."""
ALL: Final = parse_positions("all")


@dataclass(frozen=True)
class NamedFeature:
    """A feature that becomes a direction.

    Attributes:
        id: Its number in the autoencoder.
        name: Name of the direction.
        scale: Activation that a request without a scale sets; 0 removes the feature.
        metrics: Figures for people to read.
    """

    id: int
    name: str
    scale: float
    metrics: Mapping[str, JsonValue] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, scale: float) -> NamedFeature:
        """Reads ``ID`` or ``NAME=ID``.

        Raises:
            ConversionError: It is neither.
        """
        name, _, number = text.rpartition("=")
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise ConversionError(
                f"--features: {text!r} must be the number of a feature or NAME=NUMBER, such as 4567 or weather=4567"
            )
        return cls(int(number), name or str(int(number)), scale)


def import_sae(
    path: str | os.PathLike[str],
    chosen: Sequence[NamedFeature],
    target: Target,
    model_path: str | os.PathLike[str],
    options: SaeOptions,
    norms: NormSource = MEASURED,
    notice: Callable[[str], None] = lambda _: None,
) -> SteeringPack:
    """Writes a pack of an autoencoder's features.

    Args:
        path: A folder of SAELens, or ``params.npz`` of Gemma Scope or its folder.
        chosen: The features.
        target: The pack that is written.
        model_path: Checkpoint directory or Hugging Face id of the model that it was trained on.
        options: What its files do not say.
        norms: Where the model's residual norms are taken from.
        notice: Called with a line about what the files say.

    Returns:
        The pack, read back from disk.

    Raises:
        ConversionError: A file is not what it should be, or does not fit the model.
        PackError: The pack cannot be written.
    """
    model = model_of(model_path, norms.chat)
    options = for_model(options, model_path)
    features = read_features(Path(path), [each.id for each in chosen], model, options)
    check_alive(Path(path), features)
    if features.model_name is not None:
        notice(f"{path}: trained on {features.model_name!r}, at {features.hook}")
    settings: dict[str, JsonValue] = {
        "form": "sparse_autoencoder",
        "residual_norms": "measured" if norms.given is None else "given",
        **norms.chat.model_dump(),
    }
    return write_features(
        features, chosen, target, model, norms_of(model_path, norms, model), settings
    )


def for_model(options: SaeOptions, model_path: str | os.PathLike[str]) -> SaeOptions:
    """Returns the options with what the model's configuration says of its norms."""
    config = read_config(model_path).get_text_config()
    return replace(options, rms_norm=getattr(config, "rms_norm_eps", None) is not None)


def write_features(
    features: Features,
    chosen: Sequence[NamedFeature],
    target: Target,
    model: ModelIdentity,
    residual_norms: Mapping[int, float],
    settings: Mapping[str, JsonValue],
    positions: AnyPositions = ALL,
) -> SteeringPack:
    """Writes a pack of features.

    Args:
        features: The features, in the order of ``chosen``.
        chosen: Their names and scales.
        target: The pack that is written.
        model: The model.
        residual_norms: Median norm of the residual stream by layer.
        settings: What the pack records of how they were chosen.
        positions: Where they act where a request names none.

    Raises:
        ConversionError: Two have one name, or a name or number cannot be that of a pack.
        PackError: The pack cannot be written.
    """
    names = [each.name for each in chosen]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConversionError(
            f"two features have the name {twice[0]!r}; give each a name of its own"
        )
    try:
        TypeAdapter(PackName).validate_python(target.name)
        directions = [
            part for at, each in enumerate(chosen) for part in _directions(features, at, each)
        ]
        records = [direction.record(positions) for direction in directions]
    except ValidationError as error:
        raise ConversionError(
            f"pack {target.name!r} cannot be written: {explain(error)}"
        ) from error
    source: dict[str, JsonValue] = {
        "format": features.format,
        "sha256": features.sha256,
        "hook": features.hook,
    }
    return write_pack(
        target.path,
        PackContent(
            name=target.name,
            model=model,
            directions=records,
            vectors={direction.name: direction.vectors for direction in directions},
            method=MethodRecord(
                name="imported",
                settings={"files": source, **settings},
                libraries={library: version(library) for library in ("torch", "transformers")},
                seed=0,
                data_sha256=features.sha256,
            ),
            residual_norms=residual_norms,
        ),
    )


def _directions(features: Features, at: int, chosen: NamedFeature) -> list[Direction]:
    threshold = float(features.threshold[at])
    form = FormChoice(
        op="feature",
        read=f"{chosen.name} {ENCODER}",
        bias=float(features.bias[at]),
        threshold=threshold or None,
    )
    metrics: dict[str, JsonValue] = {"feature": chosen.id, **chosen.metrics}
    layers = [features.layer]
    return [
        Direction(chosen.name, layers, features.decoder[at : at + 1], form, chosen.scale, metrics),
        Direction(f"{chosen.name} {ENCODER}", layers, features.encoder[at : at + 1]),
    ]
