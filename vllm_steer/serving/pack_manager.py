"""Loads and unloads packs, aliases and uploaded vectors while the server runs.

Off unless ``--steering-pack-roots`` names the directories that packs may be loaded from, or
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

# How long vectors whose time is over wait for the requests that use them.
_RETRY_SECONDS = 1.0
_MAX_VALUES = 64
# How long the engine goes on before it is asked again whether it has read a pack.
_POLL_SECONDS = 0.02


class LoadRequest(BaseModel):
    """Body of ``POST /v1/steering/packs``.

    Attributes:
        name: Name of a pack, the name of its directory in one of the roots.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[PackName, Field()]


class PackManager:
    """Changes the packs and aliases of one server, one change at a time.

    Every change takes the SHA-256 of the API key that asked for it, None without one, for the log.
    """

    def __init__(
        self, admission: Admission, store: PackStore, roots: list[str], engine: AsyncLLM
    ) -> None:
        """Makes the manager.

        Args:
            admission: The server's admission.
            store: Its packs.
            roots: Directories that packs may be loaded from.
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
        """Loads a pack, or loads it again.

        Requests that were admitted before keep the content that they were admitted with.

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
                # Where the server keeps it is nothing for the client.
                raise PackError(str(error).replace(str(path), name)) from error
            if pack.name != name:
                raise PackError(f"the pack in the directory {name!r} is named {pack.name!r}")
            self._check_change(pack, key_digest)
            return await self._serve(pack, key_digest)

    async def upload(
        self, name: str, body: bytes, seconds: float, key_digest: str | None
    ) -> SteeringPack:
        """Serves vectors that a client sent, and forgets them after a time, or when no request uses them.

        Args:
            name: Name of the pack that they become.
            body: As :func:`vllm_steer.serving.uploads.write_upload` takes it.
            seconds: For how long.
            key_digest: SHA-256 of the API key.

        Raises:
            RequestError: The name or the body is malformed.
            PackError: The vectors cannot be served.
            ConflictError: A pack of another origin has the name, or there is no room.
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
            # What is served now stays on disk until the new is served in its place.
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
        """Forgets vectors that a client sent.

        Raises:
            RequestError: There are none of that name.
            ConflictError: They are in use, or an alias or the default needs them.
        """
        if name not in self._upload_registry:
            raise RequestError(f"there are no uploaded vectors {name!r}")
        await self.unload(name, key_digest)

    def _enter(self, name: str, seconds: float, owner: str | None, num_bytes: int) -> None:
        """Notes vectors that are served, and ends them after a time."""

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
        """Raises NotAllowedError where a key may not load, replace or unload a pack."""
        replaced = self._store.registry.packs.get(pack.name)
        names = {*pack.directions, *(replaced.directions if replaced else ())}
        policy = self._admission.policy
        policy.check_change(key_digest, [f"{pack.name}/{name}" for name in sorted(names)])

    async def _serve(self, pack: SteeringPack, key_digest: str | None) -> SteeringPack:
        """Loads a pack in every process, in the place of one with its name."""
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
        # vLLM hands on an error of the engine as a bare Exception.
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
        # First the name, so that no new request can come while the content is looked for.
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
        """Lets a model name stand for a steering: :func:`vllm_steer.serving.aliases.with_alias`."""
        # Not while a pack is replaced that the alias may need.
        async with self._turn:
            before, registry = self._admission.policy, self._store.registry
            self._admission.policy = with_alias(before, registry, alias, body, key_digest)

    def drop_alias(self, alias: str, key_digest: str | None) -> None:
        """Ends an alias: :func:`vllm_steer.serving.aliases.without_alias`."""
        before, registry = self._admission.policy, self._store.registry
        self._admission.policy = without_alias(before, registry, alias, key_digest)

    async def _forget(self, names: list[str]) -> None:
        """Frees the content that no name leads to and no request uses, in every process."""
        store = self._store
        unused = sorted(d for d in store.retired if not self._admission.active[d])
        # Also of nothing: an engine drops what its requests needed when it was let go of.
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
