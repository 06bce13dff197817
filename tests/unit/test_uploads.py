"""Vectors that clients send: what is refused, replaced or ended leaves no file."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tests.unit.conftest import HIDDEN
from tests.unit.front_end import desk_of, started
from vllm_steer.errors import PackError, RequestError
from vllm_steer.pack import MANIFEST_FILE, SteeringPack
from vllm_steer.serving.uploads import write_upload


def body(layer: int, value: float = 1.0) -> bytes:
    vectors = {"sent": np.full((1, HIDDEN), value, np.float32)}
    return save(vectors, {"layers": f"[{layer}]"})


def test_files_last_as_long_as_what_is_served(fears: SteeringPack) -> None:
    admission = started(fears, layers=[1, 2, 3])
    store = admission.store
    assert store is not None

    async def run() -> None:
        def kept() -> list[Path]:
            return list(Path(desk._uploads.name).iterdir())

        with pytest.raises(PackError, match=r"layers \[0\]"):
            await desk.upload("mine", body(0), 60.0, None)
        assert not kept()
        first = await desk.upload("mine", body(1), 60.0, None)
        with pytest.raises(RequestError, match="it must be between"):
            await desk.upload("mine", body(1, 1e30), 60.0, None)
        assert kept() == [first.path]
        assert store.registry.packs["mine"] is first
        second = await desk.upload("mine", body(2), 60.0, None)
        assert kept() == [second.path]
        await desk.drop_upload("mine", None)
        assert not kept()

    with desk_of(admission) as desk:
        asyncio.run(run())


def test_vectors_need_a_pack_whose_model_they_are_for(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="none is loaded; load one first"):
        write_upload(tmp_path / "sent", "sent", body(1), [])


def test_a_refused_pack_does_not_say_where_the_server_keeps_it(fears: SteeringPack) -> None:
    admission = started(fears)
    (fears.path / MANIFEST_FILE).write_text("{")
    with desk_of(admission, fears.path.parent) as desk:
        with pytest.raises(PackError) as caught:
            asyncio.run(desk.load(b'{"name": "fears"}', None))
    assert str(caught.value).startswith(f"fears/{MANIFEST_FILE}: ")
    assert str(fears.path.parent) not in str(caught.value)
