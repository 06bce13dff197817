"""The packs of one process, which may change while it runs.

Directions are found by name in the loaded packs, and by content for as long as a request may need them, even
after their pack was replaced. Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

from vllm_steer.config import ResolvedConfig
from vllm_steer.errors import PackError
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.packs.registry import LoadedDirection, PackRegistry


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """The state of a store at one moment.

    Attributes:
        registry: The packs that requests can name.
        retired: Directions by content that no longer have a name but may still be needed by requests.
    """

    registry: PackRegistry
    retired: Mapping[str, LoadedDirection]


class PackStore:
    """The packs an engine was started with, and those loaded later.

    The state is one immutable snapshot that is swapped atomically: concurrent readers see all of a change or
    none.
    """

    def __init__(self, registry: PackRegistry) -> None:
        """Makes a store.

        Args:
            registry: Its first packs.
        """
        self._now = _Snapshot(registry, {})

    @property
    def registry(self) -> PackRegistry:
        """The packs that requests can name now; read it once where names must be consistent."""
        return self._now.registry

    @property
    def retired(self) -> set[str]:
        """Digests of content that no longer has a name."""
        return set(self._now.retired)

    def by_digest(self, digest: str) -> LoadedDirection:
        """Returns a direction by content, including those of replaced packs.

        Raises:
            PackError: This process does not have it.
        """
        now = self._now
        return now.retired.get(digest) or now.registry.by_digest(digest)

    def add(self, pack: SteeringPack) -> SteeringPack | None:
        """Adds a pack, or replaces the one with its name, whose content is kept.

        Returns:
            The pack that was replaced.
        """
        packs = dict(self.registry.packs)
        old = packs.get(pack.name)
        packs[pack.name] = pack
        self._swap(packs, old)
        return old

    def remove(self, name: str) -> SteeringPack:
        """Removes a pack's name; its content is kept until :meth:`forget`."""
        packs = dict(self.registry.packs)
        old = packs.pop(name)
        self._swap(packs, old)
        return old

    def forget(self, digests: set[str]) -> None:
        """Drops content that no request needs any longer."""
        now = self._now
        kept = {digest: found for digest, found in now.retired.items() if digest not in digests}
        self._now = _Snapshot(now.registry, kept)

    def _swap(self, packs: dict[str, SteeringPack], old: SteeringPack | None) -> None:
        now, registry = self._now, PackRegistry(packs.values())
        retired = dict(now.retired)
        if old is not None:
            found = (now.registry.find(f"{old.name}/{name}") for name in old.directions)
            retired |= {direction.digest: direction for direction in found}
        self._now = _Snapshot(
            registry,
            {digest: found for digest, found in retired.items() if not registry.has(digest)},
        )


def load_checked(path: str, sha256: str) -> SteeringPack:
    """Loads a pack chosen by another process.

    Args:
        path: Its directory.
        sha256: Digest of its tensor file, as the other process read it.

    Raises:
        PackError: It is malformed, or is not the chosen one.
    """
    pack = load_pack(path)
    if pack.manifest.tensors.sha256 != sha256:
        raise PackError(f"steering pack {pack.name!r} ({path}) changed on disk while it was loaded")
    return pack


def configured_store(config: ResolvedConfig) -> PackStore:
    """Returns the store of an engine, read once per process and kept while referenced.

    Raises:
        PackError: The packs on disk are not those that the engine was configured with.
    """
    store = _stores.get(_key(config))
    if store is None:
        pairs = zip(config.packs, config.digests, strict=True)
        registry = PackRegistry(load_checked(*pair) for pair in pairs)
        store = _stores[_key(config)] = PackStore(registry)
    return store


def keep_store(config: ResolvedConfig, registry: PackRegistry) -> None:
    """Makes this process use the given packs for an engine.

    Args:
        config: The engine's configuration.
        registry: Its packs.
    """
    global _latest
    _latest = _stores[_key(config)] = PackStore(registry)


# Weak, so that stores of stopped engines do not take memory.
_stores: WeakValueDictionary[tuple[tuple[str, ...], tuple[str, ...]], PackStore] = (
    WeakValueDictionary()
)
# Held until the configured engine holds it.
_latest: PackStore | None = None


def _key(config: ResolvedConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(config.packs), tuple(config.digests)
