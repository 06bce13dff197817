"""Methods that the front end calls in the engine core and in its workers, by name.

The front end and the engine know each other by these names alone. Importing this module imports
neither torch nor vllm.
"""

from typing import TypedDict

# Of the engine core.
STAGE = "vllm_steer_stage"
LOAD = "vllm_steer_load"
FORGET = "vllm_steer_forget"
# Of each worker.
TIMES = "vllm_steer_times"
FACTS = "vllm_steer_facts"


class WorkerFacts(TypedDict):
    """What a worker says of itself.

    Attributes:
        layers: Layers hooked in it.
        self_tested: Whether its self-test has passed.
    """

    layers: list[int]
    self_tested: bool
