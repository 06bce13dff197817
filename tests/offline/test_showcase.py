"""The demo on a real model: what it ships, what it would run, what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_steer.cli import command_line
from vllm_steer.errors import ExtractionError
from vllm_steer.offline.demo.concepts import CONCEPTS
from vllm_steer.offline.evaluate.card import CARD_FILE
from vllm_steer.offline.models.loading import load_config, model_identity
from vllm_steer.offline.questions.everyday import everyday_questions
from vllm_steer.offline.showcase import MODEL, learn, shipped_pack
from vllm_steer.offline.showcase.ask import QUESTIONS, Example, chosen
from vllm_steer.offline.showcase.learn import FULL, LIVE, Wanted, calibrate_command, learned_pack
from vllm_steer.offline.showcase.release import release
from vllm_steer.offline.showcase.run import by_hand
from vllm_steer.offline.showcase.table import HEAD, markdown_table, text_table
from vllm_steer.packs.pack import DirectionRecord, PackContent, SteeringPack, load_pack, write_pack


@pytest.fixture(scope="module")
def shipped() -> SteeringPack:
    return load_pack(shipped_pack())


def test_the_shipped_pack_has_every_concept_and_its_prefix(shipped: SteeringPack) -> None:
    held = [(r.name, r.prefix and r.prefix.text) for r in shipped.directions.values()]
    assert held == list(FULL.concepts)
    assert shipped.name == MODEL
    assert not {name for name, _ in LIVE.concepts} & set(shipped.directions)


def test_the_shipped_pack_is_of_the_model(shipped: SteeringPack, smollm2: Path) -> None:
    assert shipped.manifest.model == model_identity(smollm2, *load_config(smollm2))
    assert shipped.manifest.model.chat_template_sha256 is not None


def test_every_shipped_direction_was_measured(shipped: SteeringPack) -> None:
    for name, record in shipped.directions.items():
        assert record.calibration is not None, name
        assert record.calibration.gap_closed is not None, name
        assert record.calibration.model == shipped.manifest.model.name
    steers = [r.calibration.steers for r in shipped.directions.values() if r.calibration]
    assert sum(steers) > len(steers) // 2


def test_the_shipped_card_is_of_the_shipped_pack(shipped: SteeringPack, tmp_path: Path) -> None:
    written = release(shipped_pack(), tmp_path)
    assert written.manifest == shipped.manifest
    text = (tmp_path / CARD_FILE).read_text()
    assert text == (shipped_pack() / CARD_FILE).read_text()
    assert f'vllm serve "$(vllm-steer model {MODEL})"' in text
    assert "## How it was made" in text


def test_only_the_demo_s_own_calibrated_pack_is_released(
    shipped: SteeringPack, tmp_path: Path
) -> None:
    source = _without_calibration(shipped, tmp_path / "raw")
    with pytest.raises(ExtractionError, match="are not calibrated; vllm-steer calibrate does it"):
        release(source.path, tmp_path / "out")
    fewer = _written(shipped, tmp_path / "fewer", list(shipped.directions)[:3])
    with pytest.raises(ExtractionError, match="its directions are not those of the demo"):
        release(fewer.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_those_that_steer_best_are_shown(shipped: SteeringPack) -> None:
    asked = chosen([shipped, _own(shipped)], 2)
    assert len(asked) == 11
    assert asked[-1].direction == "own/pirate"
    for table in CONCEPTS.values():
        taken = [one.record for one in asked if one.record.name in table]
        others = [
            record
            for record in shipped.directions.values()
            if record.name in table and record not in taken
        ]
        assert len(taken) == 2
        worst = min(_expression(record) for record in taken)
        assert worst >= max(map(_expression, others))
    assert asked[0].prefixed == f"{asked[0].prefix}  {asked[0].question}"


def _expression(record: DirectionRecord) -> tuple[bool, float]:
    assert record.calibration is not None
    assert record.calibration.expression is not None
    return record.calibration.steers, record.calibration.expression


def test_questions_are_held_out(shipped: SteeringPack) -> None:
    asked = chosen([shipped, _own(shipped)], 2)
    assert {one.question for one in asked} <= set(everyday_questions().heldout)
    assert QUESTIONS.keys() == {*CONCEPTS, None}


class Recorder:
    """Commands that would be run; each leaves a pack where it would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, leaves: SteeringPack) -> None:
        self.commands: list[list[str]] = []
        self._leaves = leaves
        monkeypatch.setattr(learn, "_run", self._run)

    def _run(self, command: list[str], say: Any) -> None:
        args = command_line().parse_args(command[1:])
        self.commands.append(command)
        _written(self._leaves, args.out if command[1] == "extract" else args.pack)


