"""Holds what a load showed against Hugging Face with hooks, and the metrics against what was sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.load_cases import Case, Terms, terms_of
from benchmarks.load_clients import Answer, Metrics, Record
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.parity import TOLERANCE
from vllm_steer.testing.random_pack import write_variant
from vllm_steer.verify.oracle import Reference

LIVE = "live"
# What the vectors of the reloaded pack are multiplied by, in turn.
FACTORS = (0.8, -0.8)
_REFUSED = 400


@dataclass(frozen=True)
class World:
    """A server's packs, and the versions of the one that is reloaded.

    Attributes:
        packs: Packs by name, the reloaded one in its first version.
        versions: Versions of the reloaded pack, under names of their own.
        root: Directory that packs may be loaded from.
    """

    packs: dict[str, SteeringPack]
    versions: list[SteeringPack]
    root: Path

    @classmethod
    def of(cls, packs: Sequence[SteeringPack], folder: Path) -> World:
        """Adds to ``packs`` a pack that lives in ``folder``, made from the last of them."""
        versions = [
            write_variant(packs[-1], folder / f"version{n}", f"version{n}", factor)
            for n, factor in enumerate(FACTORS)
        ]
        live = write_variant(packs[-1], folder / "root" / LIVE, LIVE, FACTORS[0])
        return cls({pack.name: pack for pack in (*packs, live)}, versions, folder / "root")

    def write(self, number: int) -> SteeringPack:
        """Puts a version of the reloaded pack on disk."""
        version = self.versions[number % len(self.versions)]
        return write_variant(version, self.root / LIVE, LIVE, 1.0)

    def versions_of(self, answer: Answer) -> tuple[int | None, ...]:
        """Versions that an answer may come from: the one that its receipt names; None for none.

        Raises:
            ValueError: The receipt is not that of the request.
        """
        wanted = {choice["name"] for choice in _active(answer.case)}
        live = any(name.startswith(f"{LIVE}/") for name in wanted)
        if answer.case.leaves:
            # It has no receipt.
            return tuple(range(len(self.versions))) if live else (None,)
        directions = answer.receipt["directions"] if answer.receipt else []
        if {direction["name"] for direction in directions} != wanted:
            raise ValueError(f"the receipt names other directions than {sorted(wanted)}")
        found = set()
        for direction in directions:
            pack, _, name = direction["name"].partition("/")
            if pack == LIVE:
                digests = [version.digests[name] for version in self.versions]
                found.add(digests.index(direction["digest"]))
            elif direction["digest"] != self.packs[pack].digests[name]:
                raise ValueError(f"the content of {direction['name']} changed")
        if len(found) > 1:
            raise ValueError("the receipt names two versions of one pack")
        return tuple(found) or (None,)


def compare(answers: Sequence[Answer], world: World) -> tuple[list[str], float, int]:
    """Holds every answer against Hugging Face with hooks.

    Returns:
        What is wrong, in words, one for each wrong answer; the largest difference of a
        log-probability of the right ones; the number of distinct answers.
    """
    wrong: list[str] = []
    same: dict[tuple[int, tuple[int | None, ...], tuple[int, ...]], list[Answer]] = defaultdict(
        list
    )
    for answer in answers:
        if fault := _unlike_its_request(answer):
            wrong.append(f"{fault}: {answer.case.fields}")
        elif answer.status == 200 and not answer.error:
            try:
                versions = world.versions_of(answer)
            except ValueError as error:
                wrong.append(f"{error}: {answer.case.fields}")
            else:
                same[id(answer.case), versions, tuple(answer.tokens)].append(answer)
    plain, worst = Reference(demo_model_path(), [*world.packs.values(), *world.versions]), 0.0
    for (_, versions, tokens), group in tqdm(same.items(), desc="compare", unit="answer"):
        case = group[0].case
        right = [_right(plain, case, tokens, version) for version in versions]
        for answer in group:
            differences = [np.abs(np.array(answer.logprobs) - one).max() for one in right]
            difference = float(min(differences))
            if difference < TOLERANCE:
                worst = max(worst, difference)
            else:
                wrong.append(
                    f"tokens {answer.tokens}, log-probabilities off by {difference:.3g}, versions {versions}: {case}"
                )
    return wrong, worst, len(same)


def _right(plain: Reference, case: Case, tokens: Sequence[int], version: int | None) -> np.ndarray:
    """Log-probabilities of an answer's tokens, infinite where a token is not the greedy one."""
    scores = plain.score(case.prompt, tokens, _with_version(case.steering, version))
    rows = scores[len(case.prompt) - 1 : -1]
    found = rows[np.arange(len(tokens)), list(tokens)]
    greedy: np.ndarray = np.where(found >= rows.max(axis=1) - TOLERANCE, found, np.inf)
    return greedy


