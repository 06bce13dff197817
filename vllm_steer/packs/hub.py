"""Packs on the Hugging Face Hub: ``owner/name@revision`` to a local directory.

Only the two files of a pack are fetched, into the hub's own cache, and only after their sizes are checked.
The directory there is named by the commit, so the path identifies the served revision. Importing this module
imports neither torch nor vllm.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllm_steer.errors import PackError, one_line
from vllm_steer.packs.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    MAX_VECTORS_BYTES,
    VECTORS_FILE,
)

_FILES: Final = {MANIFEST_FILE: MAX_MANIFEST_BYTES, VECTORS_FILE: MAX_VECTORS_BYTES}
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_SOURCE: Final = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9_./-]{{0,254}}))?"
)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSnapshot:
    """One commit of a repository in the hub's cache.

    Attributes:
        repo: ``owner/name``.
        commit: The commit, 40 hexadecimal digits.
        blobs: Directory that the files of the repository's snapshots are links to.
    """

    repo: str
    commit: str
    blobs: Path

    def __str__(self) -> str:
        """``owner/name@commit``, which always names the same content."""
        return f"{self.repo}@{self.commit}"


def hub_snapshot(path: Path) -> HubSnapshot | None:
    """Returns the commit in a directory of the hub's cache, None for any other directory."""
    repository = path.parent.parent
    kind, *names = repository.name.split("--")
    if (
        path.parent.name != "snapshots"
        or not _COMMIT.fullmatch(path.name)
        or kind != "models"
        or len(names) != 2
    ):
        return None
    return HubSnapshot("/".join(names), path.name, repository / "blobs")


def resolve_pack(source: str | os.PathLike[str]) -> Path:
    """Returns the absolute directory of a pack, fetched from the hub if necessary.

    Existing directories take precedence. Otherwise ``owner/name`` or ``owner/name@revision`` is a
    repository on the hub; a revision is a branch, a tag or a commit. A cached commit needs no network. For a
    branch or tag the hub is asked each time; with ``HF_HUB_OFFLINE=1`` the last cached commit is used.

    Args:
        source: A path or a repository.

    Raises:
        PackError: It is neither, or it cannot be fetched; the message says what would be valid.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path.absolute()
    match = _SOURCE.fullmatch(os.fspath(source))
    if not match or ".." in os.fspath(source):
        raise PackError(
            f"no steering pack at {os.fspath(source)!r}: that is not a directory; give the directory that "
            f"holds {MANIFEST_FILE}, or a hub repository as owner/name or owner/name@revision"
        )
    return _fetch(match["repo"], match["revision"] or "main")


def _fetch(repo: str, revision: str) -> Path:
    try:
        import huggingface_hub as hub
        from huggingface_hub.constants import HF_HUB_OFFLINE
    except ImportError:
        raise PackError(
            f"no directory {repo!r} here, and huggingface_hub, which fetches from the hub, is not "
            f"installed; pip install huggingface_hub"
        ) from None
    cached = None
    if HF_HUB_OFFLINE or _COMMIT.fullmatch(revision):
        cached = _cached(hub, repo, revision)
    if cached is not None:
        return cached
    if HF_HUB_OFFLINE:
        raise PackError(
            f"steering pack {repo}@{revision}: not in the cache of the hub, and HF_HUB_OFFLINE is set; "
            f"run vllm-steer inspect {repo}@{revision} once without it, or give a local directory"
        )
    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        _check_sizes(f"{repo}@{revision}", sizes)
        # By name, not by commit, so that the cache records the commit of the name.
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=list(_FILES)))
        if folder.name != info.sha:
            raise PackError(
                f"steering pack {repo}@{revision}: moved to another commit while it was fetched; try again"
            )
    except PackError:
        raise
    # Versions of huggingface_hub raise errors of three different HTTP libraries.
    except Exception as error:
        raise PackError(
            f"steering pack {repo}@{revision}: cannot be fetched from the hub ({_reason(error)}), and there "
            f"is no directory {repo!r} here; check the name, the revision, the network and HF_TOKEN, or "
            f"give ./{repo} for a directory"
        ) from error
    return folder


def _cached(hub: Any, repo: str, revision: str) -> Path | None:
    """Returns the cached snapshot of a revision, if it has both files of the pack."""
    try:
        folder = Path(
            hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(_FILES), local_files_only=True
            )
        )
    except (OSError, ValueError):
        return None
    return folder if all((folder / name).exists() for name in _FILES) else None


def _check_sizes(pack: str, sizes: dict[str, int | None]) -> None:
    for name, limit in _FILES.items():
        if name not in sizes:
            raise PackError(
                f"steering pack {pack}: the repository has no {name}; a steering pack holds "
                f"{MANIFEST_FILE} and {VECTORS_FILE} at its top"
            )
        size = sizes[name]
        if size is None or size > limit:
            raise PackError(
                f"steering pack {pack}: {name} has {size} bytes; it may have at most {limit}"
            )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 300)}"
