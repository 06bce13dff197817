"""What a calibration tries and what it makes of what it measured, without an engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.calibrate.grid import ANGLES, DOSES, FINER, TURNS, Subject, subjects
from vllm_steer.offline.calibrate.measures import Gap, Trial, fluency_of
from vllm_steer.offline.extract.answers import Example
from vllm_steer.offline.models.prompts import RenderedPrompt
from vllm_steer.packs.pack import DirectionRecord, FormChoice, PackContent, write_pack
from vllm_steer.testing.random_pack import random_identity, write_random_pack

BLOCKS = 12
LENGTHS = {layer: 0.5 + 0.25 * layer for layer in range(BLOCKS)}
NORMS = {layer: 10.0 * 1.3**layer for layer in range(BLOCKS)}


def subject(
    op: str = "add", layers: tuple[int, ...] = tuple(range(1, BLOCKS)), joint=False
) -> Subject:
    plane = {"plane": "p"} if op in ("angle", "rotate") else {}
    record = DirectionRecord(
        name="a",
        layers=list(layers),
        default_scale=1.0,
        positions="all",
        form=FormChoice(op=op, **plane) if op != "add" else None,
    )
    return Subject("x/a", record, LENGTHS, NORMS, joint)


def test_scales_are_doses_whatever_the_lengths_of_vectors_and_streams() -> None:
    """Vectors ten times as long want a tenth of the scale, a stream ten times as long ten times as much."""
    given = subject()
    for layers in (tuple(range(1, BLOCKS)), (3, 4, 5), (8,)):
        scales = given.scales(layers)
        assert scales == sorted(scales)
        for dose, scale in zip(DOSES, scales, strict=True):
            shares = [scale * LENGTHS[layer] / NORMS[layer] for layer in layers]
            assert sum(shares) == pytest.approx(dose, rel=5e-3)
            assert given.dose(scale, layers) == pytest.approx(sum(shares))
        longer = replace(given, lengths={k: 10 * v for k, v in LENGTHS.items()})
        np.testing.assert_allclose(longer.scales(layers), np.array(scales) / 10, rtol=1e-9)
        stream = replace(given, norms={k: 10 * v for k, v in NORMS.items()})
        np.testing.assert_allclose(stream.scales(layers), np.array(scales) * 10, rtol=1e-9)


def test_other_forms_have_scales_of_their_own() -> None:
    layers = (4, 6)
    assert subject("ablate").scales(layers) == [1.0]
    assert subject("angle").scales(layers) == list(ANGLES)
    assert subject("rotate").scales(layers) == list(TURNS)
    typical = (NORMS[4] + NORMS[6]) / 2
    expected = [dose * typical / 2 for dose in DOSES]
    np.testing.assert_allclose(subject("clamp").scales(layers), expected, rtol=5e-3)


def test_finer_scales_lie_around_the_best() -> None:
    tried = subject().scales((3,))
    for best in tried:
        finer = subject().finer(best, tried)
        assert best in finer
        assert finer == sorted(finer)
        np.testing.assert_allclose(finer, np.array(FINER) * best, rtol=5e-3)
    assert subject("ablate").finer(1.0, [1.0]) == [1.0]
    assert subject("angle").finer(60.0, list(ANGLES)) == [80.0, 70.0, 60.0, 50.0, 40.0]
    assert subject("angle").finer(80.0, list(ANGLES)) == [80.0, 70.0, 60.0]
    assert subject("rotate").finer(60.0, list(TURNS)) == [30.0, 45.0, 60.0]


def test_half_the_strength_of_an_angle_is_nearer_to_where_the_stream_stands() -> None:
    assert subject().half(3.0) == 1.5
    assert subject("rotate").half(30.0) == 15.0
    assert subject("angle").half(60.0) == 75.0


def test_windows_are_its_own_layers_the_middle_and_single_ones() -> None:
    own = tuple(range(1, BLOCKS))
    windows = subject().windows(BLOCKS)
    assert windows == [own, tuple(range(3, 9)), (3,), (5,), (7,), (8,), (10,), (11,)]
    # Of the layers that it has.
    assert subject(layers=(0, 1, 2, 4)).windows(BLOCKS) == [(0, 1, 2, 4), (4,), (2,)]
    assert subject(layers=(0, 1, 2, 10)).windows(BLOCKS)[1:] == [(2,), (10,)]
    # Few were chosen to act on them, and what was learned together acts together.
    assert subject(layers=(2, 5, 9)).windows(BLOCKS) == [(2, 5, 9)]
    assert subject(joint=True).windows(BLOCKS) == [own]


def test_subjects_are_the_directions_that_no_other_is_a_part_of(tmp_path) -> None:
    random = write_random_pack(
        tmp_path / "random", "p", random_identity(16, 4), {"a": [1, 2], "a plane": [1, 2], "b": [3]},
        seed=0, default_scale=1.0, safe_scale=1.0, residual_norm=8.0,
    )  # fmt: skip
    records = list(random.manifest.directions)
    records[0] = records[0].model_copy(update={"form": FormChoice(op="angle", plane="a plane")})
    method = random.manifest.method
    for estimator in ("trained", "rfm"):
        pack = write_pack(
            tmp_path / estimator, PackContent(name="p", model=random.manifest.model, directions=records,
            vectors={name: 3 * vector for name, vector in random.vectors.items()},
            method=method.model_copy(update={"settings": {"estimator": estimator}}),
            residual_norms=dict.fromkeys(range(4), 8.0)))  # fmt: skip
        found = subjects(pack)
        assert [(each.name, each.record.op) for each in found] == [("p/a", "angle"), ("p/b", "add")]
        assert {each.joint for each in found} == {estimator == "trained"}
        assert found[0].lengths == {1: pytest.approx(3.0), 2: pytest.approx(3.0)}
        assert found[1].norms[3] == 8.0


def test_positions_are_those_of_the_prompt_whatever_stands_after_it() -> None:
    expected = {
        "all": [[0, None]],
        "prompt": [[0, 9]],
        "generated": [[9, None]],
        "last_prompt": [[8, 9]],
    }
    for positions, ranges in expected.items():
        given = subject()
        record = given.record.model_copy(update={"positions": positions})
        trial = Trial(replace(given, record=record), 2.5, (3, 4))
        asked = {"name": "x/a", "scale": 2.5, "layers": [3, 4], "positions": ranges}
        assert trial.steering(9) == {"directions": [asked]}


def gap(plain: list[float], prefixed: list[float]) -> Gap:
    prompt = RenderedPrompt("", (1, 2), (0, 0))
    examples = tuple(Example(prompt, prompt, (number,), 0.0) for number in range(len(plain)))
    return Gap(examples, np.array(plain), np.array(prefixed))


def test_the_gap_closed_is_a_share_of_the_whole() -> None:
    """Not the mean of shares: an answer that hardly needs its prefix says little."""
    given = gap([-10.0, -2.0, -8.0], [-2.0, -1.9, -2.0])
    assert given.closed(given.plain) == 0.0
    assert given.closed(given.prefixed) == 1.0
    assert given.closed(np.array([-6.0, -2.0, -8.0])) == pytest.approx(4 / 14.1)
    assert given.closed(given.plain - 1) < 0
    # Where there is nothing to close, or less than nothing by rounding, nothing is closed, whatever became likelier.
    for prefixed in (-3.0, -3.001):
        nothing = gap([-3.0] * 3, [prefixed] * 3)
        assert nothing.closed(np.array([-1.0, -2.0, -2.0])) == 0.0
        assert nothing.interval(np.array([-1.0, -2.0, -2.0])) is None
    assert [e.answer for e in given.some(2).examples] == [(0,), (1,)]
    assert [e.answer for e in given.rest(2).examples] == [(2,)]
    assert given.rest(2).closed(np.array([-5.0])) == pytest.approx(0.5)


def test_the_interval_is_over_questions() -> None:
    rng = np.random.default_rng(0)
    plain = rng.uniform(-30, -20, 16)
    given = gap(plain.tolist(), (plain + 15).tolist())
    steered = plain + rng.uniform(0, 15, 16)
    low, high = given.interval(steered)
    assert low < given.closed(steered) < high
    # Fewer questions tell less, and three are needed to tell anything.
    few = given.some(5).interval(steered[:5])
    assert few[1] - few[0] > high - low
    assert given.some(2).interval(steered[:2]) is None
    # Where every question is closed alike, whatever each gap is, nothing says how others would be.
    uneven = gap(plain.tolist(), (plain + rng.uniform(1, 20, 16)).tolist())
    alike = uneven.plain + 0.3 * (uneven.prefixed - uneven.plain)
    assert uneven.interval(alike) is None


def test_fluency_is_repetition_and_the_geometric_mean_of_perplexities() -> None:
    found = fluency_of(["one two three", "no no no no"], [np.log(2.0), np.log(8.0)])
    assert found.repetition == pytest.approx((0 + 2 / 3) / 2)
    assert found.perplexity == pytest.approx(4.0)


def test_what_multiplies_an_activation_is_not_calibrated(tmp_path) -> None:
    pack = write_random_pack(
        tmp_path / "x", "x", random_identity(16, 4), {"a": [1], "b": [1]},
        seed=0, default_scale=2.0, safe_scale=4.0, residual_norm=10.0,
    )  # fmt: skip
    for activation in (None, "multiply"):
        form = FormChoice(op="feature", read="b", activation=activation)
        a, b = pack.manifest.directions
        content = PackContent(
            name="x",
            model=pack.manifest.model,
            directions=[a.model_copy(update={"form": form}), b],
            vectors=pack.vectors,
            method=pack.manifest.method,
            residual_norms=dict.fromkeys(range(4), 10.0),
        )
        found = write_pack(tmp_path / "x", content)
        if activation is None:
            (only,) = subjects(found)
            assert only.name == "x/a"
            # What is set is as long as an addition of it.
            assert only.scales((1,)) == [10.0 * dose for dose in DOSES]
        else:
            with pytest.raises(EvaluationError, match="'a' multiplies an activation"):
                subjects(found)
