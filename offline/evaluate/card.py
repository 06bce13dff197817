"""A pack's README.md: content, method, measurements and use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.plots import (
    BlockDiagnostics,
    attention_heat_map,
    concept_cosines,
    enrichment_bars,
    scale_curves,
)
from vllm_steer.offline.evaluate.results import SweepResult
from vllm_steer.offline.evaluate.tables import markdown
from vllm_steer.offline.extract.figures import FIGURES_FILE, read_figures
from vllm_steer.offline.files import write_atomically
from vllm_steer.packs.pack import DirectionRecord, SteeringPack
from vllm_steer.request.positions import show_positions

CARD_FILE = "README.md"
PICTURES = "pictures"
_SHOWN_DIRECTIONS = 50


def write_card(
    pack: SteeringPack,
    sweep: SweepResult | None = None,
    diagnostics: BlockDiagnostics | None = None,
) -> Path:
    """Writes ``README.md`` and its plots into the pack's directory, each file atomically.

    Args:
        pack: The pack.
        sweep: Result of a sweep that includes this pack; None for none.
        diagnostics: Diagnostics of the extraction for each block; None for none.

    Returns:
        The README's path.

    Raises:
        EvaluationError: The sweep used other vectors than the pack's.
    """
    if sweep is not None:
        sweep = _of_pack(sweep, pack)
    pictures = _pictures(pack, sweep, diagnostics)
    for name, (data, _) in pictures.items():
        write_atomically(pack.path / PICTURES / name, data)
    captions = {name: caption for name, (_, caption) in pictures.items()}
    file = pack.path / CARD_FILE
    write_atomically(file, _text(pack, sweep, captions))
    return file


def diagnostics_of(pack: Path) -> BlockDiagnostics | None:
    """Returns the figures of a pack's extraction; None if the pack has none."""
    if not (pack / FIGURES_FILE).exists():
        return None
    seen = read_figures(pack).arrays
    return BlockDiagnostics.of_concepts(seen["attention_max"], seen.get("enrichment"))


def _of_pack(sweep: SweepResult, pack: SteeringPack) -> SweepResult:
    """Returns the part of a sweep that is about a pack."""
    found = [result for result in sweep.classes if result.name == pack.name]
    if not found or sweep.packs.get(pack.name) != pack.manifest.tensors.sha256:
        raise EvaluationError(
            f"the sweep covers {', '.join(sweep.packs)} but not these vectors of {pack.name!r}; "
            f"sweep this pack"
        )
    return sweep.model_copy(update={"classes": found})


def _pictures(
    pack: SteeringPack, sweep: SweepResult | None, diagnostics: BlockDiagnostics | None
) -> dict[str, tuple[bytes, str]]:
    """File name to picture and caption."""
    pictures = {}
    if diagnostics is not None:
        pictures["attention.png"] = (
            attention_heat_map(diagnostics, pack.name),
            "Attention of the candidate tokens to the concept's prefix, by layer; the chosen token is "
            "outlined.",
        )
        if diagnostics.enrichment is not None:
            pictures["enrichment.png"] = (
                enrichment_bars(diagnostics, pack.name),
                "Concept enrichment of each layer.",
            )
    if sweep is not None:
        pictures["scales.png"] = (
            scale_curves(sweep.classes, f"{pack.name}, judge: {sweep.judge}"),
            "Steerability with its 95 % interval, share of the gap closed, and perplexity of the answers "
            "under the unsteered model, against ε. Dashed: the scale chosen on other questions, and the "
            "prefixed model's steerability. Dotted: unsteered answers.",
        )
    # Layers of only some directions cannot be compared.
    if len(pack.vectors) > 1 and len({tuple(d.layers) for d in pack.directions.values()}) == 1:
        vectors = {name: pack.vectors[name] for name in pack.directions}
        pictures["cosines.png"] = (concept_cosines(vectors, pack.name), "Cosine between concepts.")
    return pictures


