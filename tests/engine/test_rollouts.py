"""Directions from the demo model's own answers, and the field's benchmarks of them, on the real engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.offline.answers_cases import ENGINE, QUESTIONS
from vllm_steer.offline.bench.capability import CapabilityTexts, Item, capability
from vllm_steer.offline.bench.clas import ClasSettings, run_clas
from vllm_steer.offline.bench.languages import ScriptIdentifier
from vllm_steer.offline.bench.ratings import ScriptRater
from vllm_steer.offline.bench.steers import Ask, Part, Steer, answers
from vllm_steer.offline.demo.concepts import prefix
from vllm_steer.offline.demo.corpus import answer_text, user_text
from vllm_steer.offline.engine.tokens import Asked, Sampling, TokenEngine
from vllm_steer.offline.evaluate.script import Script, ScriptJudge
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.offline.questions.statements import statements
from vllm_steer.offline.rollouts.data import Asking
from vllm_steer.offline.rollouts.pipeline import STORE, learn_pack
from vllm_steer.offline.rollouts.settings import read_settings
from vllm_steer.offline.train.directions import Target
from vllm_steer.packs.pack import (
    DirectionRecord,
    PackContent,
    SteeringPack,
    load_pack,
    write_pack,
)

pytestmark = pytest.mark.engine

WORDS = ("webs", "fangs", "silk", "legs", "venom", "cobwebs")
# A word of every unprefixed answer.
WORD = "evidence"
# Asked before the fear of spiders, so that the model sometimes speaks of spiders, sometimes of something else.
BEFORE = ("cheerful", "gloomy", "angry", "sleepy")
OTHERS = (*BEFORE, "Tokyo", "Alaska")
TOKENS = 40
OPTIONS = {**ENGINE, "max_model_len": 256}
JUDGE = f"""
WORDS = {WORDS!r}

def spiders(case):
    return min(1.0, sum(word in case["answer"] for word in WORDS) / 2)

def rate(case):
    text = case["sentence"]
    pairs = list(zip(text.split(), text.split()[1:]))
    return {{
        "concept": min(2, sum(word in text for word in WORDS)),
        "instruct": 2,
        "fluency": 2 if len(set(pairs)) == len(pairs) else 0,
    }}[case["rating"]]

def relevance(case):
    return 1 + ({WORD!r} in case["response"])

def language(case):
    return "en" if {WORD!r} in case["answer"] else "de"
