"""What ``vllm serve`` says of steering before it serves: help, and refused starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_steer.errors import ConfigError, PackError, SteeringError
from vllm_steer.packs.pack import MANIFEST_FILE, SteeringPack
from vllm_steer.serving.admission import Wanted

VLLM = str(Path(sys.executable).with_name("vllm"))


@pytest.mark.parametrize("option", ["--help", "--help=all", "--help=SteeringConfig"])
def test_help_shows_the_flags(option: str) -> None:
    done = subprocess.run([VLLM, "serve", option], capture_output=True, text=True, check=True)
    for flag in ("--enable-steering", "--steering-packs", "--steering-rows"):
        assert flag in done.stdout


def test_a_server_with_a_foreign_pack_does_not_start(
    model: Path, packs: list[SteeringPack], tmp_path: Path
) -> None:
    foreign = _copy(packs[0], tmp_path / "foreign", hidden=None, num_layers=9)
    done = subprocess.run(
        [VLLM, "serve", str(model), "--enable-steering", "--steering-packs", str(foreign)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert "was extracted from another model" in done.stdout + done.stderr
    assert "num_layers 9 where the served model has 6" in done.stdout + done.stderr


def config(model: Path, **fields: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), **fields).create_engine_config()


def steering(*packs: Path | str, **fields: Any) -> dict[str, Any]:
    return {"steering": {"packs": [str(pack) for pack in packs], **fields}}


def _copy(pack: SteeringPack, path: Path, hidden: int | None, **model: Any) -> Path:
    path.mkdir()
    for file in pack.path.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    manifest["model"].update(model)
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p, t: steering(t / "nowhere"), PackError, "not a directory"),
        (lambda p, t: steering(p[0].path, p[0].path), ConfigError, "two steering packs are named"),
        (lambda p, t: steering(_copy(p[0], t / "x", None, model_type="gpt2")), PackError, "model_type 'gpt2'"),
        (lambda p, t: steering(p[0].path, rows=4), ConfigError, "steering rows 4 are fewer than"),
        (lambda p, t: steering(p[0].path, row=4), ConfigError, "steering.row: .*did you mean 'rows'"),
        (lambda p, t: steering(), ConfigError, "steering.packs:"),
        (lambda p, t: {"steering": str(p[0].path)}, ConfigError, "additional_config.steering:"),
    ],
)  # fmt: skip
def test_refused_configurations(
    make: Any, error: type[SteeringError], message: str,
    model: Path, packs: list[SteeringPack], tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        config(model, additional_config=make(packs, tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steering-packs", "x"], "needs --enable-steering"),
        (["--steering-rows", "8"], "needs --enable-steering"),
        (["--enable-steering"], "needs --steering-packs PACK"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(ConfigError, match=message):
        AsyncEngineArgs.from_cli_args(parser.parse_args(flags))


def test_steering_is_refused_where_the_engine_was_started_without(model: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    from vllm_steer.serving.admission import Admission

    admission = Admission(config(model))
    extra_args = {"steer": ["spiders"]}
    request = admission.parse(extra_args)
    assert request is not None
    with pytest.raises(VLLMValidationError, match="start it with --enable-steering"):
        admission.admit(Wanted(request), prompt_len=3)
