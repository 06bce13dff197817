"""How well the ways of learning steer a real language model, beside its own prefix.

    python -m benchmarks.real_model --json benchmarks/results/real-model.json

Thirty concepts of five classes. Every arm's pack is calibrated as a user's is, on everyday questions, and steers
at the one strength that was found; every figure is of questions that neither learning nor calibration has seen.
Intervals are over concepts, 95 %; see ``vllm_steer.offline.measures.intervals``.

keyword_rate: share of answers that hold one of the concept's keywords (``real_concepts.json``, written before
any answer was seen). gap_closed: the prefixed model's own greedy answers scored after the plain prompt,
(steered - plain) / (prefixed - plain) in log-likelihood; control: the same with the vector of the next concept of
the same class. perplexity: of the answers, under the unsteered model after the plain prompt. neutral_perplexity and
multiple_choice: capability beside steering.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import results_parser
from benchmarks.report import environment
from vllm_steer.offline.calibrate.grid import subjects
from vllm_steer.offline.calibrate.measures import (
    Gap,
    Trial,
    measured_gaps,
    steered_likelihoods,
    surprises,
)
from vllm_steer.offline.calibrate.run import CalibrationSettings, calibrate_pack
from vllm_steer.offline.demo.concepts import CONCEPTS, prefix
from vllm_steer.offline.engine.tokens import Asked, TokenEngine
from vllm_steer.offline.extract.answer_generation import prefixed_answers
from vllm_steer.offline.extract.answers import Example
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.inputs import read_settings, statement_sides
from vllm_steer.offline.extract.pipeline import extract_pack
from vllm_steer.offline.files import write_atomically
from vllm_steer.offline.gguf.model import model_path
from vllm_steer.offline.measures.fluency import repetition
from vllm_steer.offline.measures.intervals import SHARE, mean_interval
from vllm_steer.offline.models.loading import load_config
from vllm_steer.offline.models.prompts import Concept as Learned
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.offline.questions.everyday import everyday_questions
from vllm_steer.packs.pack import SteeringPack, load_pack

HERE = Path(__file__).parent
ARMS: Mapping[str, Mapping[str, Any]] = {
    "trained": {"method": "trained"},
    "answers, mean difference": {
        "learn_from": "answers",
        "estimator": "mean_difference",
        "labels": "hard",
        "unit": False,
        "held_out": False,
        "permutations": 0,
    },
    "answers, mean difference ahead of telling tokens": {
        "learn_from": "answers",
        "answer_tokens": "telling",
        "estimator": "mean_difference",
        "labels": "hard",
        "unit": False,
        "held_out": False,
        "permutations": 0,
    },
    "answers, attention-guided (soft labels, weighted tokens, RFM)": {
        "learn_from": "answers",
        "answer_tokens": "weighted",
        "permutations": 0,
    },
    "prompts, attention-guided as published": {"method": "attention_guided", "permutations": 0},
    "prompts, mean difference at the last token": {
        "estimator": "mean_difference",
        "labels": "hard",
        "token": -1,
        "permutations": 0,
    },
    "caa": {"method": "caa"},
}
MAX_TOKENS = 48
# Calibration reports on the first held-out questions, and answers to the next were looked at when the rule was
# chosen by which it takes a strength; these come after them.
SKIPPED, ASKED = 32, 16
PASSAGES, ITEMS = 6, 20
# Figures that lie between 0 and 1.
_SHARES = {"keyword_rate", "repetition", "multiple_choice"}


@dataclass(frozen=True)
class Concept:
    """A concept of the benchmark."""

    name: str
    concept_class: str
    keywords: re.Pattern[str]

    def shown_in(self, text: str) -> bool:
        """Whether an answer holds one of the keywords, at the beginning of a word."""
        return bool(self.keywords.search(text.lower()))


@dataclass
class Figures:
    """Values by concept, in the order of the concepts."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, key: str, value: float) -> None:
        self.values.setdefault(key, []).append(value)

    def report(self) -> dict[str, Any]:
        """Returns mean and interval of every figure; perplexities are averaged as logarithms."""
        found: dict[str, Any] = {}
        for key, values in self.values.items():
            array = np.array(values, dtype=np.float64)
            logs = key.endswith("perplexity")
            array = np.log(array) if logs else array
            low, high = mean_interval(array, SHARE) if key in _SHARES else mean_interval(array)
            ends = [float(array.mean()), low, high]
            mean, low, high = [
                None if end is None else math.exp(end) if logs else end for end in ends
            ]
            found[key] = {"mean": mean, "low": low, "high": high, "by_concept": values}
        return found


def chosen_concepts(per_class: int) -> list[Concept]:
    """Returns the first so many concepts of every class."""
    keywords = json.loads((HERE / "real_concepts.json").read_text())
    return [
        Concept(
            name, cls, re.compile("|".join(rf"(?<!\w){re.escape(w)}" for w in keywords[cls][name]))
        )
        for cls, table in CONCEPTS.items()
        for name in list(table)[:per_class]
    ]


