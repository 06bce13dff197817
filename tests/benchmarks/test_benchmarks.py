"""The benchmarks run to their end at the smallest sizes, and write what their readers rely on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.equality import compare_greedy
from benchmarks.interventions import Asked, matrix, measure_norms, rate, unrelated
from benchmarks.models import SHAPES, prepare_model
from benchmarks.probes import LEARNED, chosen_questions
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import class_of, concept_words, prefix
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.pipeline import ExtractionSettings, extract_pack
from vllm_steer.offline.models.prompts import Concept
from vllm_steer.offline.questions.everyday import everyday_questions
from vllm_steer.offline.showcase import shipped_pack
from vllm_steer.packs.pack import load_pack
from vllm_steer.verify.interleave import ratio_to, rounds

ROOT = Path(__file__).parents[2]
RATIOS = ("idle", "steered_half", "steered_one", "steered_distinct")


def bench(name: str, out: Path, *options: str) -> dict[str, Any]:
    """Runs a benchmark as its users do; returns its results."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(out)]
    _run([*command, *options])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _run(command: list[str]) -> str:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("work")


def test_questions_of_probes_are_apart() -> None:
    """Layers, thresholds and figures share no question, nor one that the directions were learned from."""
    chosen = chosen_questions(24, 120, 48)
    learned = everyday_questions().learned[:LEARNED]
    parts = [set(part) for part in (learned, chosen.choosing, chosen.thresholds, chosen.heldout)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 96 + 24 + 120 + 96
    assert set(chosen.prefixed) <= set(chosen.heldout)
    # The figures that the pack was learned with say how many there were.
    assert load_pack(shipped_pack()).manifest.method.settings["questions"] == LEARNED
    with pytest.raises(ValueError, match="not so many"):
        chosen_questions(24, 400, 48)


def test_every_round_has_every_arm_in_an_order_of_its_own() -> None:
    seen: list[str] = []

    def measure(name: str, rng: random.Random) -> float:
        seen.append(name)
        return rng.random()

    results = rounds(["a", "b", "c"], measure, 8, seed=0, after_each=lambda: None)
    assert all(set(one) == {"a", "b", "c"} for one in results)
    orders = {tuple(seen[start : start + 3]) for start in range(0, len(seen), 3)}
    assert len(orders) > 1


def test_ratio_is_formed_within_rounds() -> None:
    # The machine slows down tenfold, and the arm is always a tenth slower than the mean of two.
    figures = [{"x": 1.0 * v, "y": 1.2 * v, "arm": 0.99 * v} for v in (1.0, 0.5, 0.1)]
    ratio = ratio_to(["x", "y"], "arm", figures)
    assert ratio.low == pytest.approx(0.9)
    assert ratio.high == pytest.approx(0.9)


def test_a_tie_is_no_difference_and_a_real_one_is() -> None:
    expected = [([4, 5], [{4: -0.1, 7: -3.0}, {5: -0.70, 6: -0.71}])]
    assert compare_greedy(expected, expected, 0.001)["passed"]
    tie = [([4, 6], [{4: -0.1, 7: -3.0}, {6: -0.70, 5: -0.71}])]
    assert compare_greedy(tie, expected, 0.05)["passed"]
    assert not compare_greedy(tie, expected, 0.001)["passed"]
    other = [([4, 9], [{4: -0.1, 7: -3.0}, {9: -0.1, 5: -3.0}])]
    assert not compare_greedy(other, expected, 0.05)["passed"]


def test_the_models_are_as_large_as_they_are_called(tmp_path: Path) -> None:
    wanted = {"100m": (1e8, 1.4e8), "1.5b": (1.4e9, 1.7e9), "8b": (7.5e9, 8.5e9)}
    for name, (low, high) in wanted.items():
        assert name in SHAPES
        assert low <= prepare_model(name, tmp_path).parameters <= high


def test_rates_are_of_the_concept_that_was_asked_for() -> None:
    said = " ".join(concept_words("spiders"))
    asked = [Asked("spiders", "Rain is good."), Asked("chef", "Rain is good.")]
    found = rate(asked, [(said, True), (said, True)])
    assert found.by_concept == {"spiders": 1.0, "chef": 0.0}
    assert (found.expressed, found.fluent) == (0.5, 0.0)
    rates = dict.fromkeys(("plain", "a, own", "a, unrelated"), asdict(found))
    assert "| `a` | 0.50 [0.00, 1.00], fluent 0.00 |" in matrix({"ablation": rates})


def test_the_control_is_of_another_class() -> None:
    concepts = ["spiders", "heights", "chef", "sailor"]
    other = unrelated(concepts)
    assert sorted(other.values()) == sorted(concepts)
    assert all(class_of(one) != class_of(another) for one, another in other.items())


def test_rotation_holds_the_norm_and_addition_does_not(tmp_path: Path) -> None:
    pack = extract_pack(
        demo_model_path(),
        ExtractionData(
            [Concept("spiders", prefix("spiders"))],
            ["Rain is good.", "Order is bad."],
            ["Money is fame.", "Health is play."],
        ),
        ExtractionSettings(method="angular", layers=tuple(range(6))),
        PackTarget("angular", tmp_path / "pack", 1.0, 1.0),
        ComputeResources(device="cpu"),
    )
    found = measure_norms(pack, [Asked("spiders", "Order is new.")])
    assert max(found["rotate"], found["angle"]) < 1e-5
    assert found["add"] > 0.1


def test_overhead(tmp_path: Path) -> None:
    sizes = ("--requests", "8", "--directions", "1", "2", "--layers", "4", "--calls", "20")
    found = bench("overhead", tmp_path / "overhead.json", *sizes)
    assert [case["directions"] for case in found["microseconds"]] == [1, 2]
    for case in found["microseconds"]:
        for key in ("idle_step", "half_steered_step", "steered_step", "arrival_step", "admission"):
            assert case[key] > 0
    assert found["commit"]


@pytest.mark.engine
def test_throughput(tmp_path: Path, work: Path) -> None:
    sizes = ("--requests", "4", "--tokens", "0.1", "--repetitions", "1", "--eager", "--no-control")
    out = tmp_path / "throughput.json"
    found = bench("throughput", out, *sizes, "--no-rivals", "--work", str(work))
    assert set(found["ratios"]) == set(RATIOS)
    assert all(set(ratio) == {"median", "low", "high"} for ratio in found["ratios"].values())
    assert found["checks"]["plugin"].startswith("steers")
    assert found["ratios"] == found["workloads"]["decode-heavy"]["ratios"]
    assert out.with_suffix(".png").stat().st_size > 0


@pytest.mark.engine
@pytest.mark.slow
def test_throughput_says_of_a_rival_that_it_does_not_steer(tmp_path: Path, work: Path) -> None:
    sizes = ("--requests", "4", "--tokens", "0.1", "--repetitions", "1", "--eager")
    found = bench("throughput", tmp_path / "rivals.json", *sizes, "--work", str(work))
    assert "returns unsteered tokens" in found["not_measured"]["hotwire"]
    assert "hotwire_one" not in found["ratios"]
    assert {"vllm-lens", "EasySteer"} <= set(found["not_measured"])
    assert "control" in found["ratios"]


@pytest.mark.server
@pytest.mark.slow
def test_serve(tmp_path: Path, work: Path) -> None:
    sizes = ("--requests", "4", "--rate", "20", "--repetitions", "1", "--eager")
    found = bench("serve", tmp_path / "serve.json", *sizes, "--work", str(work))
    assert set(RATIOS) <= set(found["ttft_ratios"])
    assert set(RATIOS) <= set(found["tpot_ratios"])


@pytest.mark.server
@pytest.mark.slow
def test_serve_with_many_directions(tmp_path: Path, work: Path) -> None:
    sizes = ("--requests", "4", "--repetitions", "1", "--eager", "--directions", "16")
    found = bench("serve", tmp_path / "serve.json", *sizes, "--work", str(work))
    assert found["ttft_ratio"]["median"] > 0
    assert set(found["start_seconds"]) == {"1 direction", "16 directions"}


@pytest.mark.engine
@pytest.mark.slow
def test_gpu_on_a_cpu(tmp_path: Path, work: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu"]
    sizes = ["--shapes", "tiny", "--runners", "v1", "--batches", "2", "--answer", "16"]
    folders = ["--work", str(work), "--results", str(tmp_path)]
    _run([*command, *sizes, *folders, "--repetitions", "1", "--no-rivals"])
    found = json.loads((tmp_path / "cpu-tiny-v1.json").read_text())
    assert found["equality"]["passed"]
    assert found["profiles"]["plain"]["operators"] > 0
    assert abs(found["extra_kernels_per_layer"]["idle"]) < 1


def test_fusion_depth(tmp_path: Path) -> None:
    """On the demo model alone, which needs no engine."""
    sizes = ("--models", str(demo_model_path()), "--questions", "1", "--tokens", "2")
    out = tmp_path / "depth.json"
    command = [sys.executable, "-m", "benchmarks.fusion_depth", "--json", str(out)]
    assert "| 6 | 0.1 |" in _run([*command, *sizes])
    (model,) = json.loads(out.read_text())["models"]
    assert model["scales"]["1"]["original"] == pytest.approx(1.0, rel=1e-3)


@pytest.mark.engine
@pytest.mark.slow
def test_fusion(tmp_path: Path) -> None:
    sizes = ("--questions", "3", "--tuning", "2", "--trials", "2", "--rounds", "1", "--eager")
    command = [sys.executable, "-m", "benchmarks.fusion", "--json", str(tmp_path / "fusion.json")]
    shown = _run([*command, *sizes])
    found = json.loads((tmp_path / "fusion.json").read_text())
    assert set(found["results"]) == {"question", "prefixed"}
    assert "full, best of 2" in shown
    speed = found["speed"]
    assert len(speed["seconds"]) == 4
    for name, share in speed["same_answers"].items():
        assert share == 1.0 or "original" in name
    for forms in found["distances"].values():
        assert set(forms) == {
            "frozen",
            "frozen, lower layers steered",
            "running mean",
            "unsteered",
        }
