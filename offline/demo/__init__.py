"""The demo language model: its corpus, its training and the shipped checkpoint."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def demo_model_path() -> Path:
    """Return the directory of the shipped checkpoint, a Hugging Face model directory."""
    return _HERE / "model"


def demo_scales_path() -> Path:
    """Return the file of default and safe scales (ε) by class."""
    return _HERE / "scales.json"