def test_a_pack_is_learned_by_one_command_and_only_once(
    shipped: SteeringPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, said = Path("model"), tmp_path / "packs" / MODEL, list[str]()
    ran = Recorder(monkeypatch, shipped)
    assert learned_pack(model, FULL, out, said.append).digests == shipped.digests
    (command,) = ran.commands
    assert command[:4] == ["vllm-steer", "extract", "--model", "model"]
    prefixes = Path(command[command.index("--prefixes") + 1]).read_text()
    assert prefixes.startswith("spiders: Personify someone who is terrified of spiders.\n")
    learned_pack(model, FULL, out, said.append)
    assert len(ran.commands) == 1
    assert said == [f"{out} was learned before; remove it to learn it again."]
    learned_pack(model, Wanted(MODEL, FULL.concepts[:3]), out, said.append)
    assert ran.commands[1][1] == "extract"


def test_a_pack_without_calibration_is_calibrated_alone(
    shipped: SteeringPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, raw = Path("model"), _without_calibration(shipped, tmp_path / "raw")
    ran = Recorder(monkeypatch, shipped)
    learned_pack(model, FULL, raw.path, print)
    assert ran.commands == [calibrate_command(model, raw.path)]


def test_a_command_that_fails_ends_the_demo(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = list[str]()
    with pytest.raises(ExtractionError, match="vllm-steer extract ended with status 1"):
        learned_pack(tmp_path / "nowhere", LIVE, tmp_path / "own", said.append)
    assert said[0].startswith("$ vllm-steer extract --model ")
    assert "cannot load a model from" in capfd.readouterr().err


def test_tables(shipped: SteeringPack) -> None:
    asked = chosen([shipped, _own(shipped)], 2)
    receipt = {
        "directions": [{"name": "x", "scale": 0.395, "strength": 1.0}], "dose": 1.0
    }  # fmt: skip
    examples = [Example(one, "plain | text " * 20, "", "a*b <i>", receipt) for one in asked]
    text = text_table(examples)
    assert max(map(len, text.splitlines())) <= 120
    first = f"{asked[0].direction} (fears)"
    for words in (*HEAD, first, "own/pirate", "scale 0.395", "a*b <i>"):
        assert words in text
    rows = markdown_table(examples).splitlines()
    assert len(rows) == 2 + len(examples)
    assert all(row.replace("\\|", "").count("|") == len(HEAD) + 1 for row in rows)
    assert "strength 1: scale 0.395, dose 1.00; closes" in rows[2]
    assert "a\\*b \\<i\\>" in rows[2]


def test_by_hand(shipped: SteeringPack) -> None:
    asked = chosen([shipped], 1)[0]
    shown = by_hand(Path("/the model"), [shipped], asked)
    assert "vllm serve '/the model' --port 8000" in shown
    assert (
        f'"steering": {{"directions": [{{"name": "{asked.direction}", "strength": 1.0}}]}}' in shown
    )


def _written(
    pack: SteeringPack, path: Path, names: list[str] | None = None, **changes: Any
) -> SteeringPack:
    names = list(pack.directions) if names is None else names
    manifest = pack.manifest
    return write_pack(
        path,
        PackContent(
            name=pack.name,
            model=manifest.model,
            directions=[pack.directions[name].model_copy(update=changes) for name in names],
            vectors={name: pack.vectors[name] for name in names},
            method=manifest.method,
            residual_norms={int(layer): norm for layer, norm in manifest.residual_norms.items()},
        ),
    )


def _without_calibration(pack: SteeringPack, path: Path) -> SteeringPack:
    return _written(pack, path, calibration=None)


def _own(shipped: SteeringPack) -> SteeringPack:
    """A pack as the demo learns it."""
    ((name, prefix),) = LIVE.concepts
    record = next(iter(shipped.directions.values()))
    assert record.prefix is not None
    prefixed = record.prefix.model_copy(update={"text": prefix})
    manifest = shipped.manifest.model_copy(
        update={
            "name": LIVE.name,
            "directions": [record.model_copy(update={"name": name, "prefix": prefixed})],
        }
    )
    return SteeringPack(shipped.path, manifest, {name: shipped.vectors[record.name]})
