"""``vllm-steer sweep`` on the real engine, held against Hugging Face with hooks.

One engine answers for all tests of this file, in a process of its own; whatever else they run is
read from the answers that it left.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer.cli import main
from vllm_steer.errors import EvaluationError
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.evaluate import DemoModel, Trial
from vllm_steer.offline.engine.tokens import Asked, TokenEngine
from vllm_steer.offline.evaluate.generation import Answer, Generator, Request
from vllm_steer.offline.evaluate.results import SweepResult, read_result
from vllm_steer.offline.evaluate.subjects import Selection, Subject, subject_of
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.offline.questions.by_class import given_questions
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine

# Weak, right, and far too strong.
SCALES = (3.0, 8.0, 60.0)
MAX_TOKENS = 48
TUNING = [statement.text for statement in statements("tune")[:2]]
HELDOUT = [statement.text for statement in statements("heldout")[:3]]
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 2**27,
}


@dataclass(frozen=True)
class Swept:
    """A finished sweep.

    Attributes:
        folder: Where it stands.
        command: Arguments of ``vllm-steer`` that made it.
        printed: What it printed, after the engine's own log.
    """

    folder: Path
    command: list[str]
    printed: str

    @property
    def result(self) -> SweepResult:
        return read_result(self.folder / "sweep.json")

    def again(self, judge: str, out: str = "again") -> list[str]:
        """The command with another judge, for another directory with the same answers."""
        copy = self.folder.with_name(out)
        copy.mkdir(exist_ok=True)
        if not (copy / "answers").exists():
            (copy / "answers").symlink_to(self.folder / "answers")
        changed = {"demo": judge, str(self.folder): str(copy)}
        return [changed.get(argument, argument) for argument in self.command]


@pytest.fixture(scope="module")
def swept(
    model: Path, packs: list[SteeringPack], tmp_path_factory: pytest.TempPathFactory
) -> Swept:
    root = tmp_path_factory.mktemp("sweep")
    (root / "tune.txt").write_text("\n".join(TUNING) + "\n")
    (root / "heldout.txt").write_text("\n\n".join(HELDOUT))
    command = ["sweep", *(str(pack.path) for pack in packs), "--model", str(model)]
    command += ["--out", str(root / "first"), "--scales", *map(str, SCALES)]
    command += ["--max-tokens", str(MAX_TOKENS), "--engine", json.dumps(ENGINE)]
    command += ["--tuning-questions", str(root / "tune.txt")]
    command += ["--questions", str(root / "heldout.txt"), "--statements", "--judge", "demo"]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_steer.cli", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answers: 100%" in done.stderr
    return Swept(root / "first", command, done.stdout)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever generates fails."""

    def start(*args: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(TokenEngine, "_engine", start)


@pytest.fixture
def answers(swept: Swept, model: Path, packs: list[SteeringPack], no_engine: None) -> list[Answer]:
    """What the engine answered, in the order of the requests of all subjects."""
    engine = TokenEngine(model, packs, ENGINE, swept.folder / "answers")
    requests = [r for subject in subjects(packs) for r in subject.requests()]
    return Generator(engine, MAX_TOKENS).answer(requests)


def subjects(packs: list[SteeringPack]) -> list[Subject]:
    questions = given_questions(TUNING, HELDOUT, statements=True)
    return [subject_of(pack, questions, Selection(scales=SCALES)) for pack in packs]


def test_answers_are_those_of_hugging_face_with_hooks(
    answers: list[Answer], model: Path, packs: list[SteeringPack]
) -> None:
    trials = []
    for pack in packs:
        trials += [Trial(text) for text in (*TUNING, *HELDOUT)]
        trials += [
            Trial(text, concept, direction=pack.vectors[concept], scale=scale)
            for scale in SCALES
            for concept in pack.directions
            for text in (*TUNING, *HELDOUT)
        ]
        trials += [
            Trial(text, concept, prefixed=True)
            for concept in pack.directions
            for text in (*TUNING, *HELDOUT)
        ]
    verdicts = DemoModel(model).judge(trials, "Hugging Face")
    assert [answer.text for answer in answers] == [verdict.answer for verdict in verdicts]
    assert {trial.concept for trial in trials} > {None}


def test_figures_are_those_of_the_answers(
    swept: Swept, answers: list[Answer], packs: list[SteeringPack]
) -> None:
    """Counted here by hand from the order of the requests."""
    result = swept.result
    assert [found.name for found in result.classes] == [*(pack.name for pack in packs), "all"]
    for found in result.classes[:-1]:
        assert found.scale == 8.0
        assert found.unsteered.steerability == 0.0
        assert found.heldout[0].figures.steerability == 0.0
        assert found.single.steerability is not None
        assert found.single.steerability >= 0.5
        assert found.heldout[2].figures.steerability < found.single.steerability
        assert (found.single.answers, found.single.judge_errors) == (2 * len(HELDOUT), 0)
    words = [answer.text.split() for answer in answers[5:15]]
    assert all("reasons" in part or "details" in part for part in words), "ε = 3 is too weak"


def test_perplexity_is_that_of_the_unsteered_model(answers: list[Answer], model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    questions = [*TUNING, *HELDOUT]
    # Of the first pack: unsteered answers, those at the second scale for its two concepts, and those
    # with their prefixes, which are taken away here.
    for index in (*range(5), *range(15, 25), *range(35, 45)):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": user_text(questions[index % 5])}],
            add_generation_prompt=True,
            return_dict=False,
        )
        given = tokenizer(answers[index].text, add_special_tokens=False)["input_ids"]
        given += [tokenizer.eos_token_id] if answers[index].finished else []
        with torch.inference_mode():
            logs = plain(torch.tensor([prompt + given])).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(given) - 1)
        expected = (-logs[at, torch.tensor(given)].mean()).exp()
        assert answers[index].perplexity == pytest.approx(float(expected), rel=1e-3)


