"""What ablation and rotation do to the demo model: a concept taken out of prompts that ask for it.

    python -m benchmarks.interventions --json benchmarks/results/interventions.json

Directions are learned on the ``extract`` statements. Every prompt has its concept's prefix and a
``heldout`` statement; the engine answers it as it is, with the direction of its concept ablated at all
layers and positions, and, as a control, with that of a concept of another class ablated. The demo judge
says whether an answer expresses its concept. Intervals are over concepts. The norms are those of the
residual stream in float32, before and after the engine's own hook, at every layer and token.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.report import environment, show, write_json
from vllm_steer.engine.bank import BankShape, SteeringBank
from vllm_steer.engine.blocks import hook_blocks
from vllm_steer.engine.row_values import row_values
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import CONCEPTS, class_of, prefix
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.judge import expressed_concept, is_fluent
from vllm_steer.offline.demo.packs import FULL_METHOD
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.pipeline import extract_pack
from vllm_steer.offline.extract.settings import ExtractionSettings
from vllm_steer.offline.measures.intervals import SHARE, mean_interval
from vllm_steer.offline.models.loading import find_blocks
from vllm_steer.offline.models.prompts import Concept
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.capacity import PLANE_RANK
from vllm_steer.plan.resolve import resolve
from vllm_steer.request.schema import SteeringRequest

MAX_TOKENS = 48
ANGLES = (15.0, 60.0, 120.0, 180.0)
ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 2**28,
}


@dataclass(frozen=True)
class Rate:
    """Share of answers in the concept that the prompt asks for, and of fluent ones.

    Attributes:
        expressed: Mean over concepts.
        low: Lower end of its 95 % interval over concepts; None with fewer than two, and where all are
            equal.
        high: Upper end.
        fluent: Share of fluent answers.
        by_concept: Share in the concept.
    """

    expressed: float
    low: float | None
    high: float | None
    fluent: float
    by_concept: dict[str, float]


@dataclass(frozen=True)
class Asked:
    """One prompt that asks for its concept."""

    concept: str
    statement: str


def methods(layers: int, count: int) -> dict[str, ExtractionSettings]:
    """How directions are learned, by name of the pack; block 0 is ablated too."""
    common = {
        "layers": tuple(range(layers)),
        "positive_count": count,
        "negative_count": count,
        "permutations": 0,
    }
    return {
        "attention_guided": FULL_METHOD.model_copy(update=common),
        "attention_token_means": ExtractionSettings(
            estimator="mean_difference", labels="hard", **common
        ),
        "ablation": ExtractionSettings(method="ablation", **common),
        "ablation_contrast": ExtractionSettings(method="ablation", contrast="concepts", **common),
        "ablation_contrast_token-2": ExtractionSettings(
            method="ablation", contrast="concepts", token=-2, **common
        ),
        "angular": ExtractionSettings(method="angular", **common),
    }


def unrelated(concepts: Sequence[str]) -> dict[str, str]:
    """Returns for each concept one of another class, each used once."""
    shift = next(
        shift
        for shift in range(1, len(concepts))
        if all(
            class_of(concept) != class_of(concepts[(at + shift) % len(concepts)])
            for at, concept in enumerate(concepts)
        )
    )
    return {c: concepts[(at + shift) % len(concepts)] for at, c in enumerate(concepts)}


def rate(asked: Sequence[Asked], answers: Sequence[tuple[str, bool]]) -> Rate:
    """Judges answers, each a text and whether it ended by itself."""
    hits: dict[str, list[bool]] = {}
    fluent = []
    for one, (text, finished) in zip(asked, answers, strict=True):
        hits.setdefault(one.concept, []).append(expressed_concept(text) == one.concept)
        fluent.append(is_fluent(text, one.statement, finished))
    shares = {concept: float(np.mean(found)) for concept, found in hits.items()}
    values = np.array(list(shares.values()))
    return Rate(float(values.mean()), *mean_interval(values, SHARE), float(np.mean(fluent)), shares)


def measure_ablation(packs: Sequence[SteeringPack], asked: Sequence[Asked]) -> dict[str, Rate]:
    """Answers every prompt plainly and, for each pack, with its own and an unrelated direction ablated."""
    from vllm import LLM, SamplingParams

    steering = {"packs": [str(pack.path) for pack in packs], "ops": "affine"}
    llm = LLM(str(demo_model_path()), additional_config={"steering": steering}, **ENGINE)
    chats = [[{"role": "user", "content": user_text(a.statement, a.concept)}] for a in asked]
    other = unrelated(list(dict.fromkeys(one.concept for one in asked)))
    arms: dict[str, list[dict[str, Any] | None]] = {"plain": [None] * len(asked)}
    for pack in packs:
        for arm, of in (("own", {c: c for c in other}), ("unrelated", other)):
            arms[f"{pack.name}, {arm}"] = [
                {
                    "directions": [
                        {"name": f"{pack.name}/{of[one.concept]}", "op": "ablate", "scale": 1.0}
                    ],
                    "positions": "all",
                }
                for one in asked
            ]
    found = {}
    for name, steerings in arms.items():
        parameters = [
            SamplingParams(
                temperature=0.0,
                max_tokens=MAX_TOKENS,
                extra_args={"steering": steering} if steering else None,
            )
            for steering in steerings
        ]
        outputs = [output.outputs[0] for output in llm.chat(chats, parameters, use_tqdm=False)]
        found[name] = rate(asked, [(one.text, one.finish_reason == "stop") for one in outputs])
    llm.llm_engine.engine_core.shutdown()
    return found


def measure_norms(pack: SteeringPack, asked: Sequence[Asked]) -> dict[str, float]:
    """Returns the largest relative change of ‖h‖ by op, over tokens, layers, angles and directions.

    Args:
        pack: Directions with planes, method ``angular``.
        asked: Prompts; each is run with the direction of its concept.

    Returns:
        ``rotate`` and ``angle``, and ``add`` at ε = 10, which does change norms and shows that
        the measurement sees it.
    """
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    registry = PackRegistry([pack])
    choices = [
        (op, {"op": op, "plane": "{} plane", "scale": angle})
        for op in ("rotate", "angle")
        for angle in ANGLES
    ]
    found: dict[str, float] = {}
    for op, choice in [*choices, ("add", {"op": "add", "scale": 10.0})]:
        for one in asked:
            chat = [{"role": "user", "content": user_text(one.statement, one.concept)}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            named = {
                key: v.format(one.concept) if key == "plane" else v for key, v in choice.items()
            }
            drift = _drift(registry, f"{pack.name}/{one.concept}", named, tokenizer(text).input_ids)
            found[op] = max(found.get(op, 0.0), drift)
    return found


@torch.inference_mode()
def _drift(
    registry: PackRegistry, name: str, choice: Mapping[str, Any], token_ids: list[int]
) -> float:
    """Largest relative change of the norm by the engine's hook in a forward pass of one prompt."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    config = model.config
    layers = range(config.num_hidden_layers)
    request = SteeringRequest.model_validate(
        {"directions": [{"name": name, **choice}], "positions": "all"}
    )
    (segment,) = resolve(bind(request, registry), len(token_ids)).segments
    bank = SteeringBank(
        BankShape(tuple(layers), 2, config.hidden_size, len(token_ids), PLANE_RANK),
        torch.float32,
        torch.device("cpu"),
    )
    bank.write_row(
        1, row_values(segment, bank.index, PLANE_RANK, config.hidden_size, registry.by_digest)
    )
    bank.set_rows(np.ones(len(token_ids), dtype=np.int32))
    blocks = find_blocks(model, config.num_hidden_layers)
    norms: dict[str, list[torch.Tensor]] = {"before": [], "after": []}

    def see(when: str) -> Any:
        return lambda _block, _args, output: norms[when].append(output.double().norm(dim=-1))

    for block in blocks:
        block.register_forward_hook(see("before"))
    hook_blocks(zip(layers, blocks, strict=True), bank)
    for block in blocks:
        block.register_forward_hook(see("after"))
    model(torch.tensor([token_ids]))
    before, after = (torch.stack(norms[when]) for when in ("before", "after"))
    return float((after / before - 1).abs().max())