class Benchmark:
    """What all arms share: questions, answers with and without the prefix, and the gaps."""

    def __init__(self, model: Path, work: Path, concepts: Sequence[Concept]) -> None:
        self.model, self.work, self.concepts = model, work, concepts
        self.questions = everyday_questions()
        self.asked = self.questions.heldout[SKIPPED : SKIPPED + ASKED]
        _, self.tokenizer = load_config(model)
        self.prompts = [render_question(self.tokenizer, q).token_ids for q in self.asked]
        passages = (HERE / "neutral_passages.txt").read_text().splitlines()[:PASSAGES]
        self.passages = [tuple(self.tokenizer(text)["input_ids"]) for text in passages]
        rows = (HERE / "multiple_choice.jsonl").read_text().splitlines()[:ITEMS]
        self.items = [json.loads(row) for row in rows]

    def baseline(self) -> tuple[list[Gap], dict[str, Any]]:
        """Returns the gaps, and the figures of the plain and of the prefixed model."""
        with TokenEngine(self.model, store=self.work / "baseline") as engine:
            examples = prefixed_answers(
                engine,
                self.tokenizer,
                [prefix(concept.name) for concept in self.concepts],
                self.asked,
                MAX_TOKENS,
            )
            gaps = measured_gaps(engine, examples, "the gap")
            plain = engine.generate([Asked(p) for p in self.prompts], MAX_TOKENS, "plain answers")
            surprise = surprises(
                engine, [(p, a.tokens) for p, a in zip(self.prompts, plain, strict=True)], "plain"
            )
            neutral, right = self.capability(engine, None)
        unsteered, prefixed = Figures(), Figures()
        for concept, gap in zip(self.concepts, gaps, strict=True):
            self.add_answers(unsteered, concept, [a.text for a in plain], surprise)
            unsteered.add("gap_closed", 0.0)
            unsteered.add("neutral_perplexity", neutral)
            unsteered.add("multiple_choice", right)
            texts = [self.text(example) for example in gap.examples]
            likely = [-v / len(e.answer) for v, e in zip(gap.plain, gap.examples, strict=True)]
            self.add_answers(prefixed, concept, texts, likely)
            prefixed.add("gap_closed", 1.0)
        return gaps, {"plain": unsteered.report(), "prefixed": prefixed.report()}

    def text(self, example: Example) -> str:
        return str(self.tokenizer.decode(list(example.answer), skip_special_tokens=True))

    def add_answers(
        self, figures: Figures, concept: Concept, texts: Sequence[str], surprise: Sequence[float]
    ) -> None:
        figures.add("keyword_rate", float(np.mean([concept.shown_in(text) for text in texts])))
        figures.add("repetition", float(np.mean([repetition(text) for text in texts])))
        figures.add("perplexity", math.exp(float(np.mean(surprise))))

    def capability(self, engine: TokenEngine, trial: Trial | None) -> tuple[float, float]:
        """Returns the perplexity of neutral passages and the share of right choices."""
        asked = []
        for passage in self.passages:
            asked.append(Asked(passage[:1], passage[1:], trial.steering(1) if trial else None))
        for item in self.items:
            for choice in item["choices"]:
                start = tuple(self.tokenizer(item["question"])["input_ids"])
                whole = tuple(self.tokenizer(f"{item['question']} {choice}")["input_ids"])
                asked.append(
                    Asked(start, whole[len(start) :], trial.steering(len(start)) if trial else None)
                )
        scores = iter(engine.score(asked, "capability"))
        neutral = sum(next(scores) for _ in self.passages)
        tokens = sum(len(passage) - 1 for passage in self.passages)
        right = 0
        for item in self.items:
            by_choice = [next(scores) for _ in item["choices"]]
            right += int(np.argmax(by_choice)) == item["answer"]
        return math.exp(-neutral / tokens), right / len(self.items)

    def learned(self, arm: str) -> tuple[SteeringPack, float, float]:
        """Returns an arm's calibrated pack, and the seconds that learning and calibration took."""
        folder = self.work / re.sub(r"\W+", "-", arm)
        times = folder / "seconds.json"
        seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
        pack = None
        if "learning" not in seconds:
            started = time.monotonic()
            positives, negatives = statement_sides(None, None, None)
            pack = extract_pack(
                self.model,
                ExtractionData(
                    [Learned(concept.name, prefix(concept.name)) for concept in self.concepts],
                    positives,
                    negatives,
                ),
                read_settings(None, ARMS[arm]),
                PackTarget("real", folder),
                ComputeResources(workers=2),
            )
            seconds["learning"] = time.monotonic() - started
            write_atomically(times, json.dumps(seconds))
        if "calibration" not in seconds:
            started = time.monotonic()
            pack = calibrate_pack(
                pack or load_pack(folder), self.model, self.questions, CalibrationSettings()
            )
            seconds["calibration"] = time.monotonic() - started
            write_atomically(times, json.dumps(seconds))
        return pack or load_pack(folder), seconds["learning"], seconds["calibration"]

    def measure(self, arm: str, gaps: Sequence[Gap]) -> dict[str, Any]:
        """Returns an arm's figures."""
        pack, learning, calibration = self.learned(arm)
        by_name = {subject.record.name: subject for subject in subjects(pack)}
        trials = []
        for concept in self.concepts:
            subject = by_name[concept.name]
            record = subject.record
            trials.append(Trial(subject, record.default_scale, tuple(record.steered_layers)))
        figures = Figures()
        with TokenEngine(self.model, [pack], store=self.work / "answers") as engine:
            own = steered_likelihoods(engine, list(zip(trials, gaps, strict=True)), arm)
            others = [trials[self.control_of(at)] for at in range(len(trials))]
            control = steered_likelihoods(engine, list(zip(others, gaps, strict=True)), "control")
            asked = [Asked(p, steering=t.steering(len(p))) for t in trials for p in self.prompts]
            answers = engine.generate(asked, MAX_TOKENS, "steered answers")
            surprise = surprises(
                engine, [(one.prompt, a.tokens) for one, a in zip(asked, answers, strict=True)], arm
            )
            count = len(self.prompts)
            for at, (concept, gap) in enumerate(zip(self.concepts, gaps, strict=True)):
                part = slice(at * count, (at + 1) * count)
                self.add_answers(figures, concept, [a.text for a in answers[part]], surprise[part])
                figures.add("gap_closed", gap.closed(own[at]))
                figures.add("control", gap.closed(control[at]))
                neutral, right = self.capability(engine, trials[at])
                figures.add("neutral_perplexity", neutral)
                figures.add("multiple_choice", right)
        report = figures.report()
        each = learning / len(self.concepts)
        report["seconds_per_concept"] = {"mean": each, "low": each, "high": each}
        report["calibration_seconds"] = calibration
        report["steers"] = sum(
            bool(r.calibration and r.calibration.steers) for r in pack.directions.values()
        )
        report["scales"] = {n: s.record.default_scale for n, s in by_name.items()}
        report["layers"] = {n: s.record.steered_layers for n, s in by_name.items()}
        report["gap_interval_by_concept"] = [
            gap.interval(steered) for gap, steered in zip(gaps, own, strict=True)
        ]
        report["examples"] = {
            concept.name: [[self.asked[i], answers[at * count + i].text] for i in range(2)]
            for at, concept in enumerate(self.concepts)
        }
        return report

    def control_of(self, at: int) -> int:
        """Returns the place of the next concept of the same class; of any, where it is alone."""
        same = [
            i
            for i, c in enumerate(self.concepts)
            if c.concept_class == self.concepts[at].concept_class
        ]
        if len(same) == 1:
            return (at + 1) % len(self.concepts)
        return same[(same.index(at) + 1) % len(same)]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = results_parser(__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("benchmarks/work/real-model"),
        help="folder of packs and answers; a run that was ended goes on there",
    )
    parser.add_argument(
        "--concepts", type=int, default=6, help="of each class (default: %(default)s)"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    args = parser.parse_args(argv)
    model = args.model or model_path()
    benchmark = Benchmark(model, args.work, chosen_concepts(args.concepts))
    gaps, report = benchmark.baseline()
    report = {
        **environment(),
        "model": Path(model).name,
        "concepts": [concept.name for concept in benchmark.concepts],
        "questions": list(benchmark.asked),
        **report,
    }
    for arm in args.arms:
        report[arm] = benchmark.measure(arm, gaps)
        write_atomically(args.json, json.dumps(report, indent=2) + "\n")
    sys.stdout.write(table(report))


def table(report: Mapping[str, Any]) -> str:
    """Returns the arms as a Markdown table."""
    keys = (
        "keyword_rate",
        "gap_closed",
        "control",
        "repetition",
        "perplexity",
        "neutral_perplexity",
    )
    lines = [
        "| arm | " + " | ".join(key.replace("_", " ") for key in keys) + " | seconds a concept |",
        "|---" * (len(keys) + 2) + "|",
    ]
    for arm in ("plain", "prefixed", *(arm for arm in ARMS if arm in report)):
        row = report[arm]
        seconds = row.get("seconds_per_concept")
        cells = [_cell(row[key]) if key in row else "–" for key in keys]
        cells.append(f"{seconds['mean']:.0f}" if seconds else "–")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Any]) -> str:
    if found["low"] is None or found["low"] == found["high"]:
        return f"{found['mean']:.2f}"
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
    main()