def test_the_demo_stands_between_floor_and_ceiling(swept: Swept) -> None:
    """Its prefixes always work, and are all that its vectors were learned from."""
    result = swept.result
    assert set(result.prefixes) == {
        f"{found.name}/{one.name}" for found in result.classes[:-1] for one in found.concepts
    }
    for found in result.classes:
        assert found.unsteered.steerability == found.unsteered.gap_closed == 0.0
        assert found.prefixed is not None
        assert found.prefixed.steerability == found.prefixed.gap_closed == 1.0
        assert found.single.gap_closed is not None
        assert 0.5 < found.single.gap_closed < 1.05
        for one in found.concepts:
            assert one.own.gap_closed is not None
            assert one.own.gap_closed > 0.5
    text = (swept.folder / "sweep.md").read_text()
    assert "| class | concepts | ε | unsteered (floor) |" in text
    assert "| spiders | 8 | 0.00 | 1.00 | 1.00 | " in text


def test_what_is_too_strong_is_not_fluent(swept: Swept) -> None:
    for found in swept.result.classes[:-1]:
        assert found.fluent
        assert found.bound is not None
        assert found.bound.prefixed == len(found.concepts)
        for points in (found.tuning, found.heldout):
            assert [point.fluent for point in points] == [True, True, False]
        weak, right, strong = (point.figures.gap_closed for point in found.heldout)
        assert weak < right
        assert strong < 0


