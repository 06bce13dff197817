"""Extraction from the prefixed model's own answers, those of the real engine, on the demo model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import vllm_steer.offline.engine.tokens
import vllm_steer.offline.extract.answer_learning
from tests.offline.answers_cases import ENGINE, QUESTIONS, greedy
from vllm_steer.cli import main
from vllm_steer.errors import ExtractionError
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import prefix
from vllm_steer.offline.engine.tokens import TokenEngine
from vllm_steer.offline.estimators.fit import fit_direction
from vllm_steer.offline.estimators.labelled_rows import LabelledRows
from vllm_steer.offline.extract.answer_generation import AnswerSettings, concept_answers
from vllm_steer.offline.extract.answer_learning import AnswerLearner
from vllm_steer.offline.extract.answers import ConceptAnswers
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.figures import FIGURES_FILE
from vllm_steer.offline.extract.parts import PARTS_DIRECTORY, answers_directory
from vllm_steer.offline.extract.pipeline import extract_pack
from vllm_steer.offline.extract.settings import ExtractionSettings
from vllm_steer.offline.models.loading import load_config, load_model
from vllm_steer.offline.models.prompts import AnswerPair, Concept
from vllm_steer.offline.questions.everyday import everyday_questions
from vllm_steer.packs.pack import MANIFEST_FILE, VECTORS_FILE, SteeringPack, load_pack, raw_dose
from vllm_steer.testing.engine import ForkedLLM

pytestmark = pytest.mark.engine

NAMES = ("spiders", "cheerful", "Tokyo")
CONCEPTS = [Concept(name, prefix(name)) for name in NAMES]
LENGTH = 24
FAST = {
    "answer_length": LENGTH,
    "answer_share": 1.0,
    "dtype": "float32",
    "train_steps": 2,
    "train_answers": 4,
}
# LabelledRows of which a fifth validates.
HELD = 2 * 28 // 5 // 2


@dataclass(frozen=True)
class Stored:
    """What the engine answered.

    Attributes:
        folder: Its files, as an extraction keeps them.
        questions: File of the questions.
        answers: The answers by concept, with the prefix before the question.
        system: Those with the first concept's prefix in a system message.
    """

    folder: Path
    questions: Path
    answers: dict[str, ConceptAnswers]
    system: ConceptAnswers


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_config(demo_model_path())[1]


@pytest.fixture(scope="module")
def plain_model() -> PreTrainedModel:
    return load_model(demo_model_path(), "float32", "cpu")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Stored:
    """One engine for all tests of this file."""
    folder = tmp_path_factory.mktemp("answers")
    file = folder / "questions.txt"
    file.write_text("\n".join(QUESTIONS[:40]))
    asked = everyday_questions(file)
    assert (len(asked.learned), len(asked.stopping)) == (24, 4)
    given = (asked.learned, asked.stopping)
    with (
        pytest.MonkeyPatch.context() as patch,
        TokenEngine(demo_model_path(), (), ENGINE, folder / "answers", bar=False) as engine,
    ):
        patch.setattr("vllm.LLM", ForkedLLM)
        answers = concept_answers(engine, tokenizer, CONCEPTS, *given, AnswerSettings(LENGTH))
        system = concept_answers(
            engine, tokenizer, CONCEPTS[:1], *given, AnswerSettings(LENGTH, "system")
        )
    return Stored(folder / "answers", file, answers, system[NAMES[0]])


@pytest.fixture
def extract(stored: Stored, tmp_path, monkeypatch) -> Callable[..., SteeringPack]:
    """extract_pack with the answers that are there already."""

    def no_engine(*args: object, **kwargs: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(vllm_steer.offline.engine.tokens, "start_engine", no_engine)

    def run(
        out: str = "pack", concepts: Sequence[Concept] = CONCEPTS, **settings: object
    ) -> SteeringPack:
        given = {"method": "trained", **FAST, **settings}
        if not answers_directory(tmp_path / out).exists():
            shutil.copytree(stored.folder, answers_directory(tmp_path / out))
        return extract_pack(
            demo_model_path(),
            ExtractionData(concepts, questions=everyday_questions(stored.questions)),
            ExtractionSettings(**given),
            PackTarget("mixed", tmp_path / out),
            ComputeResources(device="cpu", engine=ENGINE),
        )

    return run


@pytest.fixture(scope="module")
def differences(stored: Stored, plain_model) -> dict[str, np.ndarray]:
    """State differences ``[answers, blocks, hidden_size]`` of each concept's answers, by hand."""
    found = {}
    for name, answers in stored.answers.items():
        rows = []
        for example in (*answers.learned, *answers.stopping):
            means = []
            for prompt in (example.prefixed, example.plain):
                seen: list[torch.Tensor] = []
                handles = [
                    block.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out[0]))
                    for block in plain_model.model.layers
                ]
                with torch.inference_mode():
                    plain_model(torch.tensor([[*prompt.token_ids, *example.answer]]))
                for handle in handles:
                    handle.remove()
                means.append(torch.stack([h[len(prompt.token_ids) :].mean(0) for h in seen]))
            rows.append((means[0] - means[1]).numpy())
        found[name] = np.stack(rows)
    return found


