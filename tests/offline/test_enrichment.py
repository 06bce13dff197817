from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.extract.capture import (
    PATHS,
    REFERENCE,
    CaptureOptions,
    CapturePath,
    capture,
)
from vllm_steer.offline.extract.enrichment import (
    Enrichment,
    PermutationTest,
    TokenChoice,
    random_subsets,
)
from vllm_steer.offline.models.batches import Batch
from vllm_steer.offline.models.prompts import RenderedPrompt

COUNT = 999
LENGTH, START, END = 40, 5, 13


def run(weights: torch.Tensor) -> Enrichment:
    """The test on rows of the last tokens, ``[prompts, heads, candidates, LENGTH]``, as one block."""
    prompts, _, candidates, _ = weights.shape
    batch = Batch(
        indices=tuple(range(prompts)),
        token_ids=torch.zeros(prompts, LENGTH, dtype=torch.int64),
        shared=0,
        real=torch.ones(prompts, LENGTH, dtype=torch.bool),
        spans=torch.tensor([[START, END]] * prompts),
        ends=torch.full((prompts,), LENGTH),
        candidates=torch.arange(LENGTH - candidates, LENGTH).expand(prompts, -1),
    )
    test = PermutationTest(COUNT, seed=0, longest=LENGTH)
    observed = weights[..., START:END].sum(dim=-1)
    test.begin(batch)
    test.see(0, weights, observed)
    return test.result()


def random_rows(prompts: int, heads: int) -> torch.Tensor:
    rows = torch.rand(prompts, heads, 1, LENGTH, generator=torch.Generator().manual_seed(1))
    return rows / rows.sum(dim=-1, keepdim=True)


def test_rows_that_ignore_the_prefix_are_hit_as_often_as_the_level_says():
    score = run(random_rows(200, 32)).score
    assert score.shape == (1, 1)
    assert score[0, 0] == pytest.approx(0.01, abs=0.005)


def test_rows_of_equal_weights_are_no_hit():
    found = run(torch.full((3, 2, 2, LENGTH), 1 / LENGTH))
    assert (found.score == 0).all()
    assert (found.p_values == 1).all()


def test_rows_on_the_prefix_alone_are_all_hits():
    rows = torch.zeros(4, 3, 2, LENGTH)
    rows[..., START:END] = 1 / (END - START)
    found = run(rows)
    assert (found.score == 1).all()
    assert (found.p_values == 1 / (COUNT + 1)).all()
    assert (found.enriched_heads == 1).all()
    assert found.head_p_values.shape == (1, 2, 3)


def test_the_first_token_does_not_matter():
    rows = random_rows(20, 8)
    rows[..., START:END] *= 2
    sunk = rows.clone()
    sunk[..., 0] *= 100
    one, other = run(rows), run(sunk)
    assert 0.05 < one.score[0, 0] < 1
    np.testing.assert_array_equal(one.score, other.score)
    np.testing.assert_array_equal(one.head_p_values, other.head_p_values)


def test_p_values_are_those_of_scipy():
    rows = random_rows(1, 1).double()
    row = rows[0, 0, 0, 1:].numpy()
    inside = np.zeros(LENGTH - 1, dtype=bool)
    inside[START - 1 : END - 1] = True
    theirs = permutation_test(
        (row[inside], row[~inside]),
        lambda a, b: a.sum(),
        n_resamples=20_000,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    ours = run(rows.float()).p_values[0, 0]
    assert 0.01 < theirs.pvalue < 0.5
    assert ours == pytest.approx(theirs.pvalue, abs=0.04)


def test_subsets_hold_as_many_keys_as_the_prefix_and_never_the_first_or_an_unseen_one():
    for first in (1, 8):
        subsets = random_subsets(500, 6, first, 20, 30, np.random.default_rng(0))
        assert (subsets.sum(axis=1) == 6).all()
        assert (subsets[:, :first] == 0).all()
        assert (subsets[:, 21:] == 0).all()
        seen = subsets[:, first:21]
        np.testing.assert_allclose(seen.mean(axis=0), 6 / seen.shape[1], atol=0.08)
    assert not random_subsets(5, 0, 1, 20, 30, np.random.default_rng(0)).any()


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("model", ["tiny_llama", "windowed_model"])
def test_figures_of_a_model_do_not_depend_on_batches_or_path(request, model, path):
    model = request.getfixturevalue(model)
    rng = np.random.default_rng(0)
    beginning = tuple(rng.integers(3, 500, 12).tolist())
    prompts = [
        RenderedPrompt("", beginning + tuple(rng.integers(3, 500, length).tolist()), (3, 9))
        for length in (6, 11, 8, 8, 14)
    ]

    def enrichment(batch_size: int, path: CapturePath = REFERENCE) -> Enrichment:
        chosen_on = np.array([True, False, True, True, False])
        test = PermutationTest(199, 3, 26, TokenChoice(chosen_on, "max"))
        captured = capture(
            model, prompts, candidates=4, batch_size=batch_size, options=CaptureOptions(path, test)
        )
        assert captured.enrichment is not None
        return captured.enrichment

    expected, found = enrichment(1), enrichment(3, path)
    assert found.score.shape == found.p_values.shape == (3, 4)
    assert len(np.unique(expected.score)) > 1
    # A sum at the edge may fall to either side by rounding.
    np.testing.assert_allclose(found.score, expected.score, atol=0.051)
    np.testing.assert_allclose(found.p_values, expected.p_values, atol=0.006)
    assert found.chosen_p_values is not None
    np.testing.assert_allclose(found.chosen_p_values, expected.chosen_p_values, atol=0.006)
    assert (found.q_values >= found.p_values - 1e-12).all()


def test_a_prefix_at_the_first_token_cannot_be_tested(tiny_llama):
    for span in ((0, 3), (0, 0)):
        prompt = RenderedPrompt("", tuple(range(3, 20)), span)
        with pytest.raises(ExtractionError, match="set permutations to 0"):
            capture(tiny_llama, [prompt], candidates=2, batch_size=1,
                    options=CaptureOptions(permutations=PermutationTest(9, 0, 17)))  # fmt: skip
