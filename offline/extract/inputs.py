"""Concepts and statements from plain text files: one per line, blank lines and outer space ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_steer.errors import ExtractionError, explain_faults
from vllm_steer.offline.extract.methods import METHODS
from vllm_steer.offline.extract.settings import ExtractionSettings
from vllm_steer.offline.files import read_lines, read_text
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.offline.models.prompts import PREFIX_TEMPLATES, AnswerPair, Concept, prefix_for
from vllm_steer.offline.questions.statements import statements

# Files of a directory of concept lists, and the class whose prefix their concepts take.
CLASS_FILES: Mapping[str, str] = {
    **{f"{name}.txt": name for name in PREFIX_TEMPLATES},
    "personalities.txt": "experts",
}
STATEMENT_FILES = ("statements_0.txt", "statements_1.txt")


_SETTINGS_FILE: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


class _PairLine(BaseModel):
    """A line of a file of answer pairs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    positive: str = Field(min_length=1)
    negative: str = Field(min_length=1)


def class_concepts(file: Path, concept_class: str) -> list[Concept]:
    """Returns the concepts of a file, each with the prefix of its class."""
    return [Concept(concept, prefix_for(concept_class, concept)) for concept in _lines(file)]


def template_concepts(file: Path, template: str) -> list[Concept]:
    """Returns the concepts of a file with a custom prefix template.

    Raises:
        ExtractionError: As :func:`templated`.
    """
    return templated(_lines(file), template)


def templated(names: Sequence[str], template: str) -> list[Concept]:
    """Returns concepts with a custom prefix template.

    Args:
        names: The concepts.
        template: The prefix, with ``{concept}`` for the concept.

    Raises:
        ExtractionError: The template has no place for the concept.
    """
    if "{concept}" not in template:
        raise ExtractionError(
            "--prefix must hold {concept}, such as 'Speak like {concept}.'; give whole prefixes by "
            "--prefixes"
        )
    return [Concept(name, template.replace("{concept}", name)) for name in names]


def whole_prefixes(file: Path) -> list[Concept]:
    """Returns concepts that bring their whole prefix: lines of ``name: prefix``.

    Raises:
        ExtractionError: A line has no name or no prefix.
    """
    concepts = []
    for line in _lines(file):
        name, _, prefix = line.partition(":")
        if not name.strip() or not prefix.strip():
            raise ExtractionError(f"{file}: a line must be 'name: whole prefix', not {line!r}")
        concepts.append(Concept(name.strip(), prefix.strip()))
    return concepts


def prompt_files(items: Sequence[str]) -> list[Concept]:
    """Returns concepts whose prefix is the whole text of a file, from ``NAME=FILE``.

    Raises:
        ExtractionError: An item is not of that form, a name is given twice, or a file cannot be read
            or is empty.
    """
    concepts: dict[str, str] = {}
    for item in items:
        name, equals, file = item.partition("=")
        if not equals or not name or name in concepts:
            raise ExtractionError(
                f"--prompt: {item!r} must be NAME=FILE, such as pirate=pirate.txt, each name once"
            )
        text = read_text(Path(file), ExtractionError).strip()
        if not text:
            raise ExtractionError(f"--prompt: {file} is empty; it must hold the prompt")
        concepts[name] = text
    return [Concept(*item) for item in concepts.items()]


def listed_concepts(directory: Path) -> list[Concept]:
    """Returns the concepts of a directory with one list for each class, sorted within each.

    A concept that stands in several classes is named ``concept (class)``.

    Args:
        directory: Holds any of ``fears.txt``, ``moods.txt``, ``experts.txt`` or
            ``personalities.txt``, ``personas.txt`` and ``places.txt``.

    Raises:
        ExtractionError: There is no such list in it.
    """
    found = [
        (concept, concept_class)
        for file, concept_class in CLASS_FILES.items()
        if (directory / file).is_file()
        for concept in sorted(set(_lines(directory / file)))
    ]
    if not found:
        raise ExtractionError(
            f"no concept lists in {directory}; it must hold one of {', '.join(CLASS_FILES)}"
        )
    times = Counter(concept for concept, _ in found)
    return [
        Concept(
            concept if times[concept] == 1 else f"{concept} ({concept_class})",
            prefix_for(concept_class, concept),
        )
        for concept, concept_class in found
    ]


