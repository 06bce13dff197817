"""The report: a text page, the same as data, and the exit status."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "measured", "not checked"]
PASSED, FAILED, COULD_NOT_RUN = 0, 1, 2
_WORDS = {PASSED: "passed", FAILED: "failed", COULD_NOT_RUN: "could not run"}
_WIDTH, _INDENT = 100, 30
# Faults shown per check.
_SHOWN = 5


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: Name of the check.
        status: ``measured`` is a figure without a requirement.
        summary: The result, in a sentence or two.
        figures: The same as data.
    """

    name: str
    status: Status
    summary: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """The results of a run.

    Attributes:
        facts: The verified model, packs, versions and device.
        checks: The checks, in the order of the page.
        obstacle: Why nothing could be verified, or None.
    """

    facts: Mapping[str, Any]
    checks: Sequence[Check]
    obstacle: str | None = None

    @property
    def exit_status(self) -> int:
        """0 if nothing failed, 1 if something failed, 2 if nothing could be verified."""
        if self.obstacle is not None:
            return COULD_NOT_RUN
        return FAILED if any(check.status == "failed" for check in self.checks) else PASSED

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "result": _WORDS[self.exit_status],
            "exit_status": self.exit_status,
            "obstacle": self.obstacle,
            "facts": dict(self.facts),
            "checks": [asdict(check) for check in self.checks],
        }

    def page(self) -> str:
        """The report as text."""
        left_out = [check.name for check in self.checks if check.status == "not checked"]
        result = f"vllm-steer verify: {_WORDS[self.exit_status]}"
        if left_out and self.obstacle is None:
            result += f"; not checked: {', '.join(left_out)}"
        lines = [result, ""]
        if self.obstacle is not None:
            lines += [self.obstacle, ""]
        lines += [f"{name:<16} {_text(value)}" for name, value in self.facts.items()]
        lines.append("")
        for check in self.checks:
            head = f"{check.name:<16} {check.status:<12} "
            lines += textwrap.wrap(
                head + check.summary,
                _WIDTH,
                subsequent_indent=" " * _INDENT,
                break_on_hyphens=False,
            )
        return "\n".join(lines) + "\n"


def judged(name: str, faults: Sequence[str], summary: str, figures: Mapping[str, Any]) -> Check:
    """A check that passes without faults.

    Args:
        name: Name of the check.
        faults: The faults.
        summary: The result.
        figures: The same as data.
    """
    figures = {**figures, "faults": list(faults)}
    if not faults:
        return Check(name, "passed", summary, figures)
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return Check(name, "failed", f"{'; '.join(faults[:_SHOWN])}{more}. {summary}", figures)


def failed(name: str, reason: str) -> Check:
    """A check that could not be carried out, which is a failure."""
    return Check(name, "failed", reason, {"faults": [reason]})


def not_checked(name: str, reason: str) -> Check:
    """A check that was skipped."""
    return Check(name, "not checked", reason, {})


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value)
