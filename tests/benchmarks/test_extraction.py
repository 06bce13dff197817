"""The benchmark of extraction, made small: what it prints is what it claims to measure."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import extraction


@pytest.mark.slow
def test_both_arms_find_the_same_vectors_and_memory_does_not_grow(tmp_path, monkeypatch, capsys):
    report_file = tmp_path / "report.json"
    small = ["--hidden", "512", "--layers", "3", "--statements", "40", "--concepts", "2"]
    monkeypatch.setattr(sys, "argv", ["extraction", "--json", str(report_file), *small])
    extraction.main()
    report = json.loads(report_file.read_text())
    assert {"speedup", "min_cosine", "peak_memory_by_layers"} <= set(report)
    assert report["min_cosine"] > 0.999
    assert all(model["same_tokens"] for model in report["models"])
    assert report["speedup"] > 2
    peaks = report["peak_memory"]
    assert peaks["pipeline"]["32"] < 1.6 * peaks["pipeline"]["4"]
    # A pass that keeps every block's attention is told apart.
    assert peaks["straightforward"]["32"] > 3 * peaks["straightforward"]["4"]
    assert "random, 512 x 3" in capsys.readouterr().out
