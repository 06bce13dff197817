"""The demo on a real model, SmolLM2-135M-Instruct: directions learned, served and shown beside their prefixes.

``run`` has its steps; ``learn`` learns packs by the command line, ``ask`` asks the server and ``table`` shows
what it answered. ``release`` writes the pack that is shipped. Importing this module imports none of them.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

MODEL = "smollm2"
"""Name of the model for ``vllm-steer model``, of the pack that is shipped, and of the served model."""


def shipped_pack() -> Path:
    """Returns the directory of the pack that is shipped: a direction for each concept of the demo."""
    return Path(str(files("vllm_steer.offline.showcase") / "pack"))