def test_the_gap_is_that_of_hugging_face(
    swept: Swept, answers: list[Answer], model: Path, reference: Reference
) -> None:
    """Of spiders at the second scale, on held-out questions."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prefix = swept.result.prefixes["fears/spiders"].text
    steering = {"directions": [{"name": "fears/spiders", "scale": SCALES[1]}]}
    raised = gap = 0.0
    for text, answer in zip(HELDOUT, answers[37:40], strict=True):
        plain = render_question(tokenizer, user_text(text)).token_ids
        prefixed = render_question(tokenizer, user_text(text), prefix).token_ids
        lone = _likelihood(reference, plain, answer, None)
        raised += _likelihood(reference, plain, answer, steering) - lone
        gap += _likelihood(reference, prefixed, answer, None) - lone
    (found,) = [one for one in swept.result.classes[0].concepts if one.name == "spiders"]
    closed = found.heldout[1].figures.gap_closed
    assert closed == pytest.approx(raised / gap, abs=2e-3)


def _likelihood(
    reference: Reference, prompt: tuple[int, ...], answer: Answer, steering: dict[str, Any] | None
) -> float:
    logs = reference.score(prompt, answer.tokens, steering)
    at = range(len(prompt) - 1, len(prompt) + len(answer.tokens) - 1)
    return float(sum(logs[place, token] for place, token in zip(at, answer.tokens, strict=True)))


def test_perplexity_rises_with_the_scale(swept: Swept) -> None:
    for found in swept.result.classes[:-1]:
        weak, right, strong = (point.figures.perplexity for point in found.heldout)
        assert weak is not None
        assert right is not None
        assert strong is not None
        assert weak < right < strong
        assert found.unsteered.perplexity == pytest.approx(weak, rel=0.05)


def test_a_finished_sweep_goes_on_without_an_engine(swept: Swept, no_engine: None) -> None:
    before = (swept.folder / "sweep.json").read_bytes()
    (swept.folder / "sweep.json").unlink()
    assert main(swept.command) == 0
    assert (swept.folder / "sweep.json").read_bytes() == before
    assert swept.printed.endswith((swept.folder / "sweep.md").read_text())


def test_another_judge_grades_the_same_answers(
    swept: Swept, no_engine: None, tmp_path: Path, packs: list[SteeringPack]
) -> None:
    keywords = tmp_path / "keywords.txt"
    lines = [f"{name}: zebra, xylophone" for pack in packs for name in pack.directions]
    keywords.write_text("\n".join(["spiders: webs, fangs", *lines[1:]]))
    command = [*swept.again("keywords"), "--keywords", str(keywords), "--least", "2"]
    assert main(command) == 0
    result = read_result(swept.folder.with_name("again") / "sweep.json")
    assert result.judge == "keywords, at least 2"
    grades = {found.name: found.single.steerability for found in result.classes[0].concepts}
    assert grades["spiders"] == 1.0
    assert result.classes[1].single.steerability == 0.0


def test_a_judge_that_grades_nothing_ends_the_sweep_and_says_why(
    swept: Swept, no_engine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = swept.again("llm", "silent")
    judge = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--retries", "0"]
    assert main([*command, *judge]) == 1
    shown = capsys.readouterr().err
    assert "fears: the judge graded none of the 12 answers to tuning questions" in shown
    assert "APIConnectionError" in shown
    assert not (swept.folder.with_name("silent") / "sweep.json").exists()


def test_other_requests_are_generated_anew(swept: Swept, no_engine: None) -> None:
    changed = ["5.0" if argument == "8.0" else argument for argument in swept.command]
    with pytest.raises(AssertionError, match="an engine was started"):
        main(changed)


def test_another_checkpoint_in_the_same_place_is_asked_anew(
    model: Path, no_engine: None, tmp_path: Path
) -> None:
    copy, store, asked = (
        shutil.copytree(model, tmp_path / "model"),
        tmp_path / "answers",
        Asked((1,), (2,)),
    )
    engine = TokenEngine(copy, options=ENGINE, store=store)
    engine._store.keep("score", [asked.to_json()], [-1.5])
    assert TokenEngine(copy, options=ENGINE, store=store).score([asked], "again") == [-1.5]
    (copy / "model.safetensors").touch()
    with pytest.raises(AssertionError, match="an engine was started"):
        TokenEngine(copy, options=ENGINE, store=store).score([asked], "anew")


def test_damaged_answers_are_refused(
    swept: Swept, model: Path, packs: list[SteeringPack], no_engine: None, tmp_path: Path
) -> None:
    for file in (swept.folder / "answers").iterdir():
        (tmp_path / file.name).write_text(file.read_text()[:-20])
    requests = [r for subject in subjects(packs) for r in subject.requests()]
    with pytest.raises(EvaluationError, match="is damaged .* delete it"):
        Generator(TokenEngine(model, packs, ENGINE, tmp_path), MAX_TOKENS).answer(requests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--scales", "0"], "none of them 0"),
        (["--concepts", "spider"], "did you mean 'spiders'"),
        (["--judge", "llm"], "needs --judge-url"),
        (["--questions", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--prefixes", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--prefix", "Be {concept}.", "--prefixes", "nowhere.txt"], "give only one of --prefixes"),
    ],
)
def test_faulty_commands_are_refused_before_an_engine_starts(
    swept: Swept,
    no_engine: None,
    change: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*swept.command, *change]) == 1
    assert message in capsys.readouterr().err


def test_the_concepts_asked_for_alone(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []

    def answer(self: Generator, requests: list[Request]) -> list[Answer]:
        seen.extend(requests)
        return [Answer("", False, None) for _ in requests]

    monkeypatch.setattr(Generator, "answer", answer)
    monkeypatch.setattr(TokenEngine, "score", lambda self, asked, name: [0.0] * len(asked))
    command = [*swept.again("demo", "chosen"), "--concepts", "heights", "--layers", "2", "4"]
    assert main(command) == 0
    steered = [request for request in seen if request.direction]
    assert {request.direction for request in steered} == {"fears/heights"}
    assert {request.layers for request in steered} == {(2, 4)}
    questions = len(TUNING) + len(HELDOUT)
    assert len(steered) == len(SCALES) * questions
    prefixed = [request for request in seen if request.prefix]
    assert {request.prefix for request in prefixed} == {swept.result.prefixes["fears/heights"]}
    assert len(prefixed) == len(seen) - len(steered) - len(prefixed) == questions


def test_a_scale_is_never_chosen_on_what_is_reported(
    swept: Swept, no_engine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    at = swept.command.index("--tuning-questions")
    assert main(swept.command[:at] + swept.command[at + 2 :]) == 1
    assert "give both --tuning-questions and --questions" in capsys.readouterr().err
