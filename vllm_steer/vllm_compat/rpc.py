"""Methods that the front end calls in the engine core and in its workers, by name.

The front end and the engine know each other by these names alone. Importing this module imports
neither torch nor vllm.
"""

STAGE = "vllm_steer_stage"
LOAD = "vllm_steer_load"
FORGET = "vllm_steer_forget"
TIMES = "vllm_steer_times"
FACTS = "vllm_steer_facts"
