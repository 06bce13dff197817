"""Pictures show the figures that they are given."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from tests.offline.results_cases import class_result, given
from vllm_steer.offline.evaluate.plots import (
    Bar,
    BlockDiagnostics,
    attention_heat_map,
    concept_cosines,
    enrichment_bars,
    mean_cosines,
    method_bars,
    scale_curves,
)

ATTENTION = np.array([[0.1, 0.2, 0.3], [0.1, 0.9, 0.2], [0.3, 0.1, 0.0], [0.0, 0.1, 0.4]])
FOUND = BlockDiagnostics(
    ATTENTION,
    ATTENTION.argmax(axis=1) - 3,
    ["<|end|>", "\n", "$a$"],
    np.array([0.0, 0.9, 0.2, 0.5]),
)


def pixels(png: bytes) -> np.ndarray:
    image = imread(io.BytesIO(png))
    assert min(image.shape[:2]) > 100
    return image


def same(one: bytes, other: bytes) -> bool:
    a, b = pixels(one), pixels(other)
    return a.shape == b.shape and bool((a == b).all())


def test_the_heat_map_shows_attention_and_choice() -> None:
    drawn = attention_heat_map(FOUND, "fears")
    assert drawn == attention_heat_map(FOUND, "fears")
    more = ATTENTION.copy()
    more[2, 2] = 0.2
    assert not same(drawn, attention_heat_map(replace(FOUND, attention=more), "fears"))
    other = FOUND.chosen.copy()
    other[0] = -3
    assert not same(drawn, attention_heat_map(replace(FOUND, chosen=other), "fears"))


def test_the_heat_map_takes_eighty_layers() -> None:
    many = np.tile(ATTENTION, (20, 1))
    tall = attention_heat_map(BlockDiagnostics(many, many.argmax(1) - 3), "70B")
    assert len(pixels(tall)) > 1.5 * len(pixels(attention_heat_map(FOUND, "fears")))


def test_concepts_are_averaged_at_the_tokens_that_they_choose() -> None:
    attention = np.array([[[0.1, 0.3]], [[0.5, 0.2]], [[0.0, 0.4]]])
    enrichment = np.array([[[0.0, 0.9]], [[0.3, 1.0]], [[0.0, 0.6]]])
    found = BlockDiagnostics.of_concepts(attention, enrichment)
    np.testing.assert_allclose(found.attention, [[0.2, 0.3]])
    assert found.chosen.tolist() == [-1]
    assert found.enrichment is not None
    np.testing.assert_allclose(found.enrichment, [0.6])


def test_bars_show_enrichment_and_selection() -> None:
    drawn = enrichment_bars(FOUND, "fears")
    assert not same(drawn, enrichment_bars(replace(FOUND, selected=[1]), "fears"))
    assert not same(drawn, enrichment_bars(replace(FOUND, enrichment=ATTENTION[:, 0]), "fears"))
    with pytest.raises(ValueError, match="no enrichment"):
        enrichment_bars(replace(FOUND, enrichment=None), "fears")


def test_curves_have_a_panel_per_class() -> None:
    one = scale_curves([class_result("fears")], "title")
    two = scale_curves([class_result("fears"), class_result("moods")], "title")
    assert pixels(two).shape[1] > 1.5 * pixels(one).shape[1]
    assert not same(one, scale_curves([class_result("fears", steerability=0.2)], "title"))
    found = class_result("fears")
    assert not same(one, scale_curves([found.model_copy(update={"prefixed": None})], "title"))
    point = found.heldout[1]
    other = point.model_copy(update={"figures": given(0.75, gap=0.1)})
    changed = [found.heldout[0], other, found.heldout[2]]
    assert not same(one, scale_curves([found.model_copy(update={"heldout": changed})], "title"))


def test_cosines_are_averaged_over_layers() -> None:
    x, y = np.eye(2)
    vectors = {"a": np.stack([x, x]), "b": 3 * np.stack([x, y]), "c": -np.stack([x, x])}
    expected = [[1.0, 0.5, -1.0], [0.5, 1.0, -0.5], [-1.0, -0.5, 1.0]]
    np.testing.assert_allclose(mean_cosines(vectors), expected)
    many = {str(i): np.random.default_rng(i).standard_normal((2, 8)) for i in range(60)}
    assert not same(
        concept_cosines(vectors, "t"), concept_cosines({**vectors, "c": vectors["a"]}, "t")
    )
    pixels(concept_cosines(many, "t"))


def test_bars_of_methods() -> None:
    bars = [Bar("attention", 0.9, 0.8, 1.0, 0.7, True), Bar("token -1", 0.4, 0.3, 0.5, 0.1, False)]
    drawn = method_bars(bars, "t")
    assert not same(drawn, method_bars([bars[0], replace(bars[1], over_scales=0.3)], "t"))
    assert not same(drawn, method_bars([bars[0], replace(bars[1], high=0.6)], "t"))
