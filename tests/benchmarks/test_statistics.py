"""Statistics mean what they say: under attention that knows no prefix, and over few concepts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks import statistics
from benchmarks.statistics import LEAST_COVERAGE, WINDOW, random_concept
from benchmarks.tables import results
from vllm_steer.offline.measures.intervals import CAVEAT

COUNT = 400


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("choice", [False, True])
def test_attention_that_knows_no_prefix_is_enriched_as_often_as_p_says(
    choice: bool, window: int | None
) -> None:
    """At a chosen token too, and where a window hides most of the prompt."""
    p_values = []
    for number in range(COUNT):
        rng = np.random.default_rng([1, number])
        found, tokens = random_concept(rng, choice=choice, window=window)
        p_values.append(found.at(tokens if choice else np.array([-1]))[0][0])
    for level in (0.05, 0.2, 0.5):
        low, high = binom.interval(0.998, COUNT, level)
        assert low <= (np.array(p_values) <= level).sum() <= high


def test_the_benchmark_reports_what_it_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "statistics.json"
    given = ["statistics", "--json", str(file), "--simulations", "30", "--repetitions", "100"]
    monkeypatch.setattr(sys, "argv", given)
    statistics.main()
    report = json.loads(file.read_text())
    assert 0 <= report["false_q_rate"] <= report["as_if_named"]["false_q_rate"] + 0.1
    assert isinstance(report["p_uniform"], bool)
    assert set(report["coverage"]["normal"]) == {"2", "3", "5", "10", "20"}
    shown = capsys.readouterr().out
    assert "| chosen token, window |" in shown
    assert "| grades about 0.8 |" in shown


def test_the_results_hold_what_is_promised() -> None:
    report = results("statistics")
    assert report["p_uniform"]
    assert report["simulations"] >= 1000
    assert report["false_q_rate"] <= 0.06
    assert min(report["coverage"]["normal"].values()) >= LEAST_COVERAGE
    if report["coverage_min"] < LEAST_COVERAGE:
        assert f"down to {report['coverage_min']:.2f}" in CAVEAT
