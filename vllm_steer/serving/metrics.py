"""Prometheus metrics of steering, on the server's own ``/metrics``."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter(
    "steering:requests",
    "Steered prompts by outcome: finished, aborted by the client, or error.",
    ["outcome"],
)
REJECTED = Counter("steering:rejected", "Requests refused for their steering.", ["reason"])
STEERED_TOKENS = Counter(
    "steering:steered_tokens", "Tokens that went through the model at steered positions."
)
ACTIVE = Gauge(
    "steering:active_requests",
    "Steered prompts that are waiting or being answered.",
    multiprocess_mode="livesum",
)
WAITING = Gauge(
    "steering:waiting_requests",
    "Steered prompts waiting for a row of the bank.",
    multiprocess_mode="livesum",
)
ACTIVE_DIRECTIONS = Gauge(
    "steering:active_directions",
    "Distinct directions that running requests use; summed over API servers.",
    multiprocess_mode="livesum",
)
DIRECTIONS = Gauge(
    "steering:loaded_directions",
    "Directions that requests can name, by pack.",
    ["pack"],
    multiprocess_mode="mostrecent",
)
DOSE = Histogram(
    "steering:dose",
    "Dose of steered prompts: 1 is the largest at which text was fluent.",
    buckets=(0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
)
READ_SCORE = Histogram(
    "steering:read_score",
    "Largest score of an answer's tokens, divided by the median norm of the residual stream at the layers read. "
    "Uploaded directions have the label `uploaded`.",
    ["direction"],
    buckets=(-0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0),
)
STOPPED = Counter("steering:stopped", "Answers ended by a probe.", ["action"])
ROWS_CUT = Counter(
    "steering:rows_cut",
    "Sums of directions that passed every check but were cut in the engine. Nonzero is a bug of vllm-steer.",
)
PLANNING = Gauge(
    "steering:planning_seconds",
    "Mean time to plan one step's steering since the last scrape.",
    multiprocess_mode="mostrecent",
)
