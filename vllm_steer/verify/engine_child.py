"""The process of one engine: starts vLLM, then calls what :class:`vllm_steer.verify.process.EngineProcess` sends.

It receives the preparation and the arguments of ``LLM``, then functions of the ``LLM`` with their arguments,
and None at the end. An answer is a pair: ``value`` and a function's result, None once the engine has started;
or ``error`` and the root cause of an exception, type and text.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from vllm_steer.vllm_compat.root_cause import cause_of

# From linux/prctl.h: sets the signal on the parent's end.
PR_SET_PDEATHSIG = 1


def serve(connection: Connection[Any, Any]) -> None:
    """Serves one engine until told to stop or the other process is gone."""
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
            # Otherwise leftover threads of vLLM would keep the process alive for a minute.
            os._exit(0)
        function, given, named = call
        try:
            connection.send(("value", function(llm, *given, **named)))
        except Exception as error:
            connection.send(("error", cause_of(error)))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
