"""Production steered generation for vLLM.

Importing this package imports neither torch nor vllm; vLLM finds the plugin by its entry point.
"""

from vllm_steer.errors import (
    CompatibilityError,
    ConfigError,
    ConversionError,
    ExtractionError,
    PackError,
    RequestError,
    SteeringError,
)
from vllm_steer.manifest import DirectionRecord, Manifest, MethodRecord, ModelIdentity
from vllm_steer.pack import SteeringPack, load_pack, write_pack
from vllm_steer.request import DirectionChoice, SteeringRequest

__all__ = [
    "CompatibilityError",
    "ConfigError",
    "ConversionError",
    "DirectionChoice",
    "DirectionRecord",
    "ExtractionError",
    "Manifest",
    "MethodRecord",
    "ModelIdentity",
    "PackError",
    "RequestError",
    "SteeringError",
    "SteeringPack",
    "SteeringRequest",
    "load_pack",
    "write_pack",
]
