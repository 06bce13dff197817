"""The rules of the house: who may import whom, and how light the package stays."""

from __future__ import annotations

import ast
import subprocess
import sys
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


def imports(package: str) -> list[tuple[Path, str, bool]]:
    """File, imported module, and whether the import waits for a call, or never happens."""
    found = []
    for file in (ROOT / package).rglob("*.py"):
        tree = ast.parse(file.read_text())
        inside = {
            id(node)
            for scope in ast.walk(tree)
            if isinstance(scope, ast.FunctionDef) or _for_types_alone(scope)
            for node in ast.walk(scope)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                found.append((file, node.module, id(node) in inside))
            elif isinstance(node, ast.Import):
                found += [(file, alias.name, id(node) in inside) for alias in node.names]
    return found


def _for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_offline_knows_only_packs_errors_and_what_starts_an_engine() -> None:
    known = {f"vllm_steer.{name}" for name in ("pack", "errors", "memory", "root_cause")}
    for file, module, _ in imports("offline"):
        if module.startswith("vllm_steer"):
            assert module in known, file


def test_serving_code_knows_offline_only_inside_cli_handlers() -> None:
    for file, module, inside in imports("vllm_steer"):
        if module.startswith("offline"):
            assert inside, file
            assert file.name.startswith("cli"), file


def test_front_desk_and_workshop_do_not_meet() -> None:
    for file, module, _ in imports("vllm_steer/serving"):
        assert not module.startswith("vllm_steer.engine"), file
    for file, module, _ in imports("vllm_steer/engine"):
        assert not module.startswith("vllm_steer.serving"), file


def test_reference_is_fresh() -> None:
    from vllm_steer.cli.reference_docs import render

    written = (ROOT / "REFERENCE.md").read_text()
    assert written == render(), "run python -m vllm_steer.cli.reference_docs > REFERENCE.md"