def answer_pairs(files: Sequence[Path]) -> dict[str, list[AnswerPair]]:
    """Returns the answer pairs of JSON-lines files, each file a direction named by its stem.

    Args:
        files: Each line is an object with ``prompt``, ``positive`` and ``negative``; white space in them
            is kept, since it decides the tokens.

    Raises:
        ExtractionError: A file cannot be read, a line is no such object, or two files have one name.
    """
    found: dict[str, list[AnswerPair]] = {}
    for file in files:
        if file.stem in found:
            raise ExtractionError(f"--pairs: two files are named {file.stem!r}")
        found[file.stem] = []
        for line in _lines(file):
            try:
                pair = _PairLine.model_validate_json(line)
            except ValidationError as error:
                raise ExtractionError(
                    f"{file}: a line must be an object of prompt, positive and negative, not {line!r}: "
                    f"{error.errors()[0]['msg']}"
                ) from error
            found[file.stem].append(AnswerPair(pair.prompt, pair.positive, pair.negative))
    return found


def statement_sides(
    positive: Path | None, negative: Path | None, directory: Path | None, *, strip: bool = True
) -> tuple[list[str], list[str]]:
    """Returns the statements of the prefixed and of the unprefixed prompts.

    Args:
        positive: File of the former; None for ``statements_0.txt`` of the directory, or, where that
            is missing too, half of the project's own statements.
        negative: Likewise, ``statements_1.txt`` and the other half.
        directory: Directory of concept lists, if one was given.
        strip: Whether white space around the lines of files is dropped, line breaks included.
    """
    own = [statement.text for statement in statements("extract")]
    halves = own[: len(own) // 2], own[len(own) // 2 :]
    sides = []
    for given, file, half in zip((positive, negative), STATEMENT_FILES, halves, strict=True):
        listed = directory / file if directory and (directory / file).is_file() else None
        chosen = given or listed
        sides.append(read_lines(chosen, ExtractionError, strip) if chosen else half)
    return sides[0], sides[1]


def read_settings(
    file: Path | None, given: Mapping[str, Any], pairs: bool = False
) -> ExtractionSettings:
    """Returns the settings of a JSON file, those given besides in their place.

    Without a method, directions are trained; they are learned by the attention-guided method where
    some setting that training does not have is given, and by contrastive activation addition from
    pairs.

    Args:
        file: The JSON file; None for none.
        given: Settings given besides.
        pairs: Whether answer pairs are learned from.

    Raises:
        ExtractionError: A setting is unknown or has no such value; the message names it.
    """
    try:
        base = {} if file is None else _SETTINGS_FILE.validate_json(file.read_bytes())
        chosen = {**base, **given}
        if "method" not in chosen:
            chosen["method"] = "caa" if pairs else _method_for(chosen)
        return ExtractionSettings.model_validate(chosen)
    except OSError as error:
        raise ExtractionError(
            f"cannot read {file}: {error.strerror}; give a file of JSON"
        ) from error
    except ValidationError as error:
        faults = explain_faults(error, "settings")
        raise ExtractionError(f"settings cannot be used: {faults}") from error


def _method_for(chosen: Mapping[str, Any]) -> str:
    fixed = METHODS["trained"].fixed
    own = {field for field in ExtractionSettings.model_fields if field.startswith("train_")}
    neutral = own | {
        "layers",
        "dtype",
        "batch_size",
        "seed",
        "answer_length",
        "prefix_role",
        *ChatFormat.model_fields,
        "questions",
        "stopping_questions",
        "answer_share",
    }
    agrees = all(
        value == fixed.get(field) for field, value in chosen.items() if field not in neutral
    )
    return "trained" if agrees else "attention_guided"


def _lines(file: Path) -> list[str]:
    return read_lines(file, ExtractionError)
