"""Packs learned as users learn them, with ``vllm-steer extract``, without repeating steps."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_steer.errors import ExtractionError, PackError
from vllm_steer.offline.demo.concepts import all_concepts, prefix
from vllm_steer.offline.files import write_atomically
from vllm_steer.offline.models.prompts import Concept
from vllm_steer.offline.showcase import MODEL
from vllm_steer.packs.pack import SteeringPack, load_pack


@dataclass(frozen=True)
class Wanted:
    """A pack to be learned.

    Attributes:
        name: Its name.
        concepts: Concepts of its directions.
    """

    name: str
    concepts: tuple[Concept, ...]


LIVE = Wanted("own", (Concept("pirate", "Take on the role of a pirate."),))
"""What every run of the demo learns; the pack that is shipped has no such direction."""

FULL = Wanted(MODEL, tuple(Concept(concept, prefix(concept)) for concept in all_concepts()))
"""What is shipped."""


def learned_pack(
    model: Path, wanted: Wanted, out: Path, say: Callable[[str], None]
) -> SteeringPack:
    """Returns a pack, learned and calibrated by commands that are shown as they are run.

    An interrupted run continues, and existing directions are not learned again.

    Args:
        model: Checkpoint directory.
        wanted: The pack.
        out: Directory of the pack; the file of prefixes is next to it.
        say: Called with each line that is shown.

    Raises:
        ExtractionError: A command failed; it has said why.
        PackError: What it wrote is not a pack.
    """
    pack = _found(wanted, out)
    if pack is None:
        prefixes = out.with_suffix(".prefixes")
        lines = [f"{name}: {prefix}\n" for name, prefix in wanted.concepts]
        write_atomically(prefixes, "".join(lines))
        _run(extract_command(model, wanted, out, prefixes), say)
    elif any(record.calibration is None for record in pack.directions.values()):
        _run(calibrate_command(model, out), say)
    else:
        say(f"{out} was learned before; remove it to learn it again.")
    return load_pack(out)


def extract_command(model: Path, wanted: Wanted, out: Path, prefixes: Path) -> list[str]:
    """Returns the command that learns a pack and calibrates it."""
    what = ["--name", wanted.name, "--prefixes", str(prefixes), "--out", str(out)]
    return ["vllm-steer", "extract", "--model", str(model), *what]


def calibrate_command(model: Path, out: Path) -> list[str]:
    """Returns the command that calibrates a pack whose calibration was interrupted."""
    return ["vllm-steer", "calibrate", str(out), "--model", str(model)]


def _found(wanted: Wanted, out: Path) -> SteeringPack | None:
    """Returns the pack that is there, if it holds all that is wanted."""
    try:
        pack = load_pack(out)
    except PackError:
        return None
    records = pack.directions.values()
    held = tuple((r.name, r.prefix.text if r.prefix else "") for r in records)
    return pack if (pack.name, held) == (wanted.name, wanted.concepts) else None


def _run(command: Sequence[str], say: Callable[[str], None]) -> None:
    say(f"$ {shlex.join(command)}")
    # Only progress is shown; vLLM logs a hundred lines at every start.
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", **os.environ}
    program = [sys.executable, "-m", "vllm_steer.cli", *command[1:]]
    status = subprocess.run(program, env=environment, check=False).returncode
    if status:
        raise ExtractionError(
            f"vllm-steer {command[1]} ended with status {status}; what it said stands above, and the same "
            f"demo continues"
        )
