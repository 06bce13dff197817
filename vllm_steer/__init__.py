"""Steered generation for vLLM, per request.

Importing this package imports neither torch nor vllm; vLLM finds the plugin through its entry point.
"""

from vllm_steer.client import steer
from vllm_steer.errors import (
    CompatibilityError,
    ConfigError,
    ConversionError,
    EvaluationError,
    ExtractionError,
    PackError,
    RequestError,
    SteeringError,
)
from vllm_steer.packs.calibration import Calibration, CalibrationPoint
from vllm_steer.packs.manifest import DirectionRecord, Manifest, MethodRecord, ModelIdentity
from vllm_steer.packs.pack import SteeringPack, load_pack, write_pack
from vllm_steer.packs.probe import Probe, ProbeLayer, ProbeThreshold
from vllm_steer.plan.scores import Scores, read
from vllm_steer.request.reads import ReadChoice
from vllm_steer.request.schema import DirectionChoice, SteeringRequest

__all__ = [
    "Calibration",
    "CalibrationPoint",
    "CompatibilityError",
    "ConfigError",
    "ConversionError",
    "DirectionChoice",
    "DirectionRecord",
    "EvaluationError",
    "ExtractionError",
    "Manifest",
    "MethodRecord",
    "ModelIdentity",
    "PackError",
    "Probe",
    "ProbeLayer",
    "ProbeThreshold",
    "ReadChoice",
    "RequestError",
    "Scores",
    "SteeringError",
    "SteeringPack",
    "SteeringRequest",
    "load_pack",
    "read",
    "steer",
    "write_pack",
]
