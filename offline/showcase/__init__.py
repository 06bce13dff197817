"""The demo on a real model, SmolLM2-135M-Instruct: directions learned, served and compared with their
prefixes.

``run`` has its steps; ``learn`` learns packs with the command line, ``ask`` asks the server and ``table``
shows the answers. ``release`` writes the shipped pack. Importing this module imports none of them.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

MODEL = "smollm2"
"""Name of the model for ``vllm-steer model``, of the pack that is shipped, and of the served model."""


def shipped_pack() -> Path:
    """Returns the directory of the shipped pack: a direction for each concept of the demo."""
    return Path(str(files("vllm_steer.offline.showcase") / "pack"))
