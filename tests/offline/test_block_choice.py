"""Which blocks are learned, and that nothing is left out or taken by chance without a word."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.extract.block_choice import choose_blocks, seeing_blocks


def test_blocks_are_chosen_by_their_score(caplog):
    score = np.array([0.9, 0.2, 0.7, 0.2, 0.1])
    layers = [1, 2, 3, 4]
    assert choose_blocks(score, layers, "all", None, None) == layers
    # Block 0 is not among the layers, so that k blocks are k blocks.
    assert choose_blocks(score, layers, "top_k", 2, None) == [1, 2]
    assert choose_blocks(score, layers, "bottom_k", 2, None) == [1, 4]
    assert choose_blocks(score, layers, "threshold", None, 0.2) == [1, 2, 3]
    # A block without a score is not chosen, however many are asked for.
    assert choose_blocks(np.array([0.0, 0.0, 0.3, 0.0]), [1, 2, 3], "top_k", 2, None) == [2]
    with pytest.raises(ExtractionError, match="nothing to choose by"):
        choose_blocks(np.zeros(4), [1, 2, 3], "top_k", 2, None)
    with pytest.raises(ExtractionError, match="the largest enrichment score is 0.7000"):
        choose_blocks(score, layers, "threshold", None, 0.8)


@pytest.mark.parametrize(
    ("choice", "score", "tied"),
    [
        # Most blocks of a real model have no score: nothing tells which are the lowest.
        ("bottom_k", [0.0, 0.0, 0.5, 0.0, 0.0], [1, 3, 4]),
        ("top_k", [0.0, 1.0, 1.0, 0.2, 1.0], [1, 2, 4]),
    ],
)
def test_a_choice_among_equal_blocks_is_told(caplog, choice, score, tied):
    chosen = choose_blocks(np.array(score), [1, 2, 3, 4], choice, 2, None)
    assert chosen == tied[:2]
    (message,) = caplog.messages
    assert "block_count 2 cuts through blocks of the same enrichment score" in message
    assert f"of {tied} the lower ones" in message
    caplog.clear()
    assert choose_blocks(np.array(score), [1, 2, 3, 4], choice, 3, None) == tied
    assert caplog.messages == []


def test_blocks_that_do_not_see_the_prefix_are_left_out_and_named(caplog):
    attention = np.array([[0.1, 0.0, 0.2, 0.0], [0.3, 0.0, 0.0, 0.0]], dtype=np.float32)
    assert seeing_blocks(attention, [0, 2], "spiders") == [0, 2]
    assert caplog.messages == []
    assert seeing_blocks(attention, [1, 2, 3], "spiders") == [2]
    (message,) = caplog.messages
    assert "concept 'spiders': blocks [1, 3] are left out" in message
    assert "sliding window" in message
    with pytest.raises(
        ExtractionError, match=r"no block of \[1, 3\] pays the prefix any attention"
    ):
        seeing_blocks(attention, [1, 3], "spiders")
