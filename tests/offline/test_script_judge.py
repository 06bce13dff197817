"""A user's own program as judge: what it is sent, and everything that it may do wrong."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.judges import Case, Grade
from vllm_steer.offline.evaluate.script import Script, ScriptJudge
from vllm_steer.offline.questions.by_class import Question

CASES = [
    Case("general", "sums", Question("q", "Two and two?"), text, True, "4")
    for text in ("4", 'five\n"5"', "")
]


def judge(tmp_path: Path, code: str, name: str = "grade.py", timeout: float = 60.0) -> ScriptJudge:
    file = tmp_path / name
    file.write_text(code)
    file.chmod(0o755)
    return ScriptJudge(Script.parse(str(file), timeout))


def test_a_function_is_sent_each_answer(tmp_path: Path) -> None:
    code = (
        "import helper\n"
        "def grade(case):\n"
        "    print('this is not a grade')\n"
        "    assert set(case) == {'prompt', 'answer', 'finished', 'concept', 'reference'}\n"
        "    return case['answer'] == case['reference'] if case['answer'] else helper.NOTHING\n"
    )
    (tmp_path / "helper.py").write_text("NOTHING = None")
    graded = judge(tmp_path, code).grade(CASES)
    assert graded == [Grade(1.0), Grade(0.0), Grade(None, "the script gave none")]


def test_another_function_and_an_executable(tmp_path: Path) -> None:
    file = tmp_path / "grade.py"
    file.write_text("def half(case):\n    return 0.5\n")
    assert ScriptJudge(Script.parse(f"{file}:half")).grade(CASES[:1]) == [Grade(0.5)]
    shell = judge(
        tmp_path, '#!/bin/sh\nsed \'s/.*"answer": "4".*/1/; t; s/.*/0.25/\'\n', "grade.sh"
    )
    assert shell.grade(CASES) == [Grade(1.0), Grade(0.25), Grade(0.25)]


def test_one_answer_costs_no_other_its_grade(tmp_path: Path) -> None:
    code = "def grade(case):\n    return {'4': 1 / 0} if case['answer'] == '4' else 0.5\n"
    first, *others = judge(tmp_path, code).grade(CASES)
    assert first.value is None
    assert "ZeroDivisionError" in first.error
    assert others == [Grade(0.5), Grade(0.5)]


@pytest.mark.parametrize("value", ["2", "-0.1", "float('nan')", "'good'", "float('inf')"])
def test_what_is_no_grade(tmp_path: Path, value: str) -> None:
    (found,) = judge(tmp_path, f"def grade(case):\n    return {value}\n").grade(CASES[:1])
    assert found.value is None
    assert "no number from 0 to 1" in found.error


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("grade.py", "def other(case):\n    return 1\n", "has no function 'grade'"),
        ("grade.py", "import nothing_of_this_name\n", "ended with status 1: ModuleNotFoundError"),
        ("grade.py", "def grade(case:\n", "SyntaxError|invalid syntax"),
        ("grade.py", "import os\ndef grade(case):\n    os._exit(3)\n", "ended with status 3"),
        ("grade.sh", "#!/bin/sh\ncat > /dev/null\necho 1\n", "wrote 1 lines for 3 answers"),
        ("grade.sh", "#!/bin/sh\nexit 0\n", "wrote 0 lines for 3 answers"),
        ("grade.sh", "#!/bin/sh\nsed 's/.*/maybe/'\n", "'maybe' in line 1, which is no JSON"),
        ("grade.sh", "#!/no/such/interpreter\n", "does not start"),
        ("grade.sh", "#!/bin/sh\necho out of luck >&2\nexit 4\n", "status 4: out of luck"),
    ],
)
def test_what_fails_as_a_whole(tmp_path: Path, name: str, code: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        judge(tmp_path, code, name).grade(CASES)


@pytest.mark.parametrize("then", ["sleep 60", "exit 0"])
def test_what_takes_too_long_ends_with_what_it_started(tmp_path: Path, then: str) -> None:
    """Also where the script itself has ended, and what it started holds its output."""
    code = f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/child\n{then}\n"
    started = time.monotonic()
    with pytest.raises(EvaluationError, match="took longer than 1 seconds"):
        judge(tmp_path, code, "grade.sh", timeout=1.0).grade(CASES)
    assert time.monotonic() - started < 30
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    os.kill(child, 9)
    pytest.fail("what the script started still runs")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.py", "there is no file"),
        ("nowhere.py:grade", "there is no file"),
        ("plain.txt", "neither a Python file"),
        ("own.py:not a name", "no name of a function"),
    ],
)
def test_scripts_that_cannot_be(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "plain.txt").write_text("1")
    (tmp_path / "own.py").write_text("")
    with pytest.raises(EvaluationError, match=message):
        Script.parse(str(tmp_path / given))


def test_its_name_changes_with_its_content(tmp_path: Path) -> None:
    first = judge(tmp_path, "def grade(case):\n    return 1\n").name
    assert first != judge(tmp_path, "def grade(case):\n    return 0\n").name
    assert str(tmp_path) not in first
