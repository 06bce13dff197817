"""Code as Markdown: models, functions, docstrings and arguments, for the reference pages."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from vllm_steer.operations import Gate
from vllm_steer.request.reads import ReadChoice, StopChoice
from vllm_steer.request.schedule import ScheduleChoice
from vllm_steer.request.schema import DirectionChoice, SteeringRequest

REQUEST_MODELS: tuple[type[BaseModel], ...] = (
    SteeringRequest,
    DirectionChoice,
    Gate,
    ScheduleChoice,
    ReadChoice,
    StopChoice,
)
"""Models on the page on requests; the page on packs has the others."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table."""
    first, *others = (f"| {' | '.join(line)} |" for line in [head, *rows])
    return "\n".join([first, f"|{'---|' * len(head)}", *others])


def model_section(model: type[BaseModel]) -> str:
    """Returns a section: a model's summary, and its fields with types and meanings."""
    schema = model.model_json_schema()
    meanings: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, BaseModel):
            meanings |= _meanings(owner.__doc__ or "")
    required = schema.get("required", [])
    rows = [
        (f"`{name}`", _type(field), "yes" if name in required else "no", meanings.get(name, ""))
        for name, field in schema["properties"].items()
    ]
    first = markdown((model.__doc__ or "").strip().split("\n\n")[0])
    fields = table(("field", "type", "required", "meaning"), rows)
    return f"## {model.__name__}\n\n{first}\n\n{fields}"


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "$ref" in field:
        return model_link(field["$ref"].rpartition("/")[2])
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    return str(field.get("type", "any"))


def _meanings(doc: str) -> dict[str, str]:
    """Field to meaning, from the ``Attributes`` section of a docstring."""
    meanings: dict[str, str] = {}
    name = ""
    for line in doc.partition("Attributes:")[2].splitlines():
        text = line.strip()
        if line.startswith(" " * 12):
            meanings[name] += f" {markdown(text)}"
        elif text:
            name, _, meaning = text.partition(": ")
            meanings[name] = markdown(meaning)
    return meanings


def markdown(text: str) -> str:
    """Returns a docstring's text as Markdown that also fits a table cell."""
    return text.replace("``", "`").replace("|", "\\|")


def described(name: str, thing: Any) -> str:
    """Returns a section: signature, docstring, and a class's own properties."""
    lines = [f"## {name}", f"`{name}{_signature(thing)}`", *_sections(inspect.getdoc(thing) or "")]
    if isinstance(thing, type):
        own = [(n, p) for n, p in vars(thing).items() if isinstance(p, property | cached_property)]
        if own:
            rows = ((f"`{n}`", markdown(summary(p))) for n, p in own)
            lines += ["**Properties**", table(("property", "meaning"), rows)]
    return "\n\n".join(lines)


def _signature(thing: Any) -> str:
    """A signature with the annotations as written."""
    signature = inspect.signature(thing)
    shown, named = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            shown.append("*")
            named = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        shown.append(f"{parameter.name}: {parameter.annotation}{default}")
    result = "" if isinstance(thing, type) else f" -> {signature.return_annotation}"
    return f"({', '.join(shown)}){result}"


def summary(thing: Any) -> str:
    """Returns the first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _sections(doc: str) -> Iterator[str]:
    """A Google docstring as Markdown: paragraphs, its named sections as lists; without examples."""
    for paragraph in doc.split("\n\n"):
        head, _, body = paragraph.partition("\n")
        if head == "Example:":
            continue
        if head.rstrip(":") not in ("Args", "Attributes", "Returns", "Raises"):
            yield markdown(" ".join(paragraph.split()))
            continue
        if head == "Returns:":
            yield f"**Returns**\n\n{markdown(' '.join(body.split()))}"
            continue
        items: list[str] = []
        for line in textwrap.dedent(body).splitlines():
            if line.startswith(" "):
                items[-1] += f" {line.strip()}"
            else:
                name, colon, meaning = line.partition(": ")
                items.append(f"- `{name}`: {meaning}" if colon else f"- {line}")
        yield f"**{head.rstrip(':')}**\n\n" + markdown("\n".join(items))


def argument(action: argparse.Action) -> str:
    """Returns an argument's syntax, with its value or its choices."""
    named = action.choices or action.metavar or (None if action.nargs == 0 else action.dest.upper())
    value = (
        named if named is None or isinstance(named, str) else "{" + ", ".join(map(str, named)) + "}"
    )
    several = " ..." if action.nargs == "+" else ""
    return f"`{' '.join(filter(None, [*action.option_strings[:1], value]))}{several}`"


def model_link(model: str) -> str:
    """Returns a link to the section of a model."""
    page = "requests" if model in {each.__name__ for each in REQUEST_MODELS} else "packs"
    return f"[{model}]({page}.md#{model.lower()})"
