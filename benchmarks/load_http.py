"""A server under load: many clients stream steered answers while a pack is reloaded under them.

    python -m benchmarks.load_http --seconds 300 --json FILE

50 steerings on three routes, aliases, unsteered requests, wrong ones, and clients that go away. One
pack's content is replaced again and again under its name. Then every token of every answer is held
against Hugging Face with hooks, with the content that the answer's receipt names, and the server's
metrics against what was sent. Two tokens whose log-probabilities lie within the tolerance are a tie,
which the batch may decide; either is right.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.load_cases import STEERINGS, CaseBook
from benchmarks.load_check import World, check_metrics, compare
from benchmarks.load_clients import load
from benchmarks.options import results_parser
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import CONCEPTS
from vllm_steer.offline.demo.packs import FULL_METHOD, extract_demo_packs
from vllm_steer.offline.demo.server import serve
from vllm_steer.packs.pack import SteeringPack

# Fewer than the requests that run at once need, so that some wait.
_ROWS = 65


def run(
    packs: Sequence[SteeringPack],
    folder: Path,
    *,
    clients: int,
    seconds: float,
    pause: float = 0.5,
    seed: int = 0,
) -> dict[str, Any]:
    """Starts a server, puts it under load, and compares everything that it said.

    Args:
        packs: Packs to steer by, whose content stays.
        folder: Directory for what is written.
        clients: Clients at once.
        seconds: For how long they ask.
        pause: Seconds between two reloads.
        seed: Seed of the requests.

    Returns:
        The results, as they are written to the JSON file.
    """
    from transformers import AutoTokenizer

    world = World.of(packs, folder)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    book = CaseBook(tokenizer, list(world.packs.values()), seed)
    started = time.monotonic()
    with serving(world, book, folder) as server:
        record = asyncio.run(
            load(
                server,
                book,
                world.write,
                clients=clients,
                seconds=seconds,
                pause=pause,
                seed=seed,
            )
        )
    elapsed = time.monotonic() - started
    wrong, worst, distinct = compare(record.answers, world)
    uneven = check_metrics(record, world)
    errors = [answer for answer in record.answers if answer.is_server_error]
    return {
        "requests": len(record.answers),
        "wrong": len(wrong),
        "server_errors": len(errors),
        "reloads": record.reloads,
        "failed_reloads": len(record.faults),
        "metrics_match": not uneven,
        "seconds": seconds,
        "seconds_with_start": round(elapsed, 1),
        "clients": clients,
        "steerings": STEERINGS,
        "kinds": dict(Counter(answer.case.kind for answer in record.answers)),
        "tokens": sum(len(answer.tokens) for answer in record.answers),
        "distinct_answers": distinct,
        "worst_logprob_difference": worst,
        "most_waiting_for_rows": record.most_waiting,
        "seed": seed,
        "failures": {
            "wrong": wrong[:20],
            "server_errors": [f"{one.status} {one.error}" for one in errors[:20]],
            "reloads": record.faults[:20],
            "metrics": uneven,
        },
    }


def serving(world: World, book: CaseBook, folder: Path) -> Any:
    """A server with the world's packs, its aliases and few rows."""
    policy = folder / "policy.json"
    policy.write_text(json.dumps({"aliases": book.aliases}))
    options = ["--steering-policy", str(policy), "--steering-pack-roots", str(world.root)]
    options += ["--steering-rows", str(_ROWS), "--enable-prefix-caching", "--enforce-eager"]
    # All routes then name tokens by their ids.
    options += ["--return-tokens-as-token-ids"]
    paths = [pack.path for pack in world.packs.values()]
    return serve(demo_model_path(), paths, folder / "log", *options)


def passed(result: Mapping[str, Any]) -> bool:
    """Whether nothing went wrong, and anything happened at all."""
    harm = result["wrong"] or result["server_errors"] or result["failed_reloads"]
    return not harm and result["metrics_match"] and result["reloads"] > 0


def main() -> None:
    """Command line."""
    parser = results_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="length of the load")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    environment = report.environment()
    few = FULL_METHOD.model_copy(update={"positive_count": 20, "negative_count": 20})
    chosen = {name: list(CONCEPTS[name])[:2] for name in ("fears", "moods")}
    with tempfile.TemporaryDirectory() as folder:
        packs = extract_demo_packs(Path(folder), chosen, few)
        result = run(
            packs, Path(folder), clients=args.clients, seconds=args.seconds, seed=args.seed
        )
    report.write_json(args.json, environment | result)
    shown = {key: value for key, value in result.items() if key != "failures" or not passed(result)}
    report.show([json.dumps(shown, indent=2)])
    raise SystemExit(not passed(result))


if __name__ == "__main__":
    main()
