"""Other steering plugins: where they come from, how they are asked, and whether they can run here.

A rival is installed into a folder that only its own engine has on its path: hotwire loads itself
into every vLLM beside it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.arms import COMBINED, STRONG, Arm, unsteered
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.verify.engine_calls import ExtraArgs

HOTWIRE = "hotwire"
HOTWIRE_PACKAGE = "hotwire-vllm==0.1.2"
# Folder that holds rivals already, for machines without a package registry.
FOLDER_VARIABLE = "BENCHMARK_RIVALS"

NOT_RUN = {
    "vllm-lens": "not run: needs Python 3.12, runs on V1 alone, and turns compilation and CUDA graphs off for the "
    "whole server",
    "EasySteer": "not run: a fork of vLLM that is built from source for CUDA, not a plugin; the registry's "
    "`easysteer` is an empty package of another project",
    "vLLM-Hook": "not run: no per-request steering, and no compilation; not in the registry under its plugin's name",
}


@dataclass(frozen=True)
class Rival:
    """A rival that is installed.

    Attributes:
        name: Name of its engine, and beginning of its arms' names.
        path: Folder to put on the engine's path.
        environment: Variables of its engine.
        arms: Its arms.
        strong: An arm that no answer can ignore.
    """

    name: str
    path: Path
    environment: dict[str, str]
    arms: tuple[Arm, ...]
    strong: Arm


def install_hotwire(folder: Path, pack: SteeringPack, requests: int) -> Rival:
    """Installs hotwire and writes the pack's directions in its format.

    hotwire has one vector per layer and token, so a request's combination is one vector file, made
    beforehand; and one slot for each vector, layer and scale, never given back.

    Args:
        folder: Where to install and write.
        pack: The directions that the plugin's arms use.
        requests: Requests of a batch.

    Raises:
        RuntimeError: It cannot be installed; the message says why.
    """
    path = Path(os.environ.get(FOLDER_VARIABLE, folder / "rivals"))
    if not any(path.glob("hotwire_vllm-*.dist-info")):
        _install(HOTWIRE_PACKAGE, path)
    vectors = folder / f"{pack.path.name}-hotwire"
    _write_vectors(vectors, pack, requests)
    layers = pack.manifest.model.num_layers
    environment = {
        "VLLM_PLUGINS": HOTWIRE,
        "HOTWIRE_VECTORS": str(vectors),
        "HOTWIRE_SLOTS": str((requests + 2) * layers + 1),
    }

    def ask(vector: str, scale: float) -> ExtraArgs:
        entries = [{"id": vector, "layer": layer, "scale": scale} for layer in range(layers)]
        return {HOTWIRE: json.dumps(entries)}

    def one(count: int, rng: random.Random) -> list[ExtraArgs]:
        return [ask("one", 1.0)] * count

    def distinct(count: int, rng: random.Random) -> list[ExtraArgs]:
        return [ask(f"sum{index}", 1.0) for index in range(count)]

    def strong(count: int, rng: random.Random) -> list[ExtraArgs]:
        return [ask("one", STRONG)] * count

    arms = (
        Arm("hotwire_idle", HOTWIRE, unsteered),
        Arm("hotwire_one", HOTWIRE, one),
        Arm("hotwire_distinct", HOTWIRE, distinct),
    )
    return Rival(HOTWIRE, path, environment, arms, Arm("hotwire_strong", HOTWIRE, strong))


def _install(package: str, path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run(
        [*command, str(path), package], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise RuntimeError(f"{package} cannot be installed: {reason}")


def _write_vectors(folder: Path, pack: SteeringPack, requests: int) -> None:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    values = [np.asarray(vector) for vector in pack.vectors.values()]
    torch.save(torch.from_numpy(values[0].copy()), folder / "one.pt")
    rng = random.Random(0)
    for index in range(requests):
        terms = rng.sample(values, min(COMBINED, len(values)))
        total = sum(rng.uniform(0.5, 1.5) * term for term in terms)
        torch.save(torch.from_numpy(np.asarray(total, dtype=np.float32)), folder / f"sum{index}.pt")
