"""CLaS-Bench: its files, what it steers by, its scores; and capability beside steering."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.offline.bench_cases import FakeEngine, FakeRater
from vllm_steer.errors import EvaluationError
from vllm_steer.offline.bench.capability import (
    CapabilityTexts,
    Item,
    capability,
    read_capability,
)
from vllm_steer.offline.bench.clas import ClasResult, ClasSettings, run_clas, table
from vllm_steer.offline.bench.clas_data import read_questions
from vllm_steer.offline.bench.languages import Langid, ScriptIdentifier
from vllm_steer.offline.bench.ratings import Rated
from vllm_steer.offline.bench.steers import Part, Steer
from vllm_steer.offline.evaluate.script import Script
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.random_pack import random_identity, write_random_pack

QUESTIONS = {"en": ["one", "two", "three", "four"], "de": ["eins", "zwei", "drei", "vier"]}
SETTINGS = ClasSettings(strengths=(2.0, 6.0), layers=(1,), max_tokens=8)


@pytest.fixture
def pack(tmp_path: Path) -> SteeringPack:
    return write_random_pack(
        tmp_path / "languages", "languages", random_identity(32, 3), {"en": [0, 1], "de": [1, 2]}, seed=0, default_scale=4.0,
        safe_scale=8.0, residual_norm=10.0,
    )  # fmt: skip


class FirstWord:
    """Tells languages by an answer's first word."""

    name = "first word"

    def languages(self, texts: list[str]) -> list[str | None]:
        return [text.split()[0] if text.split() else None for text in texts]


def speak(prompt: str, directions: list[dict[str, Any]], seed: int | None) -> str:
    """In the language of the positive direction where it is long enough, else in the question's."""
    own = "en" if any(q in prompt for q in QUESTIONS["en"]) else "de"
    strong = [d for d in directions if d["scale"] > 0]
    target = strong[0]["name"].split("/")[1] if strong else own
    forced = strong and sum(abs(d["scale"]) for d in directions) > FORCED
    return f"{target if forced else own} says {prompt.count('o')} things"


FORCED = 0.0


def run(
    engine: FakeEngine, rate: Any = lambda each: 1.0, settings: ClasSettings = SETTINGS
) -> ClasResult:
    (pack,) = engine.packs
    return run_clas(
        engine,
        pack,
        QUESTIONS,
        FakeRater(rate),
        FirstWord(),
        settings,
        CapabilityTexts(),  # type: ignore[arg-type]
    )


def test_steers_by_the_difference_at_length_one(
    chatml: PreTrainedTokenizerFast, pack: SteeringPack
) -> None:
    engine = FakeEngine(chatml, [pack], speak)
    run(engine)
    steered = [one.steering["directions"] for one in engine.asked if one.steering]
    assert len(steered) == 2 * 2 * 4
    de, en = pack.vectors["de"][0], pack.vectors["en"][1]
    for directions in steered:
        added = np.zeros(32)
        for each in directions:
            assert each["layers"] == [1]
            added += each["scale"] * {"languages/de": de, "languages/en": en}[each["name"]]
        towards = de - en if directions[0]["name"].endswith("de") else en - de
        length = np.linalg.norm(added)
        assert length == pytest.approx(2.0, rel=1e-5) or length == pytest.approx(6.0, rel=1e-5)
        np.testing.assert_allclose(added / length, towards / np.linalg.norm(towards), atol=1e-5)


