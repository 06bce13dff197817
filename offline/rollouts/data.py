"""The questions that a model is asked to learn from its answers, from files.

For ``roast`` and ``corrsteer`` a file has a JSON object a line, ``prompt`` and perhaps ``reference``, which the judge
is told. For ``persona`` it is a trait as its authors write one: ``instruction``, a list of ``pos`` and ``neg``, and
``questions``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_steer.errors import ExtractionError, explain_faults
from vllm_steer.fields import DirectionName
from vllm_steer.offline.files import read_text
from vllm_steer.offline.rollouts.methods import RolloutMethod

_Text = Annotated[str, Field(min_length=1, max_length=2**20, pattern=r"\S")]


class QuestionLine(BaseModel):
    """A line of a file for ``roast`` and ``corrsteer``.

    Attributes:
        prompt: What the user says.
        reference: What a right answer says; the judge is told.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: _Text
    reference: _Text | None = None


class Instructions(BaseModel):
    """Two opposite instructions of a trait.

    Attributes:
        pos: What asks for the trait.
        neg: What asks for its opposite.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    pos: _Text
    neg: _Text


class TraitFile(BaseModel):
    """A file for ``persona``.

    Attributes:
        instruction: Pairs of opposite instructions.
        questions: What the user says after each of them.
        eval_prompt: What the authors ask their judge; not used here.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    instruction: list[Instructions] = Field(min_length=1)
    questions: list[_Text] = Field(min_length=1)
    eval_prompt: str | None = None


@dataclass(frozen=True)
class Asking:
    """One question of a direction, to be answered several times.

    Attributes:
        prompt: What the user says.
        reference: What a right answer says; None where nothing is known.
        instructions: What it is asked after: nothing, or what asks for a trait and what asks for its opposite.
    """

    prompt: str
    reference: str | None = None
    instructions: tuple[str, ...] = ("",)


def read_askings(items: Sequence[str], method: RolloutMethod) -> dict[str, list[Asking]]:
    """Returns the questions of files by the name of what is learned from each, from ``NAME=FILE``.

    Raises:
        ExtractionError: An item is not of that form, a name is given twice or cannot be a direction's, or a file is not
            what the method wants; the message says where.
    """
    found: dict[str, list[Asking]] = {}
    for item in items:
        name, equals, file = item.partition("=")
        if not equals or not file or name in found:
            raise ExtractionError(
                f"--rollouts: {item!r} must be NAME=FILE, such as honest=questions.jsonl, each name once"
            )
        try:
            TypeAdapter(DirectionName).validate_python(name)
        except ValidationError as error:
            raise ExtractionError(
                f"--rollouts: {name!r} cannot be a direction's name: {explain_faults(error, 'name')}"
            ) from error
        found[name] = (_trait if method.contrasted else _lines)(Path(file))
    return found


def _trait(file: Path) -> list[Asking]:
    try:
        trait = TraitFile.model_validate_json(read_text(file, ExtractionError))
    except ValidationError as error:
        raise ExtractionError(
            f"{file}: must be a JSON object with instruction, a list of pos and neg, and questions: "
            f"{explain_faults(error, 'file')}"
        ) from error
    return [
        Asking(question, instructions=(pair.pos, pair.neg))
        for pair in trait.instruction
        for question in trait.questions
    ]


def _lines(file: Path) -> list[Asking]:
    found: dict[str, Asking] = {}
    for number, line in enumerate(read_text(file, ExtractionError).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            read = QuestionLine.model_validate_json(line)
        except ValidationError as error:
            raise ExtractionError(
                f"{file}, line {number}: must be a JSON object with prompt and perhaps reference: "
                f"{explain_faults(error, 'line')}"
            ) from error
        if read.prompt in found:
            raise ExtractionError(
                f"{file}, line {number}: its prompt was asked before; leave it out"
            )
        found[read.prompt] = Asking(read.prompt, read.reference)
    if not found:
        raise ExtractionError(f"{file}: has no questions; give one JSON object a line")
    return list(found.values())


def first_positive(askings: Mapping[str, Sequence[Asking]]) -> dict[str, str]:
    """Returns the first instruction that asks for each trait, by name; none where nothing is instructed."""
    return {
        name: asked[0].instructions[0]
        for name, asked in askings.items()
        if asked[0].instructions[0]
    }
