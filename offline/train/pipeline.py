"""Data files and a preset to a steering pack."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, JsonValue, TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from vllm_steer.errors import ExtractionError, explain_faults
from vllm_steer.fields import DirectionName, PackName
from vllm_steer.offline.models.likelihood import AnswerModel
from vllm_steer.offline.models.loading import (
    check_quantisation,
    checkpoint_state,
    chosen_dtype,
    load_config,
    load_model,
    model_identity,
)
from vllm_steer.offline.shards import Shards, spread
from vllm_steer.offline.train.data import LINES, Encoder, read_lines_of
from vllm_steer.offline.train.directions import Direction, Target
from vllm_steer.offline.train.kept import StateFile
from vllm_steer.offline.train.norms import residual_norms
from vllm_steer.offline.train.positions import Positions
from vllm_steer.offline.train.presets.preset import Bench
from vllm_steer.offline.train.presets.registry import PRESETS
from vllm_steer.offline.train.settings import TrainSettings
from vllm_steer.offline.train.trainer import Lesson, Trainer, TrainerOptions
from vllm_steer.packs.pack import MethodRecord, PackContent, SteeringPack, write_pack

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "vllm-steer")
# Prompts that residual norms are measured on.
_NORM_PROMPTS = 32


def read_settings(file: Path | None, given: Mapping[str, Any]) -> TrainSettings:
    """Returns the settings of a JSON file, those given besides in their place.

    Raises:
        ExtractionError: The file cannot be read, or a setting is unknown or has no such value; the message names it.
    """
    try:
        read = {} if file is None else TypeAdapter(dict[str, Any]).validate_json(file.read_bytes())
        return TrainSettings.model_validate({**read, **given})
    except OSError as error:
        raise ExtractionError(
            f"cannot read {file}: {error.strerror}; give a file of JSON"
        ) from error
    except ValidationError as error:
        raise ExtractionError(
            f"settings cannot be used: {explain_faults(error, 'settings')}"
        ) from error


def read_data(items: Sequence[str], preset: str) -> dict[str, list[BaseModel]]:
    """Returns the lines of data files by the name of what is trained on each, from ``NAME=FILE``.

    Raises:
        ExtractionError: An item is not of that form, a name is given twice or cannot be a direction's, or a file is not
            what the preset wants; the message names the line.
    """
    found: dict[str, list[BaseModel]] = {}
    for item in items:
        name, equals, file = item.partition("=")
        if not equals or not name or name in found:
            raise ExtractionError(
                f"--data: {item!r} must be NAME=FILE, such as formal=formal.jsonl, each name once"
            )
        try:
            TypeAdapter(DirectionName).validate_python(name)
        except ValidationError as error:
            raise ExtractionError(
                f"--data: {name!r} cannot be a direction's name: {explain_faults(error, 'name')}"
            ) from error
        found[name] = list(read_lines_of(LINES[PRESETS[preset].example], Path(file)))
    return found


def train_pack(
    model_path: str | os.PathLike[str],
    data: Mapping[str, Sequence[BaseModel]],
    settings: TrainSettings,
    target: Target,
    device: str | None = None,
    shards: Shards | None = None,
) -> SteeringPack:
    """Trains one direction for each data file and writes them as a steering pack.

    The same call after a kill goes on where it was and gives the same vectors.

    Args:
        model_path: Checkpoint directory or Hugging Face model id.
        data: Lines by direction, of the kind that the preset learns from.
        settings: How to train.
        target: The pack that is written.
        device: Device of the model; None for CUDA where there is one, else CPU.
        shards: Where directions are trained; None for this process alone. The vectors are the same.

    Returns:
        The pack, read back from disk.

    Raises:
        ExtractionError: The settings do not fit the model, a prompt cannot be rendered, a loss is not finite, or Ray is
            missing or has no room.
        PackError: The pack cannot be written.
    """
    config, tokenizer = load_config(model_path, settings.chat)
    check_quantisation(config, model_path)
    settings = settings.model_copy(update={"dtype": chosen_dtype(settings.dtype, device)})
    _check_name(target)
    make = partial(_Training, str(model_path), tokenizer, settings, Path(target.path), device)
    training = make()
    lessons = {name: training.lesson(lines) for name, lines in data.items()}
    found = _trained(training, make, list(lessons.items()), shards or Shards())
    directions = [direction for name in lessons for direction in found[name]]
    served = training.positions.served()
    try:
        records = [direction.record(served) for direction in directions]
    except ValidationError as error:
        raise ExtractionError(
            f"pack {target.name!r} could not be written: {explain_faults(error, 'directions')}"
        ) from error
    pack = write_pack(
        target.path,
        PackContent(
            name=target.name,
            model=model_identity(model_path, config, tokenizer),
            directions=records,
            vectors={direction.name: direction.vectors for direction in directions},
            method=MethodRecord(
                name=settings.preset,
                settings={
                    **settings.model_dump(mode="json", exclude={"seed"}),
                    "layers": list(training.layers),
                    "paper": PRESETS[settings.preset].paper,
                    "device": training.device,
                },
                libraries={library: version(library) for library in LIBRARIES},
                seed=settings.seed,
                data_sha256=_digest([asdict(lesson) for lesson in lessons.values()]),
            ),
            residual_norms=dict(enumerate(training.norms.tolist())),
        ),
    )
    for name, lesson in lessons.items():
        training.keeper(name, lesson).remove()
    return pack


_Task = tuple[str, Lesson[Any]]


def _trained(
    training: _Training,
    make: Callable[..., _Training],
    tasks: Sequence[_Task],
    shards: Shards,
) -> dict[str, list[Direction]]:
    """What each direction's lesson gave, by its name."""
    if not shards.count:
        return {name: training.train(name, lesson) for name, lesson in tasks}
    # One worker's norms for all, so that vectors do not depend on who learned which.
    workers = spread(partial(make, norms=training.norms), tasks, shards)
    found: dict[str, list[Direction]] = {}
    for (name, _), result in workers:
        if isinstance(result, str):
            raise ExtractionError(result)
        found[name] = result
    return found


