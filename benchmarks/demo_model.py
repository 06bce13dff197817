"""How well the demo model answers, and how well extracted directions steer it.

    python -m benchmarks.demo_model --json demo_model.json

Vectors are learned on the `extract` statements, one ε per class is chosen on the `tune`
statements, and every figure reported is measured on the `heldout` statements.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.options import results_parser
from vllm_steer.offline.demo import demo_model_path, demo_scales_path
from vllm_steer.offline.demo.concepts import CONCEPTS, all_concepts, class_of, prefix
from vllm_steer.offline.demo.evaluate import DemoModel, Trial, Verdict
from vllm_steer.offline.demo.packs import FULL_METHOD
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.pipeline import ExtractionSettings, extract_pack
from vllm_steer.offline.models.prompts import Concept
from vllm_steer.offline.questions.statements import Split, statements

Directions = Mapping[str, NDArray[np.float32]]


def _variant(**changes: Any) -> ExtractionSettings:
    return FULL_METHOD.model_copy(update=changes)


FULL = "attention token, soft labels, RFM"
METHODS: dict[str, ExtractionSettings] = {
    FULL: FULL_METHOD,
    "the same, authors' ridge and centring": ExtractionSettings(
        positive_count=200, negative_count=200
    ),
    "attention token, hard labels, RFM": _variant(labels="hard"),
    "token -2, hard labels, RFM": _variant(labels="hard", token=-2),
    "token -1, hard labels, RFM": _variant(labels="hard", token=-1),
    "attention token, mean difference": _variant(estimator="mean_difference"),
    "token -1, mean difference": _variant(estimator="mean_difference", token=-1),
}
SCALES = (6.0, 7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0, 11.0, 12.0, 13.0)
FLUENT_SHARE = 0.95
_PLACEHOLDER = 1.0


@dataclass(frozen=True)
class Point:
    """One point of a class's grid on the tuning statements; shares of answers."""

    scale: float
    hit: float
    fluent: float
    hit_and_fluent: float


@dataclass(frozen=True)
class ClassFigures:
    """One class steered at its one ε, on held-out statements."""

    scale: float
    safe_scale: float
    hit: float
    fluent: float
    hit_and_fluent: float
    by_concept: dict[str, float]
    grid: list[Point]


def extract_directions(
    model: Path, concepts: Sequence[str], settings: ExtractionSettings
) -> Directions:
    """Learn one direction per concept from the `extract` statements, half for each side."""
    texts = [statement.text for statement in statements("extract")]
    half = len(texts) // 2
    with tempfile.TemporaryDirectory() as out:
        pack = extract_pack(
            model,
            ExtractionData(
                [Concept(_slug(concept), prefix(concept)) for concept in concepts],
                texts[:half],
                texts[half:],
            ),
            settings,
            PackTarget("demo", out, _PLACEHOLDER, _PLACEHOLDER),
            ComputeResources(workers=len(os.sched_getaffinity(0))),
        )
        return {concept: pack.vectors[_slug(concept)] for concept in concepts}


def _slug(concept: str) -> str:
    return concept.lower().replace(" ", "-")