def test_scores(
    chatml: PreTrainedTokenizerFast, pack: SteeringPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two strengths answers begin to be forced; German is judged half as relevant as English."""
    length = float(np.linalg.norm(pack.vectors["de"][0] - pack.vectors["en"][1]))
    monkeypatch.setitem(globals(), "FORCED", 2 * 4.0 / length)

    def rate(each: Rated) -> float | None:
        return 2.0 if each.fields["response"].startswith("en") else 1.0

    found = run(FakeEngine(chatml, [pack], speak), rate)
    assert found.chosen.strength == 6.0
    best = found.chosen.reported
    assert best.answers == 8
    assert (best.forcing, best.relevance) == (1.0, 0.75)
    assert best.score == pytest.approx(2 * 0.75 / 1.75)
    assert found.chosen.targets["de"].relevance == 0.5
    assert found.chosen.targets["de"].score == pytest.approx(2 / 3)
    assert found.chosen.sources["de"].relevance == 0.75
    # Without force, half of the pairs are those of a language with itself.
    assert found.strengths[0].reported.forcing == found.unsteered.forcing == 0.5
    assert found.strengths[0].choosing.answers == 8
    assert "| 1 | 6 | 1.000 | 0.750 | 0.857 | 0 | – | – |" in table(found)


def test_what_a_judge_may_do(chatml: PreTrainedTokenizerFast, pack: SteeringPack) -> None:
    with pytest.raises(
        EvaluationError, match="no answer was rated; the first error of the judge: it mumbles"
    ):
        run(FakeEngine(chatml, [pack], speak), lambda each: None)
    rater = FakeRater(lambda each: 2.0)
    found = run_clas(
        FakeEngine(chatml, [pack], lambda *_: ""),
        pack,
        QUESTIONS,
        rater,
        FirstWord(),
        SETTINGS,
        CapabilityTexts(),  # type: ignore[arg-type]
    )
    assert rater.seen == []
    assert found.chosen.reported.score == 0.0


def test_the_targets_direction_alone(chatml: PreTrainedTokenizerFast, pack: SteeringPack) -> None:
    engine = FakeEngine(chatml, [pack], speak)
    run(engine, settings=ClasSettings((1.5,), towards="target"))
    steered = [one.steering["directions"] for one in engine.asked if one.steering]
    assert {(len(d), d[0]["scale"]) for d in steered} == {(1, 6.0)}
    assert {(d[0]["name"], tuple(d[0]["layers"])) for d in steered} == {
        ("languages/de", (1, 2)),
        ("languages/en", (0, 1)),
    }


@pytest.mark.parametrize(
    ("layers", "message"),
    [((0,), "'de' has no vector at layer 0"), ((2,), "'en' has no vector at layer 2")],
)
def test_layers_that_a_direction_does_not_have(
    chatml: PreTrainedTokenizerFast, pack: SteeringPack, layers: tuple[int, ...], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        run(FakeEngine(chatml, [pack], speak), settings=ClasSettings((1.0,), layers))


def test_languages_without_directions(chatml: PreTrainedTokenizerFast, pack: SteeringPack) -> None:
    with pytest.raises(EvaluationError, match="has no direction 'fr'"):
        run_clas(
            FakeEngine(chatml, [pack], speak), pack, {"fr": ["un", "deux"]}, FakeRater(lambda e: 1.0), FirstWord(), SETTINGS,  # type: ignore[arg-type]
            CapabilityTexts(),
        )  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {"strengths": ()},
        {"strengths": (0.0,), "layers": (1,)},
        {"strengths": (1.0,)},
        {"strengths": (1.0,), "layers": (1,), "max_tokens": 0},
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError):
        ClasSettings(**given)


def test_questions_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("one\n\ntwo\nthree\n")
    (tmp_path / "de.txt").write_text("eins\nzwei\ndrei\n")
    (tmp_path / "README.txt").write_text("not a language")
    assert read_questions(tmp_path, None, 2) == {"de": ["eins", "zwei"], "en": ["one", "two"]}
    assert list(read_questions(tmp_path, ["en"], None)) == ["en"]
    with pytest.raises(EvaluationError, match="has no questions in 'fr'"):
        read_questions(tmp_path, ["en", "fr"], None)
    (tmp_path / "de.txt").write_text("eins\nzwei\n")
    with pytest.raises(EvaluationError, match="the same questions"):
        read_questions(tmp_path, None, None)
    with pytest.raises(EvaluationError, match="the same questions"):
        read_questions(tmp_path, None, 1)
    with pytest.raises(EvaluationError, match="is no directory"):
        read_questions(tmp_path / "en.txt", None, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"no file LANGUAGE.txt"):
        read_questions(tmp_path / "empty", None, None)


def test_languages_are_told() -> None:
    texts = {
        "en": "The weather was fine this morning, and we went for a walk along the river.",
        "de": "Das Wetter war heute Morgen schön, und wir gingen am Fluss spazieren.",
        "fr": "Il faisait beau ce matin, et nous nous sommes promenés le long de la rivière.",
        "ru": "Сегодня утром была хорошая погода, и мы гуляли вдоль реки.",
        "no": "Været var fint i morges, og vi gikk en tur langs elva.",
        "bo": "བཀྲ་ཤིས་བདེ་ལེགས། ཁྱེད་རང་སྐུ་གཟུགས་བདེ་པོ་ཡིན་པས།",
    }
    assert Langid().languages([*texts.values(), "", "12 …"]) == [*texts, None, None]


def test_languages_by_a_script(tmp_path: Path) -> None:
    file = tmp_path / "tell.py"
    file.write_text("def grade(case):\n    return case['answer'][:2] or None\n")
    told = ScriptIdentifier(Script.parse(str(file)))
    assert told.languages(["de ja", ""]) == ["de", None]
    for code, message in (
        ("return 7", "no code of a language"),
        ("raise KeyError('x')", "KeyError"),
    ):
        file.write_text(f"def grade(case):\n    {code}\n")
        with pytest.raises(EvaluationError, match=message):
            told.languages(["a"])


def test_capability_is_steered_as_an_answer_would_be(
    chatml: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """At the pack's positions, said as positions of what the engine sees as a prompt."""
    pack = write_random_pack(
        tmp_path / "late", "late", random_identity(32, 3), {"rain": [1]}, seed=0, default_scale=4.0,
        safe_scale=8.0, residual_norm=10.0,
    )  # fmt: skip
    record = pack.directions["rain"].model_copy(update={"positions": "generated"})
    engine = FakeEngine(chatml, [pack], speak)
    texts = CapabilityTexts(
        ("Rain is good.",), (Item(question="Rain is", choices=["good", "a thing"], answer=1),)
    )
    plain, steered = capability(engine, texts, [Steer(), Steer((Part("late/rain", record, 2.0),))])  # type: ignore[arg-type]
    assert plain.accuracy == steered.accuracy == 0.0
    assert plain.perplexity == pytest.approx(np.e)
    assert steered.perplexity == pytest.approx(np.e**2)
    for one in engine.scored[3:]:
        assert one.steering is not None
        (direction,) = one.steering["directions"]
        assert direction["positions"] == [[len(one.prompt), None]]
    question = tuple(chatml("Rain is")["input_ids"])
    assert engine.scored[1].prompt == question
    whole = tuple(chatml("Rain is good")["input_ids"])
    assert engine.scored[1].prompt + engine.scored[1].answer == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "choices": ["b"], "answer": 0}', "choices"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "choices 0 to 1"),
        ('{"question": "a", "choices": ["b", "b"], "answer": 0}', "distinct"),
        ('{"question": "a", "choices": ["b", "c"]}', "answer"),
        ("what?", "text line 1"),
        ("", "is empty"),
    ],
)
def test_malformed_multiple_choice(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "file").write_text(line)
    with pytest.raises(EvaluationError, match=message):
        read_capability(None, tmp_path / "file")


def test_capability_files(tmp_path: Path) -> None:
    (tmp_path / "neutral").write_text("One.\n\nTwo.\n")
    item = {"question": "a", "choices": ["b", "c"], "answer": 1}
    (tmp_path / "items").write_text(json.dumps(item))
    found = read_capability(tmp_path / "neutral", tmp_path / "items")
    assert found == CapabilityTexts(("One.", "Two."), (Item(**item),))
    assert not read_capability(None, None)
    (tmp_path / "neutral").write_text("\n")
    with pytest.raises(EvaluationError, match="is empty"):
        read_capability(tmp_path / "neutral", None)
