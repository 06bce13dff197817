"""Uploaded vectors: their owners, sizes and expiry times.

Imports neither torch nor vllm.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from vllm_steer.errors import ConflictError, NotAllowedError
from vllm_steer.serving.policy import Policy


@dataclass(frozen=True)
class Upload:
    """Vectors sent by a client.

    Attributes:
        owner: SHA-256 of the API key that sent them, None without one.
        num_bytes: Length of the body.
        timer: Removes them.
    """

    owner: str | None
    num_bytes: int
    timer: asyncio.TimerHandle


class UploadRegistry:
    """The served uploads, by the name of their pack."""

    def __init__(self, most: int, most_bytes: int) -> None:
        """Makes an empty registry.

        Args:
            most: Largest number of uploads.
            most_bytes: Largest total size in bytes.
        """
        self._most, self._most_bytes = most, most_bytes
        self._uploads: dict[str, Upload] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._uploads

    def check_room(self, name: str, num_bytes: int) -> None:
        """Checks that another upload fits, or one that replaces that of its name.

        Raises:
            ConflictError: It does not fit now.
        """
        others = [upload for known, upload in self._uploads.items() if known != name]
        if len(others) >= self._most:
            raise ConflictError(
                f"{len(others)} uploads are served, which is the limit; delete one, wait until one expires, or raise "
                f"--steering-upload-count"
            )
        held = sum(upload.num_bytes for upload in others)
        if held + num_bytes > self._most_bytes:
            raise ConflictError(
                f"the uploads that are served have {held} bytes, and {num_bytes} more would exceed the limit of "
                f"{self._most_bytes}; delete one, wait until one expires, or raise --steering-upload-total-mib"
            )

    def check_owner(self, name: str, key_digest: str | None, policy: Policy) -> None:
        """Checks that a key may replace or remove an upload.

        Raises:
            NotAllowedError: Another key sent it, and this one is not an administrator's.
        """
        upload = self._uploads.get(name)
        if upload is None or upload.owner == key_digest or policy.administers(key_digest):
            return
        raise NotAllowedError(f"{name!r} was uploaded with another API key; choose another name")

    def enter(self, name: str, upload: Upload) -> None:
        """Registers an upload; cancels the timer of one with its name."""
        self.remove(name)
        self._uploads[name] = upload

    def remove(self, name: str) -> None:
        """Removes an upload, if there is one with that name."""
        upload = self._uploads.pop(name, None)
        if upload is not None:
            upload.timer.cancel()

    def find(self, name: str) -> Upload | None:
        """Returns the upload with a name."""
        return self._uploads.get(name)