class _Training:
    """A loaded model that trains one direction after the other."""

    def __init__(
        self,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: TrainSettings,
        folder: Path,
        device: str | None,
        norms: NDArray[np.float64] | None = None,
    ) -> None:
        self._path, self._settings, self._folder = model_path, settings, folder
        self._preset = PRESETS[settings.preset]
        self._encoder = Encoder(tokenizer, settings.end)
        skipped = self._encoder.template if self._preset.without_template else 0
        self.positions = Positions.parse(settings.positions, skipped)
        self._model = load_model(model_path, settings.dtype, device, attention=None)
        text = self._model.config.get_text_config()
        self._hidden_size = text.hidden_size
        self.layers = _layers(settings, text.num_hidden_layers)
        # Measured on the first lesson, unless they are given.
        self.norms = np.zeros(0) if norms is None else norms

    def __call__(self, task: _Task) -> list[Direction] | str:
        """Trains a direction, or returns why that cannot be."""
        try:
            return self.train(*task)
        except ExtractionError as error:
            return str(error)

    @property
    def device(self) -> str:
        """Type of the device that the model runs on."""
        return self._model.device.type

    def lesson(self, lines: Sequence[BaseModel]) -> Lesson[Any]:
        """Returns what a direction is trained on, some of it held out."""
        examples = self._encoder.examples(lines)
        if not self.norms.size:
            self.norms = residual_norms(self._model, [e.prompt for e in examples[:_NORM_PROMPTS]])
        count = ceil(self._settings.held_out * len(examples))
        order = np.random.default_rng(self._settings.seed).permutation(len(examples))
        held_out = set(order[:count].tolist())
        return Lesson(
            [e for at, e in enumerate(examples) if at not in held_out],
            [e for at, e in enumerate(examples) if at in held_out],
        )

    def train(self, name: str, lesson: Lesson[Any]) -> list[Direction]:
        """Trains one direction, or goes on with it, and returns what is served of it."""
        settings = self._settings
        answers = AnswerModel(self._model, self.layers, settings.checkpointing)
        norms = torch.tensor(self.norms[list(self.layers)], dtype=torch.float32)
        objective = self._preset.objective(
            Bench(answers, norms, self._hidden_size, self.positions, settings)
        )
        options, keeper = _options(settings, len(lesson.learned)), self.keeper(name, lesson)
        (result,) = Trainer(objective, [lesson], options, keeper).run(name)
        found = self._preset.directions(name, objective, result, lesson.learned)
        first = found[0]
        kept: dict[str, JsonValue] = {"steps": result.steps}
        if result.score is not None:
            kept |= objective.figures(result.score, lesson.held_out)
        return [replace(first, metrics={**kept, **first.metrics}), *found[1:]]

    def keeper(self, name: str, lesson: Lesson[Any]) -> StateFile:
        """Returns the file that keeps the state of a training."""
        return StateFile(self._folder, self._content(name, lesson))

    def _content(self, name: str, lesson: Lesson[Any]) -> list[Any]:
        """Returns everything that decides what is trained."""
        libraries = {library: version(library) for library in LIBRARIES}
        return [
            name,
            asdict(lesson),
            self._settings.model_dump(mode="json"),
            list(self.layers),
            checkpoint_state(self._path),
            libraries,
            self.device,
        ]


def _options(settings: TrainSettings, count: int) -> TrainerOptions:
    size = min(settings.examples, count)
    steps = settings.epochs * ceil(count / size)
    return TrainerOptions(
        steps=steps,
        examples=size,
        rate=settings.rate,
        schedule=settings.schedule,
        warmup=int(settings.warmup * steps),
        decay=settings.decay,
        clip=settings.clip,
        every=settings.every,
        patience=settings.patience,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )


def _layers(settings: TrainSettings, blocks: int) -> tuple[int, ...]:
    preset = PRESETS[settings.preset]
    chosen = preset.layers(blocks) if settings.layers is None else settings.layers
    layers = tuple(sorted(set(chosen)))
    if layers[-1] >= blocks:
        raise ExtractionError(f"layers {list(layers)} asked for; the model has 0 to {blocks - 1}")
    if preset.one_layer and len(layers) > 1:
        raise ExtractionError(
            f"layers {list(layers)} asked for; preset {settings.preset!r} trains one block at a time"
        )
    return layers


def _check_name(target: Target) -> None:
    try:
        TypeAdapter(PackName).validate_python(target.name)
    except ValidationError as error:
        raise ExtractionError(
            f"--name: {target.name!r} cannot be a pack's name: it has letters, digits, '_', '.' and '-' alone"
        ) from error


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