def content(pack: SteeringPack) -> list[bytes]:
    return [(pack.path / file).read_bytes() for file in (MANIFEST_FILE, VECTORS_FILE)]


def cosines(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    return np.asarray((vectors * others).sum(axis=1) / lengths)


def test_answers_are_those_of_hugging_face(stored: Stored, plain_model, tokenizer) -> None:
    """Greedy, after the prefixed prompt, ended where the model ends them."""
    for concept in (*stored.answers.values(), stored.system):
        for example in (*concept.learned[:3], concept.stopping[-1]):
            assert example.answer == greedy(plain_model, example.prefixed.token_ids, LENGTH)
    examples = [e for a in stored.answers.values() for e in (*a.learned, *a.stopping)]
    assert len(examples) == 3 * 28
    assert all(tokenizer.eos_token_id not in example.answer[:-1] for example in examples)
    assert len({example.answer for example in examples}) > 20
    system = stored.system.learned[0]
    assert system.prefixed.text.startswith(f"<|start|>system<|sep|>\n{prefix(NAMES[0])}<|end|>")
    span = system.prefixed.token_ids[slice(*system.prefixed.prefix_span)]
    assert tokenizer.decode(span).strip() == prefix(NAMES[0])


def test_trained_directions(extract, stored: Stored, differences) -> None:
    """As long as they were trained; ε = 1 adds them so."""
    pack = extract(train_steps=8, train_rate=0.02)
    assert list(pack.directions) == list(NAMES)
    for name, record in pack.directions.items():
        answers = stored.answers[name]
        assert record.prefix.text == prefix(name)
        assert (record.prefix.role, record.op, record.positions) == ("user", "add", "all")
        assert (record.default_scale, record.safe_scale) == (1.0, None)
        # The middle blocks of six.
        assert (record.layers, record.default_layers) == ([1, 2, 3], None)
        assert record.metrics["stopping_gap_closed"] > 0.5
        assert record.metrics["steps"] in (4, 8)
        saved = [len(e.prefixed.token_ids) - len(e.plain.token_ids) for e in answers.learned]
        assert record.metrics["tokens_saved"] == int(np.median(saved)) > 4
        assert set(record.metrics) == {"stopping_gap_closed", "steps", "tokens_saved"}
        assert pack.vectors[name].shape == (3, 256)
        shares = np.linalg.norm(pack.vectors[name], axis=1)
        shares /= [pack.manifest.residual_norms[str(layer)] for layer in (1, 2, 3)]
        assert (shares > 0.01).all()
        assert (shares < 2).all()
        towards = cosines(pack.vectors[name], differences[name].mean(axis=0)[1:4])
        assert (towards > 0.1).all()
    settings = pack.manifest.method.settings
    chosen = {key: settings[key] for key in ("method", "learn_from", "estimator", "unit")}
    assert chosen == {
        "method": "trained",
        "learn_from": "answers",
        "estimator": "trained",
        "unit": False,
    }
    assert pack.manifest.method.name == "trained"
    assert set(pack.manifest.residual_norms) == set("012345")
    assert not (pack.path / FIGURES_FILE).exists()
    assert not (pack.path / PARTS_DIRECTORY).exists()


def test_training_starts_from_the_difference_of_means(extract, differences) -> None:
    """Of 24 answers at the most, and by the factor that is asked for."""
    warm = {"train_warm": 0.3, "train_rate": 1e-6, "train_steps": 1}
    pack = extract(**warm)
    for name, vectors in pack.vectors.items():
        expected = 0.3 * differences[name][:24].mean(axis=0)[1:4]
        np.testing.assert_allclose(vectors, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        ("mean_difference", {"labels": "hard"}),
        ("mean_difference", {"labels": "soft", "answer_tokens": "weighted"}),
        ("rfm", {"rfm_bandwidths": (10.0,)}),
        ("rfm", {"answer_tokens": "attention", "rfm_bandwidths": (10.0,)}),
        ("ridge", {"labels": "hard"}),
        ("logistic", {"labels": "hard"}),
        ("pca", {"labels": "hard"}),
        ("unit_mean_difference", {"labels": "hard", "held_out": False}),
    ],
    ids=str,
)
def test_every_estimator_learns_from_answers(extract, differences, estimator, settings) -> None:
    chosen = {"method": "attention_guided", "learn_from": "answers", "estimator": estimator}
    pack = extract(**chosen, **settings)
    reads = settings.get("labels") != "hard" or "answer_tokens" in settings
    for name, record in pack.directions.items():
        assert record.layers == [1, 2, 3, 4, 5]
        assert record.prefix.text == prefix(name)
        vectors = pack.vectors[name]
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        towards = cosines(vectors, differences[name].mean(axis=0)[1:])
        # One token of each answer says more of the token than their means do.
        assert (towards > 0.3).all() or settings.get("answer_tokens") == "attention"
        assert ("attention_mean" in record.metrics) is reads
        if reads:
            assert all(0 < value < 1 for value in record.metrics["attention_mean"])
        if settings.get("held_out", True):
            least = 0.0 if settings.get("answer_tokens") == "attention" else 0.5
            assert all(value > least for value in record.metrics["validation_r"])
        assert all(len(values) == 5 for values in record.metrics.values())
        # Nobody has measured the strength: half of the residual stream, over all layers. The norms are
        # those of the first concept's answers.
        norms = {int(layer): norm for layer, norm in pack.manifest.residual_norms.items()}
        lengths = dict.fromkeys(record.layers, 1.0)
        assert raw_dose(record.default_scale, lengths, norms) == pytest.approx(0.5, rel=0.1)
    if settings == {"labels": "hard"} and estimator == "mean_difference":
        for name, vectors in pack.vectors.items():
            expected = differences[name][: 28 - HELD].mean(axis=0)[1:]
            np.testing.assert_allclose(cosines(vectors, expected), 1, atol=1e-6)
    assert pack.manifest.method.settings["learn_from"] == "answers"
    assert not (pack.path / FIGURES_FILE).exists()


