"""How well directions of a real model tell answers apart that a prefix has coloured, and what a guard by them catches.

    python -m benchmarks.probes --json benchmarks/results/probes.json

Ten concepts of the shipped pack, the first two of each class, on the model that they were learned on. Everyday questions
are asked plain and after the concept's prefix, and the engine reads its answers as it gives them, token by token, at
six of the layers that the directions have. The score of an answer is that of its highest token. Questions come in three
parts that share none, nor any with those that the directions were learned from: the layer is chosen on the first, by AUROC;
the threshold at 1 % false positives on the plain answers of the second; everything that is reported is measured on the
third.
Caught are the answers that the engine itself aborts, by ``abort_when`` with the threshold named, within 16 tokens. An
answer shows its concept where it holds one of its keywords (``real_concepts.json``).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real_model import Concept, chosen_concepts
from benchmarks.report import environment, show, write_json
from vllm_steer.offline.engine.llm import start_engine, stop_engine
from vllm_steer.offline.gguf.model import model_path
from vllm_steer.offline.measures.detection import rate_above
from vllm_steer.offline.measures.intervals import SHARE, mean_interval
from vllm_steer.offline.models.loading import load_config, public_name
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.offline.probe.run import ProbeParts, ProbeScores, measured
from vllm_steer.offline.probe.settings import ProbeSettings
from vllm_steer.offline.probe.texts import Text, digest_of
from vllm_steer.offline.questions.everyday import everyday_questions
from vllm_steer.offline.showcase import MODEL, shipped_pack
from vllm_steer.packs.pack import Probe, SteeringPack, load_pack, update_records
from vllm_steer.plan.scores import read
from vllm_steer.request.reads import MAX_READS

PER_CLASS = 2
# One request may read so much of ten directions.
LAYERS = (9, 11, 13, 15, 17, 19)
RATES = (0.01, 0.05)
WITHIN = 16
# What a guard should catch.
TARGET = 0.9
MAX_TOKENS = 32
BINS = 24
# The directions were learned from the answers to the first of them.
LEARNED = 96
ENGINE = {
    "dtype": "float32",
    "max_num_seqs": 64,
    "block_size": 32,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 300 * 2**20,
}
# Concept and question of the answer that is shown.
SHOWN = ("Sherlock Holmes", "If someone wrote your biography, how would it begin?")
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Questions:
    """Questions by what they are for.

    Attributes:
        choosing: The layer is chosen on these.
        thresholds: Thresholds are chosen on these, asked plainly.
        heldout: What is reported is measured on these, asked plainly.
        prefixed: The first of them, asked with the prefix too.
    """

    choosing: tuple[str, ...]
    thresholds: tuple[str, ...]
    heldout: tuple[str, ...]
    prefixed: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Answer:
    """What the engine answered.

    Attributes:
        tokens: Token ids.
        text: The text of each token.
        reason: Why it ended.
        scores: ``[reads, tokens - 1]``.
    """

    tokens: list[int]
    text: list[str]
    reason: str
    scores: Doubles


class Reader:
    """The engine, its tokenizer, and the pack that it reads."""

    def __init__(self, llm: Any, pack: SteeringPack, tokenizer: Any) -> None:
        self._llm, self.pack, self._tokenizer = llm, pack, tokenizer

    def prompt(self, question: str, concept: str | None = None) -> list[int]:
        """Returns a question as the model reads it, after the prefix of a concept where one is given."""
        prefix = self.pack.directions[concept].prefix if concept else None
        text = prefix.text if prefix else ""
        return list(render_question(self._tokenizer, question, text).token_ids)

    def answer(
        self, prompts: Sequence[Sequence[int]], steering: Mapping[str, Any], max_tokens: int
    ) -> list[Answer]:
        """Answers prompts greedily."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, extra_args={"steering": dict(steering)}
        )
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = []
        for prompt, output in zip(prompts, self._llm.generate(given, parameters), strict=True):
            one = output.outputs[0]
            tokens = list(one.token_ids)
            scores = read(output)[0, :, len(prompt) : len(prompt) + len(tokens) - 1]
            texts = [self._tokenizer.decode([token]) for token in tokens]
            found.append(Answer(tokens, texts, str(one.finish_reason), scores.astype(np.float64)))
        return found

    def highest(
        self, prompts: Sequence[Sequence[int]], reads: Sequence[Any]
    ) -> tuple[Doubles, list[str]]:
        """Returns the score of the highest token of each answer, ``[reads, prompts]``, and the answers."""
        answers = self.answer(prompts, {"read": list(reads)}, MAX_TOKENS)
        scores = np.stack([one.scores.max(1) for one in answers], axis=1)
        return scores, ["".join(one.text) for one in answers]


