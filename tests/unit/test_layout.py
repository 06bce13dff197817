"""The layout: which room may import which, and how light the package stays."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "module",
    [
        "vllm_steer",
        "vllm_steer.cli",
        "vllm_steer.plugin",
        "vllm_steer.engine.token_rows",
        "vllm_steer.engine.prefix_cache",
    ],
)
def test_imports_neither_torch_nor_vllm(module: str) -> None:
    code = f"import sys, {module}; sys.exit(str({{'torch', 'vllm'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()", done.stderr


@dataclass(frozen=True)
class Import:
    """One import: the file, its own module, the imported module, and whether it waits for a call or is for types alone."""

    file: Path
    own: str
    module: str
    inside: bool


def imports(folder: str) -> list[Import]:
    """The imports of a top-level folder's files; a name that is a module counts as that module."""
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        own = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        own = f"vllm_steer.{own}" if folder == "offline" else own
        tree = ast.parse(file.read_text())
        inside = {
            id(node)
            for scope in ast.walk(tree)
            if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types_alone(scope)
            for node in ast.walk(scope)
        }
        for node in ast.walk(tree):
            modules: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                modules = [name if _is_module(name) else node.module for name in names]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            found += [
                Import(file, own.removesuffix(".__init__"), module, id(node) in inside)
                for module in modules
            ]
    return found


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


BASE = "vllm_steer/base"


def allowed() -> dict[str, set[str]]:
    """Room to the rooms that it may import, as the table of CONTRIBUTING.md says, from bottom to top."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| room | what it does |") : text.index("## From a request")]
    rooms: dict[str, set[str]] = {BASE: set()}
    for name, given in re.findall(r"^\| `([^`]+)` \|[^|]+\| ([^|]+) \|$", table, re.MULTILINE):
        words = given.split(", ")
        known = {word if "/" in word else f"vllm_steer/{word}" for word in words}
        rooms[name] = set(rooms) if words == ["everything"] else known | {BASE}
    return rooms


def room_of(module: str) -> str:
    """The room of one of the project's modules."""
    top, *parts = module.split(".")
    if parts[:1] == ["offline"]:
        top, *parts = parts
    if not parts:
        return f"{top}/__init__.py"
    if (ROOT / top / parts[0]).is_dir():
        return f"{top}/{parts[0]}"
    alone = top == "offline" or parts[0] in ("client", "plugin")
    return f"{top}/{parts[0]}.py" if alone else BASE


@pytest.mark.parametrize("folder", ["vllm_steer", "offline"])
def test_rooms_import_what_the_table_allows(folder: str) -> None:
    rooms = allowed()
    for found in imports(folder):
        room, other = room_of(found.own), room_of(found.module)
        if not found.module.startswith("vllm_steer") or room in (other, "vllm_steer/__init__.py"):
            continue
        assert room in rooms, f"{found.file}: {room} has no row in CONTRIBUTING.md"
        assert other in rooms[room], f"{found.file}: {room} may not import {found.module}"


def test_rows_of_the_table_exist_and_stand_below_what_they_import() -> None:
    seen: set[str] = set()
    for room, others in allowed().items():
        assert room == BASE or (ROOT / room).exists(), room
        assert others <= seen, f"{room} stands above {others - seen}"
        seen.add(room)


@pytest.mark.parametrize("folder", ["vllm_steer", "offline", "tests", "benchmarks"])
def test_nothing_imports_offline_by_its_folder(folder: str) -> None:
    """It would be a second copy of every module, and is not installed."""
    assert [
        str(found.file) for found in imports(folder) if found.module.startswith("offline")
    ] == []


def test_benchmarks_import_no_tests() -> None:
    """What both need stands in ``vllm_steer/testing``."""
    assert [
        f"{found.file}: {found.module}"
        for found in imports("benchmarks")
        if found.module.partition(".")[0] == "tests"
    ] == []


def test_tests_of_benchmarks_alone_import_benchmarks() -> None:
    assert [
        f"{found.file}: {found.module}"
        for found in imports("tests")
        if found.module.partition(".")[0] == "benchmarks"
        and not found.own.startswith("tests.benchmarks.")
    ] == []


def test_commands_import_torch_only_when_they_run() -> None:
    for found in imports("vllm_steer/cli"):
        if found.module.startswith("vllm_steer.offline"):
            assert found.inside, found.file


def test_reference_is_fresh() -> None:
    from vllm_steer.cli.reference_docs import render

    folder = ROOT / "docs" / "reference"
    for name, text in render().items():
        written = (folder / name).read_text()
        assert written == text, "run python -m vllm_steer.cli.reference_docs docs/reference"
