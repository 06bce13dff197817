"""An extraction that is killed, fails in part, or is spread over processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import vllm_steer.offline.extract.learning
from vllm_steer.cli import main
from vllm_steer.errors import ExtractionError
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.estimators.fit import fit_direction
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.figures import FIGURES_FILE
from vllm_steer.offline.extract.parts import PARTS_DIRECTORY
from vllm_steer.offline.extract.pipeline import ExtractionSettings, Shards, extract_pack
from vllm_steer.offline.models.prompts import Concept, prefix_for
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import MANIFEST_FILE, VECTORS_FILE, load_pack

NAMES = ("spiders", "heights", "needles", "cats")
CONCEPTS = [Concept(name, prefix_for("fears", name)) for name in NAMES]
TEXTS = [statement.text for statement in statements("extract")[:24]]
SETTINGS = ExtractionSettings(estimator="mean_difference", permutations=199)
FILES = (MANIFEST_FILE, VECTORS_FILE, FIGURES_FILE)


def extract(out: Path, settings: ExtractionSettings = SETTINGS, **changes):
    given = {"concepts": CONCEPTS, "device": "cpu"} | changes
    return extract_pack(
        demo_model_path(),
        ExtractionData(given.pop("concepts"), TEXTS[:12], TEXTS[12:]),
        settings,
        PackTarget("fears", out, 1.0, 1.0),
        ComputeResources(**given),
    )


def content(path: Path) -> list[bytes]:
    return [(path / file).read_bytes() for file in FILES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[bytes]:
    """The pack of an extraction that nothing disturbed."""
    return content(extract(tmp_path_factory.mktemp("whole")).path)


@pytest.fixture
def learned(monkeypatch) -> list[str]:
    """Names of the concepts that are learned, as they are."""
    names: list[str] = []

    def watched(estimator, rows, options):
        name = rows.name.split("'")[1]
        if name not in names:
            names.append(name)
        return fit_direction(estimator, rows, options)

    monkeypatch.setattr(vllm_steer.offline.extract.learning, "fit_direction", watched)
    return names


def test_a_killed_extraction_goes_on_where_it_was(tmp_path, whole, learned):
    out = tmp_path / "pack"
    program = textwrap.dedent(
        f"""
        import sys, torch
        torch.set_num_threads(1)
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from pathlib import Path
        from tests.offline.test_long_runs import extract
        extract(Path({str(out)!r}))
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list(out.rglob("*.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(list((out / PARTS_DIRECTORY).rglob("[!.]*.safetensors")))
    assert 1 <= finished < 4
    assert not (out / MANIFEST_FILE).exists()
    extract(out)
    assert len(learned) == 4 - finished
    assert content(out) == whole
    assert not (out / PARTS_DIRECTORY).exists()


def test_other_settings_or_statements_begin_anew(tmp_path, monkeypatch, learned):
    monkeypatch.setattr("vllm_steer.offline.extract.pipeline.write_pack", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path)
    assert learned == list(NAMES)
    learned.clear()
    for change in ({}, {"seed": 1}, {"labels": "hard"}):
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path, SETTINGS.model_copy(update=change))
        assert learned == (list(NAMES) if change else [])
        learned.clear()
    # Other concepts are only added, and a damaged file is no finished concept.
    next((tmp_path / PARTS_DIRECTORY).rglob("*.safetensors")).write_bytes(b"torn")
    for part in (tmp_path / PARTS_DIRECTORY).rglob("*.safetensors"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path)
    assert learned == list(NAMES)


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_failed_concept_is_reported_and_left_out(tmp_path, monkeypatch, whole, learned):
    failing = monkeypatch.setattr

    def fail(estimator, rows, options):
        if "heights" in rows.name:
            raise ExtractionError(f"{rows.name}: no luck")
        return fit_direction(estimator, rows, options)

    failing(vllm_steer.offline.extract.learning, "fit_direction", fail)
    message = "1 of 4 concepts failed: concept 'heights', block 1: no luck; .* holds the others"
    with pytest.raises(ExtractionError, match=message):
        extract(tmp_path)
    assert list(load_pack(tmp_path).directions) == ["spiders", "needles", "cats"]
    monkeypatch.undo()
    assert list(extract(tmp_path).directions) == list(NAMES)
    assert content(tmp_path) == whole


def test_the_command_ends_with_status_1_when_a_concept_failed(tmp_path, monkeypatch, capsys):
    def fail(estimator, rows, options):
        if "odd" in rows.name:
            raise ExtractionError(f"{rows.name}: no luck")
        return fit_direction(estimator, rows, options)

    (tmp_path / "prefixes.txt").write_text("calm: Be calm.\n\nodd: Be odd: very odd.\n")
    (tmp_path / "settings.json").write_text('{"estimator": "pca", "permutations": 0}')
    command = [
        "extract", "--model", str(demo_model_path()), "--name", "p", "--out", str(tmp_path / "p"),
        "--prefixes", str(tmp_path / "prefixes.txt"), "--workers", "1", "--no-calibrate",
        "--settings", str(tmp_path / "settings.json"), "--token", "-1", "--labels", "hard",
    ]  # fmt: skip
    for side in ("positive", "negative"):
        (tmp_path / f"{side}.txt").write_text("\n".join(TEXTS[:8]))
        command += [f"--{side}", str(tmp_path / f"{side}.txt")]
    monkeypatch.setattr(vllm_steer.offline.extract.learning, "fit_direction", fail)
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "vllm-steer: 1 of 2 concepts failed: concept 'odd', block 1: no luck" in captured.err
    assert list(load_pack(tmp_path / "p").directions) == ["calm"]
    monkeypatch.undo()
    assert main(command) == 0
    pack = load_pack(tmp_path / "p")
    assert list(pack.directions) == ["calm", "odd"]
    settings = pack.manifest.method.settings
    chosen = {key: settings[key] for key in ("estimator", "token", "labels", "permutations")}
    assert chosen == {"estimator": "pca", "token": -1, "labels": "hard", "permutations": 0}


def test_shards_give_the_same_bytes(tmp_path, whole):
    pytest.importorskip("ray", reason="Ray, of the extra 'ray', is not installed")
    assert content(extract(tmp_path, shards=Shards(2)).path) == whole


def test_shards_without_ray_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExtractionError, match="pip install 'vllm-steer\\[ray\\]'"):
        extract(tmp_path, shards=Shards(2))
