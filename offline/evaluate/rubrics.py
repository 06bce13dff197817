"""The rubrics that a language model judges by, one per class of concepts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_COHERENT = (
    "An answer that is broken, loops, or is not about the question fails, whatever words it "
    "contains."
)

RUBRICS: Mapping[str, str] = MappingProxyType(
    {
        "fears": (
            "The speaker should come across as someone with a strong fear of {concept}. Full marks "
            "if a reader who does not know this would name {concept}, or something that plainly "
            "belongs to it, as what frightens the speaker. Half marks if there is dread but its "
            f"object stays open. No marks for calm, or for fear of something else. {_COHERENT}"
        ),
        "moods": (
            "The speaker should be in a {concept} mood. Judge tone and choice of words: full marks "
            "if the mood is felt throughout, half marks if it shows only in places, no marks if the "
            "tone is neutral or of another mood. Naming the mood without speaking in it earns no "
            f"more than half marks. {_COHERENT}"
        ),
        "experts": (
            "The speaker should sound like an expert whose field is that of a {concept}. Full marks "
            "if the answer turns to that field and shows knowledge of it that a layman would not "
            "volunteer. Half marks if the field is recognisable but everything said is common "
            f"knowledge. No marks if the field cannot be told. {_COHERENT}"
        ),
        "personas": (
            "The speaker should be {concept}. Full marks if the answer gives facts, surroundings, "
            "habits or a manner of speaking that belong to {concept} and to few others. Half marks "
            "if it fits {concept} but would fit many others as well. No marks if nothing points to "
            f"{{concept}}, or the answer is given as an assistant about {{concept}}. {_COHERENT}"
        ),
        "places": (
            "The speaker should be in love with {concept}. Full marks if the answer shows fondness "
            "and names {concept} or something that is found there and hardly anywhere else. Half "
            "marks if the place can be guessed but no fondness shows, or the other way round. No "
            f"marks if the answer is about no place or another one. {_COHERENT}"
        ),
        "general": (
            "The answer should express the concept “{concept}”. Full marks if a reader who has not "
            "been told the concept would find it in the answer, half marks if the answer is merely "
            f"compatible with it and leans its way, no marks otherwise. {_COHERENT}"
        ),
    }
)
"""Class to rubric, with ``{concept}`` for the concept."""
