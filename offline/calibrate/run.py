"""Calibration: the strength of every direction of a pack, measured through the engine and written into it.

Layers and scales are chosen on tuning questions, among those whose answers are fluent; reported figures are
measured on other questions. Text is fluent if it repeats itself at most slightly more than the prefixed
model's own answers, and its perplexity under the unsteered model is not much higher than theirs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.calibrate.calibrator import Calibrator, Chosen
from vllm_steer.offline.calibrate.settings import CalibrationSettings
from vllm_steer.offline.engine.tokens import TokenEngine
from vllm_steer.offline.questions.everyday import Everyday
from vllm_steer.packs.pack import Calibration, Prefix, SteeringPack, update_records

__all__ = ["CalibrationSettings", "calibrate_pack"]

STORE = ".calibration"
# Number of directions whose measurement takes less time than compiling an engine.
_FEW = 2


def calibrate_pack(
    pack: SteeringPack,
    model_path: str | os.PathLike[str],
    questions: Everyday,
    settings: CalibrationSettings,
    prefixes: Mapping[str, Prefix] | None = None,
    engine: Mapping[str, Any] | None = None,
) -> SteeringPack:
    """Measures the strength of every direction and writes it into the pack's manifest.

    The same call after a kill continues. For a direction without a known prefix only the largest fluent scale
    is measured, and half of it becomes the default.

    Args:
        pack: The pack.
        model_path: Checkpoint directory or hub id of its model.
        questions: The questions.
        settings: The settings.
        prefixes: Prefixes that make the model take on each concept, by direction; the pack's if None or
            missing.
        engine: More arguments of ``vllm.LLM``.

    Returns:
        The pack, rewritten and read back.

    Raises:
        EvaluationError: A prefix names no direction, or the engine fails.
        ExtractionError: A prompt cannot be rendered.
        PackError: The pack cannot be written.
    """
    prefixes = prefixes or {}
    if unknown := sorted(set(prefixes) - set(pack.directions)):
        raise EvaluationError(f"prefixes are given for {unknown}, which are not in the pack")
    store = pack.path / STORE
    known = {name: prefixes.get(name, record.prefix) for name, record in pack.directions.items()}
    quick = len(pack.directions) <= _FEW
    with TokenEngine(model_path, [pack], engine, store, quick=quick) as running:
        calibrator = Calibrator(running, pack, questions, settings, known)
        found = calibrator.run()
    written = _written(pack, found, known)
    # Stored answers are only needed by an unfinished run.
    shutil.rmtree(store, ignore_errors=True)
    return written


def _written(
    pack: SteeringPack,
    found: Mapping[str, tuple[Chosen, Calibration]],
    prefixes: Mapping[str, Prefix | None],
) -> SteeringPack:
    updates: dict[str, dict[str, Any]] = {}
    for name, record in pack.directions.items():
        updates[name] = {"prefix": prefixes[name]}
        if name in found:
            chosen, calibration = found[name]
            layers = list(chosen.layers)
            updates[name] |= {
                "default_layers": None if layers == record.layers else layers,
                "default_scale": chosen.scale,
                "safe_scale": chosen.safe,
                "calibration": calibration,
            }
    return update_records(pack, updates)
