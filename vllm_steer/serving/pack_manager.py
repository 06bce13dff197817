"""Loads and unloads packs, aliases and uploaded vectors while the server runs.

Disabled unless ``--steering-pack-roots`` names the directories from which packs may be loaded, or
``--steering-upload-mib`` lets clients send vectors: a request gives a name, never a path.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Annotated, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_steer import log
from vllm_steer.errors import ConflictError, PackError, RequestError, explain_faults
from vllm_steer.fields import PackName
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.store import PackStore
from vllm_steer.packs.strict_json import parse_json
from vllm_steer.serving import metrics
from vllm_steer.serving.admission import Admission, announce_pack
from vllm_steer.serving.aliases import with_alias, without_alias
from vllm_steer.serving.upload_registry import Upload, UploadRegistry
from vllm_steer.serving.uploads import write_upload
from vllm_steer.vllm_compat.rpc import FORGET, LOAD, STAGE

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient

# Retry interval for expired vectors that requests still use.
_RETRY_SECONDS = 1.0
_MAX_VALUES = 64
# Interval of asking the engine whether it has read a pack.
_POLL_SECONDS = 0.02


class LoadRequest(BaseModel):
    """Body of ``POST /v1/steering/packs``.

    Attributes:
        name: Name of a pack and of its directory in one of the roots.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[PackName, Field()]


