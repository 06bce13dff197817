"""Which way of learning directions steers the demo model best: one engine, all arms in its batches.

    python -m benchmarks.methods --json benchmarks/results/methods.json

Directions are learned on the ``extract`` statements. Every arm has the same grid of scales; each
class's ε is chosen on ``tune`` statements among those whose text is fluent, and every figure is of
``heldout`` statements. An answer counts if it expresses its concept and is fluent. Intervals are
over concepts; differences are paired by concept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.method_arms import ATTENTION, ESTIMATORS, Arm, see, write_arms
from benchmarks.options import results_parser
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import CONCEPTS, prefix
from vllm_steer.offline.demo.judge import DemoJudge
from vllm_steer.offline.evaluate.generation import Generator, Request, generating
from vllm_steer.offline.evaluate.plots import Bar, method_bars
from vllm_steer.offline.evaluate.results import ClassResult, Figures
from vllm_steer.offline.evaluate.scores import Measured, class_result, joint_result
from vllm_steer.offline.evaluate.subjects import Subject
from vllm_steer.offline.evaluate.tables import figure_cell
from vllm_steer.offline.files import write_atomically
from vllm_steer.offline.measures.intervals import mean_interval
from vllm_steer.offline.questions.by_class import QuestionSet, given_questions
from vllm_steer.offline.questions.statements import Split, statements
from vllm_steer.packs.pack import Prefix, SteeringPack

SCALES = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 14.0, 20.0, 28.0)
MAX_TOKENS = 48
BLOCK_COUNTS = (1, 2)
BLOCK_ESTIMATORS = (("rfm", "soft"), ("mean_difference", "hard"))
ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 256,
    "kv_cache_memory_bytes": 2**30,
}
FULL = Arm(ATTENTION, "rfm", "soft")


@dataclass(frozen=True, eq=False)
class Found:
    """One arm's figures.

    Attributes:
        arm: The arm.
        joint: All classes together, each at the ε chosen for it.
        classes: Each class.
        difference: Mean over concepts of steerability less that of the full method, and the ends of
            its interval; the mean itself where all are equal.
    """

    arm: Arm
    joint: ClassResult
    classes: Sequence[ClassResult]
    difference: tuple[float, float, float]

    @property
    def over_scales(self) -> float:
        """Steerability averaged over classes and the whole grid: how wide the range of good ε is."""
        points = [point.figures.steerability for found in self.classes for point in found.heldout]
        return float(np.mean([value for value in points if value is not None]))

    def report(self) -> dict[str, Any]:
        """Returns the arm as JSON: figures, one ε per class, steerability by class and by ε."""
        return {
            **asdict(self.arm),
            "single": self.joint.single.model_dump(),
            "own": self.joint.own.model_dump(),
            "oracle": self.joint.oracle.model_dump(),
            "difference_to_full_method": self.difference,
            "mean_over_scales": self.over_scales,
            "scale": {found.name: found.scale for found in self.classes},
            "by_class": {found.name: found.single.model_dump() for found in self.classes},
            "by_scale": {
                found.name: {
                    f"{point.scale:g}": [point.figures.steerability, point.figures.perplexity]
                    for point in found.heldout
                }
                for found in self.classes
            },
        }


def all_arms(candidates: int) -> list[Arm]:
    """Returns every arm: the attention-chosen and each fixed token, then choices of blocks.

    Last come estimators as their authors run them.
    """
    tokens: list[str | int] = [ATTENTION, *range(-candidates, 0)]
    arms = [Arm(token, estimator, labels) for token in tokens for estimator, labels in ESTIMATORS]
    for estimator, labels in BLOCK_ESTIMATORS:
        arms += [
            Arm(ATTENTION, estimator, labels, f"{end} {count}")
            for count in BLOCK_COUNTS
            for end in ("top", "bottom")
        ]
    published = [(ATTENTION, *pair) for pair in ESTIMATORS[:5]] + [(-2, "rfm", "hard")]
    return arms + [Arm(*given, published=True) for given in published]


def measure_arms(
    generator: Generator,
    arms: Sequence[Arm],
    concepts: dict[str, list[str]],
    questions: QuestionSet,
) -> list[Found]:
    """Answers for every arm, class, concept and scale in one stream of requests."""
    subjects = [
        Subject(
            name,
            name,
            {concept: f"{arm.name}/{concept}" for concept in chosen},
            SCALES,
            questions,
            prefixes={concept: Prefix(text=prefix(concept)) for concept in chosen},
        )
        for arm in arms
        for name, chosen in concepts.items()
    ]
    requests: list[Request] = [r for subject in subjects for r in subject.requests()]
    answers = iter(generator.answer(requests))
    measured: list[Measured] = []
    for subject in subjects:
        own = list(islice(answers, len(subject.requests())))
        measured.append(subject.measured(own, DemoJudge().grade(list(subject.cases(own)))))
    by_arm = [
        measured[start : start + len(concepts)] for start in range(0, len(measured), len(concepts))
    ]
    full = _by_concept(by_arm[arms.index(FULL)])
    return [
        _found(arm, list(concepts), parts, full) for arm, parts in zip(arms, by_arm, strict=True)
    ]


def _found(arm: Arm, names: Sequence[str], parts: Sequence[Measured], full: np.ndarray) -> Found:
    difference = _by_concept(parts) - full
    mean = float(difference.mean())
    low, high = mean_interval(difference)
    return Found(
        arm,
        joint_result("all", parts),
        [class_result(name, part) for name, part in zip(names, parts, strict=True)],
        (mean, mean if low is None else low, mean if high is None else high),
    )


def _by_concept(parts: Sequence[Measured]) -> np.ndarray:
    """``[concepts]``: steerability of each concept at its class's chosen scale."""
    return np.concatenate([part.single.grades.mean(axis=1) for part in parts])


