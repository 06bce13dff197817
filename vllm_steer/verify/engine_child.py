"""The process of one engine: starts vLLM, then calls what :class:`vllm_steer.verify.process.EngineProcess` sends.

It is sent what to prepare and the arguments of ``LLM``, then functions of the ``LLM`` with their arguments,
and None at the end. An answer is a pair: ``value`` and what a function returned, None once the engine has
started; or ``error`` and the root cause of an exception, type and text.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from vllm_steer.vllm_compat.root_cause import cause_of

# From linux/prctl.h: the signal to get when the parent ends.
PR_SET_PDEATHSIG = 1


def serve(connection: Connection[Any, Any]) -> None:
    """Serves one engine until it is told to stop or the other process is gone."""
    # A stopped process would outlive the one that started it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prepare, arguments = connection.recv()
    try:
        if prepare is not None:
            prepare(arguments)
        from vllm import LLM

        llm = LLM(**arguments)
    except Exception as error:
        connection.send(("error", cause_of(error)))
        return
    connection.send(("value", None))
    while True:
        try:
            call = connection.recv()
        except EOFError:
            call = None
        if call is None:
            llm.llm_engine.engine_core.shutdown()
            # Without this, threads that vLLM left behind would keep the process for a minute.
            os._exit(0)
        function, given, named = call
        try:
            connection.send(("value", function(llm, *given, **named)))
        except Exception as error:
            connection.send(("error", cause_of(error)))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
