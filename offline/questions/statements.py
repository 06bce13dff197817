"""Statements about everyday virtues and habits, drawn from a small grammar."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

Split = Literal["extract", "tune", "heldout"]

SPLIT_SIZES: dict[Split, int] = {"heldout": 400, "tune": 200, "extract": 400}
_SPLIT_SEED = 20261121

_VIRTUES = (
    "patience courage honesty kindness wisdom freedom justice loyalty ambition curiosity humility "
    "discipline generosity trust hope pride friendship knowledge silence beauty luck talent "
    "practice comfort safety progress tradition science history language education fairness "
    "respect gratitude privacy success failure leadership teamwork creativity memory imagination "
    "simplicity order change money fame power health work play love duty charm doubt faith reason "
    "skill mercy dignity"
).split()
_PEOPLE = (
    "parents children teachers students leaders neighbors friends citizens doctors artists writers "
    "workers managers voters travelers scientists lawyers athletes farmers drivers readers critics "
    "engineers volunteers tourists musicians merchants judges soldiers poets families teenagers "
    "cities schools companies governments villages committees nations teams"
).split()
_VERBS = (
    "value defend question praise ignore teach reward protect avoid study share celebrate regret "
    "welcome forget admire explain remember follow improve support mistrust measure discuss accept "
    "seek lose repeat choose enjoy"
).split()
_OBJECTS = (
    "promises rules habits mistakes stories secrets opinions debts letters meetings rumors songs "
    "speeches books gardens holidays taxes games laws machines computers lessons "
    "bargains shortcuts apologies compliments adventures surprises routines warnings plans ideas "
    "questions answers numbers words pictures markets elections"
).split()
_ADJECTIVES = (
    "small honest simple public private ancient modern early careful daily quiet bold common rare "
    "foreign local wise strict gentle clever long sudden good bad old new useful empty"
).split()
_ADVERBS = "often rarely always never seldom usually sometimes quickly slowly secretly".split()
_TIMES = (
    "before breakfast|after dinner|every morning|on weekends|in public|at home|in winter|"
    "during summer|while traveling|without fear|at school|in private"
).split("|")


@dataclass(frozen=True)
class Statement:
    """One statement.

    Attributes:
        text: The sentence, capitalised and ended by a period.
    """

    text: str


def draw_statement(rng: random.Random) -> Statement:
    """Draw one statement of seven words from the grammar."""
    pick = rng.choice
    form = rng.randrange(3)
    if form == 0:
        first, second = pick(_VIRTUES), pick(_VIRTUES)
        words = f"{pick(_ADJECTIVES)} {first} matters more than {pick(_ADJECTIVES)} {second}"
    elif form == 1:
        words = f"{pick(_PEOPLE)} should {pick(_VERBS)} {_thing(rng)} {pick(_TIMES)}"
    else:
        words = f"{pick(_ADJECTIVES)} {pick(_PEOPLE)} {pick(_ADVERBS)} {pick(_VERBS)} {_thing(rng)}"
        words += " today"
    return Statement(words[0].upper() + words[1:] + ".")


def _thing(rng: random.Random) -> str:
    return f"{rng.choice(_ADJECTIVES)} {rng.choice(_OBJECTS)}"


@cache
def _reserved() -> dict[Split, tuple[Statement, ...]]:
    rng = random.Random(_SPLIT_SEED)
    seen: set[str] = set()
    splits: dict[Split, tuple[Statement, ...]] = {}
    for split, size in SPLIT_SIZES.items():
        chosen: list[Statement] = []
        while len(chosen) < size:
            statement = draw_statement(rng)
            if statement.text not in seen:
                seen.add(statement.text)
                chosen.append(statement)
        splits[split] = tuple(chosen)
    return splits


def statements(split: Split) -> tuple[Statement, ...]:
    """Return a split's statements; no statement is in two splits or in the training corpus.

    Args:
        split: `extract` for the prompts that vectors are learned from, `tune` for choosing ε,
            `heldout` for reporting.
    """
    return _reserved()[split]


def training_statements(seed: int) -> Iterator[Statement]:
    """Yield statements for training the language model, without end, none of them reserved."""
    reserved = {s.text for split in _reserved().values() for s in split}
    rng = random.Random(seed)
    while True:
        statement = draw_statement(rng)
        if statement.text not in reserved:
            yield statement