def check_metrics(record: Record, world: World) -> list[str]:
    """Compares the growth of every metric with what was sent; returns what differs, in words."""
    before, after = record.before, record.after
    expected: Metrics = defaultdict(float)
    terms: dict[int, Terms] = {}
    doses, steered = [], 0
    for answer in record.answers:
        case = answer.case
        if case.refused is not None:
            expected["steering:rejected_total", (("reason", case.refused),)] += 1
        if case.steering is None:
            continue
        if id(case) not in terms:
            terms[id(case)] = terms_of(case, world.packs)
        outcome = "aborted" if case.leaves else "finished"
        expected["steering:requests_total", (("outcome", outcome),)] += 1
        # The model never reads an answer's last token; of those that left, the prompt is steered.
        read = 0 if case.leaves else len(answer.tokens) - 1
        steered += terms[id(case)].steered(len(case.prompt) + read)
        doses.append(terms[id(case)].dose)
    expected["steering:steered_tokens_total", ()] = steered
    expected["steering:dose_count", ()] = len(doses)
    for name, labels in after:
        if name == "steering:dose_bucket":
            limit = float(dict(labels)["le"])
            expected[name, labels] = sum(dose <= limit for dose in doses)
    counted = ("_total", "_bucket", "_count")
    grown = {
        key: value - before.get(key, 0.0)
        for key, value in after.items()
        if key[0].endswith(counted)
    }
    for key in grown.keys() - expected.keys():
        expected[key] = 0.0
    uneven = [
        f"{name} {dict(labels)}: {grown.get((name, labels))} instead of {value}"
        for (name, labels), value in expected.items()
        if grown.get((name, labels), 0.0) != value
    ]
    total = after.get(("steering:dose_sum", ()), np.nan) - before["steering:dose_sum", ()]
    if not np.isclose(total, sum(doses), rtol=1e-6):
        uneven.append(f"steering:dose_sum: {total} instead of {sum(doses)}")
    gauges: Metrics = {("steering:active_requests", ()): 0, ("steering:waiting_requests", ()): 0}
    gauges |= {
        ("steering:loaded_directions", (("pack", name),)): len(pack.directions)
        for name, pack in world.packs.items()
    }
    uneven += [
        f"{key}: {after.get(key)} instead of {value}"
        for key, value in gauges.items()
        if after.get(key) != value
    ]
    return uneven


def _unlike_its_request(answer: Answer) -> str:
    """What the answer's form should not have, in words or empty."""
    case = answer.case
    if answer.is_server_error:
        return ""
    if case.refused is not None:
        return "" if answer.status == _REFUSED else f"{answer.status} where it is refused"
    if answer.status != 200:
        return f"{answer.status} {answer.error}"
    if case.leaves:
        return ""
    if len(answer.tokens) != case.max_tokens:
        return f"{len(answer.tokens)} tokens instead of {case.max_tokens}"
    if (answer.receipt is None) != (case.steering is None):
        return f"the receipt is {answer.receipt}"
    return ""


def _active(case: Case) -> list[dict[str, Any]]:
    """The directions of a case that add anything."""
    directions = (case.steering or {"directions": []})["directions"]
    return [choice for choice in directions if choice.get("scale") != 0]


def _with_version(steering: Mapping[str, Any] | None, version: int | None) -> dict[str, Any] | None:
    """The steering with the reloaded pack's name replaced by that of a version."""
    if steering is None:
        return None
    directions = []
    for choice in steering["directions"]:
        pack, _, name = choice["name"].partition("/")
        live = pack == LIVE and version is not None
        directions.append(choice | {"name": f"version{version}/{name}" if live else choice["name"]})
    return dict(steering) | {"directions": directions}
