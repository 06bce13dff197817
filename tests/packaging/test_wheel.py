"""A wheel built from the source distribution installs into an empty environment and brings the plugin."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]

LOOK = """
from importlib.metadata import entry_points
(plugin,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "vllm_steer"]
print(plugin.load().__module__)
import importlib.util, sys
print({name: importlib.util.find_spec(name) is not None for name in ("torch", "vllm", "offline")})
from vllm_steer.offline.demo import demo_model_path
print((demo_model_path() / "model.safetensors").is_file())
from vllm_steer.offline.questions.everyday import everyday_questions
from vllm_steer.offline.showcase import shipped_pack
from vllm_steer.packs.pack import load_pack
print(len(everyday_questions().heldout), load_pack(shipped_pack()).name)
from vllm_steer.serving import playground
print(sum(bool(playground._read(name).content) for name in playground.FILES) == len(playground.FILES))
"""


def test_the_wheel_brings_the_plugin(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vllm_steer-*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    done = subprocess.run(
        [python, "-c", LOOK], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == [
        "vllm_steer.plugin",
        "{'torch': False, 'vllm': False, 'offline': False}",
        "True",
        "96 smollm2",
        "True",
    ]
    shown = subprocess.run(
        [python.with_name("vllm-steer"), "--help"], check=True, capture_output=True, text=True
    )
    for command in ("demo", "extract", "inspect", "verify"):
        assert command in shown.stdout
