"""Sentences of the documentation and the README have the figures of ``benchmarks/results``.

They are prose, so they are read before a release, by ``make test-slow``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.fusion_depth import STEERED, UNSTEERED
from benchmarks.probes import means
from benchmarks.tables import FINDINGS, README, results

pytestmark = pytest.mark.slow
FUSION = FINDINGS.with_name("how-to") / "fusion.md"
LEARN = FINDINGS.with_name("how-to") / "learn.md"
OPERATIONS = FINDINGS.with_name("concepts") / "operations.md"


def text_of(document: Path) -> str:
    """A document on one line, so that a sentence is found however it is wrapped."""
    return " ".join(document.read_text().split())


def test_sentences_of_depth() -> None:
    """On a model of 30 blocks: how far each delta goes, beside the original."""
    shallow, deep = results("fusion-depth")["models"]
    assert (shallow["blocks"], deep["blocks"]) == (6, 30)
    for model in (shallow, deep):
        for scale, row in model["scales"].items():
            assert row[STEERED]["displacement"] == pytest.approx(row["original"], rel=1e-3)
            assert abs(row[STEERED]["first_kl"]) < 1e-4
            if float(scale) >= 0.1:
                assert row[UNSTEERED]["displacement"] > 1.2 * row["original"]
                assert row[UNSTEERED]["mean_kl"] > 10 * abs(row[STEERED]["mean_kl"])
    times = [row[UNSTEERED]["displacement"] / row["original"] for row in deep["scales"].values()]
    assert f"{times[-1]:.0f} times at full scale" in text_of(FUSION)
    words = {3: "three", 21: "21"}
    assert (
        f"moves {words[round(times[1])]} times too far at αγ = 0.1 and {words[round(times[-1])]} times at 1"
    ) in text_of(FINDINGS)


def test_sentences_of_fusion() -> None:
    report = results("fusion")
    asked = report["results"]["prefixed"]
    segmented = asked["arms"]["segmented"]["by_trials"][asked["trials"] - 1]["right"]
    full = asked["arms"]["full"]["by_trials"][asked["trials"] - 1]["right"]
    others = asked["arms"]["segmented, scales of other questions"]["figures"]["right"]
    seconds = report["speed"]["seconds"]
    (uncached,) = (name for name in seconds if name.endswith("the uncached original"))
    found = {
        "wrong": asked["wrong"],
        "trials": asked["trials"],
        "segmented": _cell(segmented),
        "others": _cell(others),
        "engine": seconds["through the engine"],
        "uncached": seconds[uncached],
    }
    page = text_of(FUSION)
    assert (
        "of {wrong} questions that it gets wrong unsteered, segmented scales of {trials} trials get "
        "{segmented} right, and those of other questions {others}"
    ).format(**found) in page
    assert (
        "takes {engine:.1f} s through the engine and {uncached:.1f} s one question after another"
    ).format(**found) in page
    findings = text_of(FINDINGS)
    share = report["speed"]["same_answers"][uncached]
    assert f"the same text in {share:.1%} of cases" in findings
    assert f"three numbers reach {segmented['mean']:.2f} and one {full['mean']:.2f}" in findings


def test_sentences_of_interventions() -> None:
    report = results("interventions")
    own = {
        name.removesuffix(", own"): rate
        for name, rate in report["ablation"].items()
        if name.endswith(", own")
    }
    left = [rate["expressed"] for rate in own.values()]
    drift = max(report["norm_drift"][op] for op in ("rotate", "angle"))
    assert (
        f"leaves {min(left):.2f} to {max(left):.2f}, by how the direction was learned; "
        f"rotation holds ‖h‖ to {drift:.2g}"
    ) in text_of(OPERATIONS)
    assert drift < 1e-5 < 0.1 < report["norm_drift"]["add"]
    gone = {name: _count(rate, 0.0) for name, rate in own.items()}
    contrast, token = gone.pop("ablation_contrast"), gone.pop("ablation_contrast_token-2")
    other = [
        _count(report["ablation"][f"ablation_contrast{end}, unrelated"], 0.0)
        for end in ("", "_token-2")
    ]
    assert (
        f"ablation takes {min(gone.values())} to {max(gone.values())} of the "
        f"{len(report['concepts'])} concepts out wholly. Of those learned against the other concepts "
        f"it takes {contrast}, and with `--token -2` {token}, and leaves the other "
        f"{_count(own['ablation_contrast_token-2'], 1.0)} as they were; an unrelated direction of "
        f"theirs takes {other[0]} and {other[1]} out as well"
    ) in text_of(FINDINGS)


def test_sentences_of_extraction() -> None:
    demo, wide = results("extraction")["models"]
    assert (
        f"concepts a minute are {wide['speedup']:.1f} times those of a straightforward reading of "
        "the method for a random model of hidden size 1024, "
        f"{demo['speedup']:.1f} times for the demo model"
    ) in text_of(LEARN)


def test_sentences_of_methods() -> None:
    report = results("methods")
    arms, minutes = report["arms"], report["seconds"]["engine"] / 60
    assert f"all {len(arms)} arms, 39,200 answers in {minutes:.0f} minutes" in text_of(FINDINGS)
    by_name = {
        (arm["token"], arm["estimator"], arm["labels"], arm["published"]): arm["single"]
        for arm in arms.values()
        if arm["blocks"] == "all"
    }
    for estimator, published, sentence in (
        ("rfm", True, "with the RFM as published they fall from {hard} to {soft}"),
        ("ridge", False, "with ridge regression from {hard} to {soft}"),
    ):
        given = {
            labels: f"{by_name['attention', estimator, labels, published]['steerability']:.2f}"
            for labels in ("hard", "soft")
        }
        assert sentence.format(**given) in text_of(FINDINGS)


def test_sentences_of_overhead() -> None:
    report = results("overhead")
    steered = [
        row[step]
        for row in report["microseconds"]
        for step in ("half_steered_step", "steered_step")
    ]
    idle = [row["idle_step"] for row in report["microseconds"]]
    assert (
        f"a step of {report['requests']} decoding requests takes {_span(steered)} µs, {_span(idle)} µs when none is "
        f"steered"
    ) in text_of(README)


def test_sentences_of_statistics() -> None:
    report = results("statistics")
    assert (
        f"Of such concepts {report['false_q_rate']:.3f} report some block with q ≤ 0.05, of 30 blocks; if each "
        f"token's choice were left out of the null distribution, {report['as_if_named']['false_q_rate']:.3f} would."
    ) in text_of(FINDINGS)


def _span(values: Sequence[float]) -> str:
    """``11``, or ``11 to 19`` where rounding leaves two values."""
    return " to ".join(dict.fromkeys(f"{value:.0f}" for value in (min(values), max(values))))


def _cell(share: dict[str, float]) -> str:
    return f"{share['mean']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"


def _count(rate: dict[str, dict[str, float]], share: float) -> int:
    return sum(value == share for value in rate["by_concept"].values())


def test_sentences_of_probes() -> None:
    report = results("probes")
    found = means(report)
    assert (
        "the engine aborts {caught:.0%} of the prefixed answers within 16 tokens, and {whole:.0%} of the whole answers of "
        "32 have a token above the threshold, beside {false:.1%} of the plain ones. {shown:.0%} of the prefixed answers "
        "show their concept, and of these {of_shown:.0%} are aborted. Of {count} concepts {reached:.0f} reach 90 %"
    ).format(**found, count=len(report["concepts"])) in text_of(FINDINGS)
