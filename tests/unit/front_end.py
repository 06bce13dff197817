"""What a server's front end has, without an engine behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.unit.conftest import HIDDEN, LAYERS, resolved
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.store import keep_store
from vllm_steer.serving.admission import Admission
from vllm_steer.serving.pack_manager import PackManager

VOCABULARY = 500


def started(*packs: SteeringPack, **fields: Any) -> Admission:
    """The admission of an engine that was started with some packs, and ``fields`` of its configuration."""
    config = resolved(
        packs=[str(pack.path) for pack in packs],
        digests=[pack.manifest.tensors.sha256 for pack in packs],
        **fields,
    )
    keep_store(config, PackRegistry(packs))
    model_config = SimpleNamespace(
        max_model_len=64,
        dtype="float32",
        hf_config=SimpleNamespace(model_type=packs[0].manifest.model.model_type),
        hf_text_config=SimpleNamespace(model_type=packs[0].manifest.model.model_type),
        get_hidden_size=lambda: HIDDEN,
        get_vocab_size=lambda: VOCABULARY,
        get_total_num_hidden_layers=lambda: LAYERS,
    )
    additional_config = {"steering": config.model_dump()}
    return Admission(
        SimpleNamespace(additional_config=additional_config, model_config=model_config)
    )


@contextmanager
def manager_of(admission: Admission, *roots: Path) -> Iterator[PackManager]:
    """The pack manager of a server whose engine agrees to everything."""

    async def agree(method: str, *arguments: Any) -> Any:
        return True

    engine = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=agree))
    assert admission.store is not None
    manager = PackManager(admission, admission.store, [str(root) for root in roots], engine)
    try:
        yield manager
    finally:
        manager._uploads.cleanup()
