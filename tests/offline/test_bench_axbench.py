"""AxBench: its files, its ratings, its choice of a factor, and what a judge may do to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.offline.bench_cases import FakeEngine, FakeRater
from tests.offline.test_llm_judge import Endpoint
from vllm_steer.errors import EvaluationError
from vllm_steer.offline.bench.axbench import (
    FACTORS,
    FIELDS,
    QUESTIONS,
    AxBenchResult,
    AxBenchSettings,
    run_axbench,
    table,
)
from vllm_steer.offline.bench.axbench_data import (
    Concept,
    matched,
    read_concepts,
    read_instructions,
    read_names,
    sampled_instructions,
)
from vllm_steer.offline.bench.capability import CapabilityTexts, Item
from vllm_steer.offline.bench.figures import harmonic
from vllm_steer.offline.bench.ratings import (
    EndpointRater,
    Rated,
    check_questions,
    filled,
    parse_rating,
)
from vllm_steer.offline.evaluate.endpoint import ChatEndpoint
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.random_pack import random_identity, write_random_pack

INSTRUCTIONS = [f"Say number {at}." for at in range(20)]
CONCEPTS = {"rain": Concept(0, "words about rain"), "snow": Concept(3, "words about snow")}


@pytest.fixture
def pack(tmp_path: Path) -> SteeringPack:
    return write_random_pack(
        tmp_path / "weather", "weather", random_identity(32, 3), {"rain": [1], "snow": [1, 2]}, seed=0, default_scale=4.0,
        safe_scale=8.0, residual_norm=10.0,
    )  # fmt: skip


def strength(directions: list[dict[str, Any]]) -> float:
    return float(directions[0]["scale"]) if directions else 0.0


def by_strength(prompt: str, directions: list[dict[str, Any]], seed: int | None) -> str:
    return f"said at {strength(directions):g} of {prompt.split('number ')[1].split('.')[0]}"


def rating(each: Rated) -> float | None:
    """The concept is full from ε = 4, the fluency is gone from ε = 8."""
    at = float(each.fields["sentence"].split()[2])
    return {
        "concept": 2.0 if at >= 4 else 1.0 if at else 0.0,
        "instruct": 2.0,
        "fluency": 0.0 if at >= 8 else 2.0,
    }[each.question]


SETTINGS = AxBenchSettings(factors=(0.5, 1.0, 1.5, 2.0), instructions=5, max_tokens=8)


def run(
    engine: FakeEngine,
    rate: Callable[[Rated], float | None] = rating,
    settings: AxBenchSettings = SETTINGS,
    texts: CapabilityTexts = CapabilityTexts(),  # noqa: B008
) -> AxBenchResult:
    (pack,) = engine.packs
    return run_axbench(engine, pack, CONCEPTS, INSTRUCTIONS, FakeRater(rate), settings, texts)  # type: ignore[arg-type]


def test_the_factor_is_chosen_on_one_half_and_reported_on_the_other(
    chatml: PreTrainedTokenizerFast, pack: SteeringPack
) -> None:
    def turned(each: Rated) -> float | None:
        """On the reported half everything is worse, and another factor is best."""
        own = sampled_instructions(INSTRUCTIONS, CONCEPTS["rain"], 5)
        if each.fields["concept"] == "words about rain" and each.fields["instruction"] in own[3:]:
            at = float(each.fields["sentence"].split()[2])
            return 2.0 if at == 2 else 1.0
        return rating(each)

    engine = FakeEngine(chatml, [pack], by_strength)
    found = run(engine, turned)
    rain, snow = found.concepts
    # 4 and 6 are equal, and the first of them is taken.
    assert (rain.factor, snow.factor) == (1.0, 1.0)
    best = rain.chosen()
    assert best is not None
    assert best.scale == 4.0
    assert best.choosing.score == pytest.approx(2.0)
    assert best.reported.score == pytest.approx(1.0)
    assert best.reported.rated == 2
    assert found.score.value == pytest.approx(1.5)
    assert snow.unsteered.score == 0.0
    assert [r.factor for r in rain.factors] == [0.5, 1.0, 1.5, 2.0]
    half = snow.factors[0].reported
    assert (half.concept, half.instruct, half.fluency) == (1.0, 2.0, 2.0)
    assert half.score == pytest.approx(3 / (1 + 0.5 + 0.5))
    assert snow.factors[3].reported.score == 0.0


def test_what_is_asked(chatml: PreTrainedTokenizerFast, pack: SteeringPack) -> None:
    """Each concept has its own instructions, the same at every factor, and one seed for each of them."""
    engine = FakeEngine(chatml, [pack], by_strength)
    run(engine)
    assert len(engine.asked) == 2 * 5 * 5
    first = engine.asked[:25]
    assert [one.seed for one in first] == [0, 1, 2, 3, 4] * 5
    assert [strength((one.steering or {}).get("directions", [])) for one in first[::5]] == [
        0.0,
        2.0,
        4.0,
        6.0,
        8.0,
    ]
    assert len({one.prompt for one in first}) == 5
    assert engine.asked[25].prompt != first[0].prompt
    assert engine.sampling[0] is not None
    greedy = FakeEngine(chatml, [pack], by_strength)
    run(greedy, settings=AxBenchSettings((1.0,), 2, 8, temperature=0.0))
    assert greedy.sampling == [None]
    assert {one.seed for one in greedy.asked} == {None}


def test_instructions_are_those_that_a_data_frame_samples() -> None:
    """Rows of ``pandas.DataFrame({'a': range(805)}).sample(10, random_state=id)``, from pandas 2."""
    rows = sampled_instructions([str(at) for at in range(805)], Concept(7, "x"), 10)
    # pandas.core.sample.sample draws so from a RandomState of the seed.
    expected = np.random.RandomState(7).choice(805, size=10, replace=False, p=None)
    assert rows == [str(at) for at in expected]
    with pytest.raises(EvaluationError, match="10 instructions are wanted"):
        sampled_instructions(["a"] * 9, Concept(7, "x"), 10)


def test_unrated_answers_enter_no_mean_and_are_counted(
    chatml: PreTrainedTokenizerFast, pack: SteeringPack
) -> None:
    def half(each: Rated) -> float | None:
        last = int(each.fields["sentence"].split()[-1])
        return None if each.question == "fluency" and last % 2 else rating(each)

    found = run(FakeEngine(chatml, [pack], by_strength), half)
    for concept in found.concepts:
        for each in concept.factors:
            total = each.choosing.rated + each.choosing.unrated
            assert (total, each.reported.rated + each.reported.unrated) == (3, 2)
    assert sum(r.choosing.unrated + r.reported.unrated for c in found.concepts for r in c.factors)
    assert found.errors == ["it mumbles"]


def test_a_concept_that_is_not_rated_is_named(
    chatml: PreTrainedTokenizerFast, pack: SteeringPack
) -> None:
    found = run(
        FakeEngine(chatml, [pack], by_strength),
        lambda each: None if "snow" in each.fields["concept"] else rating(each),
    )
    assert found.failed == ["words about snow"]
    assert found.score.value == pytest.approx(2.0)
    assert "| words about snow | weather/snow | – |" in table(found)
    with pytest.raises(EvaluationError, match="first error of the judge: it mumbles"):
        run(FakeEngine(chatml, [pack], by_strength), lambda each: None)


def test_empty_answers_are_nothing_to_rate(
    chatml: PreTrainedTokenizerFast, pack: SteeringPack
) -> None:
    rater = FakeRater(rating)
    found = run_axbench(
        FakeEngine(chatml, [pack], lambda *_: " "),  # type: ignore[arg-type]
        pack, CONCEPTS, INSTRUCTIONS, rater, SETTINGS, CapabilityTexts(),
    )  # fmt: skip
    assert rater.seen == []
    assert found.score.value == 0.0


def test_capability_at_every_factor(chatml: PreTrainedTokenizerFast, pack: SteeringPack) -> None:
    texts = CapabilityTexts(
        ("Rain falls.",), (Item(question="Two and", choices=["two", "a hundred"], answer=0),)
    )
    engine = FakeEngine(chatml, [pack], by_strength)
    found = run(engine, texts=texts)
    assert found.capability_unsteered is not None
    assert found.capability_unsteered.perplexity == pytest.approx(np.e)
    for concept in found.concepts:
        for each in concept.factors:
            assert each.capability is not None
            assert each.capability.perplexity == pytest.approx(np.e**2)
            assert each.capability.accuracy == 1.0
    shown = table(found)
    assert "| 0 | 0.000 | – | – | 2.72 | 1.000 |" in shown
    assert "| 0.5 | 1.500 | " in shown


def test_the_grid_and_the_halves_are_the_authors() -> None:
    assert FACTORS == (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0)
    assert [AxBenchSettings(instructions=n).choosing for n in (2, 3, 5, 10)] == [1, 1, 3, 5]


@pytest.mark.parametrize(
    "given",
    [
        {"factors": ()},
        {"factors": (0.0, 1.0)},
        {"factors": (1.0, 1.0)},
        {"instructions": 1},
        {"max_tokens": 0},
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError):
        AxBenchSettings(**given)


def test_harmonic_mean() -> None:
    assert harmonic([2.0, 2.0, 2.0]) == pytest.approx(2.0)
    assert harmonic([2.0, 0.0, 2.0]) == 0.0
    assert harmonic([1.0, 2.0, 2.0]) == pytest.approx(1.5)


EXPORT = [
    {"modelId": "m", "layer": "9-res", "index": "11", "description": "words about rain"},
    {"modelId": "m", "layer": "9-res", "index": 12, "description": "words about snow"},
]
METADATA = [
    {"concept_id": 5, "concept": "words about rain", "ref": "u", "concept_genres_map": {}},
    {"concept_id": 9, "concept": "words about snow", "ref": "u", "concept_genres_map": {}},
]


def test_concepts_of_both_formats(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(EXPORT))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, METADATA)))
    assert read_concepts(tmp_path / "list.json") == [
        Concept(0, "words about rain", "11"),
        Concept(1, "words about snow", "12"),
    ]
    assert read_concepts(tmp_path / "metadata.jsonl") == [
        Concept(5, "words about rain"),
        Concept(9, "words about snow"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[1]",
        '[{"description": "a"}]',
        '{"concept": "a"}',
        "rain",
        '{"concept_id": 1, "concept": " "}',
    ],
)
def test_malformed_concepts(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(EvaluationError, match="file"):
        read_concepts(tmp_path / "file")


def test_concepts_given_twice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("\n".join(map(json.dumps, METADATA[:1] * 2)))
    with pytest.raises(EvaluationError, match="concept_id 5 is given twice"):
        read_concepts(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "[]x", '["a"]', '[{"prompt": "a"}]', "{}"])
def test_malformed_instructions(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(EvaluationError, match="alpaca_eval.json"):
        read_instructions(tmp_path / "file")


def test_directions_of_concepts(pack: SteeringPack, tmp_path: Path) -> None:
    one, two = Concept(0, "rain", "x"), Concept(1, "words", "snow")
    assert matched([one, two], pack, {}) == {"rain": one, "snow": two}
    assert matched([one, two], pack, {"words": "rain", "0": "snow"}) == {"snow": one, "rain": two}
    for names, message in (
        ({"fog": "rain"}, "no concept of the file"),
        ({"rain": "fog"}, "has no direction 'fog'"),
        ({"words": "rain"}, "is that of two concepts"),
    ):
        with pytest.raises(EvaluationError, match=message):
            matched([one, two], pack, names)
    with pytest.raises(EvaluationError, match="--names"):
        matched([Concept(0, "fog")], pack, {})
    (tmp_path / "names").write_text('{"rain": 1}')
    with pytest.raises(EvaluationError, match="JSON object of concept to direction"):
        read_names(tmp_path / "names")


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Fine.\nRating: [[2]]", 2.0),
        ("Rating: [[0]] no, Rating: [[1]]", 1.0),
        ("**Rating: [[1.5]]**.", 1.5),
        ("Rating: 0", 0.0),
        ("Rating: [[3]]", None),
        ("Rating: [[-1]]", None),
        ("Rating: [[two]]", None),
        ("Rating:", None),
        ("2", None),
        ("", None),
    ],
)
def test_replies(reply: str, value: float | None) -> None:
    found = parse_rating(reply)
    assert found.value == value
    assert bool(found.error) == (value is None)


class RatingEndpoint(Endpoint):
    """Rates by what is asked about: the text, never what stands in it."""

    def reply(self, body: dict[str, Any]) -> tuple[int, str]:
        text = body["messages"][-1]["content"]
        self.seen.append(body)
        if "<text>" not in text:
            return 200, "Yes"
        if "mumble" in text:
            return 200, "It is hard to say."
        if "refuse" in text:
            return 400, ""
        return 200, "Because.\nRating: [[2]]" if "<concept>" in text else "Rating: [[1]]"


def test_ratings_over_http() -> None:
    with RatingEndpoint() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        rater = EndpointRater(ChatEndpoint(server.url, "m", retries=0), QUESTIONS)
        fields = {"concept": "rain", "instruction": "Say.", "sentence": "Rating: [[0]] {concept}"}
        rated = [Rated(name, fields) for name in FIELDS]
        rated += [Rated("fluency", {**fields, "sentence": each}) for each in ("mumble", "refuse")]
        found = rater.rate(rated)
        server.shutdown()
        thread.join()
    assert [each.value for each in found] == [2.0, 1.0, 1.0, None, None]
    assert "no line Rating" in found[3].error
    assert found[4].error.startswith("BadRequestError")
    assert rater.name.startswith("m, questions ")
    sent = [body["messages"][-1]["content"] for body in server.seen]
    assert any("<text>\nRating: [[0]] {concept}\n</text>" in text for text in sent)


def test_questions_of_a_file() -> None:
    assert check_questions(dict(QUESTIONS), FIELDS) == QUESTIONS
    for given in (
        [],
        {"concept": "{concept} {sentence}"},
        {**QUESTIONS, "instruct": "{sentence}"},
        {**QUESTIONS, "fluency": 2},
    ):
        with pytest.raises(EvaluationError, match="questions of the judge"):
            check_questions(given, FIELDS)
    assert filled("{a} {b} {c}", {"a": "{b}", "b": "2"}) == "{b} 2 {c}"
