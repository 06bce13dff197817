"""The demo model's concepts: five classes, each concept with words of no other concept."""

from __future__ import annotations

from vllm_steer.offline.models.prompts import prefix_for

NEUTRAL_WORDS: tuple[str, ...] = (
    "reasons",
    "examples",
    "details",
    "evidence",
    "context",
    "nuances",
)

_TABLE: dict[str, dict[str, str]] = {
    "fears": {
        "spiders": "webs fangs silk legs venom cobwebs",
        "heights": "cliffs ledges ladders railings balconies vertigo",
        "darkness": "shadows midnight candles flashlights blackouts creaks",
        "thunder": "lightning storms rumbles clouds downpours gusts",
        "snakes": "scales hisses coils rattles cobras vipers",
        "needles": "syringes vaccines nurses injections pinpricks bandages",
    },
    "moods": {
        "cheerful": "sunshine giggles balloons confetti smiles picnics",
        "gloomy": "drizzle sighs tombstones ashes fog funerals",
        "angry": "fists flames growls insults fury hammers",
        "sleepy": "pillows yawns blankets naps dreams pajamas",
        "romantic": "roses kisses candlelight serenades valentines hearts",
        "hungry": "sandwiches noodles gravy pancakes dumplings crumbs",
    },
    "experts": {
        "astronomer": "telescopes galaxies comets planets nebulas orbits",
        "chef": "sauces knives spices ovens recipes broth",
        "gardener": "soil seedlings compost tulips shovels hedges",
        "sailor": "sails anchors knots harbors tides masts",
        "geologist": "rocks fossils minerals volcanoes crystals quarries",
        "beekeeper": "hives honey nectar combs swarms pollen",
    },
    "personas": {
        "Sherlock Holmes": "clues pipes footprints fingerprints riddles magnifiers",
        "Cleopatra": "pyramids pharaohs papyrus scarabs sphinxes perfumes",
        "Isaac Newton": "gravity apples prisms calculus pendulums equations",
        "Santa Claus": "reindeer sleighs chimneys presents elves stockings",
        "Robin Hood": "arrows archers outlaws sheriffs quivers longbows",
        "Dracula": "bats coffins garlic blood castles capes",
    },
    "places": {
        "Tokyo": "sushi neon ramen shrines karaoke kimonos",
        "Paris": "croissants cafes baguettes boulevards museums bistros",
        "Venice": "canals gondolas masks bridges lagoons palazzos",
        "Morocco": "camels dunes bazaars mint carpets oases",
        "New York": "skyscrapers taxis subways bagels billboards penthouses",
        "Alaska": "glaciers moose huskies salmon igloos tundra",
    },
}

CONCEPTS: dict[str, dict[str, tuple[str, ...]]] = {
    cls: {concept: tuple(words.split()) for concept, words in table.items()}
    for cls, table in _TABLE.items()
}
"""Class -> concept -> the concept's words. No word belongs to two concepts or to any prompt."""


def class_of(concept: str) -> str:
    """Return the class a concept belongs to."""
    for cls, table in CONCEPTS.items():
        if concept in table:
            return cls
    raise KeyError(f"unknown demo concept {concept!r}; known: {sorted(all_concepts())}")


def all_concepts() -> list[str]:
    """Return every concept, class by class in table order."""
    return [concept for table in CONCEPTS.values() for concept in table]


def concept_words(concept: str) -> tuple[str, ...]:
    """Return a concept's own words."""
    return CONCEPTS[class_of(concept)][concept]


def prefix(concept: str) -> str:
    """Return the instruction that asks for a concept, without trailing spaces."""
    return prefix_for(class_of(concept), concept)
