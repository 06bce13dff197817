"""Calibration through the real engine on the demo model, held against Hugging Face with hooks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

import vllm_steer.offline.engine.tokens
from tests.offline.answers_cases import ENGINE, QUESTIONS, prompts_of
from vllm_steer.cli import main
from vllm_steer.errors import EvaluationError
from vllm_steer.offline.calibrate.grid import ANGLES, subjects
from vllm_steer.offline.calibrate.measures import Trial
from vllm_steer.offline.calibrate.run import STORE, CalibrationSettings, calibrate_pack
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import prefix
from vllm_steer.offline.engine.answer_store import Store
from vllm_steer.offline.engine.llm import start_engine, stop_engine
from vllm_steer.offline.engine.tokens import Asked, TokenEngine
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.pipeline import extract_pack
from vllm_steer.offline.extract.settings import ExtractionSettings
from vllm_steer.offline.models.loading import load_config
from vllm_steer.offline.models.prompts import Concept, render_question
from vllm_steer.offline.questions.everyday import Everyday
from vllm_steer.offline.questions.statements import statements
from vllm_steer.operations import Gate
from vllm_steer.packs.pack import (
    DirectionRecord,
    FormChoice,
    PackContent,
    Prefix,
    SteeringPack,
    load_pack,
    write_pack,
)
from vllm_steer.testing.engine import ForkedLLM
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine

TUNING, HELDOUT = QUESTIONS[100:104], QUESTIONS[110:116]
ASKED = Everyday((), (), tuple(TUNING), tuple(HELDOUT))
SETTINGS = CalibrationSettings(
    window_questions=2, tuning_questions=4, heldout_questions=6, max_tokens=24
)
# Of vectors at unit length; the last two turn the stream.
MIDDLE = [1, 2, 3]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_config(demo_model_path())[1]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> SteeringPack:
    """Directions of three concepts in several forms, one that is noise, and one of unknown origin."""
    folder = tmp_path_factory.mktemp("packs")
    names = ("spiders", "cheerful", "Tokyo")
    texts = [statement.text for statement in statements("extract")[:40]]
    learned = extract_pack(
        demo_model_path(),
        ExtractionData([Concept(name, prefix(name)) for name in names], texts[:20], texts[20:]),
        ExtractionSettings(estimator="mean_difference", labels="hard", token=-1, permutations=0),
        PackTarget("learned", folder / "learned"),
        ComputeResources(device="cpu"),
    )

    def rows(name: str, layers: list[int]) -> np.ndarray:
        return learned.vectors[name][[layer - 1 for layer in layers]]

    def record(name: str, layers: list[int], concept: str | None, **fields: Any) -> DirectionRecord:
        known = Prefix(text=prefix(concept)) if concept else None
        given = {"default_scale": 1.0, "positions": "all", "prefix": known} | fields
        return DirectionRecord(name=name, layers=layers, **given)

    noise = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    every = list(range(1, 6))
    turned = FormChoice(op="angle", plane="turned plane")
    directions = [
        (record("spiders", every, "spiders"), rows("spiders", every)),
        (record("cheerful", every, "cheerful"), rows("cheerful", every)),
        (record("Tokyo", MIDDLE, "Tokyo", positions="generated"), rows("Tokyo", MIDDLE)),
        (record("noise", MIDDLE, "chef"), noise),
        (record("unknown", MIDDLE, None), rows("cheerful", MIDDLE)),
        (record("no spiders", MIDDLE, "spiders", form=FormChoice(op="ablate")), rows("spiders", MIDDLE)),
        (record("turned", MIDDLE, "Tokyo", form=turned), rows("Tokyo", MIDDLE)),
        (record("turned plane", MIDDLE, None), rows("spiders", MIDDLE)),
    ]  # fmt: skip
    return write_pack(
        folder / "mixed",
        PackContent(
            name="mixed",
            model=learned.manifest.model,
            directions=[each for each, _ in directions],
            vectors={each.name: vector for each, vector in directions},
            method=learned.manifest.method,
            residual_norms={int(k): norm for k, norm in learned.manifest.residual_norms.items()},
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def engine(mixed: SteeringPack) -> Iterator[None]:
    """One life of the engine for all tests; whoever starts one gets it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.LLM", ForkedLLM)
        running = start_engine(
            demo_model_path(), [str(mixed.path)], ENGINE, room=1024, steering={"ops": "affine"}
        )
        patch.setattr(vllm_steer.offline.engine.tokens, "start_engine", lambda *_, **__: running)
        patch.setattr(vllm_steer.offline.engine.tokens, "stop_engine", lambda _: None)
        yield
    stop_engine(running)