def _text(pack: SteeringPack, sweep: SweepResult | None, captions: Mapping[str, str]) -> str:
    manifest, model = pack.manifest, pack.manifest.model
    # A JSON string is valid YAML.
    header = (
        f"library_name: vllm-steer\nbase_model: {json.dumps(model.name)}\n"
        f"tags: [steering-vector, activation-steering, vllm]"
    )
    parts = [
        f"---\n{header}\n---",
        f"# {pack.name}: steering vectors for {model.name}",
        f"{len(pack.directions)} directions for `{model.name}` ({model.architecture}, hidden size "
        f"{model.hidden_size}, {model.num_layers} layers), to change the residual stream by "
        f"vllm-steer. Layer k is the output of decoder block k, counted from 0.",
        "## Use",
        _use(pack),
        "## Directions",
        _directions(pack),
    ]
    if sweep is not None:
        parts += ["## How well it steers", markdown(sweep).strip()]
    if captions:
        parts.append("## Pictures")
        parts += [f"![{text}]({PICTURES}/{name})\n\n{text}" for name, text in captions.items()]
    method = manifest.method
    settings = {**method.settings, "seed": method.seed}
    parts += [
        "## Method",
        f"`{method.name}`; sha256 of the prompts `{method.data_sha256}`, of the vectors "
        f"`{manifest.tensors.sha256}`.",
        _table("setting", settings),
        _table("library", method.libraries),
    ]
    return "\n\n".join(parts) + "\n"


def _use(pack: SteeringPack) -> str:
    name, record = next(iter(pack.directions.items()))
    direction = {"name": f"{pack.name}/{name}", "scale": record.default_scale}
    body = {
        "model": pack.manifest.model.name,
        "messages": [{"role": "user", "content": "What is on your mind?"}],
        "steering": {"directions": [direction]},
    }
    data = json.dumps(body).replace("'", r"'\''")
    affine = any(_form(record) != "add" for record in pack.directions.values())
    ops = " --steering-ops affine" if affine else ""
    if any(record.op == "multiply" for record in pack.directions.values()):
        ops += " --steering-multiply"
    return (
        f"```bash\nvllm serve {pack.manifest.model.name} --enable-steering --steering-packs .{ops}\n"
        "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d '{data}'\n```"
    )


def _directions(pack: SteeringPack) -> str:
    rows = [
        "| direction | form | default scale | safe scale | gap closed | expressed | steers | positions "
        "| default layers | layers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    records = list(pack.directions.values())
    for record in records[:_SHOWN_DIRECTIONS]:
        safe = "–" if record.safe_scale is None else f"{record.safe_scale:g}"
        default_layers, layers = (
            ", ".join(map(str, some)) for some in (record.steered_layers, record.layers)
        )
        rows.append(
            f"| {_cell(record.name)} | {_cell(_form(record))} | {record.default_scale:g} | {safe} | "
            f"{_measured(record)} | {show_positions(record.positions)} | {default_layers} | {layers} |"
        )
    more = len(records) - _SHOWN_DIRECTIONS
    if more > 0:
        rows.append(f"\nand {more} more; `vllm-steer inspect` lists them all.")
    return "\n".join(rows)


def _measured(record: DirectionRecord) -> str:
    """The cells of the gap closed, with its interval, of the concept expressed, and of whether it steers."""
    found = record.calibration
    if found is None or found.gap_closed is None:
        return "– | – | –"
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f" [{found.low:.2f}, {found.high:.2f}]"
    expressed = "–" if found.expression is None else f"{found.expression:.2f}"
    return f"{found.gap_closed:.2f}{interval} | {expressed} | {'yes' if found.steers else 'no'}"


def _form(record: DirectionRecord) -> str:
    """The op and the other fields of a direction's form."""
    given = record.form.model_dump(exclude_none=True) if record.form is not None else {}
    op = given.pop("op", "add")
    return f"{op} {json.dumps(given)}" if given else op


def _table(head: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {_cell(key)} | {_cell(json.dumps(value))} |" for key, value in values.items()]
    return "\n".join([f"| {head} | value |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
