"""An engine process that says that it is ready and is killed by the first thing that it is asked."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
connection.recv()
connection.send(("ready", None))
connection.recv()
sys.stderr.write("ERROR somewhere: MemoryError: no room\n")
sys.stderr.flush()
os.kill(os.getpid(), signal.SIGKILL)