class PackManager:
    """Changes the packs and aliases of one server, one change at a time.

    Every change takes the SHA-256 of the requesting API key, None without one, for the log.
    """

    def __init__(
        self, admission: Admission, store: PackStore, roots: list[str], engine: AsyncLLM
    ) -> None:
        """Makes the manager.

        Args:
            admission: The server's admission.
            store: Its packs.
            roots: Directories from which packs may be loaded.
            engine: Its engine.
        """
        self._admission = admission
        self._store = store
        self._roots = [Path(root) for root in roots]
        # The client of every server: vLLM runs its engine core in a process of its own there.
        self._core = cast("AsyncMPClient", engine.engine_core)
        self._turn = asyncio.Lock()
        # Kept as long as the server runs, and removed with it.
        self._uploads = TemporaryDirectory(prefix="vllm-steer-")
        config = admission.config
        total = (config.upload_total_mib if config else None) or 0
        self._upload_registry = UploadRegistry(config.upload_count if config else 0, total * 2**20)
        self._expiring: set[asyncio.Task[None]] = set()

    async def load(self, body: bytes, key_digest: str | None) -> SteeringPack:
        """Loads or reloads a pack.

        Requests keep the content they were admitted with.

        Raises:
            RequestError: The body or the name is malformed.
            PackError: There is no such pack, or it cannot be served.
        """
        try:
            parse_json(body, _MAX_VALUES)
            name = LoadRequest.model_validate_json(body).name
        except ValidationError as error:
            raise RequestError(explain_faults(error, "body")) from error
        except ValueError as error:
            raise RequestError(f"body: {error}") from error
        async with self._turn:
            if name in self._upload_registry:
                raise ConflictError(
                    f"{name!r} is the name of uploaded vectors; choose another name"
                )
            path = self._find(name)
            try:
                pack = await asyncio.to_thread(load_pack, path)
            except PackError as error:
                # The client must not learn the server's path.
                raise PackError(str(error).replace(str(path), name)) from error
            if pack.name != name:
                raise PackError(f"the pack in the directory {name!r} is named {pack.name!r}")
            self._check_change(pack, key_digest)
            return await self._serve(pack, key_digest)

    async def upload(
        self, name: str, body: bytes, seconds: float, key_digest: str | None
    ) -> SteeringPack:
        """Serves uploaded vectors, and removes them after a time, once no request uses them.

        Args:
            name: Name of their pack.
            body: As in :func:`vllm_steer.serving.uploads.write_upload`.
            seconds: How long they are served.
            key_digest: SHA-256 of the API key.

        Raises:
            RequestError: The name or the body is malformed.
            PackError: The vectors cannot be served.
            ConflictError: Another kind of pack has the name, or there is no room.
            NotAllowedError: The key may not send them.
        """
        try:
            TypeAdapter(PackName).validate_python(name)
        except ValidationError as error:
            raise RequestError(explain_faults(error, "name")) from error
        async with self._turn:
            packs = self._store.registry.packs
            if name in packs and name not in self._upload_registry:
                raise ConflictError(
                    f"{name!r} is the name of a loaded steering pack; choose another name"
                )
            self._upload_registry.check_owner(name, key_digest, self._admission.policy)
            self._upload_registry.check_room(name, len(body))
            # The current pack stays on disk until the new one replaces it.
            root = Path(mkdtemp(dir=self._uploads.name))
            old = packs.get(name)
            try:
                pack = await asyncio.to_thread(write_upload, root, name, body, packs.values())
                self._check_change(pack, key_digest)
                served = await self._serve(pack, key_digest)
            except (RequestError, PackError):
                shutil.rmtree(root)
                raise
            if old is not None:
                shutil.rmtree(old.path)
            self._enter(name, seconds, key_digest, len(body))
            return served

    async def drop_upload(self, name: str, key_digest: str | None) -> None:
        """Removes uploaded vectors.

        Raises:
            RequestError: There are none with that name.
            ConflictError: They are in use, or an alias or the default needs them.
        """
        if name not in self._upload_registry:
            raise RequestError(f"there are no uploaded vectors {name!r}")
        await self.unload(name, key_digest)

    def _enter(self, name: str, seconds: float, owner: str | None, num_bytes: int) -> None:
        """Registers served vectors, and schedules their removal."""

        def expire() -> None:
            task = asyncio.ensure_future(self._expire(name, upload))
            self._expiring.add(task)
            task.add_done_callback(self._expiring.discard)

        timer = asyncio.get_running_loop().call_later(seconds, expire)
        upload = Upload(owner, num_bytes, timer)
        self._upload_registry.enter(name, upload)

    async def _expire(self, name: str, upload: Upload) -> None:
        async with self._turn:
            # Sent again or dropped meanwhile.
            if self._upload_registry.find(name) is not upload:
                return
            try:
                await self._unload(name, None)
            except RequestError:
                self._enter(name, _RETRY_SECONDS, upload.owner, upload.num_bytes)

    def _check_change(self, pack: SteeringPack, key_digest: str | None) -> None:
        """Raises NotAllowedError if a key may not load, replace or unload a pack."""
        replaced = self._store.registry.packs.get(pack.name)
        names = {*pack.directions, *(replaced.directions if replaced else ())}
        policy = self._admission.policy
        policy.check_change(key_digest, [f"{pack.name}/{name}" for name in sorted(names)])

    async def _serve(self, pack: SteeringPack, key_digest: str | None) -> SteeringPack:
        """Loads a pack in every process, replacing one with its name."""
        self._admission.check_servable(pack)
        packs = {**self._store.registry.packs, pack.name: pack}
        try:
            self._admission.policy.check(PackRegistry(packs.values()))
        except RequestError as error:
            raise ConflictError(
                f"steering pack {pack.name!r} conflicts with the policy: {error}"
            ) from None
        sha256 = pack.manifest.tensors.sha256
        chosen = str(pack.path), sha256
        try:
            while not await self._core.call_utility_async(STAGE, *chosen):
                await asyncio.sleep(_POLL_SECONDS)
            await self._core.call_utility_async(LOAD, *chosen)
        # vLLM passes on an engine error as a bare Exception.
        except Exception as error:
            raise ConflictError(
                f"the engine could not load steering pack {pack.name!r}: {error}"
            ) from error
        old = self._store.add(pack)
        await self._forget([])
        log.PACK_LOADED.write(
            name=pack.name,
            sha256=sha256,
            directions=len(pack.directions),
            replaced=old.manifest.tensors.sha256 if old else None,
            key=log.short_key(key_digest),
        )
        announce_pack(pack)
        return pack

    async def unload(self, name: str, key_digest: str | None) -> None:
        """Unloads a pack that no request uses.

        Raises:
            RequestError: No such pack is loaded.
            ConflictError: It is in use, or an alias or the default needs it.
            NotAllowedError: The key may not unload it.
        """
        async with self._turn:
            pack = self._store.registry.packs.get(name)
            if pack is not None:
                self._check_change(pack, key_digest)
                self._upload_registry.check_owner(name, key_digest, self._admission.policy)
            await self._unload(name, key_digest)

    async def _unload(self, name: str, key_digest: str | None) -> None:
        store = self._store
        if name not in store.registry.packs:
            raise RequestError(f"no steering pack {name!r} is loaded")
        pack = store.registry.packs[name]
        needed = self._admission.policy.named(store.registry, name)
        if needed:
            raise ConflictError(f"steering pack {name!r} is needed by {', '.join(needed)}")
        # The name first, so that no new request can use it while its content is looked up.
        store.remove(name)
        active = sum(self._admission.active[digest] for digest in pack.digests.values())
        if active:
            store.add(pack)
            raise ConflictError(
                f"steering pack {name!r} is in use by {active} requests; unload it when they are done"
            )
        await self._forget([name])
        metrics.DIRECTIONS.remove(name)
        if name in self._upload_registry:
            self._upload_registry.remove(name)
            shutil.rmtree(pack.path)
        digest = pack.manifest.tensors.sha256
        log.PACK_UNLOADED.write(name=name, sha256=digest, key=log.short_key(key_digest))

    async def set_alias(self, alias: str, body: bytes, key_digest: str | None) -> None:
        """Adds or replaces an alias: :func:`vllm_steer.serving.aliases.with_alias`."""
        # Not while a pack that the alias may need is replaced.
        async with self._turn:
            before, registry = self._admission.policy, self._store.registry
            self._admission.policy = with_alias(before, registry, alias, body, key_digest)

    def drop_alias(self, alias: str, key_digest: str | None) -> None:
        """Removes an alias: :func:`vllm_steer.serving.aliases.without_alias`."""
        before, registry = self._admission.policy, self._store.registry
        self._admission.policy = without_alias(before, registry, alias, key_digest)

    async def _forget(self, names: list[str]) -> None:
        """Frees content without a name that no request uses, in every process."""
        store = self._store
        unused = sorted(d for d in store.retired if not self._admission.active[d])
        # Even for nothing: an engine then drops content that its finished requests used.
        await self._core.call_utility_async(FORGET, unused, names)
        store.forget(set(unused))

    def _find(self, name: str) -> Path:
        for root in self._roots:
            path = (root / name).resolve()
            if not path.is_dir():
                continue
            if not path.is_relative_to(root.resolve()):
                raise PackError(
                    f"steering pack {name!r} is outside the directories of --steering-pack-roots"
                )
            return path
        raise PackError(f"no directory {name!r} in those of --steering-pack-roots")
