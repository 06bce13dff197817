"""The steps of the demo on a real model, with the time of each."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from vllm_steer.offline.demo.server import free_port, running
from vllm_steer.offline.files import write_atomically
from vllm_steer.offline.gguf.model import model_path
from vllm_steer.offline.showcase import MODEL, shipped_pack
from vllm_steer.offline.showcase.ask import MAX_TOKENS, Asked, Example, ask_all, chosen
from vllm_steer.offline.showcase.learn import FULL, LIVE, learned_pack
from vllm_steer.offline.showcase.table import markdown_table, text_table
from vllm_steer.packs.pack import SteeringPack, load_pack

PORT = 8000
TABLE = "table.md"
_ABOUT = (
    "Of each class the directions are shown that their calibration found to express their concept most clearly, by a "
    "question for the class on which nothing was learned or tuned. Plain: the model's own answer. With the prefix: its "
    "answer to the prefix and the question. Steered: its answer to the question alone, with the direction added at "
    f"strength 1. Greedy, at most {MAX_TOKENS} tokens. The gap lies between how likely answers to the prefixed "
    "question are without the prefix and with it; how much of it a direction closes was measured by its calibration, "
    "over 100% where it makes them likelier than the prefix does. A dose of 1 is the largest at which text was found "
    "fluent."
)


def run_showcase(output: Path, per_class: int, full: bool) -> list[Example]:
    """Runs the whole demo and shows its table.

    Args:
        output: Directory of the table, the packs that are learned and the server's log.
        per_class: Concepts of each class that are shown.
        full: Whether all directions are learned; else one is, and the others are those that are
            shipped.

    Returns:
        The rows of the table.

    Raises:
        ConversionError: The model cannot be fetched or converted.
        ExtractionError: A direction cannot be learned.
        EngineError: The server does not start.
    """
    started = time.monotonic()
    with _step("1. SmolLM2-135M-Instruct, from the package that ships it to a checkpoint."):
        model = model_path(MODEL, notice=_say)
    packs = _packs(model, output, full)
    port, log = free_port(), output / "server.log"
    command = serve_command(model, [pack.path for pack in packs], port)
    with ExitStack() as stack:
        with _step(f"3. vllm serve with the plugin; its output goes to {log}"):
            server = stack.enter_context(running(command, port, log))
        with _step("4. Every question plain, with the prefix and steered, all in one batch."):
            examples = ask_all(server.url, chosen(packs, per_class))
    write_atomically(output / TABLE, _page(examples))
    _say(
        f"\n{text_table(examples)}\n\n{textwrap.fill(_ABOUT, 119)}\n\nThe table stands in {output / TABLE}."
    )
    _say(by_hand(model, packs, examples[-1].asked))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    _say(f"All of it took {minutes} min {seconds} s.")
    return examples


def serve_command(model: Path, packs: Sequence[Path], port: int) -> list[str]:
    """Returns the ``vllm serve`` command for the model with steering packs."""
    options = ["--port", str(port), "--served-model-name", MODEL, "--max-model-len", "1024"]
    # The default would take most of the memory of a machine that others use, and a minute to compile
    # what a few dozen answers do not win back.
    shared = ["--max-num-seqs", "64", "--kv-cache-memory-bytes", "512M", "--enforce-eager"]
    steering = ["--enable-steering", "--steering-packs", *map(str, packs)]
    return ["vllm", "serve", str(model), *options, *shared, *steering]


def by_hand(model: Path, packs: Sequence[SteeringPack], asked: Asked) -> str:
    """Returns the commands that serve the packs and ask one of the questions."""
    command = shlex.join(serve_command(model, [pack.path for pack in packs], PORT))
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": asked.question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "steering": asked.steering,
    }
    curl = (
        f"curl http://127.0.0.1:{PORT}/v1/chat/completions -H 'Content-Type: application/json' -d "
    )
    return (
        "\nThe same by hand, in this environment (. .venv/bin/activate):\n\n"
        f"{command}\n\n{curl}{shlex.quote(json.dumps(body))}\n"
    )


def _packs(model: Path, output: Path, full: bool) -> list[SteeringPack]:
    if full:
        with _step(f"2. {len(FULL.concepts)} directions, learned and calibrated."):
            return [learned_pack(model, FULL, output / "packs" / FULL.name, _say)]
    ((name, prefix),) = LIVE.concepts
    with _step(f"2. One direction, learned and calibrated: {name}, from “{prefix}”"):
        own = learned_pack(model, LIVE, output / "packs" / LIVE.name, _say)
    shipped = load_pack(shipped_pack())
    _say(f"   The others are shipped: {_summary(shipped)}. --full learns them here.")
    return [shipped, own]


def _summary(pack: SteeringPack) -> str:
    found = [record.calibration for record in pack.directions.values() if record.calibration]
    gaps = [calibration.gap_closed for calibration in found if calibration.gap_closed is not None]
    return (
        f"{len(pack.directions)} directions, of which {sum(each.steers for each in found)} were found to steer; "
        f"they close {median(gaps):.0%} of the gap in the median"
    )


def _page(examples: Sequence[Example]) -> str:
    head = "# SmolLM2-135M-Instruct, plain, with a prefix and steered"
    return f"{head}\n\n{_ABOUT}\n\n{markdown_table(examples)}"


@contextmanager
def _step(text: str) -> Iterator[None]:
    _say(f"\n{text}")
    started = time.monotonic()
    yield
    _say(f"   {time.monotonic() - started:.0f} s")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
