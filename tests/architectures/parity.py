"""Holds the engine against Hugging Face with hooks, on the tiny checkpoint of a family.

Engines of several families run side by side, one for each core that the tests may use.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.architectures.checkpoint import write_checkpoint
from tests.architectures.families import VOCABULARY, Family
from vllm_steer.testing.engine import Engine, Output
from vllm_steer.verify.oracle import Answer, Reference

TOKENS = 8
TOLERANCE = 1e-4
FIRST, SECOND = "random/first", "random/second"
CASES: dict[str, dict[str, Any] | None] = {
    "unsteered": None,
    "all positions": {"directions": [{"name": FIRST}]},
    "prompt only": {"directions": [{"name": SECOND, "scale": 6.0}], "positions": "prompt"},
    "generated only, two directions": {
        "directions": [{"name": FIRST, "scale": 5.0}, {"name": SECOND, "scale": -7.0}],
        "positions": "generated",
    },
    "different positions": {
        "directions": [
            {"name": FIRST, "scale": 5.0, "positions": "prompt"},
            {"name": SECOND, "scale": 5.0, "positions": "generated"},
        ]
    },
    "one layer": {"directions": [{"name": FIRST, "scale": 9.0, "layers": [1]}]},
    "last layer": {"directions": [{"name": SECOND, "scale": 9.0, "layers": [2]}]},
}
# Read in the batch of all cases, by eager engines: compiled ones show blocks without readers.
READ = {
    "directions": [{"name": FIRST, "scale": 5.0}],
    "read": [
        {"name": SECOND, "layers": [0], "at": "all"},
        {"name": SECOND, "at": "all"},
        {"name": FIRST, "at": "all", "when": "after"},
    ],
}
PROBES = 2


@dataclass(frozen=True)
class Parity:
    """What an engine and the reference answered.

    Attributes:
        outputs: Answers of the engine by case, all from one batch.
        expected: Answers of the reference by case.
        unsteered: What the reference answers without steering, by case.
        scores: Float32 ``[reads, tokens]``, what the engine read, and the reference; None of a compiled engine.
    """

    outputs: dict[str, Output]
    expected: dict[str, Answer]
    unsteered: dict[str, Answer]
    scores: tuple[np.ndarray, np.ndarray] | None

    def difference(self, case: str) -> float:
        """Largest difference of log-probabilities between engine and reference."""
        return _difference(self.outputs[case].logprobs, self.expected[case].logprobs)

    def effect(self, case: str) -> float:
        """Largest difference of log-probabilities that the steering makes."""
        return _difference(self.unsteered[case].logprobs, self.expected[case].logprobs)


class ParityRuns:
    """Runs of families, started at once and worked off in the background.

    Args:
        wanted: Families and modes.
        root: Directory for checkpoints.
    """

    def __init__(self, wanted: Sequence[tuple[Family, str]], root: Path) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self._cores: queue.SimpleQueue[int] = queue.SimpleQueue()
        for core in cores:
            self._cores.put(core)
        # Loading a model switches global state of transformers.
        self._reference_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(len(cores))
        self._runs: dict[tuple[str, str], Future[Parity]] = {
            (family.name, mode): self._pool.submit(self._run, family, mode, root)
            for family, mode in wanted
        }

    def result(self, family: Family, mode: str) -> Parity:
        """Waits for a run; what it raised is raised here."""
        return self._runs[family.name, mode].result()

    def close(self) -> None:
        """Leaves out the runs that have not begun."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, family: Family, mode: str, root: Path) -> Parity:
        core = self._cores.get()
        try:
            return self._measure(family, mode, root / f"{family.config}-{mode}", core)
        finally:
            self._cores.put(core)

    def _measure(self, family: Family, mode: str, root: Path, core: int) -> Parity:
        prompts = _prompts()
        with self._reference_lock:
            pack = write_checkpoint(family, root)
            reference = Reference(root, [pack])
            expected = _answers(reference, prompts, list(CASES.values()))
            unsteered = _answers(reference, prompts, [None] * len(CASES))
        engine = Engine(
            engine_arguments(root, mode) | family.engine,
            {"VLLM_CPU_OMP_THREADS_BIND": str(core), "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            fork=True,
        )
        try:
            reads = [(prompts[0], READ)] if mode == "eager" else []
            asked = [*zip(prompts, CASES.values(), strict=True), *reads]
            outputs = engine.generate(*map(list, zip(*asked, strict=True)), TOKENS)
        finally:
            engine.close()
        scores = None
        if reads:
            read = outputs.pop()
            assert read.scores is not None
            with self._reference_lock:
                known = reference.read(prompts[0], read.tokens, READ)
            # The model did not read the last token.
            scores = read.scores[:, :-1], known[:, :-1]
        return Parity(dict(zip(CASES, outputs, strict=True)), expected, unsteered, scores)


def engine_arguments(root: Path, mode: str) -> dict[str, Any]:
    """Arguments of ``LLM`` for a tiny checkpoint whose pack lies beside its weights."""
    return {
        "model": str(root),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 8,
        # Fewer than the tokens of all prompts, so that they take several steps.
        "max_num_batched_tokens": 128,
        "kv_cache_memory_bytes": 2**25,
        "max_logprobs": -1,
        "enforce_eager": mode == "eager",
        "enable_prefix_caching": False,
        "seed": 0,
        "additional_config": {
            "steering": {
                "packs": [str(root / "pack")],
                "reads": PROBES if mode == "eager" else 0,
            }
        },
    }


def _prompts() -> list[list[int]]:
    """Random prompts of different lengths, one for each case."""
    generator = np.random.default_rng(2)
    return [generator.integers(3, VOCABULARY, 20 + 6 * n).tolist() for n in range(len(CASES))]


def _answers(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    steerings: Sequence[dict[str, Any] | None],
) -> dict[str, Answer]:
    return {
        case: reference.generate(prompt, steering, TOKENS)
        for case, prompt, steering in zip(CASES, prompts, steerings, strict=True)
    }


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())
