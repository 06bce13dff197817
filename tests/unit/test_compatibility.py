"""What cannot be steered correctly is refused at start, and the documentation's table says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.compatibility import BLOCK, PAGE, RESULTS, render
from vllm_steer.errors import CompatibilityError
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.serving.compatibility import refuse_unsupported
from vllm_steer.serving.configure import resolve_config


@pytest.fixture
def vllm_config() -> Any:
    """The real configuration of a real model; its engine is not started."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(demo_model_path())).create_engine_config()


def test_an_ordinary_configuration_is_accepted(vllm_config: Any) -> None:
    refuse_unsupported(vllm_config)


def _connector(name: str) -> Callable[[Any], None]:
    def give(config: Any) -> None:
        from vllm.config import KVTransferConfig

        config.kv_transfer_config = KVTransferConfig(kv_connector=name, kv_role="kv_both")

    return give


def _pooling(config: Any) -> None:
    config.model_config.runner_type = "pooling"


def _dual_batch_overlap(config: Any) -> None:
    config.parallel_config.enable_dbo = True


def _prefill_context_parallel(config: Any) -> None:
    config.parallel_config.prefill_context_parallel_size = 2


def _sequence_parallel_moe(config: Any) -> None:
    parallel = config.parallel_config
    parallel.enable_expert_parallel, parallel.tensor_parallel_size = True, 2
    parallel.data_parallel_size, parallel.all2all_backend = 2, "deepep_low_latency"


def _adaptive_verification(config: Any) -> None:
    from vllm.config import SpeculativeConfig

    ngram = SpeculativeConfig(method="ngram", num_speculative_tokens=3)
    ngram.enable_adaptive_verification = True
    config.speculative_config = ngram


def _fast_prefill(config: Any) -> None:
    config.cache_config.kv_sharing_fast_prefill = True


REFUSED = {
    "pooling models": (_pooling, "pooling models generate nothing"),
    "dual-batch overlap": (_dual_batch_overlap, "leave out --enable-dbo"),
    "prefill context parallel": (_prefill_context_parallel, "prefill context parallelism"),
    "sequence-parallel mixture of experts": (_sequence_parallel_moe, "use another --all2all"),
    "key-value connectors that key on token ids": (
        _connector("LMCacheConnectorV1"),
        "LMCacheConnectorV1 may find keys and values by token ids alone",
    ),
    "speculative decoding: adaptive verification": (
        _adaptive_verification,
        "leave enable_adaptive_verification out",
    ),
    "fast prefill with shared key-value layers": (_fast_prefill, "leave out --kv-sharing-fast"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.feature(n, "refused at start")) for n in REFUSED],
)
def test_refused_at_start(name: str, vllm_config: Any) -> None:
    change, message = REFUSED[name]
    change(vllm_config)
    with pytest.raises(CompatibilityError, match=f"^steering cannot start: .*{message}"):
        refuse_unsupported(vllm_config)


@pytest.mark.feature("weight offloading without unified addressing", "refused at start")
def test_functional_offloading_is_refused(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_config.offload_config.uva.cpu_offload_gb = 1.0
    refuse_unsupported(vllm_config)
    monkeypatch.setenv("VLLM_WEIGHT_OFFLOADING_DISABLE_UVA", "1")
    with pytest.raises(CompatibilityError, match="functional_call"):
        refuse_unsupported(vllm_config)


@pytest.mark.parametrize("name", ["OffloadingConnector", "SimpleCPUOffloadConnector"])
def test_connectors_that_key_on_block_hashes_are_accepted(name: str, vllm_config: Any) -> None:
    _connector(name)(vllm_config)
    refuse_unsupported(vllm_config)


def test_readme_is_fresh() -> None:
    assert BLOCK.inside(PAGE.read_text()) == render(), "run make compatibility"


def test_every_feature_was_tested_and_passed() -> None:
    root = Path(__file__).parents[2]
    sources = [file.read_text() for file in (root / "tests").rglob("test_*.py")]
    assert "FAILED" not in render()
    for line in render().splitlines()[4:]:
        name = line.split(" | ")[0].removeprefix("| ")
        assert any(f'"{name}"' in source for source in sources), f"{RESULTS.name} knows {name!r}"


def test_an_additional_config_that_is_an_object_is_left_alone() -> None:
    """vLLM takes an object with ``compute_hash`` in the place of a dict."""

    class Hashed:
        def compute_hash(self) -> str:
            return "hash"

    given = SimpleNamespace(additional_config=Hashed())
    assert resolve_config(lambda *_: given)(None) is given