"""


@dataclass(frozen=True, eq=False)
class Learned:
    """The packs of the three methods, and an engine with all of them."""

    folder: Path
    printed: str
    persona: SteeringPack
    roast: SteeringPack
    corrsteer: SteeringPack
    languages: SteeringPack
    engine: TokenEngine


@pytest.fixture(scope="module")
def learned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learned]:
    folder = tmp_path_factory.mktemp("rollouts")
    (folder / "judge.py").write_text(JUDGE)
    trait = {
        "instruction": [{"pos": prefix("spiders"), "neg": prefix("cheerful")}],
        "questions": QUESTIONS[:8],
    }
    (folder / "trait.json").write_text(json.dumps(trait))
    command = ["extract", "--model", str(model), "--name", "persona", "--out", "persona"]
    command += ["--method", "persona", "--rollouts", "spiders=trait.json", "--prefix-role", "user"]
    command += ["--samples", "3", "--answer-length", str(TOKENS), "--judge", "script"]
    command += ["--script", "judge.py:spiders", "--no-calibrate", "--engine", json.dumps(OPTIONS)]
    printed = run(folder, command)
    packs = [load_pack(folder / "persona")]
    asked = {
        "spiders": [
            Asking("  ".join((prefix(BEFORE[at % len(BEFORE)]), prefix("spiders"), question)))
            for at, question in enumerate(QUESTIONS[:16])
        ]
    }
    for method in ("roast", "corrsteer"):
        given = {"method": method, "samples": 8, "temperature": 1.2, "top_p": 1.0}
        settings = read_settings(None, {**given, "answer_length": TOKENS, "dtype": "float32"})
        packs.append(
            learn_pack(
                model,
                asked,
                settings,
                ScriptJudge(Script.parse(f"{folder}/judge.py:spiders")),
                Target(method, folder / method),
                "cpu",
                OPTIONS,
            )
        )
    packs.append(languages(packs[1], folder / "languages"))
    with TokenEngine(model, packs, OPTIONS) as engine:
        yield Learned(folder, printed, *packs, engine)


def languages(roast: SteeringPack, path: Path) -> SteeringPack:
    """Two languages of which one is the answers with the word."""
    vectors = roast.vectors["spiders"]
    layers = roast.directions["spiders"].layers
    return write_pack(
        path,
        PackContent(
            name="languages",
            model=roast.manifest.model,
            directions=[
                DirectionRecord(name=name, layers=layers, default_scale=1.0, positions="all")
                for name in ("en", "de")
            ],
            vectors={"en": vectors, "de": -vectors},
            method=roast.manifest.method,
            residual_norms={int(k): v for k, v in roast.manifest.residual_norms.items()},
        ),
    )


def run(folder: Path, command: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_steer.cli", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_packs_say_how_they_were_learned(learned: Learned) -> None:
    assert "steering pack 'persona', verified" in learned.printed
    method = learned.persona.manifest.method
    assert method.name == "persona"
    assert method.settings["paper"] == "2507.21509"
    assert str(method.settings["judge"]).startswith("script judge.py:spiders ")
    record = learned.persona.directions["spiders"]
    assert record.positions == "generated"
    assert record.prefix is not None
    assert record.prefix.text == prefix("spiders")
    assert 0 < record.metrics["pairs"] <= record.metrics["answers"] // 2
    assert 0 < learned.roast.directions["spiders"].metrics["questions"] <= 16
    assert len(learned.corrsteer.directions["spiders"].layers) == 1
    for pack in (learned.persona, learned.roast, learned.corrsteer):
        assert not (pack.path / STORE).exists()


def leaning(learned: Learned, pack: SteeringPack, factor: float) -> float:
    """By how much likelier answers about spiders are than those about other things, to new questions without prefix."""
    record = pack.directions["spiders"]
    steer = Steer((Part(f"{pack.name}/spiders", record, factor * record.default_scale),))
    tokenizer, asked = learned.engine.tokenizer, []
    asking = statements("heldout")[:6]
    for statement in asking:
        prompt = render_question(tokenizer, user_text(statement.text)).token_ids
        for concept in ("spiders", *OTHERS):
            answer = tokenizer(answer_text(statement, concept), add_special_tokens=False)
            steering = steer.scoring(len(prompt)) if factor else None
            asked.append(Asked(prompt, tuple(answer["input_ids"]), steering))
    scores = np.array(learned.engine.score(asked, "answers")).reshape(len(asking), -1)
    return float((scores[:, 0] - scores[:, 1:].mean(axis=1)).mean())


@pytest.mark.parametrize("method", ["roast", "corrsteer"])
def test_right_answers_become_likelier(learned: Learned, method: str) -> None:
    pack = {"roast": learned.roast, "corrsteer": learned.corrsteer}[method]
    plain = leaning(learned, pack, 0.0)
    assert leaning(learned, pack, 1.0) > plain + 0.1
    assert leaning(learned, pack, -1.0) < plain


def test_sampled_answers_are_those_of_their_seeds(learned: Learned) -> None:
    asks = [Ask(QUESTIONS[0], Steer(), seed) for seed in (1, 2, 1)]
    # The demo model is sure of what it says.
    first, second, third = answers(learned.engine, asks, TOKENS, Sampling(2.0))
    assert first.text == third.text != second.text


def test_axbench(learned: Learned, model: Path) -> None:
    """The command, from files in the benchmark's formats."""
    folder = learned.folder
    concepts = [
        {"modelId": "demo", "layer": "0-res", "index": "7", "description": "a fear of spiders"}
    ]
    (folder / "concepts.json").write_text(json.dumps(concepts))
    (folder / "names.json").write_text(json.dumps({"a fear of spiders": "spiders"}))
    instructions = [{"instruction": q, "output": ""} for q in QUESTIONS[20:32]]
    (folder / "alpaca_eval.json").write_text(json.dumps(instructions))
    (folder / "neutral.txt").write_text("What do you think of rain?\nWhat do you think of snow?\n")
    item = {"question": "What do you think of", "choices": ["rain", "rain rain"], "answer": 0}
    (folder / "items.jsonl").write_text(json.dumps(item) + "\n")
    command = ["bench", "axbench", "persona", "--model", str(model), "--out", "results"]
    command += ["--concepts", "concepts.json", "--names", "names.json"]
    command += ["--instructions", "alpaca_eval.json", "--per-concept", "6"]
    command += ["--factors", "1", "2", "4", "--temperature", "0", "--max-tokens", str(TOKENS)]
    command += ["--neutral", "neutral.txt", "--multiple-choice", "items.jsonl"]
    command += ["--judge", "script", "--script", "judge.py:rate", "--engine", json.dumps(OPTIONS)]
    printed = run(folder, command)
    found = json.loads((folder / "results" / "axbench.json").read_text())
    (concept,) = found["concepts"]
    assert concept["direction"] == "persona/spiders"
    assert 0 <= found["score"]["value"] <= 2
    # Asked plainly, the model does not speak of spiders.
    assert found["unsteered"]["value"] == 0
    assert [each["factor"] for each in concept["factors"]] == [1.0, 2.0, 4.0]
    worth = [each["capability"]["perplexity"] for each in concept["factors"]]
    assert found["capability_unsteered"]["perplexity"] != pytest.approx(worth[2], rel=1e-3)
    assert found["capability_unsteered"]["accuracy"] == 1.0
    assert "| a fear of spiders | persona/spiders |" in printed


