"""The card of a pack: every figure and picture where a reader finds it, and commands that work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.offline.results_cases import sweep_result
from tests.unit.conftest import calibrated, rewritten
from vllm_steer.cli import main
from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.card import write_card
from vllm_steer.offline.evaluate.plots import BlockDiagnostics
from vllm_steer.offline.evaluate.results import read_result
from vllm_steer.offline.evaluate.tables import markdown, write_result
from vllm_steer.operations import FormChoice
from vllm_steer.packs.pack import PackContent, SteeringPack, load_pack, write_pack
from vllm_steer.request.schema import parse
from vllm_steer.testing.random_pack import random_identity, write_random_pack


@pytest.fixture
def pack(tmp_path: Path) -> SteeringPack:
    return write_random_pack(
        tmp_path / "pack",
        "fears",
        random_identity(8, 4, "tiny"),
        {"spiders": [1, 2, 3], "it's | odd": [1, 2, 3]},
        seed=0,
        default_scale=8.0,
        safe_scale=12.0,
        residual_norm=40.0,
    )


def pictures(card: Path) -> set[str]:
    """Names of the pictures that a card shows; each must exist and be one."""
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.read_text())
    for name in shown:
        assert imread(card.parent / name).ndim == 3
    return {Path(name).stem for name in shown}


def test_a_card_with_everything(pack: SteeringPack) -> None:
    sweep = sweep_result({pack.name: pack.manifest.tensors.sha256})
    attention = np.random.default_rng(0).random((4, 3))
    seen = BlockDiagnostics(attention, attention.argmax(1) - 3, ["a", "b", "c"], attention[:, 0])
    card = write_card(pack, sweep, seen)
    text = card.read_text()
    assert pictures(card) == {"attention", "enrichment", "scales", "cosines"}
    assert "0.75 [0.38, 0.75] (20)" in text
    for name, record in pack.directions.items():
        cell = re.escape(name.replace("|", r"\|"))
        assert re.search(rf"^\| {cell} \| add \| {record.default_scale:g} ", text, re.MULTILINE)
    for key in pack.manifest.method.settings:
        assert f"| {key} |" in text
    assert pack.manifest.tensors.sha256 in text
    assert load_pack(pack.path).digests == pack.digests


def test_the_request_of_the_card_is_one(pack: SteeringPack) -> None:
    text = write_card(pack).read_text()
    body = json.loads(re.findall(r"-d '(.*)'", text)[0].replace(r"'\''", "'"))
    request = parse({"steering": body["steering"]})
    assert request is not None
    name = request.directions[0].name
    assert name.removeprefix(f"{pack.name}/") in pack.directions


def test_a_card_says_what_its_forms_need(pack: SteeringPack, tmp_path: Path) -> None:
    assert "--steering-packs .\n" in write_card(pack).read_text()
    (spiders, odd), form = pack.directions.values(), FormChoice(op="rotate", plane="it's | odd")
    formed = write_pack(
        tmp_path / "formed",
        PackContent(
            name="formed",
            model=pack.manifest.model,
            directions=[
                spiders.model_copy(update={"form": form}),
                odd,
            ],
            vectors=pack.vectors,
            method=pack.manifest.method,
            residual_norms={int(k): norm for k, norm in pack.manifest.residual_norms.items()},
        ),
    )
    text = write_card(formed).read_text()
    assert "--steering-packs . --steering-ops affine\n" in text
    assert '| spiders | rotate {"plane": "it\'s \\| odd"} |' in text
    assert "| add |" in text


def test_a_card_shows_what_was_measured(pack: SteeringPack, tmp_path: Path) -> None:
    found = calibrated(gap_closed=0.4212, low=0.305, high=0.55)
    measured = rewritten(
        pack,
        tmp_path / "measured",
        "measured",
        spiders={"calibration": found, "default_layers": [2, 3]},
        **{"it's | odd": {"safe_scale": None}},
    )
    text = write_card(measured).read_text()
    head = (
        "| direction | form | default scale | safe scale | gap closed | expressed | steers | positions "
        "| default layers | layers |"
    )
    spiders = "| spiders | add | 8 | 12 | 0.42 [0.30, 0.55] | 0.61 | yes | all | 2, 3 | 1, 2, 3 |"
    odd = r"| it's \| odd | add | 8 | – | – | – | – | all | 1, 2, 3 | 1, 2, 3 |"
    assert [line for line in text.splitlines() if line in (head, spiders, odd)] == [
        head,
        spiders,
        odd,
    ]
    idle = {"calibration": calibrated(steers=False, gap_closed=-0.013, low=None)}
    text = write_card(rewritten(measured, spiders=idle)).read_text()
    assert "| 12 | -0.01 | 0.61 | no | all |" in text
    vague = {"calibration": calibrated(gap_closed=None)}
    assert "| 12 | – | – | – | all |" in write_card(rewritten(measured, spiders=vague)).read_text()


def test_a_card_without_a_sweep_shows_none(pack: SteeringPack) -> None:
    card = write_card(pack)
    assert pictures(card) == {"cosines"}
    assert "How well it steers" not in card.read_text()


def test_a_sweep_of_other_vectors_is_refused(pack: SteeringPack) -> None:
    with pytest.raises(EvaluationError, match="but not these vectors"):
        write_card(pack, sweep_result({pack.name: "0" * 64}))
    with pytest.raises(EvaluationError, match="but not these vectors"):
        write_card(pack, sweep_result({"other": pack.manifest.tensors.sha256}))


def test_the_command(
    pack: SteeringPack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_result(tmp_path / "out", sweep_result({pack.name: pack.manifest.tensors.sha256}))
    assert main(["card", str(pack.path), "--sweep", str(tmp_path / "out" / "sweep.json")]) == 0
    assert pictures(Path(capsys.readouterr().out.strip())) == {"scales", "cosines"}
    shutil.rmtree(tmp_path / "out")
    assert main(["card", str(pack.path), "--sweep", str(tmp_path / "out" / "sweep.json")]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_results_survive_the_disk_and_strange_ones_do_not(tmp_path: Path) -> None:
    written = sweep_result({"fears": "0" * 64, "moods": "1" * 64}, errors=2)
    write_result(tmp_path, written)
    assert read_result(tmp_path / "sweep.json") == written
    assert (tmp_path / "sweep.md").read_text() == markdown(written)
    fields = json.loads((tmp_path / "sweep.json").read_text()) | {"judge": 3}
    (tmp_path / "sweep.json").write_text(json.dumps(fields))
    with pytest.raises(EvaluationError, match="judge:"):
        read_result(tmp_path / "sweep.json")


def test_ungraded_answers_stand_in_the_table() -> None:
    text = markdown(sweep_result({"fears": "0" * 64}, errors=2))
    assert "0.75 [0.38, 0.75] (20), 2 ungraded" in text
    assert "failed on 2 answers" in text
    assert "- the reply does not end in a grade" in text


def test_the_card_of_an_extracted_pack_shows_what_was_seen(
    packs: list[SteeringPack], tmp_path: Path
) -> None:
    path = tmp_path / "pack"
    shutil.copytree(packs[0].path, path)
    assert main(["card", str(path)]) == 0
    assert pictures(path / "README.md") == {"attention", "enrichment", "cosines"}
