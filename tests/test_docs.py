"""The README and the documentation: their programs and commands run, all else is held against what it names.

A test that runs a block of a page says so by ``runs``. Every other block is run by a test elsewhere, checked by
its kind, or excused with a reason; one that nobody covers fails. ``python -m tests.test_docs`` counts them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from tests.documents import ROOT, Fence, block, fence, fences
from tests.shell_commands import check
from vllm_steer.offline.bench.capability import Item
from vllm_steer.offline.convert.gguf_file import write_gguf
from vllm_steer.offline.convert.selection import PairLine
from vllm_steer.offline.demo.gold import gold_questions
from vllm_steer.offline.demo.judge import expressed_concept
from vllm_steer.offline.demo.server import SERVED_NAME, Server, free_port, running
from vllm_steer.offline.evaluate.judges import Case
from vllm_steer.offline.evaluate.script import Script, ScriptJudge
from vllm_steer.offline.fusion.questions import GoldQuestion
from vllm_steer.offline.fusion.results import FusionResult
from vllm_steer.offline.questions.by_class import Question
from vllm_steer.offline.rollouts.data import QuestionLine, TraitFile
from vllm_steer.offline.train.data import PreferenceLine
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.request.schema import SteeringRequest
from vllm_steer.serving.policy import Policy

BIN = Path(sys.executable).parent
# Blocks that a test runs, by what ``fence`` finds them by.
RUN: list[Fence] = []
# Blocks that tests in other modules run, and the module.
ELSEWHERE = {
    ("docs/how-to/monitor.md", "", "Steering request:"): "tests/server/test_middleware.py",
    (
        "docs/how-to/uploads.md",
        "python",
        "/v1/steering/vectors/",
    ): "tests/server/test_pack_manager.py",
    ("docs/tutorials/operate.md", "bash", "vllm-steer verify"): "tests/verify/test_verify.py",
    ("docs/findings.md", "", "straightforward     pipeline"): "tests/benchmarks/test_tables.py",
}
EXCUSED = {
    (
        "docs/findings.md",
        "",
        "plain prompts express any concept",
    ): "what python -m benchmarks.demo_model printed",
}
# JSON of the documentation is one of these.
SCHEMAS: tuple[type[Any], ...] = (
    SteeringRequest,
    Policy,
    GoldQuestion,
    PreferenceLine,
    QuestionLine,
    TraitFile,
    Item,
    PairLine,
)


def runs(page: str, language: str, containing: str) -> Callable[[Any], Any]:
    """Gives a test the code of a block, as ``code``, and counts the block as run."""
    found = fence(page, language, containing)
    RUN.append(found)
    return pytest.mark.parametrize("code", [found.code], ids=[page])


def how(each: Fence) -> str:
    """Returns how a block is covered.

    Raises:
        ValueError: Nobody covers it.
        AssertionError: It is not what it claims to be.
    """
    if each in RUN or each in [fence(*place) for place in ELSEWHERE]:
        return "run"
    if each in [fence(*place) for place in EXCUSED]:
        return "excused"
    if each.language == "bash":
        assert check(each.code)
        return "commands parsed"
    if each.language == "json":
        _validated(each.code)
        return "JSON validated"
    raise ValueError(f"{each}: no test covers this block")


def _validated(code: str) -> type[Any]:
    """Returns the schema that JSON is of."""
    value, errors = json.loads(code), []
    for schema in SCHEMAS:
        try:
            TypeAdapter(schema).validate_json(json.dumps(value))
        except ValueError as error:
            errors.append(str(error))
        else:
            return schema
    raise AssertionError("\n".join(errors))


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


@runs("docs/how-to/clients.md", "python", "chat.completions.create(")
@pytest.mark.server
def test_openai_client(code: str, server: Server, tmp_path: Path) -> None:
    code = code.replace("http://localhost:8000/v1", server.url)
    shown = run(
        [sys.executable, "-c", code + "\nprint(response.choices[0].message.content)"], tmp_path
    )
    assert shown.strip()


@pytest.fixture(scope="session")
def clients(pytestconfig: pytest.Config) -> Path:
    """Python of an environment with the other clients and without vLLM; kept in pytest's cache."""
    return environment(pytestconfig, "clients")


@pytest.fixture(scope="session")
def harnesses(pytestconfig: pytest.Config) -> Path:
    """Python of an environment with the other harnesses and without vLLM and torch; likewise."""
    return environment(pytestconfig, "harnesses")


