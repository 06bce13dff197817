"""Methods that the front end calls in the engine core and in its workers, by name.

The front end and the engine share only these names. Importing this module imports
neither torch nor vllm.
"""

from typing import TypedDict

# Methods of the engine core.
STAGE = "vllm_steer_stage"
LOAD = "vllm_steer_load"
FORGET = "vllm_steer_forget"
# Methods of each worker.
TIMES = "vllm_steer_times"
FACTS = "vllm_steer_facts"


class WorkerFacts(TypedDict):
    """A worker's report about itself.

    Attributes:
        layers: Layers hooked in it.
        self_tested: Whether its self-test has passed.
    """

    layers: list[int]
    self_tested: bool
