"""Packs in memory, by name and by content digest.

The API server resolves names and the worker resolves digests; both read the same files. Importing this module
imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from vllm_steer.errors import ConfigError, PackError, UnknownDirectionError, choices
from vllm_steer.packs.pack import DirectionRecord, SteeringPack, load_pack

# Language models inside vision-language models, equivalent on text to the standalone type.
_ON_TEXT: Final = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}

# Method of packs that clients have sent. They come and go, so no name without a pack leads to them: it would mean
# something else, or nothing, for others.
UPLOADED: Final = "uploaded"


@dataclass(frozen=True, eq=False)
class LoadedDirection:
    """A direction of a loaded pack.

    Attributes:
        pack: Its pack.
        record: Its record in the manifest.
        vector: Float32 array ``[len(record.layers), hidden_size]``.
        digest: Content digest.
    """

    pack: SteeringPack
    record: DirectionRecord
    vector: np.ndarray
    digest: str

    @cached_property
    def lengths(self) -> dict[int, float]:
        """Euclidean length of the vector by layer."""
        lengths = np.linalg.norm(self.vector, axis=1).tolist()
        return dict(zip(self.record.layers, lengths, strict=True))

    @cached_property
    def extremes(self) -> dict[int, tuple[float, float]]:
        """Least and largest value of the vector by layer."""
        lows, highs = self.vector.min(axis=1).tolist(), self.vector.max(axis=1).tolist()
        pairs = zip(lows, highs, strict=True)
        return dict(zip(self.record.layers, pairs, strict=True))

    def largest(self, layer: int) -> float:
        """Largest magnitude of a value of the vector at one layer."""
        return max(map(abs, self.extremes[layer]))

    @cached_property
    def norms(self) -> dict[int, float]:
        """Median norm of the residual stream by layer, from the pack."""
        norms = self.pack.manifest.residual_norms
        return {layer: norms[str(layer)] for layer in self.record.layers}

    @cached_property
    def rows(self) -> dict[int, int]:
        """Row of ``vector`` by layer."""
        return {layer: row for row, layer in enumerate(self.record.layers)}

    def at(self, layer: int) -> np.ndarray:
        """The vector at one layer, float32 ``[hidden_size]``."""
        row: np.ndarray = self.vector[self.rows[layer]]
        return row

    @property
    def full_name(self) -> str:
        """``pack/direction``."""
        return f"{self.pack.name}/{self.record.name}"


class PackRegistry:
    """Packs by name and content; immutable."""

    def __init__(self, packs: Iterable[SteeringPack]) -> None:
        """Indexes ``packs``.

        Raises:
            ConfigError: Two packs have the same name.
        """
        self.packs: dict[str, SteeringPack] = {}
        for pack in packs:
            if pack.name in self.packs:
                raise ConfigError(
                    f"two steering packs are named {pack.name!r}: {self.packs[pack.name].path} and {pack.path}; "
                    f"requests could not distinguish them; load only one, or extract one under another name"
                )
            self.packs[pack.name] = pack
        loaded = [
            LoadedDirection(pack, record, pack.vectors[name], pack.digests[name])
            for pack in self.packs.values()
            for name, record in pack.directions.items()
        ]
        self._by_name = {direction.full_name: direction for direction in loaded}
        # Of directions with equal content, prefer the calibrated one, whose dose is known.
        known = sorted(loaded, key=lambda direction: direction.record.calibration is not None)
        self._by_digest = {direction.digest: direction for direction in known}
        self._bare: dict[str, list[LoadedDirection]] = {}
        for direction in loaded:
            if direction.pack.manifest.method.name == UPLOADED:
                continue
            self._bare.setdefault(direction.record.name, []).append(direction)

    @classmethod
    def load(cls, paths: Iterable[str]) -> PackRegistry:
        """Loads and verifies the packs at ``paths``."""
        return cls(load_pack(path) for path in paths)

    @property
    def layers(self) -> list[int]:
        """Layers with a vector of at least one direction, ascending."""
        return sorted(
            {layer for direction in self._by_name.values() for layer in direction.record.layers}
        )

    def find(
        self, name: str, sees: Callable[[str], bool] = lambda full_name: True
    ) -> LoadedDirection:
        """Returns the direction that a request names as ``pack/direction`` or just ``direction``.

        Args:
            name: What the request says.
            sees: Whether its client is told of a direction, by its full name. Others are no choice for a name
                without a pack, and no message names them.

        Raises:
            UnknownDirectionError: There is no such direction, or more than one.
        """
        if name in self._by_name:
            return self._by_name[name]
        pack_name, slash, direction_name = name.partition("/")
        if slash:
            seen = [
                d.record.name
                for d in self._by_name.values()
                if d.pack.name == pack_name and sees(d.full_name)
            ]
            if not seen:
                packs = {d.pack.name for full_name, d in self._by_name.items() if sees(full_name)}
                raise UnknownDirectionError(
                    f"no steering pack {pack_name!r} is loaded; {choices(pack_name, packs)}"
                )
            raise UnknownDirectionError(
                f"steering pack {pack_name!r} has no direction {direction_name!r}; {choices(direction_name, seen)}"
            )
        candidates = [d for d in self._bare.get(name, ()) if sees(d.full_name)]
        if not candidates:
            known = (
                bare for bare, found in self._bare.items() if any(sees(d.full_name) for d in found)
            )
            raise UnknownDirectionError(
                f"no loaded steering pack has a direction {name!r}; {choices(name, known)}"
            )
        if len(candidates) > 1:
            full = ", ".join(repr(direction.full_name) for direction in candidates)
            raise UnknownDirectionError(
                f"direction {name!r} is in more than one loaded pack; name it as one of {full}"
            )
        return candidates[0]

    def find_beside(
        self,
        direction: LoadedDirection,
        name: str,
        sees: Callable[[str], bool] = lambda full_name: True,
    ) -> LoadedDirection:
        """Returns the direction named by another one's form; that one's pack is searched first."""
        own = name in direction.pack.directions
        return self.find(f"{direction.pack.name}/{name}" if own else name, sees)

    def has(self, digest: str) -> bool:
        """Whether a loaded direction has this content digest."""
        return digest in self._by_digest

    def by_digest(self, digest: str) -> LoadedDirection:
        """Returns a direction by content.

        Raises:
            PackError: No loaded direction has that content.
        """
        try:
            return self._by_digest[digest]
        except KeyError:
            raise PackError(
                f"no loaded direction has the content {digest[:12]}…; the worker's packs differ from the API server's"
            ) from None

    def check_model(self, *, model_types: Iterable[str], hidden_size: int, num_layers: int) -> None:
        """Checks that every pack was made for the served model or its language model.

        Args:
            model_types: Model types that packs may name.
            hidden_size: Width of the model's residual stream.
            num_layers: Its number of decoder blocks.

        Raises:
            PackError: A pack was made for a model of another type or shape.
        """
        served: dict[str, tuple[Any, ...]] = {
            "model_type": tuple(model_types),
            "hidden_size": (hidden_size,),
            "num_layers": (num_layers,),
        }
        for pack in self.packs.values():
            wrong = [
                f"{field} {getattr(pack.manifest.model, field)!r} where the served model has "
                + " or ".join(map(repr, values))
                for field, values in served.items()
                if not {*map(_on_text, values)} & {_on_text(getattr(pack.manifest.model, field))}
            ]
            if wrong:
                raise PackError(
                    f"steering pack {pack.name!r} ({pack.path}) was extracted from another model "
                    f"({pack.manifest.model.name}): {', '.join(wrong)}; extract it from the served model"
                )


def _on_text(value: Any) -> Any:
    return _ON_TEXT.get(value, value)
