"""The table of architectures in the documentation, from what the parity tests measured.

``python -m tests.architectures.table`` writes it; a test fails when it is stale.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.families import FAMILIES, MODES
from vllm_steer.testing.marked import Block

RESULTS = Path(__file__).with_name("parity.json")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "models.md"


@dataclass(frozen=True)
class Results:
    """What the parity tests measured.

    Attributes:
        versions: Versions of the libraries that they ran with.
        differences: Largest difference of log-probabilities by family and mode.
    """

    versions: dict[str, str]
    differences: dict[str, dict[str, float]]


def read_results() -> Results:
    """Returns the stored results; nothing measured where there are none."""
    return Results(**json.loads(RESULTS.read_text())) if RESULTS.exists() else Results({}, {})


def write_results(results: Results) -> None:
    """Stores results, families in the order of the list."""
    known = [name for name in FAMILIES if name in results.differences]
    ordered = {
        name: {
            mode: results.differences[name][mode]
            for mode in MODES
            if mode in results.differences[name]
        }
        for name in known
    }
    text = json.dumps(asdict(Results(results.versions, ordered)), indent=1)
    RESULTS.write_text(text + "\n")


def render(results: Results) -> str:
    """Returns the table with the sentence over it, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    rows = [
        f"| {name} | `{_class(name)}` | {' | '.join(_cell(differences, mode) for mode in MODES)} |"
        for name, differences in results.differences.items()
    ]
    return "\n".join(
        [
            f"{len(rows)} families, {versions}:",
            "",
            f"| family | class | {' | '.join(MODES)} |",
            "|---|---|---|---|",
            *rows,
            *_notes(results),
        ]
    )


def _notes(results: Results) -> list[str]:
    known = [FAMILIES[name] for name in results.differences]
    notes = [
        f"{family.name} compiled: {family.not_compiled}." for family in known if family.not_compiled
    ]
    return ["", *notes] if notes else []


def _class(name: str) -> str:
    config = getattr(transformers, FAMILIES[name].config)
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def _cell(differences: dict[str, float], mode: str) -> str:
    return f"{differences[mode]:.0e}" if mode in differences else "–"


BLOCK = Block(PAGE, "architectures", lambda: render(read_results()))


if __name__ == "__main__":
    BLOCK.write()
