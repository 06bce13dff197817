"""Fusion Steering against the uncached original, by depth and scale; without an engine.

    python -m benchmarks.fusion_depth --json benchmarks/results/fusion-depth.json

On the demo model and on SmolLM2-135M, of 6 and of 30 blocks, one scale for all of them: how far the
prompt's mean is moved towards the reference, and how far the next tokens' distribution is from the
original's, with mu of the unsteered prompt and with mu under steering, which is what is served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.options import results_parser
from benchmarks.report import environment, show, write_json
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.gold import gold_questions
from vllm_steer.offline.fusion.distance import displacement
from vllm_steer.offline.fusion.original import (
    Fusion,
    continue_greedily,
    forced_logs,
    frozen,
    frozen_steered,
    refreshed,
)
from vllm_steer.offline.fusion.references import measure_references
from vllm_steer.offline.gguf.model import model_path
from vllm_steer.offline.models.hooks import Change
from vllm_steer.offline.models.loading import load_config, load_model, public_name

SCALES = (0.01, 0.1, 0.255, 0.5, 1.0)
"""The least and the largest product of alpha and gamma that a search draws, their mean, and between."""
ROUNDING = 1e-6
UNSTEERED, STEERED = "mu of the unsteered prompt", "mu under steering"


def measured(path: Path, questions: int, tokens: int) -> dict[str, Any]:
    """Returns the figures of one model, by scale and form, means and the largest over questions."""
    _, tokenizer = load_config(path)
    model = load_model(path, "float32", "cpu")
    asked = gold_questions("heldout", questions, prefixed_reference=True)
    found = measure_references(model, tokenizer, asked)
    cases = [(scale, place) for scale in SCALES for place in range(questions)]
    raw: dict[float, list[dict[str, Any]]] = {scale: [] for scale in SCALES}
    for scale, place in tqdm(cases, desc=public_name(path), unit="case"):
        reference, mean = (torch.tensor(x[place]) for x in (found.reference, found.prompt))
        fusion = Fusion(found.prompts[place], reference, torch.full((len(mean),), scale))
        raw[scale].append(_one(model, fusion, mean, tokens))
    rows: dict[str, dict[str, Any]] = {}
    for scale, given in raw.items():
        rows[f"{scale:g}"] = {
            "original": float(np.mean([one["original"] for one in given])),
            **{
                name: {
                    "displacement": float(np.mean([one[name][0] for one in given])),
                    "mean_kl": float(np.mean([one[name][1] for one in given])),
                    "first_kl": float(np.mean([one[name][1][0] for one in given])),
                    "max_kl": float(np.max([one[name][1] for one in given])),
                }
                for name in (UNSTEERED, STEERED)
            },
        }
    return {"model": public_name(path), "blocks": model.config.num_hidden_layers, "scales": rows}


def _one(model: PreTrainedModel, fusion: Fusion, mean: torch.Tensor, tokens: int) -> dict[str, Any]:
    original = refreshed(fusion)
    answer = continue_greedily(model, original, fusion.prompt, tokens, None)
    logs = forced_logs(model, original, fusion.prompt, answer)
    found: dict[str, Any] = {"original": displacement(model, fusion, original, mean)}
    forms: Mapping[str, Change] = {
        UNSTEERED: frozen(fusion, mean),
        STEERED: frozen_steered(model, fusion),
    }
    for name, form in forms.items():
        own = forced_logs(model, form, fusion.prompt, answer)
        divergence = (logs.exp() * (logs - own)).sum(dim=-1).tolist()
        found[name] = displacement(model, fusion, form, mean), divergence
    return found


def table(report: Mapping[str, Any]) -> str:
    """Returns displacement and divergence by model and scale, as Markdown."""
    lines = [
        "| blocks | αγ | moved by the original | by μ of the unsteered prompt | by μ under steering | "
        "KL, μ of the unsteered prompt | KL, μ under steering | at the first token |",
        "|---" * 8 + "|",
    ]
    for one in report["models"]:
        for scale, row in one["scales"].items():
            before, after = row[UNSTEERED], row[STEERED]
            cells = (
                f"{row['original']:.2f}",
                f"{before['displacement']:.2f}",
                f"{after['displacement']:.2f}",
                *(
                    f"{abs(kl):.2g}" if abs(kl) > ROUNDING else "0"
                    for kl in (before["mean_kl"], after["mean_kl"], after["first_kl"])
                ),
            )
            lines.append(f"| {one['blocks']} | {scale} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument(
        "--models", type=Path, nargs="+", metavar="DIR", help="default: the demo's and SmolLM2's"
    )
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4, help="of the original's answer")
    parser.add_argument("--redraw", action="store_true", help="show the table of --json alone")
    args = parser.parse_args()
    if not args.redraw:
        about = environment()
        torch.set_num_threads(1)
        models = args.models or [demo_model_path(), model_path("smollm2")]
        found = [measured(path, args.questions, args.tokens) for path in models]
        settings = {"questions": args.questions, "tokens": args.tokens}
        write_json(args.json, {**about, **settings, "models": found})
    show([table(json.loads(args.json.read_text()))])


if __name__ == "__main__":
    main()
