"""Refused requests: the error for HTTP 400, the metric and the log lines.

A client that repeats a refused request must not fill the log: for each reason, a few lines are written per
minute, and the others are counted in one line at its end.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.exceptions import VLLMValidationError

from vllm_steer import log
from vllm_steer.errors import RequestError, shortened
from vllm_steer.operations import Gate
from vllm_steer.request.reads import ReadChoice, StopChoice
from vllm_steer.request.schedule import ScheduleChoice
from vllm_steer.request.schema import FLAT_KEYS, REQUEST_KEY, DirectionChoice, SteeringRequest
from vllm_steer.serving import metrics
from vllm_steer.serving.http_context import current_http_context

LINES = 5
SECONDS = 60.0
_MODELS = (SteeringRequest, DirectionChoice, Gate, ScheduleChoice, ReadChoice, StopChoice)
_PARTS = "|".join(sorted({name for model in _MODELS for name in model.model_fields}))
# Messages begin with their field. Client input may be private; the log gets only field names of steering.
_FIELD = re.compile(rf"(?:{REQUEST_KEY}(?:\.(?:\d+|{_PARTS})\b)*|(?:{'|'.join(FLAT_KEYS)})\b)")


class RefusalLog:
    """Logs refusals: the first few for a reason one by one, the others as a count."""

    def __init__(self, lines: int = LINES, seconds: float = SECONDS) -> None:
        """Makes a log.

        Args:
            lines: Most lines for one reason in a period.
            seconds: Length of the period, which begins with its first refusal.
        """
        self._lines = lines
        self._seconds = seconds
        self._counts: Counter[str] = Counter()
        self._ends: dict[str, float] = {}

    def write(self, reason: str, field: str, route: str | None, key_digest: str | None) -> None:
        """Writes a refusal, or counts it. Outside an event loop only the caller gets the error.

        Args:
            reason: ``RequestError.reason``.
            field: The wrong field, without client input.
            route: Path of the HTTP request.
            key_digest: SHA-256 of its API key.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        # A timer whose event loop was closed never fires.
        if time.monotonic() >= self._ends.get(reason, 0.0):
            self._end(reason)
            self._ends[reason] = time.monotonic() + self._seconds
            loop.call_later(self._seconds, self._end, reason)
        self._counts[reason] += 1
        if self._counts[reason] <= self._lines:
            key = log.short_key(key_digest)
            log.REFUSED.write(reason=reason, field=field, route=route, key=key)

    def _end(self, reason: str) -> None:
        count = self._counts.pop(reason, 0) - self._lines
        self._ends.pop(reason, None)
        if count > 0:
            log.REFUSED_MORE.write(reason=reason, count=count, seconds=self._seconds)


_log = RefusalLog()


def log_refusal(reason: str, field: str, route: str | None, key_digest: str | None) -> None:
    """Writes a refusal to the log shared by all routes: :meth:`RefusalLog.write`."""
    _log.write(reason, field, route, key_digest)


def count_refusal(error: RequestError, route: str | None, key_digest: str | None) -> None:
    """Counts and logs a refused generation request."""
    metrics.REJECTED.labels(error.reason).inc()
    found = _FIELD.match(str(error))
    log_refusal(error.reason, found[0] if found else REQUEST_KEY, route, key_digest)


def refusal(error: RequestError) -> VLLMValidationError:
    """Counts and logs the current request as refused; returns the error that becomes HTTP 400."""
    http_context = current_http_context.get()
    route = http_context.route if http_context else None
    count_refusal(error, route, http_context.key_digest if http_context else None)
    return VLLMValidationError(shortened(str(error)), parameter=REQUEST_KEY)


@contextmanager
def as_http_400() -> Iterator[None]:
    """Converts a refusal to the error that vLLM answers with HTTP 400.

    Raises:
        VLLMValidationError: A :class:`RequestError` was raised within it.
    """
    try:
        yield
    except RequestError as error:
        raise refusal(error) from error
