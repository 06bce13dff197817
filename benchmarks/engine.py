"""A vLLM engine in a process of its own, for benchmarks: on random weights and beside rivals as well.

Several live side by side, stopped by a signal while they wait, since some of their threads poll; so timed
runs can alternate between them. An engine may run in another environment: a rival's plugin is put on its path alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.models import RANDOM_LOAD_FORMAT, register_random_weights
from vllm_steer.testing.triton import prepare_model_runner
from vllm_steer.verify import engine_calls
from vllm_steer.verify.engine_calls import ExtraArgs, answer_batch
from vllm_steer.verify.process import EngineProcess, ProcessOptions

if TYPE_CHECKING:
    from vllm import LLM

ROOT = Path(__file__).parents[1]
START_TIMEOUT = 900
TOP = 2


def start_engine(
    name: str,
    arguments: Mapping[str, Any],
    environment: Mapping[str, str],
    path: Sequence[Path] = (),
) -> EngineProcess:
    """Starts an engine and waits until it is ready.

    Args:
        name: Name in messages.
        arguments: Arguments of ``LLM``.
        environment: Environment variables that differ from this process's.
        path: Folders that only this engine imports from.

    Raises:
        EngineError: The engine does not start.
    """
    own = {
        # One process for front end and engine: nothing hides behind another core, and
        # admission is part of what is timed.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    options = ProcessOptions([*path, ROOT], True, START_TIMEOUT, _prepare)
    return EngineProcess(name, arguments, own | dict(environment), options)


def answers_of(
    engine: EngineProcess, prompts: Sequence[list[int]], extra: Sequence[ExtraArgs], count: int
) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Greedy tokens of each prompt and, for each token, the best log-probabilities by token."""
    answers = engine.call(answer_batch, prompts, extra, count, TOP)
    return [(answer.tokens, answer.logprobs) for answer in answers]


def describe(llm: LLM) -> dict[str, Any]:
    """What an engine runs with, the version of a rival among it."""
    found = engine_calls.describe(llm)
    packages = (*engine_calls.PACKAGES, "hotwire-vllm")
    return found | {"versions": found["versions"] | engine_calls.package_versions(packages)}


def _prepare(arguments: dict[str, Any]) -> None:
    prepare_model_runner()
    if arguments.get("load_format") == RANDOM_LOAD_FORMAT:
        register_random_weights()