def test_soft_labels_are_the_attention_that_an_answer_pays(extract, monkeypatch) -> None:
    """To the prefix, 0 of the plain prompt; hard ones are 1 and 0."""
    seen: list[LabelledRows] = []

    def remember(estimator, rows, options):
        seen.append(rows)
        return fit_direction(estimator, rows, options)

    monkeypatch.setattr(vllm_steer.offline.extract.answer_learning, "fit_direction", remember)
    settings = {"method": "attention_guided", "learn_from": "answers", "layers": (2, 4)}
    pack = extract(**settings, estimator="mean_difference", concepts=CONCEPTS)
    for (name, record), *rows in zip(pack.directions.items(), seen[::2], seen[1::2], strict=True):
        for at, each in enumerate(rows):
            assert each.name == f"concept {name!r}, block {(2, 4)[at]}"
            assert each.positive.tolist() == [True, False] * 28
            assert not each.labels[1::2].any()
            assert (each.labels[::2] > 0).all()
            assert np.ptp(each.labels[::2]) > 0
            assert each.labels[::2].mean() == pytest.approx(record.metrics["attention_mean"][at])
            assert each.labels[::2].max() == pytest.approx(record.metrics["attention_max"][at])
    seen.clear()
    extract("hard", **settings, estimator="logistic", labels="hard")
    assert all(rows.labels.tolist() == [1.0, 0.0] * 28 for rows in seen)


