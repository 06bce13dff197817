"""The side of an engine's process: starts the engine, then answers the commands of another process.

An answer is a pair: ``ready`` once at the start, then ``value`` and what a command returned, or
``error`` and the root cause of its exception, type and text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from vllm_steer.vllm_compat.root_cause import cause_of

if TYPE_CHECKING:
    from vllm import LLM


def answer_commands(
    connection: Connection[Any, Any],
    start: Callable[[], LLM],
    commands: Mapping[str, Callable[..., Any]],
) -> None:
    """Serves one engine until it is told to ``stop`` or the other process is gone.

    Args:
        connection: To the other process, which sends a command's name and its arguments.
        start: Makes the ``LLM``.
        commands: What to call with the ``LLM`` and the arguments.
    """
    try:
        llm = start()
    except Exception as error:
        connection.send(("error", cause_of(error)))
        return
    connection.send(("ready", None))
    while True:
        try:
            command, *rest = connection.recv()
        except EOFError:
            command = "stop"
        if command == "stop":
            llm.llm_engine.engine_core.shutdown()
            # Without this, threads that vLLM left behind would keep the process for a minute.
            os._exit(0)
        try:
            connection.send(("value", commands[command](llm, *rest)))
        except Exception as error:
            connection.send(("error", cause_of(error)))