@dataclass(frozen=True, eq=False)
class Scored:
    """The scores of the answers of a concept, and the held-out ones to prefixed questions themselves."""

    parts: ProbeParts
    answers: list[str]


def chosen_questions(choosing: int, thresholds: int, prefixed: int) -> Questions:
    """Returns so many questions of each part, and all that are held out."""
    everyday = everyday_questions()
    rest = everyday.learned[LEARNED:]
    heldout = everyday.heldout
    parts = rest[:choosing], rest[choosing : choosing + thresholds], heldout, heldout[:prefixed]
    if [len(parts[0]), len(parts[1]), len(parts[3])] != [choosing, thresholds, prefixed]:
        raise ValueError("there are not so many questions")
    return Questions(*parts)


@contextmanager
def reading(pack: SteeringPack, probes: int) -> Iterator[Reader]:
    """An engine that reads a pack."""
    model = model_path(MODEL)
    room = 512
    llm = start_engine(model, [str(pack.path)], ENGINE, room=room, steering={"reads": probes})
    try:
        yield Reader(llm, pack, load_config(model)[1])
    finally:
        stop_engine(llm)


def reads_of(pack: SteeringPack, concepts: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the reads of each concept, layer after layer."""
    names = [f"{pack.name}/{concept}" for concept in concepts]
    return [{"name": name, "layers": [layer]} for name in names for layer in LAYERS]


def scored(reader: Reader, concepts: Sequence[str], questions: Questions) -> dict[str, Scored]:
    """Returns the scores of all answers, by concept."""
    pack = reader.pack
    plain = [*questions.choosing, *questions.thresholds, *questions.heldout]
    prompts = [reader.prompt(question) for question in plain]
    cuts = [len(questions.choosing), len(questions.choosing) + len(questions.thresholds)]
    found = {}
    many = MAX_READS // len(LAYERS)
    for start in range(0, len(concepts), many):
        some = concepts[start : start + many]
        table, _ = reader.highest(prompts, reads_of(pack, some))
        for concept, rows in zip(some, np.split(table, len(some)), strict=True):
            asked = [*questions.choosing, *questions.prefixed]
            own = [reader.prompt(question, concept) for question in asked]
            positive, answers = reader.highest(own, reads_of(pack, [concept]))
            choosing, thresholds, heldout = np.split(rows, cuts, axis=1)
            first, second = np.split(positive, [len(questions.choosing)], axis=1)
            found[concept] = Scored(
                ProbeParts(
                    ProbeScores(LAYERS, first, choosing),
                    thresholds,
                    ProbeScores(LAYERS, second, heldout),
                ),
                answers[len(questions.choosing) :],
            )
    return found


def probes_of(
    reader: Reader, found: Mapping[str, Scored], questions: Questions
) -> dict[str, Probe]:
    """Returns the probe of every concept, as ``vllm-steer probe`` makes it of such parts."""
    settings = ProbeSettings(rates=RATES, max_tokens=MAX_TOKENS)
    told = {
        "model": public_name(model_path(MODEL)),
        "dtype": str(ENGINE["dtype"]),
        "chat_template_sha256": reader.pack.manifest.model.chat_template_sha256,
        "positives": len(questions.choosing) + len(questions.prefixed),
        "negatives": sum(map(len, (questions.choosing, questions.thresholds, questions.heldout))),
        "positives_sha256": _digest(questions.choosing, questions.prefixed),
        "negatives_sha256": _digest(questions.choosing, questions.thresholds, questions.heldout),
    }
    return {name: measured(each.parts, settings, told) for name, each in found.items()}


def _digest(*parts: Sequence[str]) -> str:
    return digest_of([Text("", question) for part in parts for question in part])


def caught(reader: Reader, concept: str, questions: Sequence[str]) -> list[int | None]:
    """Returns the token at which the engine aborted each prefixed answer, from 1; None where it did not within 16."""
    name = f"{reader.pack.name}/{concept}"
    rule = {"read": [{"name": name}], "abort_when": {"read": 0, "at": f"fpr={RATES[0]:g}"}}
    prompts = [reader.prompt(question, concept) for question in questions]
    # The answer ends with the token after the one that fired, and one more tells it from an answer that is cut off.
    answers = reader.answer(prompts, rule, WITHIN + 2)
    ends = [len(one.tokens) - 1 if one.reason == "abort" else None for one in answers]
    return [end if end is not None and end <= WITHIN else None for end in ends]


def coloured(reader: Reader, probe: Probe) -> dict[str, Any]:
    """Returns a plain and a steered answer to one question, token by token with their scores."""
    concept, question = SHOWN
    name = f"{reader.pack.name}/{concept}"
    reads = {"read": [{"name": name, "layers": [probe.layer]}]}
    steering = {"directions": [{"name": name, "strength": 1.0}]}
    prompts = [reader.prompt(question)]
    (plain,) = reader.answer(prompts, reads, 48)
    (steered,) = reader.answer(prompts, reads | steering, 48)
    best = probe.at(probe.layer)
    assert best is not None
    return {
        "concept": concept,
        "question": question,
        "layer": probe.layer,
        "threshold": best.thresholds[0].above,
        "answers": {
            way: {"tokens": one.text, "scores": [round(float(s), 3) for s in one.scores[0]]}
            for way, one in (("plain", plain), ("steered", steered))
        },
    }


def figures(
    concept: Concept, probe: Probe, found: Scored, ends: Sequence[int | None]
) -> dict[str, Any]:
    """Returns what is reported of a concept."""
    heldout = found.parts.heldout
    hits = np.array([end is not None for end in ends], dtype=np.float64)
    shown = np.array([concept.shown_in(answer) for answer in found.answers])
    of_shown = hits[shown]
    return {
        "layer": probe.layer,
        "probe": probe.model_dump(),
        "caught": asdict(rate_above(hits, 0.5)),
        "shown": asdict(rate_above(shown.astype(np.float64), 0.5)),
        "caught_of_shown": asdict(rate_above(of_shown, 0.5)) if len(of_shown) else None,
        "caught_at": list(ends),
        "histograms": {
            str(layer): _histogram(heldout.positive[row], heldout.negative[row])
            for row, layer in enumerate(heldout.layers)
        },
    }


def _histogram(positive: Doubles, negative: Doubles) -> dict[str, Any]:
    edges = np.histogram_bin_edges(np.concatenate([positive, negative]), bins=BINS)
    return {
        "low": float(edges[0]),
        "high": float(edges[-1]),
        "positive": np.histogram(positive, edges)[0].tolist(),
        "negative": np.histogram(negative, edges)[0].tolist(),
    }


def table(report: Mapping[str, Any]) -> str:
    """Returns the figures of the concepts as a Markdown table."""
    head = ["concept", "layer", "AUROC", "false positives", "above in the whole answer"]
    head += [f"aborted within {WITHIN} tokens", "answers that show it", "aborted of these"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    columns: list[list[float]] = []
    for concept, found in report["concepts"].items():
        layer = next(x for x in found["probe"]["layers"] if x["layer"] == found["layer"])
        at = layer["thresholds"][0]
        cells = [
            (layer["auroc"], layer["low"], layer["high"]),
            *(
                (at[kind], at[f"{kind}_low"], at[f"{kind}_high"])
                for kind in ("false_positives", "true_positives")
            ),
            *(_ends(found[key]) for key in ("caught", "shown", "caught_of_shown")),
        ]
        columns.append([cell[0] for cell in cells])
        shown = [concept, str(found["layer"]), *(_cell(*cell) for cell in cells)]
        lines.append(f"| {' | '.join(shown)} |")
    means = []
    for values in np.array(columns, dtype=np.float64).T:
        known = values[np.isfinite(values)]
        means.append(_cell(float(known.mean()), *mean_interval(known, SHARE)))
    return "\n".join([*lines, f"| mean | | {' | '.join(means)} |"])


def layers_table(report: Mapping[str, Any]) -> str:
    """Returns the AUROC on held-out answers by layer as a Markdown table, the chosen layers in bold."""
    concepts = report["concepts"]
    layers = [each["layer"] for each in next(iter(concepts.values()))["probe"]["layers"]]
    lines = [f"| concept | {' | '.join(map(str, layers))} |", "|---" * (len(layers) + 1) + "|"]
    for concept, found in concepts.items():
        cells = [
            f"**{each['auroc']:.2f}**"
            if each["layer"] == found["layer"]
            else f"{each['auroc']:.2f}"
            for each in found["probe"]["layers"]
        ]
        lines.append(f"| {concept} | {' | '.join(cells)} |")
    return "\n".join(lines)


def means(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns the means over concepts that the findings speak of, and how many concepts a guard catches 90 % of."""
    rows = []
    for found in report["concepts"].values():
        layer = next(x for x in found["probe"]["layers"] if x["layer"] == found["layer"])
        at = layer["thresholds"][0]
        shown = found["caught_of_shown"]
        rows.append(
            {
                "auroc": layer["auroc"],
                "false": at["false_positives"],
                "whole": at["true_positives"],
                "caught": found["caught"]["share"],
                "shown": found["shown"]["share"],
                "of_shown": shown["share"] if shown else np.nan,
            }
        )
    values = {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}
    return values | {"reached": sum(row["caught"] >= TARGET for row in rows)}


def _ends(share: Mapping[str, float] | None) -> tuple[float, float | None, float | None]:
    return (share["share"], share["low"], share["high"]) if share else (np.nan, None, None)


def _cell(value: float, low: float | None, high: float | None) -> str:
    if not np.isfinite(value):
        return "–"
    return f"{value:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def _report(args: argparse.Namespace) -> dict[str, Any]:
    known = {concept.name: concept for concept in chosen_concepts(args.concepts)}
    concepts = list(known)
    questions = chosen_questions(args.choosing, args.thresholds, args.prefixed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pack"
        shutil.copytree(shipped_pack(), path)
        pack = load_pack(path)
        with reading(pack, min(len(concepts), MAX_READS // len(LAYERS))) as reader:
            found = scored(reader, concepts, questions)
            probes = probes_of(reader, found, questions)
            shown = coloured(reader, probes[SHOWN[0]]) if SHOWN[0] in probes else None
        pack = update_records(pack, {name: {"probe": probe} for name, probe in probes.items()})
        # Thresholds are named, so the engine starts with the pack that has them.
        with reading(pack, 1) as reader:
            ends = {concept: caught(reader, concept, questions.prefixed) for concept in concepts}
    return {
        **environment(),
        "model": public_name(model_path(MODEL)),
        "questions": {
            "choosing": len(questions.choosing),
            "thresholds": len(questions.thresholds),
            "heldout": len(questions.heldout),
            "prefixed": len(questions.prefixed),
        },
        "max_tokens": MAX_TOKENS,
        "within": WITHIN,
        "fpr": RATES[0],
        "concepts": {
            name: figures(known[name], probes[name], found[name], ends[name]) for name in concepts
        },
        "coloured": shown,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file of all figures")
    parser.add_argument("--concepts", type=int, default=PER_CLASS, help="concepts per class")
    parser.add_argument("--choosing", type=int, default=12, help="questions to choose the layer on")
    parser.add_argument("--thresholds", type=int, default=110, help="to choose the threshold on")
    parser.add_argument("--prefixed", type=int, default=30, help="prefixed ones to report on")
    args = parser.parse_args()
    report = _report(args)
    write_json(args.json, report)
    show([table(report), "", layers_table(report)])


if __name__ == "__main__":
    main()