def test_other_methods_learn_from_answers(extract, differences) -> None:
    """In their own form: of contrastive addition the length counts, of angular steering the plane."""
    caa = extract("caa", method="caa", learn_from="answers")
    for name, record in caa.directions.items():
        np.testing.assert_allclose(caa.vectors[name], differences[name].mean(axis=0)[1:], atol=1e-4)
        assert (record.default_scale, record.default_layers) == (1.0, [3])
    angular = extract("angular", method="angular", learn_from="answers")
    assert list(angular.directions) == [n for name in NAMES for n in (name, f"{name} plane")]
    for name in NAMES:
        assert angular.directions[name].default_scale == 60.0
        assert angular.directions[name].form.plane == f"{name} plane"
        assert np.ptp(angular.vectors[name], axis=0).max() == 0
        inner = (angular.vectors[name] * angular.vectors[f"{name} plane"]).sum(axis=1)
        np.testing.assert_allclose(inner, 0, atol=0.9)


def test_the_prefix_may_be_a_system_message(extract, stored: Stored) -> None:
    pack = extract(concepts=CONCEPTS[:1], prefix_role="system")
    (record,) = pack.directions.values()
    assert (record.prefix.text, record.prefix.role) == (prefix(NAMES[0]), "system")
    assert record.metrics["tokens_saved"] == stored.system.tokens_saved
    assert stored.system.tokens_saved != stored.answers[NAMES[0]].tokens_saved


@pytest.fixture
def learned(monkeypatch) -> Iterator[list[str]]:
    """Names of the concepts that are learned, as they are."""
    names: list[str] = []
    learn = AnswerLearner.learn

    def watched(self, given, parallel):
        names.extend(given)
        return learn(self, given, parallel)

    monkeypatch.setattr(AnswerLearner, "learn", watched)
    return names


@pytest.mark.parametrize(
    "settings",
    [
        {"train_together": 1},
        {
            "method": "attention_guided",
            "learn_from": "answers",
            "estimator": "pca",
            "labels": "hard",
        },
    ],
    ids=["trained", "pca"],
)
def test_an_extraction_that_was_killed_goes_on(extract, learned, monkeypatch, settings) -> None:
    whole = content(extract("whole", **settings))
    assert learned == list(NAMES)
    learned.clear()
    watched = AnswerLearner.learn

    def killed(self, names, parallel):
        if learned:
            raise KeyboardInterrupt
        return watched(self, names, parallel)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerLearner, "learn", killed)
        with pytest.raises(KeyboardInterrupt):
            extract("again", **settings)
    assert learned == [NAMES[0]]
    assert content(extract("again", **settings)) == whole
    assert learned == list(NAMES)


