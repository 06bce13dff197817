"""The demo: extract packs, serve the model, ask steered and unsteered in one batch."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import CONCEPTS
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.packs import extract_demo_packs
from vllm_steer.offline.demo.server import SERVED_NAME, Server, serve, serve_command
from vllm_steer.offline.questions.statements import statements

MAX_TOKENS = 64
PORT = 8000


@dataclass(frozen=True)
class Example:
    """One line of the demo's table."""

    direction: str
    scale: float
    statement: str
    unsteered: str
    steered: str


def run_demo(output: Path, concepts_per_class: int, workers: int) -> list[Example]:
    """Runs the whole demo and prints its table.

    Args:
        output: Directory for packs and the server's log.
        concepts_per_class: Number of concepts per class to extract and show.
        workers: Processes that fit directions.

    Returns:
        The lines of the table.
    """
    chosen = {name: list(concepts)[:concepts_per_class] for name, concepts in CONCEPTS.items()}
    _say(f"1. Extracting steering packs into {output}/packs with the attention-guided method.")
    packs = extract_demo_packs(output / "packs", chosen, workers=workers)
    _say("2. Starting vLLM with the plugin; its output goes to " + str(output / "server.log"))
    paths = [pack.path for pack in packs]
    with serve(demo_model_path(), paths, output / "server.log") as server:
        _say("3. Asking steered and unsteered, all in one batch.")
        wanted = [
            (f"{pack.name}/{name}", record.default_scale)
            for pack in packs
            for name, record in pack.directions.items()
        ]
        examples = asyncio.run(_ask_all(server, wanted))
    _say(_table(examples))
    _say(_by_hand(paths, examples[0]))
    return examples


async def _ask_all(server: Server, wanted: Sequence[tuple[str, float]]) -> list[Example]:
    texts = [statement.text for statement in statements("heldout")][: len(wanted)]
    async with AsyncOpenAI(base_url=server.url, api_key="none") as client:
        plain = [_ask(client, text, None) for text in texts]
        steered = [
            _ask(client, text, {"directions": [{"name": name, "scale": scale}]})
            for text, (name, scale) in zip(texts, wanted, strict=True)
        ]
        answers = await asyncio.gather(*plain, *steered)
    return [
        Example(name, scale, text, unsteered, answer)
        for (name, scale), text, unsteered, answer in zip(
            wanted, texts, answers[: len(texts)], answers[len(texts) :], strict=True
        )
    ]


async def _ask(client: AsyncOpenAI, statement: str, steering: dict[str, Any] | None) -> str:
    response = await client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": user_text(statement)}],
        max_tokens=MAX_TOKENS,
        temperature=0.0,
        extra_body={"steering": steering} if steering else {},
    )
    return (response.choices[0].message.content or "").strip()


def _table(examples: Sequence[Example]) -> str:
    widths = (30, 44, 44)
    rule = "+".join("-" * (width + 2) for width in widths)
    head = _row(("statement", "unsteered", "steered"), widths)
    lines = ["", head, rule]
    for example in examples:
        steered = f"[{example.direction}, scale {example.scale:g}] {example.steered}"
        lines += [_row((example.statement, example.unsteered, steered), widths), rule]
    return "\n".join(lines)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    wrapped = [
        textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)
    ]
    height = max(map(len, wrapped))
    return "\n".join(
        "|".join(
            f" {cell[line] if line < len(cell) else '':<{width}} "
            for cell, width in zip(wrapped, widths, strict=True)
        ).rstrip()
        for line in range(height)
    )


def _by_hand(packs: Sequence[Path], example: Example) -> str:
    command = shlex.join(serve_command(demo_model_path(), packs, PORT))
    body = {
        "model": SERVED_NAME,
        "messages": [{"role": "user", "content": user_text(example.statement)}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "steering": {"directions": [{"name": example.direction, "scale": example.scale}]},
    }
    curl = (
        f"curl http://127.0.0.1:{PORT}/v1/chat/completions -H 'Content-Type: application/json' -d "
    )
    return (
        "\nThe same by hand, in this environment (. .venv/bin/activate):\n\n"
        f"{command}\n\n{curl}{shlex.quote(json.dumps(body))}\n"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