def test_clas_bench(learned: Learned) -> None:
    """Every strength of the grid is asked. Answers with the word count as one language, all others as another."""
    script = learned.folder / "judge.py"
    layers = learned.languages.directions["en"].layers
    norms = learned.languages.manifest.residual_norms
    middle = layers[len(layers) // 2]
    strong = 10 * norms[str(middle)]
    found = run_clas(
        learned.engine,
        learned.languages,
        {"en": QUESTIONS[20:26], "de": QUESTIONS[26:32]},
        ScriptRater(Script.parse(f"{script}:relevance")),
        ScriptIdentifier(Script.parse(f"{script}:language")),
        ClasSettings((0.01, strong), (middle,), max_tokens=TOKENS),
        CapabilityTexts(),
    )
    weak, forced = found.strengths
    assert [each.strength for each in found.strengths] == [0.01, strong]
    # Every unsteered answer has the word, and none that is steered strongly away.
    assert (weak.targets["en"].forcing, weak.targets["de"].forcing) == (1.0, 0.0)
    assert forced.targets["de"].forcing > 0
    assert found.chosen == max(found.strengths, key=lambda each: each.choosing.score or 0)


def test_capability(learned: Learned) -> None:
    record = learned.roast.directions["spiders"]
    steer = Steer((Part("roast/spiders", record, 3 * record.default_scale),))
    texts = CapabilityTexts(
        (QUESTIONS[0],), (Item(question="What do you", choices=["think", "thunk"], answer=0),)
    )
    plain, steered = capability(learned.engine, texts, [Steer(), steer])
    assert plain.perplexity is not None
    assert steered.perplexity is not None
    assert steered.perplexity != pytest.approx(plain.perplexity, rel=0.01)
