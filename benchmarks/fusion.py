"""Fusion Steering on the demo model, its search through the engine and in a plain loop.

    python -m benchmarks.fusion --json benchmarks/results/fusion.json

Questions are held-out statements; the gold answer is that of a concept's voice, which the plain model
never has. Scales are searched with each question's gold answer, as the method does. The published
reference text does not make the demo model speak in a concept's voice, since nothing in it asks for
one; so there are two sets of reference vectors.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.fusion_loop import PlainLoop
from benchmarks.options import results_parser
from benchmarks.report import environment, show, write_json
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.gold import gold_questions, is_gold
from vllm_steer.offline.evaluate.generation import Generator, generating
from vllm_steer.offline.fusion.distance import distances
from vllm_steer.offline.fusion.evaluate import FusionQuestions, run_fusion
from vllm_steer.offline.fusion.original import Fusion
from vllm_steer.offline.fusion.pack import FusionDeltas, write_deltas
from vllm_steer.offline.fusion.questions import GoldQuestion
from vllm_steer.offline.fusion.references import References, measure_references
from vllm_steer.offline.fusion.results import Arm, Figures, FusionResult, perplexity_cell
from vllm_steer.offline.fusion.search import (
    Ask,
    Budget,
    Case,
    Kind,
    Target,
    Trial,
    cases_of,
    search,
    segments_of,
)
from vllm_steer.offline.fusion.steered import steered_deltas
from vllm_steer.offline.models.loading import load_config, load_model, model_identity
from vllm_steer.verify.interleave import Ratio, ratio_to, rounds

KINDS: tuple[Kind, ...] = ("full", "segmented")
SETS = {"question": False, "prefixed": True}
"""Name of each set of vectors: whether its reference answers are read after the prefixed question."""
AFTER = {
    "question": "the question, as published",
    "prefixed": "the question with the concept's prefix",
}
PUBLISHED_TRIALS = 5
MAX_TOKENS = 48
ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 256,
    "kv_cache_memory_bytes": 2**29,
    # A later round of the timed search would find its prompts there.
    "enable_prefix_caching": False,
}
BATCH = 32
EXAMPLES = 3
ENGINE_ARM = "through the engine"
ORIGINAL_ARM = "Hugging Face, one by one, the uncached original"


class Bench:
    """What all parts share: the model in Hugging Face, questions, vectors and packs."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        _, self.tokenizer = load_config(demo_model_path())
        self.model = load_model(demo_model_path(), "float32", "cpu")
        self.questions: dict[str, list[GoldQuestion]] = {}
        self.tuning: dict[str, list[GoldQuestion]] = {}
        self.references: dict[str, References] = {}
        self.deltas: dict[str, NDArray[np.float32]] = {}
        self.packs = {}
        layers = self.model.config.num_hidden_layers
        self.budget = Budget(args.trials, args.low, args.high, args.seed)
        self.cases = cases_of(args.questions, args.tuning, KINDS, layers, self.budget)
        for name, prefixed in SETS.items():
            self.questions[name] = gold_questions("heldout", args.questions, prefixed)
            self.tuning[name] = gold_questions("tune", args.tuning, prefixed)
            every = [*self.questions[name], *self.tuning[name]]
            measured = measure_references(self.model, self.tokenizer, every)
            self.references[name] = measured
            self.deltas[name] = steered_deltas(self.model, measured, self.cases)
            self.packs[name] = write_deltas(
                folder / name,
                name,
                model_identity(demo_model_path(), self.model.config, self.tokenizer),
                FusionDeltas(every, self.cases, self.deltas[name], measured.residual_norms),
                self.model.dtype,
            )

    def results(self, generator: Generator) -> dict[str, FusionResult]:
        """Unsteered, searched, and at the scales of other questions, by set of vectors."""
        return {
            name: run_fusion(
                generator,
                self.packs[name],
                FusionQuestions(self.questions[name], self.tuning[name]),
                self.cases,
                self.budget,
                is_gold,
            )
            for name in SETS
        }

    def speed(self, generator: Generator) -> dict[str, Any]:
        """The segmented search with the published budget, through the engine and in plain loops.

        What measures the deltas is counted where they are added.
        """
        asks = self._asks(generator)
        questions = self.questions["prefixed"][: self.args.timed]
        cases = [
            case
            for case in self.cases
            if case.kind == "segmented"
            and not case.common
            and case.question < len(questions)
            and case.trial < PUBLISHED_TRIALS
        ]
        studies = [
            [
                [Target(question.question, question.answer, "prefixed", case)]
                for case in cases
                if case.question == place
            ]
            for place, question in enumerate(questions)
        ]
        found: dict[str, list[list[Trial]]] = {}
        generator.answer([trials[0][0].request for trials in studies])

        def once(name: str, rng: random.Random) -> float:
            began = time.perf_counter()
            if name != ORIGINAL_ARM:
                steered_deltas(self.model, self.references["prefixed"], cases)
            found[name] = search(asks[name], studies)
            return time.perf_counter() - began

        with tqdm(total=len(asks) * self.args.rounds, desc="searches") as bar:
            timed = rounds(list(asks), once, self.args.rounds, self.args.seed, bar.update)
        ratios = {name: ratio_to([ENGINE_ARM], name, timed) for name in asks if name != ENGINE_ARM}
        return {
            "questions": len(questions),
            "trials": len(studies[0]),
            "rounds": timed,
            "seconds": {name: sorted(r[name] for r in timed)[len(timed) // 2] for name in asks},
            "ratios": {name: ratio.as_dict() for name, ratio in ratios.items()},
            "same_answers": {
                name: _same_answers(trials, found[ENGINE_ARM]) for name, trials in found.items()
            },
        }

    def _asks(self, generator: Generator) -> dict[str, Ask]:
        # With the attention that one gets without asking for another.
        model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
        names = [case.name for case in self.cases]
        deltas = dict(zip(names, self.deltas["prefixed"], strict=True))
        given = (model, self.tokenizer, self.references["prefixed"], deltas, MAX_TOKENS)
        return {
            ENGINE_ARM: generator.answer,
            f"Hugging Face, batches of {BATCH}": PlainLoop(*given, batch=BATCH),
            "Hugging Face, one by one": PlainLoop(*given),
            ORIGINAL_ARM: PlainLoop(*given, original=True),
        }

    def distances(self, results: Mapping[str, FusionResult]) -> dict[str, Any]:
        """How far the forms for a cache are from the original at the scales that were found."""
        references = self.references["prefixed"]
        places = {question.question: i for i, question in enumerate(self.questions["prefixed"])}
        found = {}
        for kind in KINDS:
            cases = []
            segments = segments_of(kind, self.model.config.num_hidden_layers)
            for chosen in results["prefixed"].arms[kind].chosen[: self.args.compared]:
                place = places[chosen.question]
                case = Case(place, kind, 0, segments, tuple(chosen.scales or ()))
                fusion = Fusion(
                    references.prompts[place],
                    torch.tensor(references.reference[place]),
                    torch.tensor(case.layer_scales),
                )
                cases.append((fusion, torch.tensor(references.prompt[place])))
            measured = distances(self.model, cases, MAX_TOKENS, self.tokenizer.eos_token_id)
            found[kind] = {name: asdict(distance) for name, distance in measured.items()}
        return found


def _same_answers(trials: Sequence[Sequence[Trial]], others: Sequence[Sequence[Trial]]) -> float:
    """Share of all trials' answers that two searches have in common, text for text."""
    pairs = [
        (one.answers[0].text, two.answers[0].text)
        for own, theirs in zip(trials, others, strict=True)
        for one, two in zip(own, theirs, strict=True)
    ]
    return sum(one == two for one, two in pairs) / len(pairs)


def shortened(result: FusionResult) -> FusionResult:
    """Returns a result with a few of each arm's answers, since all of them make a large file."""
    arms = {
        name: arm.model_copy(update={"chosen": arm.chosen[:EXAMPLES]})
        for name, arm in result.arms.items()
    }
    return result.model_copy(update={"arms": arms})


def table(report: Mapping[str, Any]) -> str:
    """Returns the figures, the seconds and the distances as Markdown."""
    parts = (figures_table, seconds_table, distances_table)
    return "\n".join(part(report) for part in parts)


def figures_table(report: Mapping[str, Any]) -> str:
    """Returns unsteered, full-layer and segmented answers, by set of vectors."""
    lines = [
        "| reference answer read after | scales | right | overlap | perplexity | answers searched |",
        "|---" * 6 + "|",
    ]
    results = {name: FusionResult.model_validate(r) for name, r in report["results"].items()}
    unsteered = next(iter(results.values())).unsteered
    lines.append(_figures_row("–", "unsteered", unsteered, "–"))
    for name, result in results.items():
        for arm_name, arm in result.arms.items():
            rows = _arm_rows(arm_name, arm, result)
            lines += [_figures_row(AFTER[name], *row) for row in rows]
    return "\n".join(lines) + "\n"


def _arm_rows(name: str, arm: Arm, result: FusionResult) -> list[tuple[str, Figures, str]]:
    seconds = f"in {arm.seconds:.0f} s"
    if not arm.by_trials:
        others = result.tuning_questions
        return [(name, arm.figures, f"{others} others × {result.trials} {seconds}")]
    counts = sorted({min(PUBLISHED_TRIALS, len(arm.by_trials)), len(arm.by_trials)})
    searched = [f"{result.wrong} × {count}" for count in counts]
    searched[-1] += f" {seconds}"
    return [
        (f"{name}, best of {count}", arm.by_trials[count - 1], shown)
        for count, shown in zip(counts, searched, strict=True)
    ]


def _figures_row(after: str, name: str, figures: Figures, searched: str) -> str:
    cells = (after, name, figures.right.cell(), figures.overlap.cell(), perplexity_cell(figures))
    return f"| {' | '.join(cells)} | {searched} |"


def seconds_table(report: Mapping[str, Any]) -> str:
    """Returns what the same search takes in every way."""
    speed = report["speed"]
    lines = [
        f"| segmented search, {speed['questions']} questions × {speed['trials']} trials | seconds | "
        f"ratio to the engine, median [95 %] | same answers |",
        "|---" * 4 + "|",
    ]
    for name, seconds in speed["seconds"].items():
        ratio = Ratio(**speed["ratios"][name]) if name in speed["ratios"] else None
        shown = f"{ratio.median:.1f} [{ratio.low:.1f}, {ratio.high:.1f}]" if ratio else "1"
        same = speed["same_answers"][name]
        lines.append(f"| {name} | {seconds:.1f} | {shown} | {same:.1%} |")
    return "\n".join(lines) + "\n"


def distances_table(report: Mapping[str, Any]) -> str:
    """Returns how far each form is from the original."""
    lines = [
        "| against the uncached original | scales | same answer | same likeliest token | mean KL | "
        "largest KL |",
        "|---" * 6 + "|",
    ]
    for kind, forms in report["distances"].items():
        for name, found in forms.items():
            lines.append(
                f"| {name} | {kind} | {found['same_answers']:.2f} | {found['same_tokens']:.2f} | "
                f"{found['mean_kl']:.2g} | {found['max_kl']:.2g} |"
            )
    return "\n".join(lines) + "\n"


def _report(args: argparse.Namespace) -> dict[str, Any]:
    about = environment()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        engine = ENGINE | {"enforce_eager": args.eager}
        packs = list(bench.packs.values())
        with generating(demo_model_path(), packs, MAX_TOKENS, None, engine, bar=False) as generator:
            results = bench.results(generator)
            speed = bench.speed(generator)
        return {
            **about,
            "results": {name: shortened(result).model_dump() for name, result in results.items()},
            "speed": speed,
            "distances": bench.distances(results),
        }


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--questions", type=int, default=40, help="held-out ones")
    parser.add_argument("--tuning", type=int, default=15, help="for scales of other questions")
    parser.add_argument("--trials", type=int, default=20, help="of each question")
    parser.add_argument("--low", type=float, default=0.01, help="least scale")
    parser.add_argument("--high", type=float, default=1.0, help="largest scale")
    parser.add_argument("--timed", type=int, default=24, help="questions of the timed searches")
    parser.add_argument(
        "--compared", type=int, default=20, help="questions held against the original"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the timed searches")
    parser.add_argument("--eager", action="store_true", help="an engine that compiles nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--redraw", action="store_true", help="show the tables of --json alone")
    args = parser.parse_args()
    if not args.redraw:
        write_json(args.json, _report(args))
    show([table(json.loads(args.json.read_text()))])


if __name__ == "__main__":
    main()
