"""Structured log events, one line each, on the logger ``vllm.steer``.

A line holds the event's fields as JSON; the record has them as ``record.steering``, so that a JSON formatter
can keep their types. Fields hold neither API keys nor prompt text. Importing this module imports neither
torch nor vllm.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

# A child of vLLM's logger, so that its configuration applies.
logger = logging.getLogger("vllm.steer")
# Enough of a key's SHA-256 to identify it in a policy.
KEY_DIGITS = 12


@dataclass(frozen=True)
class Event:
    """A kind of log line.

    Attributes:
        name: Its name in ``record.steering["event"]``; the line has spaces instead of underscores.
        level: Level of the standard library's logging.
        meaning: When it is written, and its fields.
    """

    name: str
    level: int
    meaning: str

    def write(self, **fields: Any) -> None:
        """Writes a line.

        Args:
            fields: JSON values.
        """
        if logger.isEnabledFor(self.level):
            logger.log(
                self.level,
                "Steering %s: %s",
                self.name.replace("_", " "),
                json.dumps(fields),
                extra={"steering": {"event": self.name, **fields}},
                stacklevel=2,
            )


STARTED = Event(
    "started",
    logging.INFO,
    "once in each front end: `packs` by name with their sha256, number of `directions`, `layers` hooked, `ops`, `rows` of "
    "the bank, and the `policy`: its `aliases`, `max_dose`, `dose_action`, whether it has a `default`, and number of `keys`",
)
WORKER_READY = Event(
    "worker_ready",
    logging.INFO,
    "once in each worker: hooked `layers`, `ops`, `rows` of its bank and the bank's size, `bank_bytes`",
)
ROW_CUT = Event(
    "row_cut",
    logging.ERROR,
    "the sum of these `directions`, by digest, passed every check but had to be cut to protect other answers; its "
    "own request is not steered as asked. This is a bug of vllm-steer, please report it",
)
SELF_TEST_PASSED = Event(
    "self_test_passed", logging.INFO, "each of these `layers` changes the model's output"
)
PACK_FETCHED = Event("pack_fetched", logging.INFO, "a pack from the hub: `source` and `snapshot`")
PACK_LOADED = Event(
    "pack_loaded",
    logging.INFO,
    "`name`, `sha256`, number of `directions`, sha256 of the pack that it `replaced`, and `key`",
)
DIRECTIONS_DO_NOT_STEER = Event(
    "directions_do_not_steer",
    logging.WARNING,
    "a pack, loaded at startup or later, has directions that do not steer according to their calibration: its "
    "`name`, their `count`, up to 5 of them as `directions`, and `advice`",
)
PACK_UNLOADED = Event("pack_unloaded", logging.INFO, "`name`, `sha256` and `key`")
ALIAS_SET = Event(
    "alias_set", logging.INFO, "`alias`, its `directions` with scale and strength, and `key`"
)
ALIAS_DROPPED = Event("alias_dropped", logging.INFO, "`alias` and `key`")
REQUEST = Event(
    "request",
    logging.INFO,
    "with `--enable-log-requests`, at the end of each steered prompt: `request_id`, `outcome` (finished, aborted, "
    "error) and `reason` (class of the error), `directions` with scales, strengths, digests and forms, `dose`, "
    "`dose_factor`, `tokens_steered` and `key`",
)
REFUSED = Event(
    "refused",
    logging.WARNING,
    "a request's steering, or a change of packs and aliases, was refused: `reason`, `field`, `route` and `key`",
)
REFUSED_MORE = Event(
    "refused_more",
    logging.WARNING,
    "number of further refusals for the same `reason`: `count` in `seconds`",
)


def short_key(digest: str | None) -> str | None:
    """Returns the beginning of an API key's SHA-256, as log lines show it; None without a key."""
    return digest[:KEY_DIGITS] if digest else None
