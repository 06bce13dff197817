"""Writes the reference of requests, flags and packs from the code that defines them.

``python -m vllm_steer.reference`` prints REFERENCE.md; a test fails when the file is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pydantic import BaseModel

from vllm_steer.cli_verify import add_verify
from vllm_steer.forms import OPS, FormChoice, Gate
from vllm_steer.manifest import (
    MAX_DIRECTIONS,
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_MAGNITUDE,
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_VALUES,
    MAX_VECTORS_BYTES,
    DirectionRecord,
    Manifest,
    MethodRecord,
    ModelIdentity,
    TensorFile,
)
from vllm_steer.policy import Policy
from vllm_steer.receipt import HEADER, RECEIPT_FIELDS
from vllm_steer.request import DirectionChoice, SteeringRequest
from vllm_steer.schedule import ScheduleChoice
from vllm_steer.serving.flags import add_flags
from vllm_steer.serving.packs_api import ROUTES
from vllm_steer.versions import OVERRIDE, OVERRIDE_MEANING, SUPPORTED

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
        "Written from the code by `python -m vllm_steer.reference > REFERENCE.md`; do not edit.",
        "## Flags of `vllm serve`",
        _flags(_serving_parser()),
        'In `LLM(...)` the same stands in `additional_config={"steering": {"packs": [...], "rows": ...}}`.',
        "## Environment",
        f"Supported are vLLM {', '.join(SUPPORTED)}.",
        f"| variable | meaning |\n|---|---|\n| `{OVERRIDE}` | {OVERRIDE_MEANING} |",
        "## `vllm-steer verify`",
        _flags(_verify_parser()),
        "Exit status: 0 nothing failed, 1 something failed, 2 nothing could be verified. `--json` holds the facts and, "
        "for each check, `name`, `status` (`passed`, `failed`, `measured`, `not checked`), `told` and `figures`.",
        "## Requests",
        "The field `steering` of `/v1/completions`, `/v1/chat/completions` and `/v1/responses`, as an "
        'object; `vllm_xargs.steering`, as its JSON text; `SamplingParams.extra_args["steering"]`, '
        'as either. The flat form: `steer`, a list of `"name:scale"` or `"name"`, with '
        '`steer_layers` and `steer_positions` beside it. `"steering": "none"` leaves out a server\'s default.',
        *(_model(model) for model in (SteeringRequest, DirectionChoice, Gate, ScheduleChoice)),
        "### Forms",
        "What a direction `a` does to the residual stream h of a token; `â` is `a` at length 1, ε the scale. All but "
        "`add` need a server started with `--steering-ops affine`. Directions that meet at a layer and position all "
        "read the stream as the block returned it, and their changes are summed.",
        "| op | change |\n|---|---|\n"
        + "\n".join(f"| `{op}` | {text} |" for op, text in OPS.items()),
        "### JSON schema",
        f"```json\n{json.dumps(SteeringRequest.model_json_schema(), indent=1, ensure_ascii=False)}\n```",
        "## Receipts",
        "A response to a steered request has `steering`, a list with a receipt for each prompt, and the header "
        f"`{HEADER}` with names and scales. In a stream the chunk that ends an answer has the receipt, and with "
        "`/v1/responses` the last event's response.",
        "| field | meaning |\n|---|---|\n"
        + "\n".join(f"| `{field}` | {meaning} |" for field, meaning in RECEIPT_FIELDS.items()),
        "## Policy",
        "`--steering-policy FILE`, a JSON object. A request for the model `SERVED:ALIAS` is steered by the alias.",
        _model(Policy),
        "## Routes",
        "| route | answer |\n|---|---|\n"
        + "\n".join(f"| `{route}` | {meaning} |" for route, meaning in ROUTES.items()),
        "## Metrics",
        "On `/metrics`; `vllm_steer/serving/grafana.json` is a Grafana dashboard of them.",
        "| metric | type | meaning |\n|---|---|---|\n" + "\n".join(_metrics()),
        "## Steering packs",
        "`steering_config.json`; layer k is the output of decoder block k, counted from 0.",
        *(
            _model(model)
            for model in (
                Manifest,
                ModelIdentity,
                DirectionRecord,
                FormChoice,
                MethodRecord,
                TensorFile,
            )  # fmt: skip
        ),
        "### Limits",
        "A pack beyond them is refused before its vectors are read. Refused too: keys given twice, NaN and "
        "Inf, and files that are links out of the pack.",
        "| of | at most |\n|---|---|\n"
        + "\n".join(f"| {what} | {limit:,} |" for what, limit in _LIMITS.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _metrics() -> list[str]:
    from prometheus_client.metrics import MetricWrapperBase

    from vllm_steer.serving import metrics

    kept = [metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)]
    families = [family for metric in kept for family in metric.collect()]
    return [
        f"| `{family.name}{'_total' if family.type == 'counter' else ''}` | {family.type} | {family.documentation} |"
        for family in families
    ]


def _serving_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    # The wrapper of ``EngineArgs.add_cli_args``, around one that adds nothing.
    add_flags(lambda parser: parser)(parser)
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser().add_subparsers()
    add_verify(commands)
    return commands.choices["verify"]


def _flags(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if action.dest == "help":
            continue
        value = ""
        if action.nargs != 0:
            names = "\\|".join(action.choices or ()) or action.metavar or action.dest.upper()
            value = f" {names} ..." if action.nargs else f" {names}"
        rows.append(f"| `{action.option_strings[0]}{value}` | {action.help} |")
    return "\n".join(["| flag | meaning |", "|---|---|", *rows])


def _model(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    meanings: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, BaseModel):
            meanings |= _meanings(owner.__doc__ or "")
    required = schema.get("required", [])
    rows = [
        f"| `{name}` | {_type(field)} | {'yes' if name in required else 'no'} | {meanings.get(name, '')} |"
        for name, field in schema["properties"].items()
    ]
    summary = _markdown((model.__doc__ or "").strip().split("\n\n")[0])
    table = ["| field | type | required | meaning |", "|---|---|---|---|", *rows]
    return f"### {model.__name__}\n\n{summary}\n\n" + "\n".join(table)


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
