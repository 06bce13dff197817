"""The command line: what it shows and how it fails."""

from __future__ import annotations

import json

import pytest

from vllm_steer.cli import main
from vllm_steer.packs.pack import SteeringPack


def test_inspect(fears: SteeringPack, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(fears.path)]) == 0
    shown = capsys.readouterr().out
    assert "steering pack 'fears', verified" in shown
    assert fears.digests["spiders"][:12] in shown
    assert main(["inspect", "--json", str(fears.path)]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "fears"


def test_a_fault_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nowhere"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("vllm-steer: no steering pack at 'nowhere'")
