"""Vectors that clients send: what is refused, replaced or ended leaves no file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from vllm.exceptions import VLLMValidationError

from tests.unit.conftest import HIDDEN
from tests.unit.front_end import manager_of, started
from vllm_steer.errors import ConflictError, NotAllowedError, PackError, RequestError
from vllm_steer.packs.pack import MANIFEST_FILE, SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.plan.binding import bind
from vllm_steer.plan.resolve import resolve
from vllm_steer.request.schema import SteeringRequest
from vllm_steer.serving.admission import Wanted
from vllm_steer.serving.pack_manager import PackManager
from vllm_steer.serving.packs_api import describe
from vllm_steer.serving.policy import Policy
from vllm_steer.serving.uploads import write_upload


def body(layer: int, value: float = 1.0) -> bytes:
    vectors = {"sent": np.full((1, HIDDEN), value, np.float32)}
    return save(vectors, {"layers": f"[{layer}]"})


def test_files_last_as_long_as_what_is_served(fears: SteeringPack) -> None:
    admission = started(fears, layers=[1, 2, 3], upload_mib=1, upload_total_mib=1)
    store = admission.store
    assert store is not None

    async def run() -> None:
        def kept() -> list[Path]:
            return list(Path(manager._uploads.name).iterdir())

        with pytest.raises(PackError, match=r"layers \[0\]"):
            await manager.upload("mine", body(0), 60.0, None)
        assert not kept()
        first = await manager.upload("mine", body(1), 60.0, None)
        with pytest.raises(RequestError, match="it must be between"):
            await manager.upload("mine", body(1, 1e30), 60.0, None)
        assert kept() == [first.path]
        assert store.registry.packs["mine"] is first
        second = await manager.upload("mine", body(2), 60.0, None)
        assert kept() == [second.path]
        await manager.drop_upload("mine", None)
        assert not kept()

    with manager_of(admission) as manager:
        asyncio.run(run())


def test_what_a_client_sends_changes_no_name_that_others_use(fears: SteeringPack) -> None:
    """A direction is found by its name alone in what the operator loads."""
    admission = started(fears, layers=[1, 2, 3], upload_mib=1, upload_total_mib=1)
    same = save({"spiders": np.ones((1, HIDDEN), np.float32)}, {"layers": "[1]"})

    def used(name: str) -> list[str]:
        request = SteeringRequest.model_validate({"directions": [{"name": name}]})
        return list(admission.admit(Wanted(request), 10).receipt.names.values())

    with manager_of(admission) as manager:
        asyncio.run(manager.upload("mine", same, 60.0, None))
        assert used("spiders") == ["fears/spiders"]
        assert used("mine/spiders") == ["mine/spiders"]
        asyncio.run(manager.upload("other", body(1), 60.0, None))
        with pytest.raises(VLLMValidationError, match="no loaded steering pack has a direction"):
            used("sent")


def test_the_metrics_have_no_name_that_a_client_chose(fears: SteeringPack) -> None:
    """Else a client could take all the names that they tell apart, or read those of others."""
    admission = started(fears, layers=[1, 2, 3], upload_mib=1, upload_total_mib=1, reads=1)

    def names() -> list[str]:
        request = SteeringRequest.model_validate(
            {"read": [{"name": "fears/spiders"}, {"name": "mine/sent"}]}
        )
        reads = resolve(bind(request, registry), 10).reads
        return [admission.metric_name_of(read) for read in reads]

    assert admission.store is not None
    with manager_of(admission) as manager:
        asyncio.run(manager.upload("mine", body(1), 60.0, None))
        registry = admission.store.registry
        assert names() == ["fears/spiders", "uploaded"]
        asyncio.run(manager.unload("mine", None))
        assert names() == ["fears/spiders", "uploaded"]


OWNER, OTHER, ROOT = "a" * 64, "b" * 64, "c" * 64
NAMED = Policy(keys={OWNER: ["mine/*", "fears/*"], OTHER: ["*"], "*": ["fears/*"]})


@pytest.mark.parametrize(
    ("policy", "key", "allowed"),
    [
        (Policy(), None, True),
        (NAMED, OWNER, True),
        (NAMED, None, False),
        (NAMED, "d" * 64, False),
        (Policy(keys={OWNER: ["other/*"]}), OWNER, False),
        (Policy(administrators=[ROOT]), ROOT, True),
        (Policy(administrators=[ROOT]), None, False),
        (NAMED.model_copy(update={"administrators": [ROOT]}), OWNER, False),
        (NAMED.model_copy(update={"administrators": [ROOT]}), ROOT, True),
    ],
)
def test_who_may_change_what_the_server_steers_with(
    policy: Policy, key: str | None, allowed: bool, fears: SteeringPack
) -> None:
    """Vectors, packs and aliases alike."""
    admission = started(fears, layers=[0, 1, 2, 3], upload_mib=1, upload_total_mib=1)
    alias = b'{"directions": [{"name": "mine/sent"}]}'

    async def changes(manager: PackManager, key: str | None) -> None:
        await manager.upload("mine", body(1), 60.0, key)
        await manager.set_alias("m", alias, key)
        manager.drop_alias("m", key)
        await manager.unload("mine", key)
        await manager.load(b'{"name": "fears"}', key)

    with manager_of(admission, fears.path.parent) as manager:
        admission.policy = policy
        if allowed:
            asyncio.run(changes(manager, key))
            return
        admission.policy = Policy()
        asyncio.run(manager.upload("mine", body(1), 60.0, "e" * 64))
        asyncio.run(manager.set_alias("m", alias, None))
        admission.policy = policy.model_copy(update={"aliases": admission.policy.aliases})
        for change in (
            manager.upload("mine", body(2), 60.0, key),
            manager.set_alias("m", alias, key),
            _dropped(manager, "m", key),
            manager.unload("mine", key),
            manager.drop_upload("mine", key),
            manager.load(b'{"name": "fears"}', key)
            if key != OWNER
            else manager.unload("mine", key),
        ):
            with pytest.raises(
                NotAllowedError, match="this API key is not allowed|another API key"
            ):
                asyncio.run(change)


async def _dropped(manager: PackManager, alias: str, key: str | None) -> None:
    manager.drop_alias(alias, key)


def test_vectors_of_another_key_are_neither_replaced_nor_dropped(fears: SteeringPack) -> None:
    admission = started(fears, layers=[1, 2, 3], upload_mib=1, upload_total_mib=1)
    admission.policy = NAMED

    async def run() -> None:
        await manager.upload("mine", body(1), 60.0, OWNER)
        for change in (manager.upload("mine", body(2), 60.0, OTHER), manager.unload("mine", OTHER)):
            with pytest.raises(NotAllowedError, match="uploaded with another API key"):
                await change
        admission.policy = NAMED.model_copy(update={"administrators": [ROOT]})
        await manager.drop_upload("mine", ROOT)

    with manager_of(admission) as manager:
        asyncio.run(run())


def test_what_a_key_may_not_use_it_is_not_shown(
    fears: SteeringPack, pack_at: Callable[..., SteeringPack]
) -> None:
    registry = PackRegistry([fears, pack_at("moods", {"calm": [0]})])
    aliases = {
        name: SteeringRequest.model_validate({"directions": [{"name": direction}]})
        for name, direction in {"c": "calm", "s": "fears/spiders", "gone": "no/such"}.items()
    }
    policy = Policy(keys={OWNER: ["*/spiders"]}, administrators=[ROOT], aliases=aliases)

    def shown(key: str | None) -> dict[str, list[str]]:
        packs = describe(registry, policy, key)["packs"]
        return {pack["name"]: [d["name"] for d in pack["directions"]] for pack in packs}

    assert shown(OWNER) == {"fears": ["spiders"]}
    assert shown(None) == {}
    assert shown(ROOT) == {"fears": ["spiders", "New York"], "moods": ["calm"]}
    assert policy.shown_aliases(OWNER, registry) == ["s"]
    assert policy.shown_aliases(ROOT, registry) == ["c", "gone", "s"]
    assert policy.shown_aliases(None, registry) == []


def test_all_uploads_together_have_a_limit(fears: SteeringPack) -> None:
    """In number and in bytes; what takes the place of another of its name counts once."""
    admission = started(fears, layers=[1, 2, 3], upload_mib=1, upload_total_mib=1, upload_count=2)

    async def run() -> None:
        for name in ("one", "two", "two"):
            await manager.upload(name, body(1), 60.0, None)
        with pytest.raises(ConflictError, match="2 uploads are served, .*--steering-upload-count"):
            await manager.upload("three", body(1), 60.0, None)
        await manager.drop_upload("one", None)
        large = body(1) + bytes(2**20 - len(body(1)))
        with pytest.raises(ConflictError, match="--steering-upload-total-mib"):
            await manager.upload("three", large, 60.0, None)
        await manager.upload("three", body(1), 60.0, None)

    with manager_of(admission) as manager:
        asyncio.run(run())


def test_vectors_need_a_pack_whose_model_they_are_for(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="from a loaded pack; load one first"):
        write_upload(tmp_path / "sent", "sent", body(1), [])


def test_a_refused_pack_does_not_say_where_the_server_keeps_it(fears: SteeringPack) -> None:
    admission = started(fears)
    (fears.path / MANIFEST_FILE).write_text("{")
    with manager_of(admission, fears.path.parent) as manager:
        with pytest.raises(PackError) as caught:
            asyncio.run(manager.load(b'{"name": "fears"}', None))
    assert str(caught.value).startswith(f"fears/{MANIFEST_FILE}: ")
    assert str(fears.path.parent) not in str(caught.value)
