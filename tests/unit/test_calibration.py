"""What a pack says of how well its directions steer, where it is shown, and who is warned."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save

from tests.unit.conftest import HIDDEN, calibrated, rewritten
from tests.unit.front_end import manager_of, started
from vllm_steer import log
from vllm_steer.errors import PackError
from vllm_steer.offline.extract.records import records_of
from vllm_steer.packs.pack import (
    MANIFEST_FILE,
    Calibration,
    DirectionRecord,
    SteeringPack,
    load_pack,
)
from vllm_steer.packs.summary import pack_summary
from vllm_steer.serving.packs_api import describe_pack
from vllm_steer.serving.uploads import write_upload

NEW = ("default_layers", "safe_scale", "calibration")


def written(pack: SteeringPack) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((pack.path / MANIFEST_FILE).read_text())
    return manifest


def test_what_was_measured_is_read_back(fears: SteeringPack) -> None:
    found = calibrated(low=None, perplexity=None)
    pack = rewritten(fears, spiders={"calibration": found, "default_layers": [1, 3]})
    spiders, york = load_pack(pack.path).manifest.directions
    assert spiders.calibration == found
    assert (spiders.default_layers, spiders.steered_layers) == ([1, 3], [1, 3])
    assert (york.calibration, york.default_layers) == (None, None)
    assert york.steered_layers == york.layers


def test_manifests_that_know_nothing_of_it_are_read_and_written_as_before(
    fears: SteeringPack,
) -> None:
    before = written(fears)
    assert list(before["directions"][0]) == [
        "name", "layers", "default_scale", "safe_scale", "positions", "form", "metrics",
    ]  # fmt: skip
    assert before["directions"][0]["form"] is None
    again = rewritten(load_pack(fears.path))
    assert written(again) == before
    record = again.manifest.directions[0]
    assert (record.safe_scale, record.calibration, record.default_layers) == (4.0, None, None)


def test_what_was_not_measured_is_left_out(fears: SteeringPack) -> None:
    pack = rewritten(fears, spiders={"safe_scale": None})
    assert not set(NEW) & set(written(pack)["directions"][0])
    assert load_pack(pack.path).manifest.directions[0].safe_scale is None
    # Inside it, what is not known is said.
    pack = rewritten(fears, spiders={"calibration": calibrated(control=None)})
    assert written(pack)["directions"][0]["calibration"]["control"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default_layers": []}, "default_layers:"),
        ({"default_layers": [2, 1]}, "default_layers must be ascending and distinct"),
        ({"default_layers": [1, 1]}, "default_layers must be ascending and distinct"),
        (
            {"default_layers": [0, 1]},
            r"default_layers must be a subset of layers; \[0\] are not in it",
        ),
        ({"safe_scale": 0.0}, "safe_scale:"),
        ({"calibration": {}}, "calibration.model:"),
    ],
)
def test_records_that_are_refused(
    change: dict[str, Any], message: str, fears: SteeringPack
) -> None:
    file = fears.path / MANIFEST_FILE
    manifest = written(fears)
    manifest["directions"][0] |= change
    file.write_text(json.dumps(manifest))
    with pytest.raises(PackError, match=message):
        load_pack(fears.path)


POINT = {"scale": 1.0, "gap_closed": 0.1, "repetition": None, "perplexity": None, "fluent": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({field: value}, field)
            for field in ("gap_closed", "low", "high", "control", "perplexity", "fluent_dose")
            for value in (float("nan"), float("inf"), "0.1")
        ),
        *(({field: 1.1}, field) for field in ("repetition", "repetition_prefixed")),
        *(({field: 0.0}, field) for field in ("perplexity", "fluent_dose", "questions")),
        ({"questions": 2.5}, "questions"),
        ({"questions_sha256": "a"}, "questions_sha256"),
        ({"steers": 1}, "steers"),
        ({"dtype": "float\x1b"}, "dtype"),
        ({"low": 0.6, "high": 0.5}, "low must not be greater than high"),
        ({"curve": []}, "curve"),
        ({"curve": [POINT] * 2}, "curve must be ascending by scale, each scale once"),
        ({"curve": [POINT | {"scale": n} for n in range(1001)]}, "curve"),
        ({"curve": [POINT | {"scale": float("inf")}]}, "curve.0.scale"),
        ({"curve": [POINT | {"gap_closed": float("nan")}]}, "curve.0.gap_closed"),
        ({"curve": [POINT | {"repetition": -0.1}]}, "curve.0.repetition"),
        ({"curve": [POINT | {"perplexity": float("inf")}]}, "curve.0.perplexity"),
        ({"curve": [POINT | {"fluency": True}]}, "curve.0.fluency"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_measurements_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        calibrated(**change)
    assert message in str(refused.value)


def test_they_may_be_unknown_and_below_zero() -> None:
    unknown = ("low", "high", "control", "repetition", "repetition_prefixed", "perplexity")
    found = calibrated(**dict.fromkeys([*unknown, "fluent_dose"]), gap_closed=-0.2, curve=[POINT])
    assert Calibration.model_validate_json(found.model_dump_json()) == found


def test_a_safe_scale_may_be_unknown_before_extraction() -> None:
    from vllm_steer.offline.extract.data import PackTarget
    from vllm_steer.offline.extract.methods import METHODS
    from vllm_steer.offline.models.prompts import Concept

    method = METHODS["attention_guided"]
    found = [
        records_of(
            PackTarget("fears", "fears", 2.0, safe), [Concept("spiders", "Fear them.")], [1], method
        )[0].safe_scale
        for safe in (None, 4, {"spiders": 3.0})
    ]
    assert found == [None, 4.0, 3.0]


def test_nobody_has_measured_what_a_client_sends(fears: SteeringPack, tmp_path: Path) -> None:
    vectors = {"sent": np.ones((1, HIDDEN), np.float32)}
    sent = write_upload(tmp_path / "sent", "sent", save(vectors, {"layers": "[1]"}), [fears])
    assert [describe_pack(sent)["directions"][0][key] for key in NEW] == [None, None, None]


@pytest.fixture
def measured(pack_at: Callable[..., SteeringPack]) -> SteeringPack:
    """A pack with a direction that steers, seven that do not, and one that nobody measured."""
    names = ["good", *(f"idle {n}" for n in range(7)), "unknown"]
    pack = pack_at("measured", dict.fromkeys(names, [0, 1, 2, 3]))
    idle = {"calibration": calibrated(steers=False, gap_closed=0.01, low=None, high=None)}
    good = {"calibration": calibrated(), "default_layers": [1, 2]}
    return rewritten(
        pack,
        good=good,
        unknown={"safe_scale": None},
        **{name: idle for name in names[1:-1]},
    )


def test_the_summary_shows_it(measured: SteeringPack) -> None:
    lines = pack_summary(measured).splitlines()
    (head,) = [line for line in lines if line.startswith("direction")]
    rows = {line[:32].strip(): line[32:].split() for line in lines[lines.index(head) + 1 :]}
    assert head[32:].split() == (
        "scale safe gap closed expressed steers AUROC positions op digest default layers layers".split()
    )
    digests = measured.digests
    assert rows["good"] == [
        "2",
        "4",
        "0.42",
        "0.61",
        "yes",
        "–",
        "all",
        "add",
        digests["good"][:12],
        "1-2",
        "0-3",
    ]
    assert rows["idle 3"][:5] == ["2", "4", "0.01", "0.61", "no"]
    assert rows["unknown"][:5] == ["2", "–", "–", "–", "–"]
    assert rows["unknown"][-2:] == ["0-3", "0-3"]
    # Without a gap nobody knows.
    vague = {"calibration": calibrated(gap_closed=None, low=None, high=None)}
    (row,) = [
        line
        for line in pack_summary(rewritten(measured, good=vague)).splitlines()
        if line.startswith("good")
    ]
    assert row[32:].split()[:5] == ["2", "4", "–", "–", "–"]


def test_the_route_lists_it(measured: SteeringPack) -> None:
    listed = {d["name"]: d for d in json.loads(json.dumps(describe_pack(measured)))["directions"]}
    good, unknown = listed["good"], listed["unknown"]
    found = written(measured)["directions"][0]["calibration"]
    curve = found.pop("curve")
    assert good["calibration"] == found | {"scales": [curve[0]["scale"], curve[-1]["scale"]]}
    assert (good["default_layers"], good["safe_scale"]) == ([1, 2], 4.0)
    assert [unknown[key] for key in NEW] == [None, None, None]


ADVICE = "`vllm-steer inspect`"


def warnings(logged: list[logging.LogRecord]) -> list[dict[str, Any]]:
    return [r.steering for r in logged if r.levelno == logging.WARNING]


def test_directions_that_do_not_steer_are_named_at_start(
    measured: SteeringPack, fears: SteeringPack, logged: list[logging.LogRecord]
) -> None:
    """One line for each pack that has some."""
    started(fears, measured)
    (line,) = warnings(logged)
    assert ADVICE in line.pop("advice")
    assert line == {
        "event": "directions_do_not_steer",
        "name": "measured",
        "count": 7,
        "directions": [f"idle {number}" for number in range(5)],
    }
    assert [r.steering["event"] for r in logged] == ["started", "directions_do_not_steer"]


def test_and_when_their_pack_comes_later(
    measured: SteeringPack, fears: SteeringPack, logged: list[logging.LogRecord]
) -> None:
    with manager_of(started(fears), measured.path.parent) as manager:
        asyncio.run(manager.load(b'{"name": "measured"}', None))
    assert [r.steering["event"] for r in logged] == [
        "started",
        "pack_loaded",
        "directions_do_not_steer",
    ]
    assert warnings(logged)[0]["name"] == "measured"


def test_what_nobody_measured_is_no_reason_to_warn(
    fears: SteeringPack, tmp_path: Path, logged: list[logging.LogRecord]
) -> None:
    good = rewritten(fears, tmp_path / "good", "good", spiders={"calibration": calibrated()})
    started(fears, good)
    assert not warnings(logged)
    assert log.DIRECTIONS_DO_NOT_STEER.level == logging.WARNING


def test_the_op_of_a_record() -> None:
    record = DirectionRecord(name="a", layers=[0], default_scale=1.0, positions="all")
    assert record.op == "add"
    assert (
        DirectionRecord.model_validate(record.model_dump() | {"form": {"op": "ablate"}}).op
        == "ablate"
    )
