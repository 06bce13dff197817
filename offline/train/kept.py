"""The state of a training on disk, so that one that was killed goes on with the same numbers.

A state is one file, written whole or not at all, named by a digest of everything that decides the result.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vllm_steer.offline.files import write_atomically
from vllm_steer.offline.train.trainer import Result, State

DIRECTORY = ".training"


class StateFile:
    """A keeper of one training's state."""

    def __init__(self, folder: Path, content: Any) -> None:
        """Names the file; nothing is written yet.

        Args:
            folder: Directory of the pack that is trained.
            content: What decides the result, as JSON.
        """
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._file = folder / DIRECTORY / f"{digest[:32]}.safetensors"

    def load(self) -> State | None:
        """Returns the state; None where there is none, or its file is damaged."""
        try:
            with safe_open(str(self._file), framework="pt") as stream:
                said = json.loads(stream.metadata()["state"])
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            best = [
                None
                if score is None
                else Result(_part(tensors, f"best.{lesson}."), score["score"], score["steps"])
                for lesson, score in enumerate(said["best"])
            ]
            moments = {}
            for name, value in _part(tensors, "moment.").items():
                number, _, moment = name.partition(".")
                moments[int(number), moment] = value
            return State(said["step"], best, said["active"], _part(tensors, "parameter."), moments)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, state: State) -> None:
        """Keeps a state in the place of the one before."""
        tensors = {f"parameter.{name}": value for name, value in state.parameters.items()}
        tensors |= {
            f"moment.{number}.{name}": value for (number, name), value in state.moments.items()
        }
        for lesson, best in enumerate(state.best):
            if best is not None:
                tensors |= {f"best.{lesson}.{name}": value for name, value in best.learned.items()}
        said = {
            "step": state.step,
            "active": state.active,
            "best": [
                None if best is None else {"score": best.score, "steps": best.steps}
                for best in state.best
            ],
        }
        # The file has no place for tensors that share memory.
        whole = {
            name: torch.as_tensor(value).detach().cpu().clone().contiguous()
            for name, value in tensors.items()
        }
        write_atomically(self._file, save(whole, metadata={"state": json.dumps(said)}))

    def remove(self) -> None:
        """Removes the file, and the directory where nothing else is left."""
        self._file.unlink(missing_ok=True)
        if self._file.parent.is_dir() and not any(self._file.parent.iterdir()):
            self._file.parent.rmdir()


def _part(tensors: dict[str, Tensor], beginning: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(beginning): value
        for name, value in tensors.items()
        if name.startswith(beginning)
    }
