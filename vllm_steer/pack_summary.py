"""What the command line shows of a pack."""

from __future__ import annotations

from vllm_steer.pack import SteeringPack


def pack_summary(pack: SteeringPack) -> str:
    """Returns the pack's model, method and directions as a table of text, newline at its end."""
    manifest = pack.manifest
    model = manifest.model
    lines = [
        f"steering pack {pack.name!r}, verified: {pack.origin}",
        f"model      {model.name} ({model.architecture}, {model.model_type}), "
        f"hidden size {model.hidden_size}, {model.num_layers} layers",
        f"method     {manifest.method.name}, seed {manifest.method.seed}, "
        f"data {manifest.method.data_sha256[:12]}",
        "layers     layer k is the output of decoder block k, counted from 0",
        "",
        f"{'direction':<32} {'scale':>8} {'safe':>8}  {'positions':<11} {'op':<7} {'digest':<12}  layers",
    ]
    for name, record in pack.directions.items():
        op = (record.form and record.form.op) or "add"
        lines.append(
            f"{name:<32} {record.default_scale:>8g} {record.safe_scale:>8g}  {record.positions:<11} "
            f"{op:<7} {pack.digests[name][:12]}  {', '.join(map(str, record.layers))}"
        )
    return "\n".join(lines) + "\n"
