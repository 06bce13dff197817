"""The command line's summary of a pack."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import JsonValue

from vllm_steer.fields import show_layers
from vllm_steer.packs.calibration import Calibration
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.probe import Probe
from vllm_steer.request.positions import show_positions

# For values that were not measured.
_NOTHING = "–"


def pack_summary(pack: SteeringPack) -> str:
    """Returns the pack's model, method and directions as a text table that ends in a newline."""
    manifest = pack.manifest
    model = manifest.model
    lines = [
        f"steering pack {pack.name!r}, verified: {pack.origin}",
        f"model      {model.name} ({model.architecture}, {model.model_type}), "
        f"hidden size {model.hidden_size}, {model.num_layers} layers",
        f"method     {manifest.method.name}, seed {manifest.method.seed}, "
        f"data {manifest.method.data_sha256[:12]}",
        *_prompts(manifest.method.settings),
        "layers     layer k is the output of decoder block k, counted from 0",
        "",
        f"{'direction':<32} {'scale':>8} {'safe':>8} {'gap closed':>10} {'expressed':>9} {'steers':>6} {'AUROC':>8}  "
        f"{'positions':<11} {'op':<7} {'digest':<12}  {'default layers':<14}  layers",
    ]
    for name, record in pack.directions.items():
        safe = _NOTHING if record.safe_scale is None else f"{record.safe_scale:g}"
        closed, expressed, steers = _measured(record.calibration)
        lines.append(
            f"{name:<32} {record.default_scale:>8g} {safe:>8} {closed:>10} {expressed:>9} {steers:>6} "
            f"{_told_apart(record.probe):>8}  "
            f"{show_positions(record.positions):<11} {record.op:<7} {pack.digests[name][:12]}  "
            f"{show_layers(record.steered_layers):<14}  {show_layers(record.layers)}"
        )
    return "\n".join(lines) + "\n"


def _prompts(settings: Mapping[str, JsonValue]) -> list[str]:
    """How prompts were rendered, if not by the tokenizer's own chat template."""
    template, arguments = settings.get("chat_template"), settings.get("chat_template_kwargs")
    told = ["plain text" if template == "plain" else "a chat template given"] if template else []
    told += [f"chat_template_kwargs {json.dumps(arguments)}"] if arguments else []
    return [f"prompts    {', '.join(told)}; ask it likewise"] if told else []


def _told_apart(probe: Probe | None) -> str:
    """How well the scores of a direction tell texts apart, and the layer."""
    best = probe.at(probe.layer) if probe else None
    return _NOTHING if best is None else f"{best.auroc:.2f}@{best.layer}"


def _measured(calibration: Calibration | None) -> tuple[str, str, str]:
    """Shares of the gap closed and of the concept expressed, and whether the direction steers."""
    if calibration is None or calibration.gap_closed is None:
        return _NOTHING, _NOTHING, _NOTHING
    expressed = _NOTHING if calibration.expression is None else f"{calibration.expression:.2f}"
    return f"{calibration.gap_closed:.2f}", expressed, "yes" if calibration.steers else "no"