@pytest.fixture(scope="module")
def calibrated(mixed: SteeringPack, engine: None) -> SteeringPack:
    found = calibrate_pack(mixed, demo_model_path(), ASKED, SETTINGS, engine=ENGINE)
    assert not (found.path / STORE).exists()
    return load_pack(found.path)


@pytest.fixture(scope="module")
def reference(mixed: SteeringPack) -> Reference:
    return Reference(demo_model_path(), [mixed])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of requests that the engine gets, at each call."""
    numbers: list[int] = []
    run = TokenEngine._run

    def counted(self, prompts, *rest):
        numbers.append(len(prompts))
        return run(self, prompts, *rest)

    monkeypatch.setattr(TokenEngine, "_run", counted)
    return numbers


def likelihood(
    reference: Reference, prompt: tuple[int, ...], answer: tuple[int, ...], **choice: Any
) -> float:
    """Log-likelihood of an answer by Hugging Face, steered by one direction or by none."""
    steering = {"directions": [choice]} if choice else None
    logs = reference.score(prompt, answer, steering)[len(prompt) - 1 :]
    return float(sum(logs[at, token] for at, token in enumerate(answer)))


def answered(
    reference: Reference, tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], **choice: Any
) -> tuple[int, ...]:
    """The answer of Hugging Face up to the token that ends it, steered by one direction or by none."""
    steering = {"directions": [choice]} if choice else None
    tokens = reference.generate(prompt, steering, SETTINGS.max_tokens).tokens
    end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else None
    return tuple(tokens[:end])


def chosen(pack: SteeringPack, name: str) -> dict[str, Any]:
    """What the manifest says of a direction, as the reference takes it."""
    record = pack.directions[name]
    form: Mapping[str, Any] = record.form.model_dump(exclude_none=True) if record.form else {}
    if "plane" in form:
        form = {**form, "plane": f"mixed/{form['plane']}"}
    scale = {"scale": record.default_scale, "positions": record.positions}
    return {"name": f"mixed/{name}", "layers": record.steered_layers, **scale, **form}


@pytest.mark.parametrize("name", ["spiders", "cheerful", "Tokyo"])
def test_directions_that_steer(calibrated: SteeringPack, mixed: SteeringPack, name: str) -> None:
    record = calibrated.directions[name]
    found = record.calibration
    assert found.steers
    assert found.gap_closed > 0.5
    assert 0 < found.low <= found.gap_closed <= found.high
    assert found.control < found.gap_closed
    assert record.default_scale <= record.safe_scale
    (subject,) = (each for each in subjects(mixed) if each.record.name == name)
    assert tuple(record.steered_layers) in subject.windows(6)
    expected = subject.dose(record.safe_scale, tuple(record.steered_layers))
    assert found.fluent_dose == pytest.approx(expected)
    # The largest fluent scale, and of all fluent ones that which does most.
    fluent = [point for point in found.curve if point.fluent]
    assert record.safe_scale == fluent[-1].scale
    done = {
        point.scale: min(point.gap_closed, 1.0) + min(point.expression, 1.0) for point in fluent
    }
    assert done[record.default_scale] == max(done.values())
    assert found.expression > 0.3
    assert (found.model, found.dtype, found.questions) == ("model", "float32", len(HELDOUT))


def test_curves_ascend_and_say_why_text_is_fluent(calibrated: SteeringPack) -> None:
    for record in calibrated.directions.values():
        if (found := record.calibration) is None:
            continue
        scales = [point.scale for point in found.curve]
        assert scales == sorted(set(scales))
        for point in found.curve:
            if found.repetition_prefixed is not None and point.fluent:
                assert point.repetition <= found.repetition_prefixed + SETTINGS.repetition


def test_noise_closes_less_than_what_was_learned_and_does_not_steer(
    calibrated: SteeringPack,
) -> None:
    gaps = {
        name: record.calibration.gap_closed
        for name, record in calibrated.directions.items()
        if record.calibration is not None
    }
    assert gaps["noise"] < min(gaps[name] for name in ("spiders", "cheerful", "Tokyo"))
    assert not calibrated.directions["noise"].calibration.steers


def test_without_a_prefix_the_text_alone_is_measured(calibrated: SteeringPack) -> None:
    record = calibrated.directions["unknown"]
    found = record.calibration
    assert record.prefix is None
    assert (found.gap_closed, found.low, found.control, found.repetition_prefixed) == (None,) * 4
    assert found.expression is None
    assert all((p.gap_closed, p.expression) == (None, None) for p in found.curve)
    assert record.safe_scale in [point.scale for point in found.curve]
    assert record.default_scale == pytest.approx(record.safe_scale / 2, rel=5e-3)
    assert found.perplexity > 1


def test_other_forms_are_calibrated_by_what_they_do(calibrated: SteeringPack) -> None:
    ablated = calibrated.directions["no spiders"]
    assert ablated.default_scale == 1.0
    assert [point.scale for point in ablated.calibration.curve] == [1.0]
    assert ablated.calibration.fluent_dose is None
    turned = calibrated.directions["turned"]
    assert {point.scale for point in turned.calibration.curve} <= set(ANGLES)
    assert turned.default_scale in ANGLES
    if turned.safe_scale is not None:
        # An angle is strong where it is small.
        assert turned.safe_scale <= turned.default_scale
    assert calibrated.directions["turned plane"].calibration is None


@pytest.mark.parametrize("name", ["spiders", "Tokyo", "no spiders", "turned"])
def test_gaps_are_those_of_hugging_face(
    calibrated: SteeringPack, reference: Reference, tokenizer, name: str
) -> None:
    """Answers, likelihoods and all on held-out questions, by hooks alone."""
    record = calibrated.directions[name]
    ends, steered, own = [], [], []
    for question in HELDOUT:
        plain, prefixed = (p.token_ids for p in prompts_of(tokenizer, question, record.prefix.text))
        answer = answered(reference, tokenizer, prefixed)
        ends.append([likelihood(reference, p, answer) for p in (plain, prefixed)])
        taken = record.op == "ablate"
        value = likelihood(
            reference, prefixed if taken else plain, answer, **chosen(calibrated, name)
        )
        # What is taken from the prefixed prompt counts as much as what is given to the plain one.
        steered.append(sum(ends[-1]) - value if taken else value)
        spoken = answered(reference, tokenizer, plain, **chosen(calibrated, name))
        own.append([likelihood(reference, p, spoken) for p in (plain, prefixed)])
    lower, upper = np.array(ends).sum(axis=0)
    closed = (sum(steered) - lower) / (upper - lower)
    assert record.calibration.gap_closed == pytest.approx(closed, abs=1e-3)
    assert abs(closed) > 0.01
    if record.op == "ablate":
        # What is taken away speaks of nothing.
        assert record.calibration.expression is None
        return
    after_plain, after_prefixed = np.array(own).sum(axis=0)
    expressed = (after_prefixed - after_plain) / (upper - lower)
    assert record.calibration.expression == pytest.approx(expressed, abs=1e-3)
    assert abs(expressed) > 0.01


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last_prompt"])
def test_an_answer_in_the_prompt_is_steered_where_a_generated_one_would_be(
    mixed: SteeringPack, reference: Reference, tokenizer, positions: str
) -> None:
    subject = subjects(mixed)[0]
    record = subject.record.model_copy(update={"positions": positions})
    trial = Trial(replace(subject, record=record), 30.0, (1, 2, 4))
    engine = TokenEngine(demo_model_path(), [mixed], ENGINE, bar=False)
    plain = render_question(tokenizer, HELDOUT[0]).token_ids
    (generated,) = engine.generate([Asked(plain, steering=trial.steering(len(plain)))], 16, "")
    rows = [
        Asked(plain, generated.tokens, trial.steering(len(plain))),
        Asked(plain, generated.tokens),
    ]
    score, unsteered = engine.score(rows, "")
    choice = {"name": "mixed/spiders", "scale": 30.0, "layers": [1, 2, 4], "positions": positions}
    expected = likelihood(reference, plain, generated.tokens, **choice)
    assert score == pytest.approx(expected, abs=1e-3)
    assert generated.log_likelihood == pytest.approx(expected, abs=1e-3)
    assert unsteered == pytest.approx(likelihood(reference, plain, generated.tokens), abs=1e-3)
    assert abs(score - unsteered) > 0.005


def only(pack: SteeringPack, name: str, out: Path, **changes: Any) -> SteeringPack:
    """A pack of one of its directions, under its name."""
    record = pack.directions[name].model_copy(update=changes)
    return write_pack(
        out, PackContent(name=pack.name, model=pack.manifest.model, directions=[record],
        vectors={name: pack.vectors[name]}, method=pack.manifest.method,
        residual_norms={int(k): norm for k, norm in pack.manifest.residual_norms.items()}))  # fmt: skip


def test_a_calibration_that_was_killed_goes_on(
    mixed: SteeringPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[int]
) -> None:
    monkeypatch.setattr(vllm_steer.offline.engine.tokens, "PART", 16)
    monkeypatch.setattr(vllm_steer.offline.engine.tokens, "MOST_AT_ONCE", 16)
    few = CalibrationSettings(
        window_questions=1, tuning_questions=2, heldout_questions=3, max_tokens=8
    )

    def run(out: str) -> dict[str, Any]:
        pack = only(mixed, "Tokyo", tmp_path / out) if not (tmp_path / out).exists() else None
        found = calibrate_pack(
            pack or load_pack(tmp_path / out), demo_model_path(), ASKED, few, engine=ENGINE
        )
        return found.directions["Tokyo"].model_dump()

    expected, total = run("whole"), sum(asked)
    kept: list[int] = []
    keep = Store.keep

    def killing(self, kind, requests, answers):
        keep(self, kind, requests, answers)
        kept.append(len(requests))
        if sum(kept) > total / 2:
            raise KeyboardInterrupt

    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "keep", killing)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    before = sum(asked)
    assert total / 2 < before < total
    assert load_pack(tmp_path / "killed").directions["Tokyo"].calibration is None
    # What a writer that was killed leaves behind is in nobody's way.
    (tmp_path / "killed" / STORE / ".0123.json.tmp").write_text("[")
    found = run("killed")
    assert sum(asked) == total
    assert not (tmp_path / "killed" / STORE).exists()
    assert found.pop("calibration")["gap_closed"] == pytest.approx(
        expected.pop("calibration")["gap_closed"], abs=1e-3
    )
    assert found == expected


def test_answers_are_kept_by_all_that_they_depend_on(
    mixed: SteeringPack, tmp_path: Path, asked: list[int], tokenizer
) -> None:
    prompt = render_question(tokenizer, TUNING[0]).token_ids
    plain = Asked(prompt, (5, 6))
    steered = replace(plain, steering=Trial(subjects(mixed)[0], 4.0, (2,)).steering(len(prompt)))

    def engine(**changes: Any) -> TokenEngine:
        given = {"packs": [mixed], "options": ENGINE, "store": tmp_path, "bar": False} | changes
        return TokenEngine(demo_model_path(), **given)

    first = engine().score([plain, steered], "")
    assert first[0] != first[1]
    assert asked == [2]
    assert engine().score([plain, steered], "") == first
    assert asked == [2]
    engine().score([plain], "")
    engine().generate([plain], 4, "")
    engine().generate([plain], 5, "")
    engine(options={**ENGINE, "seed": 1}).score([plain], "")
    engine(packs=[]).score([plain], "")
    assert asked == [2, 1, 1, 1, 1, 1]
    for file in tmp_path.iterdir():
        file.write_text(file.read_text()[:-1])
    with pytest.raises(EvaluationError, match="is damaged .*; delete it"):
        engine().score([plain], "")
    for file in tmp_path.iterdir():
        file.write_text("[]")
    with pytest.raises(EvaluationError, match="does not have 1 answers; delete it"):
        engine().score([plain], "")


@pytest.mark.parametrize(
    ("form", "affine"),
    [
        (None, False),
        (FormChoice(op="add"), False),
        (FormChoice(op="ablate"), True),
        (FormChoice(restore_norm=True), True),
        (FormChoice(gate=Gate(direction="Tokyo", above=0.0)), True),
    ],
    ids=str,
)
def test_the_engine_starts_for_what_the_packs_do(
    mixed: SteeringPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form, affine
) -> None:
    started: list[bool] = []
    start = vllm_steer.offline.engine.tokens.start_engine

    def starting(*args: Any, steering: Mapping[str, Any], **kwargs: Any) -> Any:
        started.append(steering.get("ops") == "affine")
        return start()

    monkeypatch.setattr(vllm_steer.offline.engine.tokens, "start_engine", starting)
    pack = only(mixed, "Tokyo", tmp_path / "pack", form=form)
    engine = TokenEngine(demo_model_path(), [pack], ENGINE, bar=False)
    engine.score([Asked((5, 6), (7,))], "")
    assert started == [affine]


def test_what_the_engine_cannot_do_is_said(mixed: SteeringPack) -> None:
    engine = TokenEngine(demo_model_path(), [mixed], ENGINE, bar=False)
    with pytest.raises(EvaluationError, match="has 1031 tokens, and the engine has room for 1024"):
        engine.score([Asked((5,) * 1000, (6,) * 30)], "")
    unknown = {"directions": [{"name": "mixed/nobody"}]}
    with pytest.raises(EvaluationError, match="the engine refused a request: .*nobody"):
        engine.score([Asked((5, 6), (7,), unknown)], "")
    assert engine.score([Asked((5, 6), (7,))], "")[0] < 0


def test_the_command_measures_a_pack_that_came_from_elsewhere(
    mixed: SteeringPack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a prefix the text alone; with one given its gap, which the pack then remembers."""
    pack = only(mixed, "unknown", tmp_path / "imported")
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(QUESTIONS[100:140]))
    command = [
        "calibrate", str(pack.path), "--model", str(demo_model_path()), "--questions", str(file),
        "--max-tokens", "12", "--engine", json.dumps(ENGINE),
    ]  # fmt: skip
    assert main(command) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    found = load_pack(pack.path).directions["unknown"]
    given = [f"{found.default_scale:g}", f"{found.safe_scale:g}"]
    assert row[:6] == ["unknown", *given, "–", "–", "–"]
    assert found.calibration.questions == 8
    (tmp_path / "prefixes.txt").write_text(f"unknown: {prefix('cheerful')}\n")
    assert main([*command, "--prefixes", str(tmp_path / "prefixes.txt")]) == 0
    found = load_pack(pack.path).directions["unknown"]
    assert found.prefix.text == prefix("cheerful")
    assert found.calibration.gap_closed > 0.1
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[3:6] == [
        f"{found.calibration.gap_closed:.2f}",
        f"{found.calibration.expression:.2f}",
        "yes" if found.calibration.steers else "no",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--class", "fears", "--prefix", "Be {concept}."], "give only one of --prefixes"),
        (["--prefix", "Be brave."], r"--prefix must hold {concept}"),
        (["--class", "fear"], "did you mean 'fears'"),
        (["--prefixes", "PREFIXES"], r"prefixes are given for ['nobody'], which are not in the pack"),
        (["--questions", "PREFIXES"], "has 1 distinct questions; at least 40 are needed"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_faulty_commands_are_refused_before_an_engine_is_asked(
    mixed: SteeringPack, tmp_path: Path, asked: list[int], capsys, change, message
) -> None:
    shutil.copytree(mixed.path, tmp_path / "pack")
    (tmp_path / "prefixes.txt").write_text("nobody: Be nobody.\n")
    given = [str(tmp_path / "prefixes.txt") if word == "PREFIXES" else word for word in change]
    command = ["calibrate", str(tmp_path / "pack"), "--model", str(demo_model_path()), *given]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not asked


def test_a_model_that_says_nothing_is_no_measure(mixed: SteeringPack, tmp_path: Path) -> None:
    pack = only(mixed, "Tokyo", tmp_path / "short")
    settings = SETTINGS.model_copy(update={"max_tokens": 1})
    with pytest.raises(
        EvaluationError, match="direction 'Tokyo': the model's answers .* are empty"
    ):
        calibrate_pack(pack, demo_model_path(), ASKED, settings, engine=ENGINE)
