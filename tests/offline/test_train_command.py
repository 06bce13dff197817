"""``vllm-steer train``: data files to a pack, by every preset; killed and resumed; what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_steer.cli import main
from vllm_steer.errors import ExtractionError
from vllm_steer.offline.shards import Shards
from vllm_steer.offline.train.directions import Target
from vllm_steer.offline.train.kept import DIRECTORY, StateFile
from vllm_steer.offline.train.pipeline import read_data, read_settings, train_pack
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.request.positions import plain_positions

PRESETS = ("likelihood", "bipo", "reft_r1", "loreft", "prosv", "cdas", "jola")
FEW = {"epochs": 2, "examples": 3, "every": 2, "end": False, "dtype": "float32", "batch_size": 4}
WORDS = ("rain", "sun", "wind", "snow", "fog", "hail", "dust", "heat")


def lines(preset: str) -> list[dict[str, str]]:
    """Eight lines of a data file."""
    found = []
    for word in WORDS:
        prompt, prefixed = f"{word} is good.", f"Fear it.  {word} is good."
        positive, negative = f" I fear {word}", f" {word} is what it is"
        found.append(
            {
                "bipo": {"prompt": prompt, "positive": positive, "negative": negative},
                "cdas": {
                    "prompt": prompt,
                    "prefixed": prefixed,
                    "positive": positive,
                    "negative": negative,
                },
            }.get(preset, {"prompt": prompt, "answer": positive})
        )
    return found


@pytest.fixture
def data(tmp_path: Path) -> Callable[[str], Path]:
    def write(preset: str) -> Path:
        file = tmp_path / f"{preset}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines(preset)))
        return file

    return write


def train(model_dir: Path, file: Path, out: Path, preset: str, **given: Any) -> SteeringPack:
    settings = read_settings(None, {"preset": preset, **FEW, **given})
    return train_pack(
        model_dir, read_data([f"fear={file}"], preset), settings, Target("it", out), "cpu"
    )


NAMES = {
    "loreft": ["fear bias", "fear 1", "fear 2", "fear 1 read", "fear 2 read"],
    "jola": ["fear bias", "fear factors"],
}
POSITIONS = {
    "loreft": {"prompt": [[0, 5], [-5, None]]},
    "prosv": {"prompt": [[0, 2], [-2, None]]},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_pack_of_every_preset(model_dir, data, tmp_path, preset) -> None:
    """It says how it was trained, and the same seed gives the same bytes."""
    own = {"rank": 2} if preset == "loreft" else {}
    pack = train(model_dir, data(preset), tmp_path / "one", preset, **own)
    assert list(pack.directions) == NAMES.get(preset, ["fear"])
    record = next(iter(pack.directions.values()))
    assert record.op == ("clamp" if preset == "cdas" else "add")
    served = plain_positions(record.positions)
    if preset in ("reft_r1", "cdas"):
        # Nothing acts on the template before the user's text.
        ((start, end),) = served
        assert end is None
        assert start > 1
    else:
        assert served == POSITIONS.get(preset, "all")
    method = pack.manifest.method
    assert (method.name, method.settings["epochs"]) == (preset, 2)
    assert method.settings["layers"] == record.layers
    assert record.metrics["steps"] > 0
    assert np.isfinite(record.metrics["held_out_loss"])
    again = train(model_dir, data(preset), tmp_path / "again", preset, **own)
    assert again.manifest.tensors.sha256 == pack.manifest.tensors.sha256
    other = train(model_dir, data(preset), tmp_path / "other", preset, **own, seed=1)
    assert other.manifest.tensors.sha256 != pack.manifest.tensors.sha256
    # Nothing is left of what was kept.
    assert not (tmp_path / "one" / DIRECTORY).exists()


def test_shards_give_the_same_bytes(model_dir, data, tmp_path) -> None:
    pytest.importorskip("ray", reason="Ray, of the extra 'ray', is not installed")
    lines = read_data([f"{name}={data('bipo')}" for name in ("fear", "joy", "awe")], "bipo")
    settings = read_settings(None, {"preset": "bipo", **FEW})
    packs = [
        train_pack(model_dir, lines, settings, Target("it", tmp_path / str(n)), "cpu", Shards(n))
        for n in (0, 2)
    ]
    assert packs[0].manifest.tensors == packs[1].manifest.tensors
    assert packs[0].manifest.directions == packs[1].manifest.directions
    assert list(packs[1].directions) == ["fear", "joy", "awe"]
    assert not (tmp_path / "2" / DIRECTORY).exists()


def test_what_fails_in_a_shard_says_why(model_dir, data, tmp_path) -> None:
    pytest.importorskip("ray", reason="Ray, of the extra 'ray', is not installed")
    lines = read_data([f"fear={data('bipo')}"], "bipo")
    settings = read_settings(None, {"preset": "bipo", **FEW, "rate": 1e30})
    with pytest.raises(ExtractionError, match="not finite"):
        train_pack(model_dir, lines, settings, Target("it", tmp_path / "it"), "cpu", Shards(1))


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("preset", PRESETS)
def test_a_training_that_ended_goes_on_with_the_same_numbers(
    model_dir, data, tmp_path, preset, monkeypatch
) -> None:
    given = {"epochs": 4, "every": 1}
    whole = train(model_dir, data(preset), tmp_path / "whole", preset, **given)
    save, saved = StateFile.save, []

    def killing(self: StateFile, state: Any) -> None:
        save(self, state)
        saved.append(state.step)
        if state.step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", killing)
        with pytest.raises(Killed):
            train(model_dir, data(preset), tmp_path / "killed", preset, **given)
    assert saved == [1, 2, 3, 4]
    assert not (tmp_path / "killed" / "steering_config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", lambda self, state: saved.append(state.step))
        found = train(model_dir, data(preset), tmp_path / "killed", preset, **given)
    # Not from the beginning.
    assert saved[4] == 5
    assert found.manifest.tensors.sha256 == whole.manifest.tensors.sha256
    assert found.manifest.directions == whole.manifest.directions


def test_a_process_that_is_killed_goes_on(model_dir, data, tmp_path) -> None:
    file = data("bipo")
    out = tmp_path / "killed"
    # fmt: off
    command = [
        sys.executable, "-m", "vllm_steer.cli", "train", "--model", str(model_dir), "--preset", "bipo", "--data",
        f"fear={file}", "--name", "it", "--epochs", "150", "--every", "5", "--no-end", "--device", "cpu", "--out",
    ]
    # fmt: on
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(out)], env=env, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not list(out.glob(f"{DIRECTORY}/*.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "steering_config.json").exists()
    done = subprocess.run(
        [*command, str(out)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fear" in done.stdout
    whole = tmp_path / "whole"
    assert subprocess.run([*command, str(whole)], env=env, capture_output=True).returncode == 0
    assert load_pack(out).digests == load_pack(whole).digests


@pytest.mark.parametrize("change", ["file", "setting"])
def test_what_was_kept_of_another_training_is_not_used(
    model_dir, data, tmp_path, monkeypatch, change
) -> None:
    file = data("bipo")
    monkeypatch.setattr(StateFile, "remove", lambda self: None)
    train(model_dir, file, tmp_path / "out", "bipo")
    given = {}
    if change == "file":
        file.write_text(file.read_text().replace("I fear rain", "I like rain"))
    else:
        given = {"beta": 0.3}
    states = set((tmp_path / "out" / DIRECTORY).iterdir())
    train(model_dir, file, tmp_path / "out", "bipo", **given)
    assert len(set((tmp_path / "out" / DIRECTORY).iterdir()) - states) == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_a_loss_on_held_out_examples_falls(model_dir, data, tmp_path, preset) -> None:
    """Of a random model, which learns nothing of them but the words."""
    given = {"held_out": 0.25, "every": 1}
    rate = {"likelihood": 0.1, "bipo": 0.1, "loreft": 0.02, "jola": 0.1}.get(preset)
    more = {} if rate is None else {"rate": rate}
    first, last = (
        train(
            model_dir, data(preset), tmp_path / str(epochs), preset, epochs=epochs, **given, **more
        )
        for epochs in (1, 12)
    )
    losses = [
        next(iter(pack.directions.values())).metrics["held_out_loss"] for pack in (first, last)
    ]
    assert losses[1] < losses[0]


def test_checkpointing_and_parts_change_nothing_but_rounding(model_dir, data, tmp_path) -> None:
    file = data("loreft")
    plain = train(model_dir, file, tmp_path / "plain", "loreft")
    for name, given in {"saving": {"checkpointing": True}, "small": {"batch_size": 1}}.items():
        other = train(model_dir, file, tmp_path / name, "loreft", **given)
        for key, vectors in plain.vectors.items():
            away = np.linalg.norm(other.vectors[key] - vectors) / np.linalg.norm(vectors)
            assert away < 1e-3, (name, key)


def test_bfloat16_learns_much_the_same(model_dir, data, tmp_path) -> None:
    file = data("likelihood")
    one, other = (
        train(model_dir, file, tmp_path / dtype, "likelihood", dtype=dtype, held_out=0)
        for dtype in ("float32", "bfloat16")
    )
    a, b = (pack.vectors["fear"].ravel() for pack in (one, other))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.8
    assert one.manifest.tensors.sha256 != other.manifest.tensors.sha256


@pytest.mark.parametrize(
    ("preset", "line", "message"),
    [
        ("likelihood", "{", "line 3: must be a JSON object with prompt, answer, perhaps prefixed"),
        ("likelihood", '{"prompt": "a"}', "line 3: .* answer: Field required"),
        ("likelihood", '{"prompt": "a", "answer": ""}', "line 3: .* answer: String should have"),
        (
            "likelihood",
            '{"prompt": "a", "answer": 3}',
            "line 3: .* answer: Input should be a valid",
        ),
        (
            "bipo",
            '{"prompt": "a", "positive": "b", "negative": "c", "more": 1}',
            "line 3: .* more: Extra inputs",
        ),
        ("cdas", '{"prompt": "a", "positive": "b", "negative": "c"}', "line 3: .* prefixed: Field"),
        ("bipo", None, "line 3: is line 1 again"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(data, preset, line, message) -> None:
    file = data(preset)
    first, second, *rest = file.read_text().splitlines()
    file.write_text("\n".join([first, second, line or first, *rest]))
    with pytest.raises(ExtractionError, match=message) as refused:
        read_data([f"fear={file}"], preset)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["fear.jsonl"], "must be NAME=FILE"),
        (["=x.jsonl"], "must be NAME=FILE"),
        (["a/b=x.jsonl"], "cannot be a direction's name"),
        (["fear=missing.jsonl"], "cannot read missing.jsonl"),
    ],
)
def test_bad_files_are_refused(items, message) -> None:
    with pytest.raises(ExtractionError, match=message):
        read_data(items, "bipo")


def test_a_file_of_one_example_is_refused(data) -> None:
    file = data("bipo")
    file.write_text(file.read_text().splitlines()[0])
    with pytest.raises(ExtractionError, match="has 1 examples; two are needed"):
        read_data([f"fear={file}"], "bipo")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "bipo", "rank": 2}, "rank belongs to preset 'loreft'"),
        ({"preset": "loreft", "beta": 1.0}, "beta belongs to preset 'bipo'"),
        ({"preset": "odd"}, "preset: Input should be 'likelihood'"),
        ({"preset": "bipo", "rate": 0}, "rate: Input should be greater than 0"),
        ({"preset": "bipo", "steps": 3}, "steps: Extra inputs"),
    ],
)
def test_settings_that_cannot_be_used(given, message) -> None:
    with pytest.raises(ExtractionError, match=message):
        read_settings(None, given)


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("bipo", {"layers": [3]}, "the model has 0 to 2"),
        ("cdas", {"layers": [0, 1]}, "trains one block at a time"),
        ("bipo", {"positions": "f0"}, "positions 'f0' must be all"),
        ("bipo", {"positions": "l2+f2"}, "must be all"),
        ("bipo", {"positions": ""}, "must be all"),
        ("bipo", {"end": True}, "has no token for the end of an answer; give --no-end"),
        ("bipo", {"rate": 1e37, "warmup": 0}, "loss of training is not finite"),
    ],
)
def test_settings_that_do_not_fit_the_model(
    model_dir, data, tmp_path, preset, given, message
) -> None:
    with pytest.raises(ExtractionError, match=message):
        train(model_dir, data(preset), tmp_path / "out", preset, **given)
    assert not (tmp_path / "out" / "steering_config.json").exists()


def test_the_command_says_what_is_asked_for_together(model_dir, data, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    # fmt: off
    status = main([
        "train", "--model", str(model_dir), "--preset", "loreft", "--data", f"fear={data('loreft')}", "--name", "it",
        "--out", str(out), "--epochs", "1", "--rank", "2", "--no-end", "--device", "cpu",
    ])
    # fmt: on
    assert status == 0
    said = capsys.readouterr().out
    steering = json.loads("{" + said[said.index('"steering"') :] + "}")["steering"]
    assert [each["name"] for each in steering["directions"]] == [
        "it/fear bias",
        "it/fear 1",
        "it/fear 2",
    ]
    assert main(["train", "--model", str(model_dir), "--preset", "bipo", "--data", "x", "--name",
                 "it", "--out", str(out)]) == 1  # fmt: skip
    assert "must be NAME=FILE" in capsys.readouterr().err