def matrix(report: dict[str, Any]) -> str:
    """Returns token by estimator, choices of blocks, and estimators as published.

    A cell holds steerability at one ε per class with its interval, and the mean over all ε.
    """
    arms = {_key(arm): arm for arm in report["arms"].values() if not arm["published"]}
    tokens = dict.fromkeys(token for token, *_ in arms)
    head = [f"{estimator.replace('_', ' ')}, {labels}" for estimator, labels in ESTIMATORS]
    lines = [f"| token | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for token in tokens:
        cells = [_cell(arms[token, *pair, "all"]) for pair in ESTIMATORS]
        lines.append(f"| {_token(token)} | {' | '.join(cells)} |")
    ends = ("all", *(f"{end} {count}" for count in BLOCK_COUNTS for end in ("top", "bottom")))
    lines += ["", f"| blocks | {' | '.join(ends)} |", "|---" * (len(ends) + 1) + "|"]
    for estimator, labels in BLOCK_ESTIMATORS:
        cells = [_cell(arms[ATTENTION, estimator, labels, blocks]) for blocks in ends]
        lines.append(f"| {estimator.replace('_', ' ')}, {labels} | {' | '.join(cells)} |")
    lines += ["", published_table(report)]
    return "\n".join(lines)


def published_table(report: dict[str, Any]) -> str:
    """Returns the estimators as published, the ones that this model tells apart; cells as in :func:`matrix`."""
    lines = ["| token | as published | |", "|---|---|---|"]
    for arm in report["arms"].values():
        if arm["published"]:
            name = f"{arm['estimator']}, {arm['labels']}"
            lines.append(f"| {_token(arm['token'])} | {name} | {_cell(arm)} |")
    return "\n".join(lines) + "\n"


def table(report: dict[str, Any]) -> str:
    """Returns every arm with all its figures."""
    lines = [
        "| token | estimator | labels | blocks | one ε per class (perplexity) | less the full method | "
        "mean over all ε | one ε per concept | oracle-best ε |",
        "|---" * 9 + "|",
    ]
    for name, arm in report["arms"].items():
        mean, low, high = arm["difference_to_full_method"]
        single = Figures.model_validate(arm["single"])
        estimator = arm["estimator"].replace("_", " ")
        cells = (
            _token(arm["token"]),
            estimator + (", as published" if arm["published"] else ""),
            arm["labels"],
            arm["blocks"],
            figure_cell(single),
            "" if name == FULL.name else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]",
            f"{arm['mean_over_scales']:.2f}",
            f"{arm['own']['steerability']:.2f}",
            f"{arm['oracle']['steerability']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(report: dict[str, Any]) -> bytes:
    """Draws every arm; those that choose tokens by attention are set off."""
    bars = [
        Bar(
            name.replace("_", " "),
            arm["single"]["steerability"],
            *_ends(arm["single"]),
            arm["mean_over_scales"],
            arm["token"] == ATTENTION,
        )
        for name, arm in report["arms"].items()
    ]
    return method_bars(bars, "One ε per class; dot: mean over all ε; blue: token by attention")


def _key(arm: dict[str, Any]) -> tuple[str | int, str, str, str]:
    return arm["token"], arm["estimator"], arm["labels"], arm["blocks"]


def _token(token: str | int) -> str:
    return "by attention" if token == ATTENTION else str(token)


def _cell(arm: dict[str, Any]) -> str:
    single = arm["single"]
    low, high = _ends(single)
    return f"{single['steerability']:.2f} [{low:.2f}, {high:.2f}] · {arm['mean_over_scales']:.2f}"


def _ends(single: dict[str, Any]) -> tuple[float, float]:
    """Ends of the interval; the mean itself where all concepts are equal, which have none."""
    mean = single["steerability"]
    return (mean, mean) if single["low"] is None else (single["low"], single["high"])


def _chosen_tokens(packs: Sequence[SteeringPack], arms: Sequence[Arm]) -> dict[str, dict[str, int]]:
    """How often attention chose each token, by layer; over concepts."""
    counts: dict[str, dict[str, int]] = {}
    for record in packs[arms.index(FULL)].directions.values():
        for layer, token in zip(record.layers, record.metrics["token"], strict=True):
            row = counts.setdefault(str(layer), {})
            row[str(token)] = row.get(str(token), 0) + 1
    return counts


def render(file: Path) -> str:
    """Writes the tables and the picture of a report beside it and returns the tables."""
    report = json.loads(file.read_text())
    text = f"{matrix(report)}\n{table(report)}"
    write_atomically(file.with_suffix(".md"), text)
    write_atomically(file.with_suffix(".png"), picture(report))
    return text


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """Learns, answers and measures; everything that is known of every arm."""
    concepts = {name: list(table)[: args.concepts] for name, table in CONCEPTS.items()}
    questions = given_questions(
        _texts("tune", args.tuning), _texts("heldout", args.statements), statements=True
    )
    started = time.monotonic()
    texts = _texts("extract", 2 * args.extract)
    chosen = [concept for group in concepts.values() for concept in group]
    seen = see(demo_model_path(), chosen, texts[: args.extract], texts[args.extract :])
    arms = all_arms(seen.candidates)
    with tempfile.TemporaryDirectory() as folder:
        packs = write_arms(seen, arms, Path(folder), args.seed)
        extracted = time.monotonic()
        given = (demo_model_path(), packs, MAX_TOKENS, args.store, ENGINE)
        with generating(*given) as generator:
            found = measure_arms(generator, arms, concepts, questions)
    answered = time.monotonic()
    return {
        "concepts": concepts,
        "scales": SCALES,
        "statements": {"extract": args.extract, "tune": args.tuning, "heldout": args.statements},
        "seconds": {
            "prompts_and_fits": round(extracted - started),
            "engine": round(answered - extracted),
        },
        "chosen_tokens_by_layer": _chosen_tokens(packs, arms),
        "attention_by_layer_and_token": seen.attention().round(4).tolist(),
        "arms": {one.arm.name: one.report() for one in found},
    }


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--concepts", type=int, default=3, help="concepts per class")
    parser.add_argument(
        "--extract", type=int, default=100, help="statements with and without prefix"
    )
    parser.add_argument("--tuning", type=int, default=2, help="statements that ε is chosen on")
    parser.add_argument("--statements", type=int, default=3, help="held-out statements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="keep answers here, to go on after an end")
    parser.add_argument("--redraw", action="store_true", help="tables and picture of --json alone")
    args = parser.parse_args()
    if args.redraw:
        sys.stdout.write(render(args.json))
        return
    write_atomically(args.json, json.dumps(_report(args), indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write(render(args.json))


def _texts(split: Split, count: int) -> list[str]:
    return [statement.text for statement in statements(split)[:count]]


if __name__ == "__main__":
    main()
