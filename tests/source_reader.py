"""Reads the signatures of a Python package from its source text, without importing it.

A few modules of a large package are looked at, so each is parsed when it is first needed.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
# Takes a path inside the package's root, such as "vllm/version.py", and returns its text.
ReadFile = Callable[[str], str | None]


def wheel_files(wheel: Path) -> ReadFile:
    """Files of a wheel, which is a zip."""
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    return lambda path: archive.read(path).decode() if path in names else None


def folder_files(root: Path) -> ReadFile:
    """Files below a directory, such as ``site-packages``."""
    return lambda path: (root / path).read_text() if (root / path).is_file() else None


@dataclass(frozen=True)
class Module:
    """One parsed module.

    Attributes:
        name: Its full name.
        is_package: Whether it is an ``__init__.py``.
        tree: Its syntax tree.
    """

    name: str
    is_package: bool
    tree: ast.Module

    def absolute(self, node: ast.ImportFrom) -> str:
        """Full name of the module that a ``from`` import takes from."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*base, *((node.module or "").split(".") if node.module else [])])


@dataclass(frozen=True)
class Found:
    """A function or class and the module that defines it."""

    node: Definition
    module: Module

    def parameters(self) -> tuple[str, ...]:
        """Names as ``inspect.signature`` gives them for a function or method of a class."""
        if isinstance(self.node, ast.ClassDef):
            raise TypeError(f"{self.node.name} is a class")
        given = self.node.args
        names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
        names += [given.vararg.arg] if given.vararg else []
        names += [argument.arg for argument in given.kwonlyargs]
        names += [given.kwarg.arg] if given.kwarg else []
        is_classmethod = any(
            isinstance(mark, ast.Name) and mark.id == "classmethod"
            for mark in self.node.decorator_list
        )
        return tuple(names[1:] if is_classmethod else names)


class SourceReader:
    """The definitions of a package.

    Args:
        read: Returns the text of a file of the package.
    """

    def __init__(self, read: ReadFile) -> None:
        self._read = read
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """The module of a name, or None where the package has none."""
        if name not in self._modules:
            path = name.replace(".", "/")
            files = ((f"{path}/__init__.py", True), (f"{path}.py", False))
            texts = ((self._read(file), is_package) for file, is_package in files)
            self._modules[name] = next(
                (Module(name, is_package, ast.parse(text)) for text, is_package in texts if text),
                None,
            )
        return self._modules[name]

    def find(self, module: str, name: str) -> Found | None:
        """The definition that ``module.name`` means, through imports and base classes."""
        first, *rest = name.split(".")
        found = self._top_level(module, first)
        for part in rest:
            found = self.member(found, part) if found else None
        return found

    def member(self, owner: Found, name: str) -> Found | None:
        """A method of a class or of the nearest base class that has it."""
        for found in self.classes(owner):
            for node in _statements(found.node.body):
                if isinstance(node, Function) and node.name == name:
                    return Found(node, found.module)
        return None

    def has_field(self, owner: Found, name: str) -> bool:
        """Whether a class or a base class declares a field or method or sets ``self.name``."""
        return any(name in _fields(found.node) for found in self.classes(owner))

    def class_value(self, owner: Found, name: str) -> str | None:
        """Source text of what a class or its nearest base class assigns to a name."""
        for found in self.classes(owner):
            for node in _statements(found.node.body):
                if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                    return ast.unparse(node.value)
        return None

    def calls(self, module: str, name: str) -> bool:
        """Whether a module calls a function or method of that name."""
        parsed = self.module(module)
        return parsed is not None and any(
            isinstance(node, ast.Call)
            and (
                (isinstance(node.func, ast.Name) and node.func.id == name)
                or (isinstance(node.func, ast.Attribute) and node.func.attr == name)
            )
            for node in ast.walk(parsed.tree)
        )

    def starts(self, module: str, name: str) -> bool:
        """Whether a module passes a function or method of that name as the ``target`` of a call."""
        parsed = self.module(module)
        return parsed is not None and any(
            isinstance(node, ast.keyword)
            and node.arg == "target"
            and ast.unparse(node.value).rpartition(".")[2] == name
            for node in ast.walk(parsed.tree)
        )

    def mentions(self, module: str, text: str) -> bool:
        """Whether a string literal of a module is exactly this text."""
        parsed = self.module(module)
        return parsed is not None and any(
            isinstance(node, ast.Constant) and node.value == text for node in ast.walk(parsed.tree)
        )

    def classes(self, owner: Found) -> Iterator[Found]:
        """A class and those of its base classes that the package holds, nearest first."""
        if not isinstance(owner.node, ast.ClassDef):
            return
        yield owner
        for base in owner.node.bases:
            if isinstance(base, ast.Subscript):
                base = base.value
            # Bases of other packages, such as nn.Module, are not looked at.
            found = self._top_level(owner.module.name, ast.unparse(base).split(".")[0])
            if found:
                yield from self.classes(found)

    def _top_level(self, module: str, name: str) -> Found | None:
        parsed = self.module(module)
        if parsed is None:
            return None
        for node in _statements(parsed.tree.body):
            if isinstance(node, Definition) and node.name == name:
                return Found(node, parsed)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._top_level(parsed.absolute(node), alias.name)
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, last first, because the last definition of a name is the one kept."""
    for node in reversed(body):
        yield node
        for field in ("finalbody", "orelse", "handlers", "body"):
            inner = getattr(node, field, None)
            if isinstance(inner, list) and not isinstance(node, Definition):
                yield from _statements(inner)


def _fields(node: Definition) -> set[str]:
    names = set()
    for statement in node.body:
        if isinstance(statement, Function):
            names.add(statement.name)
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names.add(statement.target.id)
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
        ):
            names.add(inner.attr)
    return names
