"""The packs of one process, which may change while it runs.

Names live in an immutable :class:`PackRegistry` that is exchanged as a whole; directions are found
by content for as long as a request may need them, also when their pack was replaced. Importing this
module imports neither torch nor vllm.
"""

from __future__ import annotations

from functools import lru_cache

from vllm_steer.config import ResolvedConfig
from vllm_steer.errors import PackError
from vllm_steer.pack import SteeringPack, load_pack
from vllm_steer.registry import LoadedDirection, PackRegistry


class PackStore:
    """The packs that an engine was started with, and those that came later.

    Attributes:
        registry: The packs that requests can name now.
    """

    def __init__(self, registry: PackRegistry) -> None:
        self.registry = registry
        self._retired: dict[str, LoadedDirection] = {}

    def by_digest(self, digest: str) -> LoadedDirection:
        """Returns a direction by content, of a pack that was replaced too.

        Raises:
            PackError: This process does not have it.
        """
        return self._retired.get(digest) or self.registry.by_digest(digest)

    def add(self, pack: SteeringPack) -> SteeringPack | None:
        """Adds a pack or puts it in the place of the one with its name, which is kept by content.

        Returns:
            The pack that was replaced.
        """
        packs = dict(self.registry.packs)
        old = packs.get(pack.name)
        packs[pack.name] = pack
        self._exchange(packs, old)
        return old

    def remove(self, name: str) -> SteeringPack:
        """Takes a pack's name away; its content is kept until :meth:`forget`."""
        packs = dict(self.registry.packs)
        old = packs.pop(name)
        self._exchange(packs, old)
        return old

    def forget(self, digests: set[str]) -> None:
        """Drops content that no request needs any more."""
        for digest in digests:
            self._retired.pop(digest, None)

    @property
    def retired(self) -> set[str]:
        """Digests of content that no name leads to."""
        return set(self._retired)

    def _exchange(self, packs: dict[str, SteeringPack], old: SteeringPack | None) -> None:
        if old is not None:
            self._retired |= {
                direction.digest: direction
                for name in old.directions
                if (direction := self.registry.find(f"{old.name}/{name}"))
            }
        self.registry = PackRegistry(packs.values())
        self.forget({d for d in self._retired if self.registry.has(d)})


def load_checked(path: str, sha256: str) -> SteeringPack:
    """Loads a pack that another process has chosen.

    Args:
        path: Its directory.
        sha256: Digest of its tensor file, as the other process read it.

    Raises:
        PackError: It is malformed, or not the one that was chosen.
    """
    pack = load_pack(path)
    if pack.manifest.tensors.sha256 != sha256:
        raise PackError(f"steering pack {pack.name!r} ({path}) changed on disk while it was loaded")
    return pack


def configured_store(config: ResolvedConfig) -> PackStore:
    """Returns the store of an engine, read once per process.

    Raises:
        PackError: The packs on disk are not those that the engine was configured with.
    """
    return _configured_store(tuple(config.packs), tuple(config.digests))


@lru_cache(maxsize=1)
def _configured_store(packs: tuple[str, ...], digests: tuple[str, ...]) -> PackStore:
    return PackStore(
        PackRegistry(
            load_checked(path, sha256) for path, sha256 in zip(packs, digests, strict=True)
        )
    )
