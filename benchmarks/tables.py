"""The tables of the findings and the README's table of speed, from the figures in ``results``.

``python -m benchmarks.tables`` writes them between their markers; a test fails when one is stale.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    extraction,
    fusion,
    fusion_depth,
    interventions,
    methods,
    probes,
    real_model,
    stalls,
    statistics,
)
from benchmarks.engine import ROOT
from vllm_steer.testing.marked import Block

FINDINGS = ROOT / "docs" / "findings.md"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
# Arm of a benchmark of throughput to its column.
ADDITIONS = {
    "idle": "idle",
    "steered_half": "half steered",
    "steered_one": "all by one direction",
    "steered_distinct": "each by its own sum of 3",
    "control": "control",
}
AFFINE = {
    "affine_idle": "idle",
    "affine_add_distinct": "each by its own sum of 3",
    "affine_rank2_distinct": "each turned by its own angle",
    "control": "control",
}
READS = {
    "reads_idle": "none reads",
    "reads_add_distinct": "each by its own sum of 3",
    "reads_one_layer": "each reads 4 directions at 1 layer",
    "reads_eight_layers": "at 8 layers, or at all",
    "control": "control",
}
CLOCKS = {"wall": "ratios", "processor": "cpu_ratios"}
STARTED = ("idle", "steered_distinct", "control")
OVERHEAD = {
    "idle_step": "none steered",
    "half_steered_step": "half steered",
    "steered_step": "all steered",
    "arrival_step": "with a new row",
    "admission": "admission of a request",
}


def results(name: str) -> dict[str, Any]:
    """Returns the figures of a file in ``results``."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def speed_table(names: Sequence[str], columns: Mapping[str, str]) -> str:
    """Returns ratios of tokens a second to plain vLLM's, a row for each model.

    Args:
        names: Files of results; the first workload of each is shown.
        columns: Arm to its column.
    """
    rows = []
    for name in names:
        report = results(name)
        requests = next(iter(report["workloads"].values()))["workload"]["requests"]
        shown = f"{_model(report)}, {requests} requests"
        rows.append([shown, *(_ratio(report["ratios"][arm]) for arm in columns)])
    return markdown(["model", *columns.values()], rows)


def clocks_table(names: Sequence[str], columns: Mapping[str, str]) -> str:
    """Returns the ratios of every workload, by wall time and by processor time.

    Args:
        names: Files of results.
        columns: Arm to its column.
    """
    rows = [
        [_run(name, work), clock, *(_ratio(found[key][arm]) for arm in columns)]
        for name in names
        for work, found in results(name)["workloads"].items()
        for clock, key in CLOCKS.items()
    ]
    return markdown(["run", "time", *columns.values()], rows)


def starts_table(names: Sequence[str]) -> str:
    """Returns starts, rounds, the speed of plain vLLM, and how far single starts lie apart."""
    rows = []
    for name in names:
        for work, found in results(name)["workloads"].items():
            starts = found["ratios_by_start"]
            rows.append(
                [
                    _run(name, work),
                    f"{len(starts)} × {len(found['times']) // len(starts)}",
                    f"{found['tokens_per_second']['plain']:.0f}",
                    *(_range([start[arm]["median"] for start in starts]) for arm in STARTED),
                ]
            )
    head = ["run", "starts × rounds", "plain vLLM, tokens a second"]
    return markdown([*head, *(ADDITIONS[arm] for arm in STARTED)], rows)


def overhead_table() -> str:
    """Returns the microseconds of planning and admission, by directions and layers."""
    found = results("overhead")["microseconds"]
    rows = [
        [str(row["directions"]), str(row["layers"]), *(f"{row[key]:.0f}" for key in OVERHEAD)]
        for row in found
    ]
    return markdown(["directions of a request", "layers", *OVERHEAD.values()], rows)


def extraction_table() -> str:
    """Returns speed and memory of extraction, as the benchmark prints them."""
    report = results("extraction")
    peaks = {
        name: {int(layers): mib for layers, mib in of.items()}
        for name, of in report["peak_memory"].items()
    }
    return f"```\n{extraction.table(report['models'], peaks)}\n```"


def norms_table() -> str:
    """Returns by how much each op changes the length of the residual stream at most."""
    rows = [
        [f"`{op}`", f"{share:.2g}"] for op, share in results("interventions")["norm_drift"].items()
    ]
    return markdown(["op", "largest change of ‖h‖, as a share of it"], rows)


