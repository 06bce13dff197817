"""Clients that stream answers, and an operator who reloads a pack under them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from benchmarks.load_cases import Case, CaseBook
from vllm_steer.offline.demo.server import Server
from vllm_steer.packs.pack import SteeringPack

Metrics = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values of ``steering:...`` by name and labels."""

_TIMEOUT = 300.0
_ENDED = ("response.completed", "response.incomplete")


@dataclass
class Answer:
    """What the server answered to one request.

    Attributes:
        case: The request.
        status: HTTP status; 0 when the connection broke.
        tokens: Token ids of the stream.
        logprobs: Their log-probabilities.
        receipt: The receipt in the chunk that ended it.
        error: What went wrong, empty when nothing did.
    """

    case: Case
    status: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    receipt: dict[str, Any] | None = None
    error: str = ""

    @property
    def is_server_error(self) -> bool:
        """Whether the server failed: a 5xx, an error in a stream, a connection that broke."""
        return self.status == 0 or self.status >= 500 or (self.status == 200 and bool(self.error))


@dataclass
class Record:
    """What a load showed.

    Attributes:
        answers: To every request.
        reloads: Reloads that the server carried out.
        faults: Reloads that it did not, in words.
        most_waiting: Most requests that were seen waiting for rows.
        before: Metrics before the first request.
        after: Metrics when all were done; empty when the server is gone.
    """

    answers: list[Answer] = field(default_factory=list)
    reloads: int = 0
    faults: list[str] = field(default_factory=list)
    most_waiting: float = 0.0
    before: Metrics = field(default_factory=dict)
    after: Metrics = field(default_factory=dict)


async def load(
    server: Server,
    book: CaseBook,
    write: Callable[[int], SteeringPack],
    *,
    clients: int,
    seconds: float,
    pause: float,
    seed: int,
) -> Record:
    """Lets clients ask for some time, each its next question as soon as the last is answered.

    Args:
        server: The server.
        book: The questions.
        write: Puts another version of a pack on disk, by the number of the reload.
        clients: How many ask at once.
        seconds: For how long new questions are asked.
        pause: Seconds between two reloads.
        seed: Seed of what they ask.
    """
    record = Record()
    limits = httpx.Limits(max_connections=clients + 2, max_keepalive_connections=clients + 2)
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=server.url, timeout=_TIMEOUT, limits=limits) as http:
        record.before = await scrape(http)
        with tqdm(total=round(seconds), desc="load", unit="s") as bar:
            await asyncio.gather(
                _show(bar, record, end),
                _reload(http, write, record, end, pause),
                *(
                    _ask_on(http, book, random.Random(f"{seed} {n}"), record, end)
                    for n in range(clients)
                ),
            )
        record.after = await _settle(http)
    return record


async def scrape(http: httpx.AsyncClient) -> Metrics:
    """Reads the server's metrics of steering."""
    response = await http.get(str(http.base_url).removesuffix("/v1/") + "/metrics")
    response.raise_for_status()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        if family.name.startswith("steering:")
        for sample in family.samples
    }


async def ask(http: httpx.AsyncClient, case: Case) -> Answer:
    """Sends one request and reads its stream to the end, or to its first token."""
    answer = Answer(case)
    try:
        async with http.stream("POST", case.route, json=case.body()) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                answer.error = (await response.aread()).decode(errors="replace")[:500]
                return answer
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _take(answer, json.loads(line.removeprefix("data: ")))
                if case.leaves and answer.tokens:
                    break
    except httpx.HTTPError as error:
        answer.status, answer.error = 0, repr(error)
    return answer


def _take(answer: Answer, chunk: Mapping[str, Any]) -> None:
    if "error" in chunk and chunk["error"]:
        answer.error = str(chunk["error"])[:500]
        return
    pairs: Sequence[tuple[str, float]] = ()
    receipts = chunk.get("steering")
    if answer.case.route == "/responses":
        if chunk["type"] == "response.output_text.delta":
            pairs = [(entry["token"], entry["logprob"]) for entry in chunk["logprobs"]]
        elif chunk["type"] in _ENDED:
            receipts = chunk["response"].get("steering")
    elif chunk["choices"] and (found := chunk["choices"][0].get("logprobs")):
        if answer.case.route == "/completions":
            pairs = list(zip(found["tokens"], found["token_logprobs"], strict=True))
        else:
            pairs = [(entry["token"], entry["logprob"]) for entry in found["content"]]
    answer.tokens += [int(token.removeprefix("token_id:")) for token, _ in pairs]
    answer.logprobs += [logprob for _, logprob in pairs]
    if receipts:
        (answer.receipt,) = receipts


async def _ask_on(
    http: httpx.AsyncClient, book: CaseBook, rng: random.Random, record: Record, end: float
) -> None:
    while time.monotonic() < end:
        answer = await ask(http, book.draw(rng))
        record.answers.append(answer)
        if answer.status == 0:
            return


async def _reload(
    http: httpx.AsyncClient,
    write: Callable[[int], SteeringPack],
    record: Record,
    end: float,
    pause: float,
) -> None:
    number = 0
    while time.monotonic() < end:
        number += 1
        pack = await asyncio.to_thread(write, number)
        try:
            response = await http.post("/steering/packs", json={"name": pack.name})
            metrics = await scrape(http)
        except httpx.HTTPError as error:
            record.faults.append(f"reload {number}: {error!r}")
            return
        if response.status_code != 200:
            record.faults.append(f"reload {number}: {response.status_code} {response.text[:300]}")
        elif response.json()["sha256"] != pack.manifest.tensors.sha256:
            record.faults.append(f"reload {number}: another content was loaded")
        else:
            record.reloads += 1
        waiting = metrics["steering:waiting_requests", ()]
        record.most_waiting = max(record.most_waiting, waiting)
        await asyncio.sleep(pause)


async def _show(bar: Any, record: Record, end: float) -> None:
    while bar.n < bar.total:
        await asyncio.sleep(min(1.0, max(0.0, end - time.monotonic())))
        bar.update(bar.total - bar.n - round(max(0.0, end - time.monotonic())))
        bar.set_postfix(answers=len(record.answers), reloads=record.reloads)


async def _settle(http: httpx.AsyncClient) -> Metrics:
    """Returns the metrics as soon as the server has noticed that all clients are gone."""
    metrics: Metrics = {}
    for _ in range(60):
        try:
            metrics = await scrape(http)
        except httpx.HTTPError:
            return {}
        if not metrics["steering:active_requests", ()]:
            break
        await asyncio.sleep(0.5)
    return metrics
