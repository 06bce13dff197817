"""Finished concepts on disk, so that a killed extraction continues.

Each concept is one file, written whole or not at all, in a directory named by a digest of everything
that decides the result. With a changed setting, statement, model or library it starts over in another
directory, so outdated results are never reused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vllm_steer.offline.extract.learning import ExtractionJob, Learned
from vllm_steer.offline.models.loading import checkpoint_state
from vllm_steer.offline.models.prompts import Concept
from vllm_steer.packs.pack import replace_file

PARTS_DIRECTORY = ".extraction"

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn", "xrfm")
# What a job holds that changes no result.
_IRRELEVANT = ("workers", "probe", "model_path")
# Each concept's file is named by its own answers; other concepts' change nothing.
_BY_CONCEPT = ("answers",)
_VECTORS, _PLANE = "vectors", "plane"


class Parts:
    """The finished concepts of one job under one pack's directory."""

    def __init__(
        self, pack: str | os.PathLike[str], job: ExtractionJob, identity: Mapping[str, Any]
    ) -> None:
        """Names the directory; nothing is written yet.

        Args:
            pack: Directory of the pack.
            job: What is extracted.
            identity: What the pack says of its model.
        """
        kept = {
            item.name: getattr(job, item.name)
            for item in fields(job)
            if item.name not in (*_IRRELEVANT, *_BY_CONCEPT)
        }
        kept["pairs"] = {
            name: [asdict(pair) for pair in pairs] for name, pairs in job.pairs.items()
        }
        kept["settings"] = job.settings.model_dump(mode="json")
        libraries = {**library_versions(), "vllm-steer": version("vllm-steer")}
        content = [kept, dict(identity), checkpoint_state(job.model_path), libraries]
        self._answers = job.answers
        self._root = Path(pack) / PARTS_DIRECTORY
        self._directory = self._root / _digest(content)

    def load(self, name: str, prefix: str) -> Learned | None:
        """Returns a finished concept, or None where it is not finished or its file is damaged."""
        try:
            with safe_open(self._file(name, prefix), framework="numpy") as tensors:
                record = json.loads(tensors.metadata()["record"])
                arrays = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
                vectors, plane = arrays.pop(_VECTORS), arrays.pop(_PLANE, None)
                return Learned(vectors=vectors, plane=plane, figures=arrays, **record)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, name: str, prefix: str, learned: Learned) -> None:
        """Writes a finished concept."""
        self._directory.mkdir(parents=True, exist_ok=True)
        record = {
            "layers": learned.layers,
            "metrics": learned.metrics,
            "residual_norms": learned.residual_norms,
            "prompts_sha256": learned.prompts_sha256,
            "device": learned.device,
        }
        arrays = {_VECTORS: learned.vectors, **learned.figures}
        if learned.plane is not None:
            arrays[_PLANE] = learned.plane
        data = save(arrays, metadata={"record": json.dumps(record)})
        replace_file(self._file(name, prefix), data)

    def remove(self, concepts: Sequence[Concept]) -> None:
        """Removes the files of these concepts, and the directories where nothing else is left."""
        for name, prefix in concepts:
            self._file(name, prefix).unlink(missing_ok=True)
        shutil.rmtree(answers_directory(self._root.parent), ignore_errors=True)
        for directory in (self._directory, self._root):
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()

    def _file(self, name: str, prefix: str) -> Path:
        own = [self._answers[name].digest] if name in self._answers else []
        return self._directory / f"{_digest([name, prefix, *own])}.safetensors"


def answers_directory(pack: str | os.PathLike[str]) -> Path:
    """Returns where the answers that a pack is extracted from are kept until it is written."""
    return Path(pack) / PARTS_DIRECTORY / "answers"


def library_versions() -> dict[str, str]:
    """Returns the version of each library that computes the directions."""
    return {library: version(library) for library in LIBRARIES}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