def spread(split: Split, concepts: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Pair every concept with `count` statements, going round the split once per need."""
    texts = cycle(statement.text for statement in statements(split))
    return [(concept, text) for concept in concepts for text in islice(texts, count)]


def steered(
    directions: Directions, pairs: Iterable[tuple[str, str]], scales: Mapping[str, float]
) -> list[Trial]:
    """Return a plain prompt steered to each pair's concept at its class's scale."""
    return [
        Trial(text, concept, direction=directions[concept], scale=scales[class_of(concept)])
        for concept, text in pairs
    ]


def shares(trials: Sequence[Trial], verdicts: Sequence[Verdict]) -> tuple[float, float, float]:
    """Return the shares of answers that express the trial's concept, are fluent, and both."""
    hit = np.array([v.expressed == t.concept for t, v in zip(trials, verdicts, strict=True)])
    fluent = np.array([v.fluent for v in verdicts])
    return float(hit.mean()), float(fluent.mean()), float((hit & fluent).mean())


def tune(model: DemoModel, directions: Directions, count: int, name: str) -> dict[str, list[Point]]:
    """Return every class's grid on the tuning statements."""
    grids: dict[str, list[Point]] = {cls: [] for cls in CONCEPTS}
    for scale in SCALES:
        trials = steered(
            directions, spread("tune", list(directions), count), dict.fromkeys(CONCEPTS, scale)
        )
        verdicts = model.judge(trials, f"{name}: tuning at {scale:g}")
        for cls, grid in grids.items():
            rows = [i for i, trial in enumerate(trials) if class_of(trial.concept) == cls]
            if rows:
                grid.append(
                    Point(scale, *shares([trials[i] for i in rows], [verdicts[i] for i in rows]))
                )
    return {cls: grid for cls, grid in grids.items() if grid}


def choose_scale(grid: Sequence[Point]) -> float:
    """Return the middle of the scales that are within 1 % of the best on the tuning statements."""
    best = max(point.hit_and_fluent for point in grid)
    good = [point.scale for point in grid if point.hit_and_fluent >= best - 0.01]
    return good[(len(good) - 1) // 2]


def safe_scale(grid: Sequence[Point], default: float) -> float:
    """Return the largest scale up to which answers stay fluent, at least the default."""
    safe = default
    for point in grid:
        if point.fluent < FLUENT_SHARE:
            break
        safe = max(safe, point.scale)
    return safe


def measure_steering(
    model: DemoModel, directions: Directions, name: str, tuning: int, heldout: int
) -> dict[str, ClassFigures]:
    """Choose ε per class on tuning statements and measure it on held-out ones."""
    grids = tune(model, directions, tuning, name)
    chosen = {cls: choose_scale(grid) for cls, grid in grids.items()}
    trials = steered(directions, spread("heldout", list(directions), heldout), chosen)
    verdicts = model.judge(trials, f"{name}: held-out")
    figures = {}
    for cls, grid in grids.items():
        rows = [i for i, trial in enumerate(trials) if class_of(trial.concept) == cls]
        by_concept = {
            concept: shares(
                [trials[i] for i in rows if trials[i].concept == concept],
                [verdicts[i] for i in rows if trials[i].concept == concept],
            )[2]
            for concept in directions
            if class_of(concept) == cls
        }
        hit, fluent, both = shares([trials[i] for i in rows], [verdicts[i] for i in rows])
        figures[cls] = ClassFigures(
            chosen[cls], safe_scale(grid, chosen[cls]), hit, fluent, both, by_concept, grid
        )
    return figures


def measure_prompting(model: DemoModel, count: int) -> dict[str, float]:
    """Measure prefixed prompts of every concept, and plain prompts, on held-out statements."""
    prefixed = [Trial(s, c, prefixed=True) for c, s in spread("heldout", all_concepts(), count)]
    hit, fluent, both = shares(prefixed, model.judge(prefixed, "prefixed prompts"))
    plain = [Trial(statement.text) for statement in statements("heldout")]
    verdicts = model.judge(plain, "plain prompts")
    none, plain_fluent, _ = shares(plain, verdicts)
    return {
        "prefixed_answers": len(prefixed),
        "prefixed_hit": hit,
        "prefixed_fluent": fluent,
        "prefixed_hit_and_fluent": both,
        "plain_answers": len(plain),
        "plain_any_concept": 1 - none,
        "plain_fluent": plain_fluent,
    }


def mean_rate(figures: Mapping[str, ClassFigures]) -> float:
    """Return the share of on-concept, fluent answers, averaged over concepts."""
    return float(np.mean([rate for f in figures.values() for rate in f.by_concept.values()]))


def table(prompting: Mapping[str, float], methods: Mapping[str, dict[str, ClassFigures]]) -> str:
    """Render all figures as one text table."""
    lines = [
        f"prefixed prompts express their concept  {prompting['prefixed_hit']:.3f}"
        f"   fluent {prompting['prefixed_fluent']:.3f}",
        f"plain prompts express any concept       {prompting['plain_any_concept']:.3f}"
        f"   fluent {prompting['plain_fluent']:.3f}",
        "",
        f"{'steered, held-out':44s} {'class':9s} {'ε':>5s} {'hit':>6s} {'fluent':>6s} {'both':>6s}",
    ]
    for method, figures in methods.items():
        for cls, f in figures.items():
            lines.append(
                f"{method:44s} {cls:9s} {f.scale:5.2f} {f.hit:6.3f} {f.fluent:6.3f} "
                f"{f.hit_and_fluent:6.3f}"
            )
        lines.append(f"{method:44s} {'mean over concepts':29s} {mean_rate(figures):6.3f}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--model", type=Path, default=demo_model_path())
    parser.add_argument("--concepts", type=int, default=6, help="concepts per class to steer to")
    parser.add_argument("--statements", type=int, default=40, help="held-out ones per concept")
    parser.add_argument("--tuning", type=int, default=10, help="tuning statements per concept")
    parser.add_argument("--baselines", action="store_true", help="measure the other methods too")
    parser.add_argument("--write-scales", action="store_true", help="write the demo's scales.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = DemoModel(args.model)
    prompting = measure_prompting(model, count=20)
    concepts = [c for group in CONCEPTS.values() for c in islice(group, args.concepts)]
    methods = {}
    for name, settings in METHODS.items():
        if name == FULL or args.baselines:
            directions = extract_directions(args.model, concepts, settings)
            methods[name] = measure_steering(model, directions, name, args.tuning, args.statements)
    report = {
        "prompting": prompting,
        "steering": {
            name: {
                "mean": mean_rate(figures),
                "classes": {cls: asdict(f) for cls, f in figures.items()},
            }
            for name, figures in methods.items()
        },
    }
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.write_scales:
        scales = {
            cls: {"default": f.scale, "safe": f.safe_scale} for cls, f in methods[FULL].items()
        }
        demo_scales_path().write_text(json.dumps(scales, indent=2) + "\n")
    print(table(prompting, methods))


if __name__ == "__main__":
    main()
