"""What every benchmark writes beside its figures: machine, versions, commit; and its plot."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import ROOT
from vllm_steer.verify.interleave import Ratio


def environment() -> dict[str, Any]:
    """The machine and the code that figures belong to."""
    return {
        # As anyone would type it, without where this machine keeps it.
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "vllm_steer")),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes the results; without a path there is nothing to write."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


def show(lines: Sequence[str]) -> None:
    """Writes a table to standard output."""
    sys.stdout.write("\n".join(lines) + "\n")


def ratio_rows(
    ratios: Mapping[str, Ratio], speeds: Mapping[str, float], notes: Mapping[str, str], unit: str
) -> list[str]:
    """One row for each arm: speed, ratio to plain vLLM with its interval, or why there is none.

    Args:
        ratios: By arm.
        speeds: Median figure by arm, plain vLLM among them.
        notes: Arms and rivals that have no ratio, and the reason.
        unit: Unit of the figures.
    """
    rows = [f"{'arm':18s} {unit:>10s}   ratio to plain, median [95 %]"]
    for name, speed in speeds.items():
        shown = f"{name:18s} {speed:10.1f}"
        if name in ratios:
            ratio = ratios[name]
            shown += f"   {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
        rows.append(shown)
    rows += [f"{name:18s} {'–':>10s}   {note}" for name, note in notes.items()]
    return rows


def plot_ratios(
    path: Path,
    title: str,
    groups: Mapping[str, Mapping[str, Ratio]],
    label: str = "ratio to plain vLLM",
) -> None:
    """Draws the ratios of each group as points with their intervals.

    Args:
        path: PNG file.
        title: Title of the plot.
        groups: Ratios by arm, of each workload.
        label: Label of the axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(1.5 + 4.5 * len(groups), 4.0), sharey=True, squeeze=False
    )
    for axis, (group, ratios) in zip(axes[0], groups.items(), strict=True):
        medians = [ratio.median for ratio in ratios.values()]
        below = [ratio.median - ratio.low for ratio in ratios.values()]
        above = [ratio.high - ratio.median for ratio in ratios.values()]
        axis.axhline(1.0, color="grey", linewidth=1)
        axis.errorbar(range(len(medians)), medians, yerr=[below, above], fmt="o", capsize=4)
        axis.set_xticks(range(len(medians)), list(ratios), rotation=30, ha="right")
        axis.set_title(group)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel(label)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _git(*arguments: str) -> str | None:
    """What git says; None where the checkout has none, as on a machine that got a copy."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCHMARK_COMMIT") if arguments[0] == "rev-parse" else None
    return done.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"
