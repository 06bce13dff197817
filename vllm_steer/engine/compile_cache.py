"""The steering configuration -> the key of vLLM's compile cache.

Fields that shape the traced graph stay in the key, so that no graph without steering is reused. Packs,
digests and the policy are left out: rows are written long after compilation, so an engine with other packs
reuses the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vllm_steer.config import CONFIG_KEY, GRAPH_FIELDS, READ_FIELDS

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def hash_graph_alone(original: Callable[..., str]) -> Callable[..., str]:
    """Wraps ``VllmConfig.compute_hash`` to hash only ``GRAPH_FIELDS`` of the steering configuration."""

    def compute_hash(self: VllmConfig, *args: object, **kwargs: object) -> str:
        given = self.additional_config
        steering = given.get(CONFIG_KEY) if isinstance(given, dict) else None
        if (
            not isinstance(given, dict)
            or not isinstance(steering, Mapping)
            or not steering.keys() >= set(GRAPH_FIELDS)
        ):
            # Off, or not resolved yet: all of it is hashed.
            return original(self, *args, **kwargs)
        fields = GRAPH_FIELDS + (READ_FIELDS if steering.get("reads") else ())
        hashed = copy.copy(self)
        hashed.additional_config = {
            **given,
            CONFIG_KEY: {field: steering[field] for field in fields},
        }
        return original(hashed, *args, **kwargs)

    return compute_hash