def test_concepts_whose_answers_changed_are_learned_anew(
    extract, learned, monkeypatch, tmp_path
) -> None:
    """Finished ones are known by their own answers; those of others are nothing to them."""

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vllm_steer.offline.extract.pipeline.write_pack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            extract("again")
    assert learned == list(NAMES)
    learned.clear()
    changed = 0
    for file in answers_directory(tmp_path / "again").iterdir():
        rows = json.loads(file.read_text())
        if len(rows) == 3 * 28 and isinstance(rows[0], list):
            # The last concept's last answer ends sooner.
            rows[-1][0].pop()
            file.write_text(json.dumps(rows))
            changed += 1
    assert changed == 1
    # All are kept, however telling they are.
    monkeypatch.setattr(TokenEngine, "score", lambda _, asked, name: [-1.0] * len(asked))
    extract("again")
    assert learned == [NAMES[-1]]


def test_concepts_in_company_fail_alone(extract, learned, monkeypatch) -> None:
    """The group is tried again one by one, and what failed is learned the next time."""
    whole = extract("whole")
    assert learned == list(NAMES)
    watched = AnswerLearner.learn

    def failing(self, names, parallel):
        if "cheerful" in names:
            raise ExtractionError(f"no luck with {len(names)}")
        return watched(self, names, parallel)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerLearner, "learn", failing)
        with pytest.raises(
            ExtractionError, match="1 of 3 concepts failed: no luck with 1; .* others"
        ):
            extract("part")
    left = [name for name in NAMES if name != "cheerful"]
    assert learned[3:] == left
    part = extract("part")
    assert learned[5:] == ["cheerful"]
    assert list(part.directions) == list(NAMES)
    for name in NAMES:
        np.testing.assert_allclose(part.vectors[name], whole.vectors[name], rtol=0.05, atol=0.02)


def test_other_questions_or_prefixes_are_answered_anew(extract, stored: Stored) -> None:
    for change in (
        {"concepts": [*CONCEPTS[:2], Concept("Tokyo", "Love Tokyo.")]},
        {"answer_length": LENGTH + 1},
        {"questions": 23},
        {"prefix_role": "system"},
    ):
        with pytest.raises(AssertionError, match="an engine was started"):
            extract(**change)


def test_faulty_arguments_are_refused_before_an_engine_starts(
    extract, stored: Stored, tmp_path
) -> None:
    with pytest.raises(ExtractionError, match=r"\['calm'\] have an empty prefix"):
        extract(concepts=[Concept("calm", " ")])
    with pytest.raises(ExtractionError, match="the model has 0 to 5"):
        extract(layers=(6,))
    with pytest.raises(ExtractionError, match="answer pairs are prompts to learn from"):
        extract_pack(
            demo_model_path(),
            ExtractionData([], pairs={"brave": [AnswerPair("what?", "yes", "no")]}),
            ExtractionSettings(method="caa", learn_from="answers"),
            PackTarget("pairs", tmp_path / "pairs"),
        )


def test_the_command_learns_whole_prompts_by_training(
    extract, stored: Stored, tmp_path, capsys
) -> None:
    """``--prompt`` takes files; nothing said of a method means training."""
    items = []
    for name, text in CONCEPTS:
        (tmp_path / f"{name}.txt").write_text(f"\n{text}\n\n")
        items.append(f"{name}={tmp_path / name}.txt")
    out = tmp_path / "prompts"
    shutil.copytree(stored.folder, answers_directory(out))
    command = [
        "extract", "--model", str(demo_model_path()), "--name", "prompts", "--out", str(out),
        "--prompt", *items, "--questions", str(stored.questions), "--engine", json.dumps(ENGINE),
        "--answer-length", str(LENGTH), "--train-steps", "2", "--dtype", "float32", "--no-calibrate",
    ]  # fmt: skip
    assert main(command) == 0
    assert "method     trained" in capsys.readouterr().out
    pack = load_pack(out)
    assert {name: record.prefix.text for name, record in pack.directions.items()} == dict(CONCEPTS)
    assert pack.manifest.method.settings["train_steps"] == 2
    assert (
        main(
            [*command, "--prefix-role", "system", "--estimator", "ridge", "--learn-from", "prompts"]
        )
        == 1
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vllm-steer: settings cannot be used: settings: ")
    assert error.endswith("prefix_role 'system' needs learn_from 'answers'")
