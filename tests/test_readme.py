"""Every command and program of the README runs as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_steer.offline.convert.gguf_file import write_gguf
from vllm_steer.offline.demo.gold import gold_questions
from vllm_steer.offline.demo.server import Server
from vllm_steer.offline.fusion.results import FusionResult
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.serving.policy import Policy

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def block(language: str, containing: str) -> str:
    """The one fenced block of a language that contains a text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    (found,) = [code for code in blocks if containing in code]
    return str(found)


def run(command: list[str], cwd: Path, **environment: str) -> str:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.server
def test_openai_client(server: Server, tmp_path: Path) -> None:
    code = block("python", "chat.completions.create(").replace(
        "http://localhost:8000/v1", server.url
    )
    shown = run(
        [sys.executable, "-c", code + "\nprint(response.choices[0].message.content)"], tmp_path
    )
    assert shown.strip()


@pytest.fixture(scope="session")
def clients(pytestconfig: pytest.Config) -> Path:
    """Python of an environment with the other clients and without vLLM; kept in pytest's cache."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["clients"]
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("clients")
    ready, python = folder / "ready", folder / "bin" / "python"
    wanted = json.dumps([sys.version, *packages])
    if not ready.exists() or ready.read_text() != wanted:
        run([sys.executable, "-m", "venv", "--clear", str(folder)], ROOT)
        run([str(python), "-m", "pip", "install", "--quiet", "--no-compile", *packages], ROOT)
        ready.write_text(wanted)
    return python


# LiteLLM would fetch prices of models.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}


@pytest.mark.server
@pytest.mark.slow
def test_langchain(server: Server, clients: Path, tmp_path: Path) -> None:
    code = block("python", "ChatOpenAI").replace("http://localhost:8000/v1", server.url)
    code += 'first, second = (model.invoke("Hello") for model in (chat, same))\n'
    code += 'headers = second.response_metadata["headers"]\n'
    code += 'print(headers["x-steering"], first.content == second.content != "", sep="\\n")\n'
    shown = run([str(clients), "-c", code], tmp_path, **OFFLINE)
    assert shown.splitlines() == ["moods/cheerful:9", "moods/cheerful:9", "True"]


@pytest.mark.server
@pytest.mark.slow
def test_litellm(server: Server, clients: Path, tmp_path: Path) -> None:
    code = block("python", "litellm").replace("http://localhost:8000/v1", server.url)
    code += "first, second = (a.choices[0].message.content for a in (answer, same))\n"
    code += 'print(answer.steering == same.steering, first == second != "")\n'
    tokens, *equal = run([str(clients), "-c", code], tmp_path, **OFFLINE).split()
    assert int(tokens) > 0
    assert equal == ["True", "True"]


@pytest.mark.server
def test_curl(server: Server, tmp_path: Path) -> None:
    command = block("bash", "/v1/completions").replace("http://localhost:8000/v1", server.url)
    answer = json.loads(run(["bash", "-c", command], tmp_path))
    assert answer["choices"][0]["text"]


@pytest.mark.server
def test_steer_helper_and_receipt(server: Server, tmp_path: Path) -> None:
    code = block("python", "import steer").replace("http://localhost:8000/v1", server.url)
    assert int(run([sys.executable, "-c", code], tmp_path)) > 0


@pytest.mark.server
def test_routes_of_packs(server: Server, tmp_path: Path) -> None:
    commands = block("bash", "/v1/steering/packs").replace("http://localhost:8000/v1", server.url)
    listed, *changes = (run(["bash", "-c", c], tmp_path) for c in commands.strip().splitlines())
    assert json.loads(listed)["packs"]
    # This server was started without the flag.
    assert all("--steering-pack-roots" in answer for answer in changes)


def test_policy() -> None:
    policy = Policy.model_validate_json(block("json", '"aliases"'))
    assert policy.default is not None
    assert set(Policy.model_fields) == policy.model_fields_set


@pytest.mark.engine
def test_llm(model: Path, packs: list[SteeringPack], tmp_path: Path) -> None:
    (tmp_path / "packs").symlink_to(packs[0].path.parent)
    code = block("python", "LLM(").replace(
        "LLM(MODEL,",
        "LLM(MODEL, enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=2**28,",
    )
    given = f"MODEL = {str(model)!r}\nmessages = [{{'role': 'user', 'content': 'Hello'}}]\n"
    body = "".join(f"    {line}\n" for line in (given + code).splitlines())
    program = tmp_path / "program.py"
    program.write_text(f'if __name__ == "__main__":\n{body}')
    run([sys.executable, str(program)], tmp_path)


@pytest.mark.engine
def test_extract_and_inspect(model: Path, tmp_path: Path) -> None:
    (tmp_path / "fears.txt").write_text("spiders\n")
    command = block("bash", "vllm-steer extract").replace("MODEL", str(model))
    shown = run(["bash", "-ec", command], tmp_path)
    assert shown.count("steering pack 'fears', verified") == 2
    pack = load_pack(tmp_path / "packs" / "fears")
    assert pack.manifest.method.name == "trained"
    assert pack.directions["spiders"].calibration is not None


@pytest.mark.engine
def test_sweep_and_card(model: Path, packs: list[SteeringPack], tmp_path: Path) -> None:
    shutil.copytree(packs[0].path.parent, tmp_path / "packs")
    engine = '{"enforce_eager": true, "max_model_len": 512, "kv_cache_memory_bytes": 268435456}'
    command = block("bash", "vllm-steer sweep").replace("MODEL", str(model))
    command = command.replace("--judge keywords", f"--judge keywords --engine '{engine}'")
    shown = run(["bash", "-ec", command], tmp_path)
    assert "| fears | 2 |" in shown
    assert (tmp_path / "packs" / "fears" / "README.md").exists()
    assert (tmp_path / "packs" / "fears" / "pictures" / "scales.png").exists()


@pytest.mark.engine
@pytest.mark.slow
def test_fusion(model: Path, tmp_path: Path) -> None:
    for name, split, count in (("questions", "heldout", 3), ("others", "tune", 2)):
        asked = gold_questions(split, count, prefixed_reference=True)
        lines = [question.model_dump_json() for question in asked]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    engine = '{"enforce_eager": true, "max_model_len": 256, "kv_cache_memory_bytes": 268435456}'
    command = block("bash", "vllm-steer fusion").replace("MODEL", str(model))
    command = command.replace("--trials 5", f"--trials 5 --engine '{engine}'")
    shown = run(["bash", "-ec", command], tmp_path)
    assert "3 of 3 questions that it gets wrong" in shown
    assert "| segmented, scales of other questions |" in shown
    assert len(load_pack(tmp_path / "results" / "pack").directions) == 5
    found = FusionResult.model_validate_json((tmp_path / "results" / "fusion.json").read_text())
    # The first trials of a search do not steer well; what it finds is measured by the benchmark.
    assert all(len(arm.by_trials) == 5 for arm in (found.arms["full"], found.arms["segmented"]))


def test_model_to_try(smollm2: Path, tmp_path: Path) -> None:
    command = block("bash", "vllm-steer model smollm2") + "\necho $MODEL"
    assert run(["bash", "-ec", command], tmp_path) == f"{smollm2}\n"


def test_convert(model: Path, tmp_path: Path) -> None:
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    write_gguf(
        tmp_path / "happy.gguf", {2: np.ones(width, np.float32)}, model_type="llama", name="x"
    )
    torch.save({2: torch.ones(width), 3: torch.ones(width)}, tmp_path / "calm.pt")
    command = block("bash", "vllm-steer convert").replace("MODEL", str(model))
    shown = run(["bash", "-ec", command], tmp_path)
    assert "steering pack 'moods', verified" in shown
    assert "--control-vector-scaled happy.gguf:1" in shown
    assert list(load_pack(tmp_path / "packs" / "moods").directions) == ["happy", "calm"]


def test_the_files_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
