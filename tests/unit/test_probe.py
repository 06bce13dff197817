"""Probes in manifests, and thresholds that requests, packs and policies name by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.conftest import make_pack, probe, rewritten, threshold
from tests.unit.test_calibration import written
from vllm_steer.config import SteeringConfig
from vllm_steer.errors import ConfigError, PackError, RequestError
from vllm_steer.operations import FormChoice, Gate
from vllm_steer.packs.pack import (
    MANIFEST_FILE,
    SteeringPack,
    load_pack,
    update_records,
)
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.summary import pack_summary
from vllm_steer.plan.binding import bind
from vllm_steer.plan.reads import StopRule
from vllm_steer.plan.resolve import resolve
from vllm_steer.plan.steering_plan import SteeringPlan
from vllm_steer.request.schema import parse
from vllm_steer.serving.configure import _policy_path
from vllm_steer.serving.packs_api import describe_pack
from vllm_steer.serving.policy import Policy

PROMPT = 10


@pytest.fixture
def probed(fears: SteeringPack) -> SteeringPack:
    """``spiders`` has a probe, ``New York`` has none."""
    return rewritten(fears, spiders={"probe": probe()})


def plan(pack: SteeringPack, **fields: Any) -> SteeringPlan:
    request = parse({"steering": fields})
    assert request is not None
    return resolve(bind(request, PackRegistry([pack])), PROMPT, 64)


def test_a_probe_is_read_back_and_changes_no_identity(fears: SteeringPack) -> None:
    before = written(fears)
    digests, tensors = fears.digests, fears.manifest.tensors
    pack = update_records(fears, {"spiders": {"probe": probe()}})
    assert pack.directions["spiders"].probe == probe()
    assert pack.directions["New York"].probe is None
    # The prefix cache's keys, the compile cache's and the server's digests are made of these.
    assert (pack.digests, pack.manifest.tensors) == (digests, tensors)
    after = written(pack)
    assert after["directions"][0].pop("probe")["layer"] == 2
    assert after == before


def test_what_others_wrote_meanwhile_stays_and_other_vectors_are_refused(
    fears: SteeringPack,
) -> None:
    rewritten(fears, spiders={"default_scale": 9.0})
    pack = update_records(fears, {"spiders": {"probe": probe()}})
    assert pack.directions["spiders"].default_scale == 9.0
    make_pack(fears.path, "fears", {"spiders": [1, 2, 3], "New York": [0, 2]}, seed=1)
    with pytest.raises(PackError, match="vectors were replaced while they were measured"):
        update_records(fears, {"spiders": {"probe": probe()}})
    assert load_pack(fears.path).directions["spiders"].probe is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 3}, "layer must be one of those in layers"),
        ({"layers": []}, "probe.layers"),
        ({"layers": "swapped"}, "layers must be ascending"),
        ({"layers": "uneven"}, "thresholds for the same fpr"),
        ({"layers": "foreign", "layer": 0}, r"probe.layers must be some of layers; \[0\] are not"),
        ({"layers": "certain"}, r"fpr: Input should be less than 1"),
        ({"layers": "outside"}, "above must lie between the ends"),
        ({"layers": "nan"}, "NaN"),
        ({"tokens": "prompt"}, "max_tokens must be given where an answer is read"),
        ({"score": "median"}, "probe.score"),
        ({"seed": -1}, "probe.seed"),
        ({"positives_sha256": "abc"}, "probe.positives_sha256"),
        ({"note": "mine"}, "probe.note"),
    ],
)
def test_malformed_probes_are_refused(
    changes: dict[str, Any], message: str, probed: SteeringPack
) -> None:
    first, second = (each.model_dump() for each in probe().layers)
    wrong = {
        "swapped": [second, first],
        "uneven": [first | {"thresholds": first["thresholds"][:1]}, second],
        "foreign": [first | {"layer": 0}, first],
        "certain": [first | {"thresholds": [threshold(0.05, 1.0).model_dump() | {"fpr": 1.0}]}],
        "outside": [first | {"thresholds": [threshold(0.05, 1.0).model_dump() | {"above": 0.1}]}],
        "nan": [first | {"auroc": float("nan")}, second],
    }
    manifest = written(probed)
    given = {k: wrong.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
    manifest["directions"][0]["probe"] |= given
    (probed.path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(PackError, match=message):
        load_pack(probed.path)


def test_lists_show_it(probed: SteeringPack) -> None:
    assert "0.90@2" in pack_summary(probed)
    spiders, york = describe_pack(probed)["directions"]
    assert (spiders["probe"]["layer"], spiders["probe"]["fpr"]) == (2, [0.01, 0.05])
    assert "layers" not in spiders["probe"]
    assert york["probe"] is None


def test_a_rule_names_a_threshold_and_reads_its_layer(probed: SteeringPack) -> None:
    found = plan(
        probed,
        read=[{"name": "spiders"}, {"name": "spiders", "layers": [1]}, {"name": "spiders"}],
        stop_when={"read": 1, "at": "fpr=0.05", "for": 2},
        abort_when={"read": 0, "at": "fpr=0.01"},
    )
    # Where nothing is named, the layers are those of the direction.
    assert [read.layers for read in found.reads] == [(2,), (1,), (1, 2, 3)]
    assert found.rules == (
        StopRule(1, 7.0, 2, abort=False),
        StopRule(0, 4.0, 1, abort=True),
    )
    assert plan(
        probed, read=[{"name": "spiders"}], abort_when={"read": 0, "at": "fpr=1e-2"}
    ).rules == (StopRule(0, 4.0, 1, abort=True),)


def test_a_gate_names_a_threshold_of_scores(probed: SteeringPack) -> None:
    chosen = {"name": "New York", "gate": {"direction": "spiders", "at": "fpr=0.01"}}
    ((segment),) = plan(probed, directions=[chosen], positions="generated").segments
    (term,) = segment.terms
    length = float(np.linalg.norm(probed.vectors["spiders"][1].astype(np.float64)))
    assert term.layers == (2,)
    assert term.form.threshold == pytest.approx(4.0 * length, rel=1e-6)
    same = chosen | {"gate": {"direction": "spiders", "above": term.form.threshold}, "layers": [2]}
    assert plan(probed, directions=[same], positions="generated").segments == (segment,)


READ: list[dict[str, Any]] = [{"name": "spiders"}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"read": READ, "abort_when": {"read": 0, "at": "fpr=0.02"}},
            r"^steering\.abort_when\.at: 'fpr=0.02' is no threshold .* there are 'fpr=0.01', 'fpr=0.05'$",
        ),
        (
            {"read": [{"name": "New York"}], "stop_when": {"read": 0, "at": "fpr=0.01"}},
            r"^steering\.stop_when\.at: direction 'fears/New York' has no probe, so there are no thresholds",
        ),
        (
            {"read": READ, "stop_when": {"read": 0, "at": "fpr=0.01", "above": 1.0}},
            r"stop_when: give either above, a number, or at",
        ),
        ({"read": READ, "stop_when": {"read": 0}}, r"stop_when: give either above"),
        ({"read": READ, "stop_when": {"read": 0, "at": "0.01"}}, r"stop_when\.at: .*pattern"),
        (
            {
                "read": [{"name": "spiders", "layers": [3]}],
                "abort_when": {"read": 0, "at": "fpr=0.01"},
            },
            r"layers \[3\] are named; .* was measured at layers 1-2: .* none for layer 2",
        ),
        (
            {
                "read": [{"name": "spiders", "layers": [1, 2]}],
                "abort_when": {"read": 0, "at": "fpr=0.01"},
            },
            r"thresholds are those of one layer, and layers \[1, 2\]",
        ),
        (
            {
                "read": [{"name": "spiders", "when": "after"}],
                "abort_when": {"read": 0, "at": "fpr=0.01"},
            },
            "the read says 'after'",
        ),
        (
            {
                "read": [{"name": "spiders", "at": "all"}],
                "recompute": True,
                "abort_when": {"read": 0, "at": "fpr=0.01"},
            },
            "measured on generated tokens, and other positions are named; name 'generated'",
        ),
        (
            {
                "directions": [
                    {"name": "spiders", "gate": {"direction": "spiders", "at": "fpr=0.5"}}
                ]
            },
            r"^steering\.directions\.0\.gate\.at: 'fpr=0.5' is no threshold .* 'fpr=0.05'$",
        ),
        (
            {
                "directions": [
                    {"name": "spiders", "gate": {"direction": "New York", "at": "fpr=0.01"}}
                ]
            },
            r"gate\.at: direction 'fears/New York' has no probe",
        ),
        (
            {
                "directions": [
                    {"name": "spiders", "gate": {"direction": "spiders", "at": "fpr=0.01"}}
                ],
                "positions": "all",
            },
            r"gate\.at: .* measured on generated tokens",
        ),
        (
            {"directions": [{"name": "spiders", "gate": {"direction": "spiders"}}]},
            r"gate: give either above",
        ),
    ],
)
def test_thresholds_that_are_not_there_are_refused(
    fields: dict[str, Any], message: str, probed: SteeringPack
) -> None:
    with pytest.raises(RequestError, match=message):
        plan(probed, **fields)


@pytest.mark.parametrize("score", ["mean", "last"])
def test_thresholds_of_whole_texts_say_nothing_of_tokens(score: str, fears: SteeringPack) -> None:
    pack = rewritten(fears, spiders={"probe": probe(score=score)})
    with pytest.raises(RequestError, match=f"measured with --score {score}"):
        plan(pack, read=READ, abort_when={"read": 0, "at": "fpr=0.01"})


def test_thresholds_of_prompts_are_for_tokens_of_prompts(fears: SteeringPack) -> None:
    pack = rewritten(fears, spiders={"probe": probe(tokens="prompt", max_tokens=None)})
    rule = {"read": 0, "at": "fpr=0.01"}
    reads = [{"name": "spiders", "at": [[1, PROMPT]]}]
    assert plan(pack, read=reads, recompute=True, abort_when=rule).rules[0].above == 4.0
    for at in ("generated", "prompt", "all"):
        reads = [{"name": "spiders", "at": at}]
        with pytest.raises(RequestError, match=r"measured on prompt tokens.*\[\[1, 10\]\]"):
            plan(pack, read=reads, recompute=True, abort_when=rule)


def test_a_form_names_a_threshold_of_its_own_pack(probed: SteeringPack) -> None:
    gate = Gate(direction="spiders", at="fpr=0.05")
    with pytest.raises(PackError, match="'fpr=0.02', which direction 'spiders' has no probe for"):
        rewritten(
            probed, spiders={"form": FormChoice(gate=gate.model_copy(update={"at": "fpr=0.02"}))}
        )
    pack = rewritten(probed, spiders={"form": FormChoice(gate=gate)})
    (segment,) = plan(pack, directions=READ, positions="generated").segments
    assert segment.terms[0].layers == (2,)
    assert segment.terms[0].form.threshold > 0


def test_a_policy_names_thresholds_that_are_there(probed: SteeringPack, tmp_path: Path) -> None:
    registry = PackRegistry([probed])
    watch = {"read": READ, "abort_when": {"read": 0, "at": "fpr=0.01"}}
    Policy.model_validate({"watch": {"*": watch}}).check(registry)
    gated = {"name": "New York", "gate": {"direction": "spiders", "at": "fpr=0.05"}}
    Policy.model_validate({"aliases": {"a": {"directions": [gated]}}}).check(registry)
    for field, wrong in {
        "watch.*": {"watch": {"*": watch | {"abort_when": {"read": 0, "at": "fpr=0.2"}}}},
        "aliases.a": {
            "aliases": {
                "a": {"directions": [gated | {"gate": {"direction": "spiders", "at": "fpr=0.2"}}]}
            }
        },
        "default": {"default": {"read": READ, "stop_when": {"read": 0, "at": "fpr=0.2"}}},
    }.items():
        (tmp_path / "policy.json").write_text(json.dumps(wrong))
        config = SteeringConfig(packs=["fears"], policy=str(tmp_path / "policy.json"), reads=1)
        with pytest.raises(ConfigError, match=rf"{field.replace('*', '.')}\..*'fpr=0.2' is no thr"):
            _policy_path(config, registry)
