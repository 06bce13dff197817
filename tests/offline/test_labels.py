from __future__ import annotations

import numpy as np
import pytest

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.estimators.labels import (
    choose_tokens,
    fixed_tokens,
    hard_labels,
    interleave,
    min_max,
    soft_labels,
)


def test_token_follows_the_maximum_over_prompts_not_the_mean():
    # One block; token -2 has the larger mean, token -1 the largest single value.
    attention = np.array([[[0.1, 0.5, 0.0]], [[0.1, 0.5, 0.9]]], dtype=np.float32)
    assert attention.mean(axis=0).argmax() == 1
    assert choose_tokens(attention).tolist() == [-1]
    assert choose_tokens(attention, "mean").tolist() == [-2]


def test_earliest_token_wins_a_tie():
    attention = np.array([[[0.2, 0.7, 0.7]], [[0.7, 0.1, 0.0]]], dtype=np.float32)
    assert choose_tokens(attention).tolist() == [-3]


def test_tokens_are_in_range_and_ignore_the_order_of_prompts():
    rng = np.random.default_rng(0)
    attention = rng.random((50, 40, 5), dtype=np.float32)
    tokens = choose_tokens(attention)
    assert tokens.shape == (40,)
    assert set(tokens) <= {-5, -4, -3, -2, -1}
    assert len(set(tokens)) > 1
    assert choose_tokens(attention[rng.permutation(50)]).tolist() == tokens.tolist()


def test_fixed_tokens_must_be_candidates():
    assert fixed_tokens(-2, blocks=3, candidates=4).tolist() == [-2, -2, -2]
    for token in (-5, 0):
        with pytest.raises(ExtractionError, match="-4 to -1"):
            fixed_tokens(token, blocks=3, candidates=4)


def test_soft_labels_are_the_attention_of_each_blocks_token():
    attention = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    labels = soft_labels(attention, np.array([-1, -4]))
    assert labels.tolist() == [[3, 4], [11, 12], [19, 20]]


def test_min_max_spans_zero_to_one_and_survives_constants():
    scaled = min_max(np.array([0.0, 0.2, 0.05], dtype=np.float32))
    assert scaled.tolist() == pytest.approx([0, 1, 0.25])
    assert min_max(np.full(4, 0.3)).tolist() == [0, 0, 0, 0]
    hard = hard_labels(np.array([True, False, True]))
    assert hard.tolist() == min_max(hard).tolist() == [1, 0, 1]


def test_rows_alternate_beginning_with_a_positive():
    order, positive = interleave(3, 3)
    assert order.tolist() == [0, 3, 1, 4, 2, 5]
    assert positive.tolist() == [True, False] * 3


@pytest.mark.parametrize(("positives", "negatives"), [(200, 200), (40, 200), (200, 30)])
def test_both_ends_of_the_rows_hold_the_same_share_of_positives(positives, negatives):
    order, positive = interleave(positives, negatives)
    rows = positives + negatives
    assert sorted(order) == list(range(rows))
    cut = rows * 4 // 5
    assert positive[:cut].mean() == pytest.approx(positives / rows, abs=0.02)
    assert positive[cut:].mean() == pytest.approx(positives / rows, abs=0.02)