def _model(report: Mapping[str, Any]) -> str:
    model = report["model"]
    if model["name"] == "demo":
        return "demo"
    return f"random, {model['parameters'] / 1e6:.0f} M parameters"


def _run(name: str, workload: str) -> str:
    return f"{name.removeprefix('throughput-')}, {workload}"


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def soak_table(dtypes: Sequence[str]) -> str:
    """Returns what bystanders noticed of hostile clients, a row for each dtype."""
    head = ["dtype", "minutes", "requests", "by bystanders", "wrong", "engine deaths", "stuck"]
    head += ["5xx but 503", "worst wait over that beside unsteered load", "growth of memory"]
    rows = []
    for dtype in dtypes:
        found = results(f"soak-{dtype}")
        counts = ("requests", "bystanders", "bystanders_wrong", "engine_deaths", "stuck")
        rows.append(
            [
                dtype,
                f"{found['seconds'] / 60:g}",
                *(str(found[key]) for key in (*counts, "server_errors")),
                f"{found['wait_ratio']:.2f}",
                f"{100 * found['rss_growth']:.1f} %",
            ]
        )
    return markdown(head, rows)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if len(values) == 1 else f"{low} to {high}"


QUIET = ("throughput-demo-quiet", "throughput-100m")
ALL = ("throughput-demo-quiet", "throughput-demo", "throughput-100m")
WITH_AFFINE = ("throughput-demo-affine", "throughput-100m-affine")
WITH_READS = ("throughput-demo-reads", "throughput-100m-reads")
BLOCKS = (
    Block(README, "speed", lambda: speed_table(QUIET, ADDITIONS)),
    Block(FINDINGS, "throughput", lambda: clocks_table(ALL, ADDITIONS)),
    Block(FINDINGS, "throughput-affine", lambda: clocks_table(WITH_AFFINE, AFFINE)),
    Block(FINDINGS, "throughput-reads", lambda: clocks_table(WITH_READS, READS)),
    Block(FINDINGS, "throughput-starts", lambda: starts_table([*ALL, *WITH_AFFINE, *WITH_READS])),
    Block(FINDINGS, "overhead", overhead_table),
    Block(FINDINGS, "extraction", extraction_table),
    Block(FINDINGS, "real-model", lambda: real_model.table(results("real-model")).strip()),
    Block(
        FINDINGS,
        "real-model-untrained",
        lambda: real_model.table(results("real-model-untrained")).strip(),
    ),
    Block(FINDINGS, "probes", lambda: probes.table(results("probes"))),
    Block(FINDINGS, "probes-layers", lambda: probes.layers_table(results("probes"))),
    Block(FINDINGS, "methods", lambda: methods.published_table(results("methods"))),
    Block(FINDINGS, "fusion", lambda: fusion.figures_table(results("fusion"))),
    Block(FINDINGS, "fusion-seconds", lambda: fusion.seconds_table(results("fusion"))),
    Block(FINDINGS, "fusion-distances", lambda: fusion.distances_table(results("fusion"))),
    Block(FINDINGS, "fusion-depth", lambda: fusion_depth.table(results("fusion-depth"))),
    Block(FINDINGS, "soak", lambda: soak_table(("float32", "bfloat16", "float16"))),
    Block(FINDINGS, "stalls", lambda: "\n".join(stalls.table(results("stalls")))),
    Block(FINDINGS, "interventions", lambda: interventions.matrix(results("interventions"))),
    Block(FINDINGS, "norms", norms_table),
    Block(FINDINGS, "p-values", lambda: statistics.p_table(results("statistics"))),
    Block(FINDINGS, "coverage", lambda: statistics.coverage_table(results("statistics"))),
)


def blocks_of(document: Path) -> list[Block]:
    """Returns the blocks of a document."""
    return [block for block in BLOCKS if block.document == document]


def stale(text: str, blocks: Iterable[Block]) -> list[str]:
    """Returns the names of the blocks that do not say what the figures say.

    Args:
        text: Text of their document.
        blocks: The blocks.
    """
    return [block.name for block in blocks if block.replaced(text, block.render()) != text]


def main() -> None:
    """Writes every table into its document."""
    for block in BLOCKS:
        block.write()


if __name__ == "__main__":
    main()
