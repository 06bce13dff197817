"""The files of a pack directory: opened only inside it, replaced only together.

A pack is two files, linked by the digest in the manifest. A writer puts the new tensors next to the old ones
under a name with their digest, replaces the manifest, which switches the pack, and gives the tensors their
usual name. A reader takes the tensors under either name if their digest is the manifest's. So a writer killed
at any moment leaves a complete pack: the old one before the switch, the new one after it. Importing this
module imports neither torch nor vllm.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from vllm_steer.errors import PackError
from vllm_steer.packs.hub import hub_snapshot
from vllm_steer.packs.manifest import MANIFEST_FILE, VECTORS_FILE


def staged_name(sha256: str) -> str:
    """Name of a tensor file that does not have its usual name yet."""
    return f".{VECTORS_FILE}.{sha256}"


@contextmanager
def opened(root: Path, name: str) -> Iterator[tuple[FileIO, int]]:
    """Opens a file of a pack for reading and yields it with its size in bytes.

    A link may point to another file of the pack or, in the hub's cache, to the blobs of the same repository,
    as that cache stores files. Anything else is refused: a pack from elsewhere must not choose which files
    are read on this machine.

    Args:
        root: Directory of the pack.
        name: File name.

    Raises:
        FileNotFoundError: There is no such file.
        PackError: It points outside the pack, is not a regular file, or cannot be read.
    """
    file = root / name
    folder = os.path.realpath(root)
    target = os.path.realpath(os.path.join(folder, name))
    snapshot = hub_snapshot(Path(folder))
    if os.path.dirname(target) not in (folder, str(snapshot.blobs) if snapshot else folder):
        raise PackError(f"{file}: a link that points outside the pack; put the file itself there")
    try:
        # Opening a pipe would block until it has a writer.
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PackError(f"{file}: cannot be read ({error.strerror})") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise PackError(f"{file}: not a regular file; a steering pack holds plain files")
    with FileIO(descriptor) as stream:
        try:
            yield stream, status.st_size
        except OSError as error:
            raise PackError(f"{file}: cannot be read ({error.strerror})") from error


def read_manifest(root: Path, limit: int) -> tuple[bytes, tuple[int, ...]]:
    """Returns the bytes of a pack's manifest, and a stamp that differs after any replacement.

    Args:
        root: Directory of the pack.
        limit: Largest size in bytes; checked before reading.

    Raises:
        PackError: It is missing, too large, or cannot be read.
    """
    file = root / MANIFEST_FILE
    try:
        with opened(root, MANIFEST_FILE) as (stream, size):
            data = stream.read(limit + 1) if size <= limit else b""
            status = os.fstat(stream.fileno())
    except FileNotFoundError as error:
        raise PackError(
            f"{file}: cannot be read ({error.strerror}); a steering pack holds {MANIFEST_FILE} and "
            f"{VECTORS_FILE}"
        ) from error
    if size > limit or len(data) > limit:
        raise PackError(f"{file}: larger than the limit of {limit} bytes")
    return data, (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def replace_pack(root: Path, manifest: bytes, vectors: bytes, sha256: str) -> None:
    """Writes a pack into a directory, replacing any pack there; other files are kept.

    Args:
        root: Directory of the pack; created if missing.
        manifest: Content of its manifest.
        vectors: Content of its tensor file.
        sha256: Digest of ``vectors``, as the manifest has it.

    Raises:
        PackError: The directory cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            staged = root / staged_name(sha256)
            replace_file(staged, vectors)
            replace_file(root / MANIFEST_FILE, manifest)
            os.replace(staged, root / VECTORS_FILE)
            _sync(root)
            _sweep(root)
    except OSError as error:
        raise PackError(
            f"{root}: the pack cannot be written ({error.strerror}); give a directory that can be created"
        ) from error


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Excludes other writers of the same pack; the lock ends with the process that holds it."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace_file(file: Path, data: bytes) -> None:
    """Writes a file atomically: it has either its complete old or its complete new content."""
    with tempfile.NamedTemporaryFile(
        dir=file.parent, prefix=f".{file.name.lstrip('.')}.", delete=False
    ) as stream:
        try:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)
            os.replace(stream.name, file)
        except BaseException:
            os.unlink(stream.name)
            raise
    _sync(file.parent)


def _sync(folder: Path) -> None:
    """Makes the directory entries survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(root: Path) -> None:
    """Removes leftovers of killed writers; only under the lock, when every file has its usual name."""
    for name in os.listdir(root):
        if name.startswith((f".{VECTORS_FILE}.", f".{MANIFEST_FILE}.")):
            with suppress(FileNotFoundError):
                os.unlink(root / name)