def matrix(report: Mapping[str, Any]) -> str:
    """Returns the ablation's figures of a report as a Markdown table."""
    rates = report["ablation"]
    names = dict.fromkeys(name.partition(", ")[0] for name in rates if name != "plain")
    lines = [
        "| directions by | its own direction ablated | an unrelated one ablated |",
        "|---|---|---|",
    ]
    for name in names:
        cells = (_cell(rates[f"{name}, {arm}"]) for arm in ("own", "unrelated"))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| none | {_cell(rates['plain'])} | |"])


def _cell(found: Mapping[str, Any]) -> str:
    ends = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['expressed']:.2f}{ends}, fluent {found['fluent']:.2f}"


def _report(args: argparse.Namespace) -> dict[str, Any]:
    concepts = [c for group in CONCEPTS.values() for c in islice(group, args.concepts)]
    texts = [statement.text for statement in statements("extract")]
    half = len(texts) // 2
    held = [statement.text for statement in statements("heldout")[: args.statements]]
    asked = [Asked(concept, text) for concept in concepts for text in held]
    layers = AutoModelForCausalLM.from_pretrained(demo_model_path()).config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        packs = {
            name: extract_pack(
                demo_model_path(),
                ExtractionData(
                    [Concept(concept, prefix(concept)) for concept in concepts],
                    texts[:half],
                    texts[half:],
                ),
                settings,
                PackTarget(name, Path(folder) / name, 1.0, 1.0),
                ComputeResources(workers=len(os.sched_getaffinity(0))),
            )
            for name, settings in methods(layers, args.extract).items()
        }
        norms = measure_norms(packs.pop("angular"), asked[:: max(1, len(asked) // 5)])
        rates = measure_ablation(list(packs.values()), asked)
    return {
        **environment(),
        "concepts": concepts,
        "statements": {"extract": args.extract, "heldout": args.statements},
        "ablation": {name: asdict(found) for name, found in rates.items()},
        "unrelated": unrelated(concepts),
        "norm_drift": norms,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file of all figures")
    parser.add_argument("--concepts", type=int, default=2, help="concepts per class")
    parser.add_argument("--extract", type=int, default=100, help="statements of each side")
    parser.add_argument("--statements", type=int, default=10, help="held-out ones per concept")
    args = parser.parse_args()
    report = _report(args)
    write_json(args.json, report)
    drift = report["norm_drift"]
    show([matrix(report), "", *(f"norm, {op}: {value:.1e}" for op, value in drift.items())])


if __name__ == "__main__":
    main()
