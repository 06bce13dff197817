"""Shell commands of the documentation, held against the programs that they name; nothing is run.

``vllm-steer`` and ``vllm serve`` are parsed by their own parsers, the JSON that ``curl`` sends by the
schema of requests. Of ``python -m``, ``make`` and ``pip`` the module, the options, the target and the
extra must exist.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from tests.documents import ROOT
from vllm_steer.cli import command_line
from vllm_steer.request.schema import parse
from vllm_steer.serving.packs_api import ROUTES

_SUBSTITUTION = re.compile(r"^\w+=\$\((.*)\)$")
_OPENAI = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class UnknownCommand(ValueError):
    """Nothing here knows the program."""


def check(script: str) -> int:
    """Checks every command of a script and returns how many there are.

    Raises:
        UnknownCommand: Nothing here knows a program.
        AssertionError: A program does not take a command as it stands.
    """
    commands = list(_commands(script))
    for command in commands:
        _check(command)
    return len(commands)


def _commands(script: str) -> Iterator[list[str]]:
    """The words of each command, without comments."""
    script = re.sub(r"(^|\s)#.*$", "", script.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(script, posix=True, punctuation_chars="&|;\n<>")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("&|;\n"):
            yield from [words] if words else []
            words = []
        else:
            words.append(word)
    yield from [words] if words else []


def _check(words: Sequence[str]) -> None:
    if substitution := _SUBSTITUTION.match(" ".join(words)):
        check(substitution[1])
        return
    for program, known in _KNOWN.items():
        if tuple(words[: len(program)]) == program:
            known(words[len(program) :])
            return
    raise UnknownCommand(shlex.join(words))


def _steer(words: Sequence[str]) -> None:
    try:
        command_line().parse_args(words)
    except SystemExit as error:
        raise AssertionError(f"vllm-steer {shlex.join(words)}") from error


def _serve(words: Sequence[str]) -> None:
    try:
        parsed = _server_parser().parse_args(list(words))
    except SystemExit as error:
        raise AssertionError(f"vllm serve {shlex.join(words)}") from error
    assert parsed.enable_steering, "a server of this documentation steers"


@cache
def _server_parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_steer.plugin import register

    register()
    return make_arg_parser(FlexibleArgumentParser())


def _curl(words: Sequence[str]) -> None:
    url = next(word for word in words if word.startswith("http://localhost:8000"))
    path = url.removeprefix("http://localhost:8000").partition("?")[0]
    body = json.loads(words[words.index("-d") + 1]) if "-d" in words else None
    if path in _OPENAI:
        assert body is not None
        assert {"model"} < body.keys()
        parse({key: body[key] for key in ("steering", "vllm_xargs") if key in body})
    else:
        method = words[words.index("-X") + 1] if "-X" in words else "GET"
        assert any(_is_route(f"{method} {path}", route) for route in ROUTES), f"{method} {path}"


def _is_route(asked: str, route: str) -> bool:
    pattern = re.sub(r"NAME|ALIAS", r"[^/]+", re.escape(route.partition("?")[0]))
    return re.fullmatch(pattern, asked) is not None


def _module(words: Sequence[str]) -> None:
    module, *options = words
    file = ROOT / f"{module.replace('.', '/')}.py"
    assert file.is_file(), module
    sources = file.read_text() + (ROOT / "benchmarks" / "options.py").read_text()
    for option in options:
        assert not option.startswith("--") or f'"{option}"' in sources, f"{module} {option}"


def _make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in words:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def _pip(words: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"^\.\[(.*)\]$", "\n".join(words), re.MULTILINE):
        for extra in extras.split(","):
            assert extra in project["optional-dependencies"], extra


def _is_file(words: Sequence[str]) -> None:
    assert words == [".venv/bin/activate"], words


def _nothing(words: Sequence[str]) -> None:
    """What a shell knows by itself."""


_KNOWN: dict[tuple[str, ...], Callable[[Sequence[str]], None]] = {
    ("vllm-steer",): _steer,
    ("vllm", "serve"): _serve,
    ("curl",): _curl,
    ("python", "-m"): _module,
    ("make",): _make,
    ("pip", "install"): _pip,
    (".",): _is_file,
    ("echo",): _nothing,
}
