"""Writes the reference of requests, flags and packs from the code that defines them.

``python -m vllm_steer.cli.reference_docs`` prints REFERENCE.md; a test fails when the file is stale.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from vllm_steer import log
from vllm_steer.cli import command_line
from vllm_steer.errors import RequestError
from vllm_steer.fields import MAX_LAYERS, MAX_MAGNITUDE
from vllm_steer.operations import OPS, FormChoice, Gate
from vllm_steer.packs.calibration import Calibration, CalibrationPoint
from vllm_steer.packs.manifest import (
    MAX_DIRECTIONS,
    MAX_HIDDEN_SIZE,
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_VALUES,
    MAX_VECTORS_BYTES,
    DirectionRecord,
    Manifest,
    MethodRecord,
    ModelIdentity,
    TensorFile,
)
from vllm_steer.request.reads import ReadChoice, StopChoice
from vllm_steer.request.schedule import ScheduleChoice
from vllm_steer.request.schema import FLAT_KEYS, DirectionChoice, SteeringRequest
from vllm_steer.serving.flags import add_flags
from vllm_steer.serving.packs_api import ROUTES
from vllm_steer.serving.policy import Policy
from vllm_steer.serving.receipt import HEADER, RECEIPT_FIELDS, SCORES_KEY
from vllm_steer.serving.refusals import LINES, SECONDS
from vllm_steer.vllm_compat.versions import OVERRIDE, OVERRIDE_MEANING, SUPPORTED

_LIMITS = {
    "bytes of the manifest": MAX_MANIFEST_BYTES,
    "values in the manifest": MAX_MANIFEST_VALUES,
    "directions": MAX_DIRECTIONS,
    "layers of the model": MAX_LAYERS,
    "hidden size": MAX_HIDDEN_SIZE,
    "bytes of the tensor file": MAX_VECTORS_BYTES,
    "scales and residual norms": int(MAX_MAGNITUDE),
}


def render() -> str:
    """Returns the text of REFERENCE.md."""
    parts = [
        "# Reference",
        "Written from the code by `python -m vllm_steer.cli.reference_docs > REFERENCE.md`; do not edit.",
        "## Flags of `vllm serve`",
        _flags(add_flags),
        'In `LLM(...)` the same stands in `additional_config={"steering": {"packs": [...], "rows": ...}}`.',
        "## Environment",
        f"Supported are vLLM {', '.join(SUPPORTED)}.",
        _table(("variable", "meaning"), [(f"`{OVERRIDE}`", OVERRIDE_MEANING)]),
        "## Requests",
        "The field `steering` of `/v1/completions`, `/v1/chat/completions` and `/v1/responses`, as an "
        'object; `vllm_xargs.steering`, as its JSON text; `SamplingParams.extra_args["steering"]`, '
        'as either. `"steering": "none"` leaves out a server\'s default.',
        *(
            _model(model)
            for model in (
                SteeringRequest,
                DirectionChoice,
                Gate,
                ScheduleChoice,
                ReadChoice,
                StopChoice,
            )
        ),
        "### Forms",
        "What a direction `a` does to the residual stream h of a token; `â` is `a` at length 1, ε the scale. All but "
        "`add` need a server started with `--steering-ops affine`. Directions that meet at a layer and position all "
        "read the stream as the block returned it, and their changes are summed.",
        _table(("op", "change"), ((f"`{op}`", text) for op, text in OPS.items())),
        "### Flat form",
        "In the place of `steering`, in `vllm_xargs`, in a request's body or in `extra_args`; `steer` has to be there.",
        _table(("key", "meaning"), ((f"`{key}`", meaning) for key, meaning in FLAT_KEYS.items())),
        "### Refusals",
        "A request whose steering cannot be carried out is answered with HTTP 400 before the response starts. The "
        "reason stands in metrics and log.",
        _table(("reason", "meaning"), _reasons()),
        "### JSON schema",
        f"```json\n{json.dumps(SteeringRequest.model_json_schema(), indent=1, ensure_ascii=False)}\n```",
        "## Receipts",
        "A response to a steered request has `steering`, a list with a receipt for each prompt, and the header "
        f"`{HEADER}` with names and scales. In a stream the chunk that ends an answer has the receipt, and with "
        "`/v1/responses` the last event's response.",
        _table(
            ("field", "meaning"), ((f"`{f}`", meaning) for f, meaning in RECEIPT_FIELDS.items())
        ),
        f"Where the request reads, each chunk of `/v1/completions` and `/v1/chat/completions` has the scores that have come "
        f"since the one before, in `{SCORES_KEY}`: for each answer its `index`, the absolute position `start` of the first "
        "token, the prompt's first being 0, and `scores`, a list for each read. In `LLM(...)` each `CompletionOutput` has "
        "them in `steering_scores`, and `vllm_steer.read(outputs)` gives them as an array.",
        "## Policy",
        "`--steering-policy FILE`, a JSON object. A request for the model `SERVED:ALIAS` is steered by the alias.",
        _model(Policy),
        "## Routes",
        _table(("route", "answer"), ((f"`{route}`", meaning) for route, meaning in ROUTES.items())),
        "All but the first need `--steering-pack-roots` and answer 403 without it. Errors have the form of the OpenAI "
        "API: 400 for what is malformed, unknown or cannot be served, 404 for a route that is none, 409 for what "
        "cannot be done now.",
        "## Metrics",
        "On `/metrics`; `vllm_steer/serving/grafana.json` is a Grafana dashboard of them.",
        _table(("metric", "type", "labels", "meaning"), _metrics()),
        "## Log",
        f"On the logger `{log.logger.name}`: a line is `Steering EVENT: ` and the fields as JSON, with blanks for the "
        "underscores of the event. The record has them as `record.steering`, with `event`, for a JSON formatter. `key` "
        f"is the beginning of the SHA-256 of the request's API key, {log.KEY_DIGITS} digits. Of one reason, at most "
        f"{LINES} refusals are written in {SECONDS:g} seconds.",
        _table(("event", "level", "written"), _events()),
        "## Steering packs",
        "`steering_config.json`; layer k is the output of decoder block k, counted from 0.",
        *(
            _model(model)
            for model in (
                Manifest,
                ModelIdentity,
                DirectionRecord,
                FormChoice,
                Calibration,
                CalibrationPoint,
                MethodRecord,
                TensorFile,
            )  # fmt: skip
        ),
        "### Limits",
        "A pack beyond them is refused before its vectors are read. Refused too: keys given twice, NaN and "
        "Inf, and files that are links out of the pack.",
        _table(("of", "at most"), ((what, f"{limit:,}") for what, limit in _LIMITS.items())),
        "## Commands of `vllm-steer`",
        *_commands(command_line()),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(line)} |" for line in [head, *rows])
    return "\n".join([first, f"|{'---|' * len(head)}", *others])


def _metrics() -> list[Sequence[str]]:
    from prometheus_client.metrics import MetricWrapperBase

    from vllm_steer.serving import metrics

    kept = [metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)]
    families = [(family, metric) for metric in kept for family in metric.collect()]
    return [
        (
            f"`{family.name}{'_total' if family.type == 'counter' else ''}`",
            family.type,
            ", ".join(f"`{label}`" for label in metric._labelnames),
            _markdown(family.documentation),
        )
        for family, metric in families
    ]


def _events() -> list[Sequence[str]]:
    events = [value for value in vars(log).values() if isinstance(value, log.Event)]
    return [(f"`{e.name}`", logging.getLevelName(e.level), e.meaning) for e in events]


def _reasons() -> list[Sequence[str]]:
    kinds: list[type[RequestError]] = [RequestError, *RequestError.__subclasses__()]
    return [(f"`{kind.reason}`", (kind.__doc__ or "").partition("\n")[0]) for kind in kinds]


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A section for each command that does something."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in inner:
        for command in action.choices.values():
            yield from _commands(command)
    if not inner:
        format_help = parser._get_formatter()._expand_help
        shown = [a for a in parser._actions if a.dest != "help"]
        rows = [(_argument(a), _markdown(format_help(a)) if a.help else "") for a in shown]
        yield f"### {parser.prog}"
        yield _table(("argument", "meaning"), rows)


def _flags(add: Callable[..., Any]) -> str:
    parser = argparse.ArgumentParser(add_help=False)
    add(lambda parser: parser)(parser)
    return _table(("flag", "meaning"), ((_argument(a), a.help or "") for a in parser._actions))


def _argument(action: argparse.Action) -> str:
    """How an argument is written, with its value or its choices."""
    named = action.choices or action.metavar or (None if action.nargs == 0 else action.dest.upper())
    value = (
        named if named is None or isinstance(named, str) else "{" + ",".join(map(str, named)) + "}"
    )
    several = " ..." if action.nargs == "+" else ""
    return f"`{' '.join(filter(None, [*action.option_strings[:1], value]))}{several}`"


def _model(model: type[BaseModel]) -> str:
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
    summary = _markdown((model.__doc__ or "").strip().split("\n\n")[0])
    table = _table(("field", "type", "required", "meaning"), rows)
    return f"### {model.__name__}\n\n{summary}\n\n{table}"


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
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
            meanings[name] += f" {_markdown(text)}"
        elif text:
            name, _, meaning = text.partition(": ")
            meanings[name] = _markdown(meaning)
    return meanings


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(render())
