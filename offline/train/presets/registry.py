"""The presets by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vllm_steer.offline.train.presets.bipo import BiPOPreset
from vllm_steer.offline.train.presets.cdas import CDASPreset
from vllm_steer.offline.train.presets.jola import JoLAPreset
from vllm_steer.offline.train.presets.likelihood import LikelihoodPreset
from vllm_steer.offline.train.presets.loreft import LoReFTPreset
from vllm_steer.offline.train.presets.preset import Preset
from vllm_steer.offline.train.presets.prosv import PrOSVPreset
from vllm_steer.offline.train.presets.reft_r1 import ReFTr1Preset

PRESETS: Mapping[str, Preset[Any]] = MappingProxyType(
    {
        "likelihood": LikelihoodPreset(),
        "bipo": BiPOPreset(),
        "reft_r1": ReFTr1Preset(),
        "loreft": LoReFTPreset(),
        "prosv": PrOSVPreset(),
        "cdas": CDASPreset(),
        "jola": JoLAPreset(),
    }
)
