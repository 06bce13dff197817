"""Questions and a judge to a steering pack: answers, their scores, their states, a direction for each file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue, TypeAdapter, ValidationError
from transformers import PreTrainedModel

from vllm_steer.errors import ExtractionError, explain_faults
from vllm_steer.fields import PackName
from vllm_steer.offline.engine.tokens import TokenEngine
from vllm_steer.offline.evaluate.judges import Judge
from vllm_steer.offline.models.loading import (
    check_quantisation,
    chosen_dtype,
    load_config,
    load_model,
    model_identity,
)
from vllm_steer.offline.rollouts.data import Asking, first_positive
from vllm_steer.offline.rollouts.directions import Found, corrsteer, persona_pairs, roast
from vllm_steer.offline.rollouts.sampled import Rollout, sampled, scored
from vllm_steer.offline.rollouts.settings import RolloutSettings
from vllm_steer.offline.rollouts.states import read_states
from vllm_steer.offline.train.directions import Target
from vllm_steer.offline.train.norms import residual_norms
from vllm_steer.packs.pack import (
    DirectionRecord,
    MethodRecord,
    PackContent,
    Prefix,
    SteeringPack,
    raw_dose,
    write_pack,
)

STORE = ".rollouts"
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "vllm-steer")
# Prompts that residual norms are measured on.
_NORM_PROMPTS = 32
# Raw dose of a direction whose paper has no length of its own, until it is calibrated.
_DOSE = 0.5


def learn_pack(
    model_path: str | os.PathLike[str],
    askings: Mapping[str, Sequence[Asking]],
    settings: RolloutSettings,
    judge: Judge,
    target: Target,
    device: str | None = None,
    engine: Mapping[str, Any] | None = None,
) -> SteeringPack:
    """Learns a direction for each name from the model's own answers, and writes them as a steering pack.

    The same call after a kill goes on with the answers that there are.

    Args:
        model_path: Checkpoint directory or Hugging Face model id.
        askings: Questions by direction.
        settings: How to learn.
        judge: Scores the answers.
        target: The pack that is written.
        device: Device of the model; None for CUDA where there is one, else CPU.
        engine: More arguments of ``vllm.LLM``, which generates the answers.

    Returns:
        The pack, read back from disk.

    Raises:
        ExtractionError: The settings do not fit the model, a prompt cannot be rendered, or the scores leave nothing to
            learn from; the message names the direction.
        EvaluationError: The engine or the judge fails.
        PackError: The pack cannot be written.
    """
    config, tokenizer = load_config(model_path, settings.chat)
    check_quantisation(config, model_path)
    settings = settings.model_copy(update={"dtype": chosen_dtype(settings.dtype, device)})
    _check_name(target)
    layers = _layers(settings, config.get_text_config().num_hidden_layers)
    store = Path(target.path) / STORE
    with TokenEngine(model_path, (), engine, store) as running:
        answers = sampled(running, tokenizer, askings, settings)
    given = scored(judge, askings, answers)
    _check(given, settings)
    model = load_model(model_path, settings.dtype, device, attention=None)
    found = {name: _learned(name, model, each, layers, settings) for name, each in given.items()}
    prompts = list(dict.fromkeys(r.prompt for each in given.values() for r in each))
    norms = residual_norms(model, prompts[:_NORM_PROMPTS])
    prefixes = first_positive(askings)
    pack = write_pack(
        target.path,
        PackContent(
            name=target.name,
            model=model_identity(model_path, config, tokenizer),
            directions=[
                _record(name, each, settings, norms, prefixes.get(name))
                for name, each in found.items()
            ],
            vectors={name: each.vectors for name, each in found.items()},
            method=MethodRecord(
                name=settings.method,
                settings={
                    **settings.model_dump(mode="json", exclude={"seed"}),
                    "layers": list[JsonValue](layers),
                    "judge": judge.name,
                    "paper": settings.of.paper,
                    "device": model.device.type,
                },
                libraries={library: version(library) for library in _LIBRARIES},
                seed=settings.seed,
                data_sha256=_digest(given),
            ),
            residual_norms=dict(enumerate(norms.tolist())),
        ),
    )
    shutil.rmtree(store, ignore_errors=True)
    return pack


def _check(given: Mapping[str, Sequence[Rollout]], settings: RolloutSettings) -> None:
    """Refuses scores that leave nothing to learn from, before the model is loaded and read."""
    for name, rollouts in given.items():
        # What the arrays are does not matter to whether there is something to learn from.
        blank = np.zeros((len(rollouts), 1, 1), dtype=np.float32)
        try:
            if settings.method == "persona":
                persona_pairs(rollouts, settings.threshold)
            elif settings.method == "roast":
                roast(blank, _questions(rollouts), _right(rollouts, settings))
        except ExtractionError as error:
            raise ExtractionError(f"{name!r}: {error}") from error


def _learned(
    name: str,
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    layers: list[int],
    settings: RolloutSettings,
) -> Found:
    pool, size = settings.of.pool, settings.batch_size
    right = _right(rollouts, settings)
    metrics: dict[str, Any] = {"answers": len(rollouts), "right": int(right.sum())}
    try:
        if settings.method == "persona":
            pairs = persona_pairs(rollouts, settings.threshold)
            kept = [rollouts[at] for pair in pairs for at in pair]
            states = read_states(model, kept, pool, size, name)[:, layers]
            vectors = states[0::2].mean(axis=0) - states[1::2].mean(axis=0)
            return Found(layers, vectors, {**metrics, "pairs": len(pairs)})
        states = read_states(model, rollouts, pool, size, name)[:, layers]
        if settings.method == "roast":
            vectors, voted = roast(states, _questions(rollouts), right)
            return Found(layers, vectors, {**metrics, "questions": voted})
        scores = np.array([r.score for r in rollouts], dtype=np.float64)
        found = corrsteer(states, scores, right, layers, settings.features == "each")
        return Found(found.layers, found.vectors, {**metrics, **found.metrics})
    except ExtractionError as error:
        raise ExtractionError(f"{name!r}: {error}") from error


def _right(rollouts: Sequence[Rollout], settings: RolloutSettings) -> np.ndarray[Any, Any]:
    return np.array([(r.score or 0.0) >= settings.threshold for r in rollouts], dtype=np.bool_)


def _questions(rollouts: Sequence[Rollout]) -> np.ndarray[Any, Any]:
    return np.array([r.question for r in rollouts], dtype=np.int64)


def _record(
    name: str,
    found: Found,
    settings: RolloutSettings,
    norms: np.ndarray[Any, Any],
    prefix: str | None,
) -> DirectionRecord:
    method = settings.of
    scale = 1.0
    if method.unit:
        lengths = np.linalg.norm(found.vectors, axis=1).tolist()
        known = dict(enumerate(norms.tolist()))
        scale = _DOSE / raw_dose(1.0, dict(zip(found.layers, lengths, strict=True)), known)
    return DirectionRecord(
        name=name,
        layers=found.layers,
        default_layers=[found.layers[len(found.layers) // 2]] if method.one_layer else None,
        default_scale=scale,
        positions=method.positions,
        prefix=None if prefix is None else Prefix(text=prefix, role=settings.prefix_role),
        metrics=found.metrics,
    )


def _layers(settings: RolloutSettings, blocks: int) -> list[int]:
    layers = sorted(set(range(1, blocks) if settings.layers is None else settings.layers))
    if layers[-1] >= blocks:
        raise ExtractionError(f"layers {layers} asked for; the model has 0 to {blocks - 1}")
    return layers


def _check_name(target: Target) -> None:
    try:
        TypeAdapter(PackName).validate_python(target.name)
    except ValidationError as error:
        raise ExtractionError(
            f"--name: {target.name!r} cannot be a pack's name: {explain_faults(error, 'name')}"
        ) from error


def _digest(given: Mapping[str, Sequence[Rollout]]) -> str:
    content = {name: [asdict(r) for r in each] for name, each in given.items()}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
