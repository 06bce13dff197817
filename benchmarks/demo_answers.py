"""What ``make demo`` answers: every question plain, with the prefix and steered, and how long it took.

``python -m benchmarks.demo_answers --json FILE`` runs the demo in a directory of its own, so that it
learns its direction anew.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.options import results_parser
from benchmarks.report import environment, write_json
from vllm_steer.offline.showcase.ask import Example
from vllm_steer.offline.showcase.run import run_showcase


def row(example: Example) -> dict[str, Any]:
    """Returns an example as the results hold it.

    Args:
        example: What was answered.
    """
    found = example.asked.record.calibration
    return {
        "direction": example.asked.direction,
        "prefix": example.asked.prefix,
        "question": example.asked.question,
        "plain": example.plain,
        "prefixed": example.prefixed,
        "steered": example.steered,
        "dose": example.receipt["dose"],
        "steers": found.steers if found else None,
        "gap_closed": found.gap_closed if found else None,
    }


def main() -> None:
    """Runs the demo and writes what it answered."""
    parser = results_parser(__doc__)
    args = parser.parse_args()
    report = environment()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as output:
        examples = run_showcase(Path(output), per_class=2, full=False)
    report["seconds"] = round(time.monotonic() - started)
    write_json(args.json, report | {"examples": [row(example) for example in examples]})


if __name__ == "__main__":
    main()
