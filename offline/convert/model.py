"""The model that vector files are for: what a pack says of it, and how long its residual stream is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from vllm_steer.errors import ConversionError, ExtractionError
from vllm_steer.offline.extract.capture import capture
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.offline.models.loading import (
    load_config,
    load_model,
    model_identity,
    read_config,
    read_tokenizer,
)
from vllm_steer.offline.models.prompts import render_prompt
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import ModelIdentity, load_pack

NORM_STATEMENTS: Final = 32
_MAX_NORMS_BYTES: Final = 2**20


@dataclass(frozen=True)
class NormSource:
    """Where the median norms of a model's residual stream are taken from.

    Attributes:
        given: A JSON file of layer to norm, or a pack of the same model; None to measure them.
        chat: Format of the prompts that they are measured on and that the pack is calibrated with.
    """

    given: str | os.PathLike[str] | None = None
    chat: ChatFormat = field(default_factory=ChatFormat)


MEASURED = NormSource()


def model_of(model_path: str | os.PathLike[str], chat: ChatFormat) -> ModelIdentity:
    """Returns what a pack says of a model; of one without a tokenizer, without its template.

    Raises:
        ConversionError: There is no such model, or its template does not read the format's arguments.
    """
    try:
        config = read_config(model_path)
    except ExtractionError as error:
        raise ConversionError(f"--model: {error}") from error
    try:
        tokenizer = read_tokenizer(model_path, config)
    except ExtractionError:
        return model_identity(model_path, config, None)
    try:
        chat.apply_to(tokenizer)
    except ExtractionError as error:
        raise ConversionError(str(error)) from error
    return model_identity(model_path, config, tokenizer)


def norms_of(
    model_path: str | os.PathLike[str], norms: NormSource, model: ModelIdentity
) -> dict[int, float]:
    """Returns the median norm of the model's residual stream after each block.

    Raises:
        ConversionError: They cannot be measured, or what is given is not the model's.
    """
    if norms.given is None:
        return _measure_norms(model_path, norms.chat)
    return _given_norms(norms.given, model)


def _measure_norms(model_path: str | os.PathLike[str], chat: ChatFormat) -> dict[int, float]:
    """Returns the norm of each block's output over plain statements, measured as extraction does."""
    try:
        _, tokenizer = load_config(model_path, chat)
        model = load_model(model_path, "float32", None)
        prompts = [
            render_prompt(tokenizer, statement.text)
            for statement in statements("extract")[:NORM_STATEMENTS]
        ]
        measured = capture(model, prompts, candidates=1, batch_size=8).residual_norms
    except ExtractionError as error:
        raise ConversionError(
            f"residual norms cannot be measured with the model: {' '.join(str(error).split())}; give them with "
            f"--residual-norms, as a JSON file of layer to norm or as a pack of the same model"
        ) from error
    return dict(enumerate(measured.tolist()))


def _given_norms(source: str | os.PathLike[str], model: ModelIdentity) -> dict[int, float]:
    path = Path(source)
    if path.is_dir():
        pack = load_pack(path)
        other = pack.manifest.model
        if (other.hidden_size, other.num_layers) != (model.hidden_size, model.num_layers):
            raise ConversionError(
                f"--residual-norms: steering pack {pack.name!r} is of a model with hidden size "
                f"{other.hidden_size} and {other.num_layers} layers; this one has {model.hidden_size} and "
                f"{model.num_layers}"
            )
        return {int(layer): norm for layer, norm in pack.manifest.residual_norms.items()}
    try:
        if path.stat().st_size > _MAX_NORMS_BYTES:
            raise ConversionError(f"--residual-norms: {path} is too large")
        return TypeAdapter(dict[int, float]).validate_json(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"--residual-norms: {path}: {error.strerror}") from error
    except ValidationError as error:
        raise ConversionError(
            f"--residual-norms: {path}: {error.errors()[0]['msg']}; it must be a JSON object of layer to "
            f'norm, such as {{"0": 11.5, "1": 12.25}}'
        ) from error