def environment(pytestconfig: pytest.Config, group: str) -> Path:
    """Returns the Python of an environment with the packages of a dependency group."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"][group]
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir(group)
    ready, python = folder / "ready", folder / "bin" / "python"
    wanted = json.dumps([sys.version, *packages])
    if not ready.exists() or ready.read_text() != wanted:
        run([sys.executable, "-m", "venv", "--clear", str(folder)], ROOT)
        run([str(python), "-m", "pip", "install", "--quiet", "--no-compile", *packages], ROOT)
        ready.write_text(wanted)
    return python


# LiteLLM would fetch prices of models.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}


@runs("docs/how-to/clients.md", "python", "ChatOpenAI")
@pytest.mark.server
@pytest.mark.slow
def test_langchain(code: str, server: Server, clients: Path, tmp_path: Path) -> None:
    code = code.replace("http://localhost:8000/v1", server.url)
    code += 'first, second = (model.invoke("Hello") for model in (chat, same))\n'
    code += 'headers = second.response_metadata["headers"]\n'
    code += 'print(headers["x-steering"], first.content == second.content != "", sep="\\n")\n'
    shown = run([str(clients), "-c", code], tmp_path, **OFFLINE)
    assert shown.splitlines() == ["moods/cheerful:9", "moods/cheerful:9", "True"]


@runs("docs/how-to/clients.md", "python", "litellm")
@pytest.mark.server
@pytest.mark.slow
def test_litellm(code: str, server: Server, clients: Path, tmp_path: Path) -> None:
    code = code.replace("http://localhost:8000/v1", server.url)
    code += "first, second = (a.choices[0].message.content for a in (answer, same))\n"
    code += 'print(answer.steering == same.steering, first == second != "")\n'
    tokens, *equal = run([str(clients), "-c", code], tmp_path, **OFFLINE).split()
    assert int(tokens) > 0
    assert equal == ["True", "True"]


@runs("docs/how-to/harnesses.md", "bash", "lm_eval run")
@pytest.mark.server
@pytest.mark.slow
def test_lm_evaluation_harness(
    code: str, server: Server, harnesses: Path, model: Path, tmp_path: Path
) -> None:
    """The alias steers what is scored, on the harness's own questions."""
    code = code.replace("http://localhost:8000/v1", server.url).replace("MODEL", str(model))
    path = f"{harnesses.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **OFFLINE, "PATH": path, "HF_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for name in ("plain", "steered"):
        (results,) = (tmp_path / name).rglob("results_*.json")
        assert 0 <= json.loads(results.read_text())["results"]["facts"]["acc,none"] <= 1
        (samples,) = (tmp_path / name).rglob("samples_facts_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        found[name] = [
            float(one[0][0] if isinstance(one[0], list) else one[0])
            for line in lines
            for one in line["resps"]
        ]
    assert len(found["plain"]) == len(found["steered"]) == 6
    assert not np.allclose(found["plain"], found["steered"], atol=0.1)


@runs("docs/how-to/harnesses.md", "python", "inspect_ai")
@pytest.mark.server
@pytest.mark.slow
def test_inspect(code: str, server: Server, harnesses: Path, tmp_path: Path) -> None:
    code = code.replace("http://localhost:8000/v1", server.url)
    code += "import json\nprint(json.dumps([[log.status for log in logs], answers]))\n"
    statuses, (plain, steered) = json.loads(run([str(harnesses), "-c", code], tmp_path, **OFFLINE))
    assert statuses == ["success", "success"]
    assert plain != steered
    assert expressed_concept(steered) == "cheerful"


