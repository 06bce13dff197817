"""The packs of one process, which may change while it runs.

Names live in an immutable :class:`PackRegistry` that is exchanged as a whole; directions are found
by content for as long as a request may need them, also when their pack was replaced. Importing this
module imports neither torch nor vllm.
"""

from __future__ import annotations

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
    store = _stores.get(_key(config))
    if store is None:
        pairs = zip(config.packs, config.digests, strict=True)
        store = keep_store(config, PackRegistry(load_checked(*pair) for pair in pairs))
    return store


def keep_store(config: ResolvedConfig, registry: PackRegistry) -> PackStore:
    """Makes the packs that were read for an engine those that this process uses for it.

    Args:
        config: The engine's configuration.
        registry: Its packs as they were read.
    """
    store = PackStore(registry)
    # The packs of an engine that is gone would only take memory.
    _stores.clear()
    _stores[_key(config)] = store
    return store


_stores: dict[tuple[tuple[str, ...], tuple[str, ...]], PackStore] = {}


def _key(config: ResolvedConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(config.packs), tuple(config.digests)
