"""``vllm-steer bench`` and ``extract --rollouts``: what is refused before an engine starts, in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_steer.cli import main
from vllm_steer.testing.random_pack import random_identity, write_random_pack


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_random_pack(
        tmp_path / "pack", "pack", random_identity(32, 3), {"rain": [1]}, seed=0, default_scale=4.0, safe_scale=8.0,
        residual_norm=10.0,
    )  # fmt: skip
    (tmp_path / "concepts").write_text(json.dumps([{"description": "rain", "index": "1"}]))
    (tmp_path / "instructions").write_text(json.dumps([{"instruction": "Say."}] * 3))
    (tmp_path / "judge.py").write_text("def grade(case):\n    return 1\n")
    (tmp_path / "data").mkdir()
    for language in ("en", "de"):
        (tmp_path / "data" / f"{language}.txt").write_text("one\ntwo\n")
    (tmp_path / "questions.jsonl").write_text('{"prompt": "Why?"}\n')
    return tmp_path


AXBENCH = "bench axbench pack --model m --out o --concepts concepts --instructions instructions"
CLAS = "bench clas-bench pack --model m --out o --questions data"
ROLLOUTS = "extract --model m --name n --out o --rollouts it=questions.jsonl"
SCRIPT = "--judge script --script judge.py"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{AXBENCH} --judge llm", "--judge llm needs --judge-url and --judge-model"),
        (f"{AXBENCH} --judge script", "--judge script needs --script FILE"),
        (f"{AXBENCH} --judge script --script nowhere.py", "there is no file 'nowhere.py'"),
        (f"{AXBENCH} {SCRIPT}", "10 instructions are wanted for each concept, and the file has 3"),
        (f"{AXBENCH} {SCRIPT} --factors 1 1", "must be distinct"),
        (f"{AXBENCH} {SCRIPT} --names data", "cannot read data"),
        (f"{AXBENCH} {SCRIPT} --neutral nowhere", "cannot read nowhere"),
        (f"{AXBENCH} {SCRIPT} --per-concept 2 --temperature -1", "temperature -1"),
        (f"{CLAS} {SCRIPT}", "layers are needed"),
        (f"{CLAS} {SCRIPT} --layers 1", "has no direction 'de'"),
        (f"{CLAS} {SCRIPT} --layers 1 --languages fr", "has no questions in 'fr'"),
        (f"{CLAS} {SCRIPT} --towards target --strengths 0", "none of them 0"),
        ("bench capability pack --model m --out o", "--neutral or --multiple-choice is needed"),
        ("bench capability nowhere --model m --out o --neutral judge.py", "nowhere"),
        (
            "bench capability pack --model m --out o --neutral judge.py --directions fog",
            "has no direction 'fog'",
        ),
        (f"{ROLLOUTS} --method roast", "--rollouts needs --judge"),
        (f"{ROLLOUTS} {SCRIPT}", "method: Field required"),
        (f"{ROLLOUTS} {SCRIPT} --method caa", "method"),
        (f"{ROLLOUTS} {SCRIPT} --method roast --estimator pca", "estimator"),
        (f"{ROLLOUTS} {SCRIPT} --method roast --scale 2", "--scale has no meaning for --rollouts"),
        (f"{ROLLOUTS} {SCRIPT} --method roast --shards 2", "leave --shards out"),
        (f"{ROLLOUTS} {SCRIPT} --method persona", "must be a JSON object with instruction"),
        (
            "extract --model m --name n --out o --prefixes questions.jsonl --method roast",
            "method 'roast' needs --rollouts",
        ),
        (
            "extract --model m --name n --out o --prefixes questions.jsonl --temperature 1",
            "--temperature belongs to the methods of --rollouts",
        ),
        (
            f"extract --model m --name n --out o --prefixes questions.jsonl {SCRIPT}",
            "--judge belongs to the methods of --rollouts",
        ),
    ],
)
def test_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    assert main(command.split()) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("vllm-steer: ")
    assert said.count("\n") == 1
    assert not (here / "o").exists()
