"""AxBench's files: its concepts and the instructions that it samples from AlpacaEval.

Concepts are a JSON list, as Neuronpedia exports them (``description``, ``index``), or JSON lines, as the metadata of
Concept10 and Concept500 (``concept``, ``concept_id``). Instructions are AlpacaEval's JSON list of objects with
``instruction``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_steer.errors import EvaluationError, choices, explain_faults
from vllm_steer.offline.files import read_text
from vllm_steer.packs.pack import SteeringPack

_Text = Annotated[str, Field(pattern=r"\S")]


class _Exported(BaseModel):
    """A concept of a JSON list."""

    model_config = ConfigDict(strict=True)

    description: _Text
    index: int | str


class _Metadata(BaseModel):
    """A concept of a line of metadata."""

    model_config = ConfigDict(strict=True)

    concept: _Text
    concept_id: Annotated[int, Field(ge=0)]


class _Instruction(BaseModel):
    model_config = ConfigDict(strict=True)

    instruction: _Text


@dataclass(frozen=True)
class Concept:
    """A concept of the benchmark.

    Attributes:
        number: Its id, which its instructions are sampled by.
        text: What it is, in words.
        feature: Number of its feature in the autoencoder; empty in metadata.
    """

    number: int
    text: str
    feature: str = ""


def read_concepts(file: Path) -> list[Concept]:
    """Returns the concepts of a file, in its order.

    Raises:
        EvaluationError: It cannot be read, has no concepts, or one twice; the message says which.
    """
    text = read_text(file, EvaluationError)
    try:
        if text.lstrip().startswith("["):
            exported = TypeAdapter(list[_Exported]).validate_json(text)
            found = [
                Concept(number, each.description.strip(), str(each.index))
                for number, each in enumerate(exported)
            ]
        else:
            lines = [_Metadata.model_validate_json(x) for x in text.splitlines() if x.strip()]
            found = [Concept(each.concept_id, each.concept.strip()) for each in lines]
    except ValidationError as error:
        raise EvaluationError(
            f"{file}: must be a JSON list of objects with description and index, or JSON lines of objects with concept and "
            f"concept_id: {explain_faults(error, 'file')}"
        ) from error
    if not found:
        raise EvaluationError(f"{file} has no concepts")
    numbers = [concept.number for concept in found]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise EvaluationError(f"{file}: concept_id {twice[0]} is given twice")
    return found


def read_instructions(file: Path) -> list[str]:
    """Returns the instructions of a file, in its order.

    Raises:
        EvaluationError: It cannot be read, or is no JSON list of objects with ``instruction``.
    """
    try:
        read = TypeAdapter(list[_Instruction]).validate_json(read_text(file, EvaluationError))
    except ValidationError as error:
        raise EvaluationError(
            f"{file}: must be a JSON list of objects with instruction, as alpaca_eval.json: {explain_faults(error, 'file')}"
        ) from error
    return [each.instruction for each in read]


def sampled_instructions(instructions: Sequence[str], concept: Concept, count: int) -> list[str]:
    """Returns the instructions of a concept: the rows that the benchmark's ``DataFrame.sample`` takes with its id as seed.

    Raises:
        EvaluationError: There are fewer.
    """
    if len(instructions) < count:
        raise EvaluationError(
            f"{count} instructions are wanted for each concept, and the file has {len(instructions)}"
        )
    rows = np.random.RandomState(concept.number).choice(len(instructions), count, replace=False)
    return [instructions[row] for row in rows]


def matched(
    concepts: Sequence[Concept], pack: SteeringPack, names: Mapping[str, str]
) -> dict[str, Concept]:
    """Returns the concept of each direction that has one.

    Args:
        concepts: The concepts.
        pack: The pack. A direction is a concept's if it is named by its words, its id or its feature.
        names: Direction by words or id, in place of that.

    Raises:
        EvaluationError: No direction has a concept, or a name that is given is no direction or no concept.
    """
    known = {word for c in concepts for word in (c.text, str(c.number))}
    for word, name in names.items():
        if word not in known:
            raise EvaluationError(f"names: {word!r} is no concept of the file, by its words or id")
        if name not in pack.directions:
            raise EvaluationError(
                f"names: pack {pack.name!r} has no direction {name!r}; {choices(name, pack.directions)}"
            )
    found: dict[str, Concept] = {}
    for concept in concepts:
        own = [concept.text, str(concept.number), concept.feature]
        given = [names[word] for word in own if word in names]
        for name in given or [word for word in own if word in pack.directions]:
            if name in found and found[name] != concept:
                raise EvaluationError(
                    f"direction {name!r} is that of two concepts, {found[name].text!r} and {concept.text!r}; say "
                    f"which by names"
                )
            found[name] = concept
            break
    if not found:
        raise EvaluationError(
            f"no direction of pack {pack.name!r} is named by a concept's words, id or feature; give a JSON object of "
            f"concept "
            f"to direction by --names"
        )
    return found


def read_json(file: Path) -> Any:
    """Returns the JSON of a user's file.

    Raises:
        EvaluationError: It cannot be read or is no JSON.
    """
    try:
        return json.loads(read_text(file, EvaluationError))
    except ValueError as error:
        raise EvaluationError(f"{file} is no JSON: {error}") from error


def read_names(file: Path | None) -> dict[str, str]:
    """Returns direction by concept, from a JSON object of strings.

    Raises:
        EvaluationError: It is none.
    """
    if file is None:
        return {}
    try:
        return TypeAdapter(dict[str, str]).validate_python(read_json(file), strict=True)
    except ValidationError as error:
        raise EvaluationError(
            f"{file}: must be a JSON object of concept to direction: {explain_faults(error, 'file')}"
        ) from error