@runs("docs/how-to/rollouts.md", "python", "def grade")
def test_a_script_as_judge(code: str, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(code)
    line = QuestionLine.model_validate_json(block("docs/how-to/rollouts.md", "json", "reference"))
    question = Question(line.prompt, line.prompt)
    judge = ScriptJudge(Script.parse(str(tmp_path / "judge.py")))
    cases = [
        Case("general", "honest", question, text, True, line.reference)
        for text in ("17 times 3 is 51.", "It is 51, or 52.", "I do not know.")
    ]
    assert [grade.value for grade in judge.grade(cases)] == [1.0, 0.0, 0.0]


@runs("docs/how-to/clients.md", "bash", "/v1/completions")
@pytest.mark.server
def test_curl_in_the_flat_form(code: str, server: Server, tmp_path: Path) -> None:
    command = code.replace("http://localhost:8000/v1", server.url)
    answer = json.loads(run(["bash", "-c", command], tmp_path))
    assert answer["choices"][0]["text"]


@runs("README.md", "bash", "/v1/chat/completions")
@pytest.mark.server
def test_curl(code: str, server: Server, tmp_path: Path) -> None:
    command = code.replace("http://localhost:8000/v1", server.url)
    answer = json.loads(run(["bash", "-c", command], tmp_path))
    assert len(answer["steering"][0]["directions"]) == 2


@pytest.mark.server
def test_requests_that_every_server_carries_out(server: Server) -> None:
    """Each choice of positions of its page; what else the page has needs another server."""
    shown = [f.code for f in fences() if f.page == "docs/how-to/parts.md" and f.language == "json"]
    asked = [json.loads(code) for code in shown if "schedule" not in code]
    assert len(asked) == 4
    for steering in asked:
        body = {"model": SERVED_NAME, "prompt": "Hello, how are you today?", "max_tokens": 8} | {
            "steering": steering
        }
        answer = httpx.post(f"{server.url}/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["steering"]


@runs("docs/how-to/clients.md", "python", "import steer")
@pytest.mark.server
def test_steer_helper_and_receipt(code: str, server: Server, tmp_path: Path) -> None:
    code = code.replace("http://localhost:8000/v1", server.url)
    assert int(run([sys.executable, "-c", code], tmp_path)) > 0


@runs("docs/tutorials/operate.md", "bash", "/v1/steering/packs")
@pytest.mark.server
def test_routes_of_packs(code: str, server: Server, tmp_path: Path) -> None:
    commands = code.replace("http://localhost:8000/v1", server.url)
    listed, *changes = (run(["bash", "-c", c], tmp_path) for c in commands.strip().splitlines())
    assert json.loads(listed)["packs"]
    # This server was started without the flag.
    assert all("--steering-pack-roots" in answer for answer in changes)


def test_policy() -> None:
    policy = Policy.model_validate_json(block("docs/tutorials/operate.md", "json", '"aliases"'))
    assert policy.default is not None
    assert set(Policy.model_fields) == policy.model_fields_set


@runs("docs/how-to/clients.md", "python", "LLM(")
@pytest.mark.engine
def test_llm(code: str, model: Path, packs: list[SteeringPack], tmp_path: Path) -> None:
    (tmp_path / "packs").symlink_to(packs[0].path.parent)
    code = code.replace(
        "LLM(MODEL,",
        "LLM(MODEL, enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=2**28,",
    )
    given = f"MODEL = {str(model)!r}\nmessages = [{{'role': 'user', 'content': 'Hello'}}]\n"
    body = "".join(f"    {line}\n" for line in (given + code).splitlines())
    program = tmp_path / "program.py"
    program.write_text(f'if __name__ == "__main__":\n{body}')
    run([sys.executable, str(program)], tmp_path)


@runs("README.md", "bash", "vllm-steer extract")
@pytest.mark.engine
def test_extract_and_inspect(code: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "fears.txt").write_text("spiders\n")
    command = code.replace("MODEL", str(model))
    shown = run(["bash", "-ec", command], tmp_path)
    assert shown.count("steering pack 'fears', verified") == 2
    pack = load_pack(tmp_path / "packs" / "fears")
    assert pack.manifest.method.name == "trained"
    assert pack.directions["spiders"].calibration is not None


@runs("docs/how-to/evaluate.md", "bash", "vllm-steer sweep")
@pytest.mark.engine
def test_sweep_and_card(code: str, model: Path, packs: list[SteeringPack], tmp_path: Path) -> None:
    shutil.copytree(packs[0].path.parent, tmp_path / "packs")
    engine = '{"enforce_eager": true, "max_model_len": 512, "kv_cache_memory_bytes": 268435456}'
    command = code.replace("MODEL", str(model))
    command = command.replace("--judge keywords", f"--judge keywords --engine '{engine}'")
    shown = run(["bash", "-ec", command], tmp_path)
    assert "| fears | 2 |" in shown
    assert (tmp_path / "packs" / "fears" / "README.md").exists()
    assert (tmp_path / "packs" / "fears" / "pictures" / "scales.png").exists()


@runs("docs/how-to/fusion.md", "bash", "vllm-steer fusion")
@pytest.mark.engine
@pytest.mark.slow
def test_fusion(code: str, model: Path, tmp_path: Path) -> None:
    for name, split, count in (("questions", "heldout", 3), ("others", "tune", 2)):
        asked = gold_questions(split, count, prefixed_reference=True)
        lines = [question.model_dump_json() for question in asked]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    engine = '{"enforce_eager": true, "max_model_len": 256, "kv_cache_memory_bytes": 268435456}'
    command = code.replace("MODEL", str(model))
    command = command.replace("--trials 5", f"--trials 5 --engine '{engine}'")
    shown = run(["bash", "-ec", command], tmp_path)
    assert "3 of 3 questions that it gets wrong" in shown
    assert "| segmented, scales of other questions |" in shown
    assert len(load_pack(tmp_path / "results" / "pack").directions) == 5
    found = FusionResult.model_validate_json((tmp_path / "results" / "fusion.json").read_text())
    # The first trials of a search do not steer well; what it finds is measured by the benchmark.
    assert all(len(arm.by_trials) == 5 for arm in (found.arms["full"], found.arms["segmented"]))


@runs("docs/install.md", "bash", "vllm-steer model smollm2")
def test_model_to_try(code: str, smollm2: Path, tmp_path: Path) -> None:
    command = code + "\necho $MODEL"
    assert run(["bash", "-ec", command], tmp_path) == f"{smollm2}\n"


@runs("docs/tutorials/import-vectors.md", "bash", "vllm-steer convert")
def test_convert(code: str, model: Path, tmp_path: Path) -> None:
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    write_gguf(
        tmp_path / "happy.gguf", {2: np.ones(width, np.float32)}, model_type="llama", name="x"
    )
    torch.save({2: torch.ones(width), 3: torch.ones(width)}, tmp_path / "calm.pt")
    command = code.replace("MODEL", str(model))
    shown = run(["bash", "-ec", command], tmp_path)
    assert "steering pack 'moods', verified" in shown
    assert "--control-vector-scaled happy.gguf:1" in shown
    assert list(load_pack(tmp_path / "packs" / "moods").directions) == ["happy", "calm"]


FIRST = "docs/tutorials/first-pack.md"


@runs(FIRST, "bash", "vllm-steer extract")
@pytest.mark.server
@pytest.mark.slow
def test_the_first_tutorial(code: str, smollm2: Path, tmp_path: Path) -> None:
    """A real model from nothing to a steered answer: extract, serve, ask."""
    environment = {"MODEL": str(smollm2)}
    run(["bash", "-ec", code], tmp_path, **environment)
    pack = load_pack(tmp_path / "packs" / "own")
    assert pack.directions["pirate"].calibration is not None
    port = free_port()
    command = block(FIRST, "bash", "vllm serve").replace('"$MODEL"', str(smollm2)).split()
    given = [str(pack.path) if word == "packs/own" else word for word in command]
    answers = []
    with running([*given, "--port", str(port)], port, tmp_path / "log"):
        for part in ('about?"}]}', '"steering"'):
            asked = block(FIRST, "bash", part).replace(":8000", f":{port}")
            answers.append(json.loads(run(["bash", "-c", asked], tmp_path)))
    plain, steered = (answer["choices"][0]["message"]["content"] for answer in answers)
    assert plain != steered
    assert answers[1]["steering"][0]["tokens_steered"] > 0


@pytest.mark.parametrize("each", fences(), ids=str)
def test_every_block_is_covered(each: Fence) -> None:
    assert how(each)


def test_a_block_that_nobody_covers_is_noticed() -> None:
    unknown = Fence("README.md", 1, "", "anything")
    with pytest.raises(ValueError, match="no test covers"):
        how(unknown)
    for wrong in (
        "vllm-steer extrakt",
        "vllm-steer inspect",
        "vllm serve M --steering-paks x",
        "make nothing",
    ):
        with pytest.raises(AssertionError):
            how(Fence("README.md", 1, "bash", wrong))
    for code in ('{"directions": [{"nam": "x"}]}', '{"max_doze": 1}'):
        with pytest.raises(AssertionError):
            how(Fence("README.md", 1, "json", code))


@pytest.mark.parametrize("place", ELSEWHERE, ids=lambda place: place[0])
def test_blocks_that_run_elsewhere_are_named_there(place: tuple[str, str, str]) -> None:
    source = (ROOT / ELSEWHERE[place]).read_text()
    assert Path(place[0]).name in source or "FINDINGS" in source


if __name__ == "__main__":
    for kind, count in Counter(how(each) for each in fences()).items():
        sys.stdout.write(f"{kind}: {count}\n")
