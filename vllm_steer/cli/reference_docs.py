"""Generates the documentation's reference pages from the code.

``python -m vllm_steer.cli.reference_docs docs/reference`` writes them; a test fails if one is stale.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vllm_steer import log
from vllm_steer.cli import command_line
from vllm_steer.cli.reference_markdown import (
    REQUEST_MODELS,
    argument,
    described,
    markdown,
    model_link,
    model_section,
    summary,
    table,
)
from vllm_steer.errors import RequestError, SteeringError
from vllm_steer.fields import MAX_LAYERS, MAX_MAGNITUDE
from vllm_steer.operations import OPS, FormChoice
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
    Prefix,
    TensorFile,
)
from vllm_steer.packs.probe import Probe, ProbeLayer, ProbeThreshold
from vllm_steer.request.schema import FLAT_KEYS, SteeringRequest
from vllm_steer.serving.flags import add_flags
from vllm_steer.serving.packs_api import ROUTES
from vllm_steer.serving.policy import Policy
from vllm_steer.serving.receipt import HEADER, RECEIPT_FIELDS, SCORES_KEY
from vllm_steer.serving.refusals import LINES, SECONDS
from vllm_steer.vllm_compat.patched_symbols import patched_symbols, wrapped_methods
from vllm_steer.vllm_compat.versions import OVERRIDE, OVERRIDE_MEANING, SUPPORTED

SCHEMA_FILE = "steering-request.schema.json"
_WRITTEN = "<!-- Generated from the code by `python -m vllm_steer.cli.reference_docs docs/reference`; do not edit. -->"
_LIMITS = {
    "bytes of the manifest": MAX_MANIFEST_BYTES,
    "values in the manifest": MAX_MANIFEST_VALUES,
    "directions": MAX_DIRECTIONS,
    "layers of the model": MAX_LAYERS,
    "hidden size": MAX_HIDDEN_SIZE,
    "bytes of the tensor file": MAX_VECTORS_BYTES,
    "scales and residual norms": int(MAX_MAGNITUDE),
}


def render() -> dict[str, str]:
    """Returns the text of every generated page, by file name."""
    pages = {
        "flags": _flag_page(),
        "requests": _request_page(),
        "receipts": _receipt_page(),
        "policy": _policy_page(),
        "routes": _route_page(),
        "metrics": _metric_page(),
        "log": _log_page(),
        "packs": _pack_page(),
        "commands": ["# Command line", *_commands(command_line())],
        "python": _python_page(),
        "patches": _patch_page(),
    }
    texts = {f"{name}.md": _joined([page[0], _WRITTEN, *page[1:]]) for name, page in pages.items()}
    return texts | {SCHEMA_FILE: _schema()}


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _flag_page() -> list[str]:
    return [
        "# Server flags",
        "Flags of `vllm serve`, also shown by `vllm serve --help=SteeringConfig`.",
        _flags(add_flags),
        'With `LLM(...)` the same settings go into `additional_config={"steering": {"packs": [...], "rows": ...}}`.',
        "## Environment",
        f"Supported vLLM versions: {', '.join(SUPPORTED)}.",
        table(("variable", "meaning"), [(f"`{OVERRIDE}`", OVERRIDE_MEANING)]),
    ]


def _request_page() -> list[str]:
    return [
        "# Requests",
        "The field `steering` of `/v1/completions`, `/v1/chat/completions` and `/v1/responses`, as an "
        'object; `vllm_xargs.steering`, as its JSON text; `SamplingParams.extra_args["steering"]`, '
        'as either. `"steering": "none"` turns off a server\'s default.',
        f"[{SCHEMA_FILE}]({SCHEMA_FILE}) is its JSON schema.",
        *(model_section(model) for model in REQUEST_MODELS),
        "## Operations",
        "The effect of a direction `a` on the residual stream h of a token; `â` is the unit vector of `a`, ε the scale. "
        "All except `add` need a server started with `--steering-ops affine`. Directions at the same layer and position all "
        "read the stream as the block returned it, and their changes are summed.",
        table(("op", "change"), ((f"`{op}`", text) for op, text in OPS.items())),
        "## Flat form",
        "Instead of `steering`, in `vllm_xargs`, in a request's body or in `extra_args`; `steer` is required.",
        table(("key", "meaning"), ((f"`{key}`", meaning) for key, meaning in FLAT_KEYS.items())),
        "## Refusals",
        "A request that cannot be steered as asked is answered with HTTP 400 before the response starts. Metrics "
        "and log give the reason.",
        table(("reason", "meaning"), _reasons()),
    ]


def _receipt_page() -> list[str]:
    return [
        "# Receipts",
        "The response to a steered request has `steering`, a list with a receipt for each prompt, and the header "
        f"`{HEADER}` with names and scales. In a stream the receipt is in the chunk that ends an answer; with "
        "`/v1/responses` it is in the response of the last event.",
        table(("field", "meaning"), ((f"`{f}`", meaning) for f, meaning in RECEIPT_FIELDS.items())),
        f"If the request reads, each chunk of `/v1/completions` and `/v1/chat/completions` has the scores since the "
        f"previous one, in `{SCORES_KEY}`: for each answer its `index`, the absolute position `start` of the first "
        "token (0 is the prompt's first), and `scores`, a list for each read. With `LLM(...)` each `CompletionOutput` has "
        "them in `steering_scores`, and `vllm_steer.read(outputs)` returns them as an array.",
    ]


def _policy_page() -> list[str]:
    return [
        "# Policy",
        "`--steering-policy FILE`, a JSON object. A request for the model `SERVED:ALIAS` is steered by the alias.",
        model_section(Policy),
    ]


def _route_page() -> list[str]:
    return [
        "# HTTP routes",
        table(("route", "answer"), ((f"`{route}`", meaning) for route, meaning in ROUTES.items())),
        "Routes that change packs and aliases need `--steering-pack-roots`, routes for vectors `--steering-upload-mib`; "
        "without it they answer 403. Errors have the OpenAI API's format: 400 for malformed or unknown input and what "
        "cannot be served, 404 for an unknown route, 409 for conflicts with the current state.",
    ]


def _metric_page() -> list[str]:
    return [
        "# Metrics",
        "Exported on `/metrics`; `vllm_steer/serving/grafana.json` is a Grafana dashboard for them.",
        table(("metric", "type", "labels", "meaning"), _metrics()),
    ]


def _log_page() -> list[str]:
    return [
        "# Log",
        f"Written to the logger `{log.logger.name}`. A line is `Steering EVENT: ` and the fields as JSON, with spaces for "
        "underscores in the event. The record has them as `record.steering`, with `event`, for a JSON formatter. `key` "
        f"is the first {log.KEY_DIGITS} digits of the SHA-256 of the request's API key. For one reason, at most "
        f"{LINES} refusals are written per {SECONDS:g} seconds.",
        table(("event", "level", "written"), _events()),
    ]


def _pack_page() -> list[str]:
    models = (
        Manifest,
        ModelIdentity,
        DirectionRecord,
        Prefix,
        FormChoice,
        Calibration,
        CalibrationPoint,
    )
    probes = (Probe, ProbeLayer, ProbeThreshold)
    return [
        "# Pack format",
        "A pack is a directory with `steering_config.json`, the manifest, and `steering_vectors.safetensors`, a tensor "
        "`[layers, hidden_size]` for each direction. Layer k is the output of decoder block k, counted from 0.",
        *(model_section(model) for model in (*models, *probes, MethodRecord, TensorFile)),
        "## Limits",
        "A pack that exceeds them is rejected before its vectors are read, and so is one with duplicate keys, NaN or Inf, "
        "or links that point outside the pack.",
        table(("of", "at most"), ((what, f"{limit:,}") for what, limit in _LIMITS.items())),
    ]


def _patch_page() -> list[str]:
    return [
        "# Patches of vLLM",
        "vLLM serves unsteered requests as without the plugin. Each patched symbol is checked at startup; if one is "
        "missing or has other parameters, the engine does not start.",
        table(
            ("symbol", "why no public hook serves", "what would make it unnecessary"), _patches()
        ),
    ]


def _python_page() -> list[str]:
    """The exports of ``vllm_steer``: functions, then classes, then errors."""
    # Imported as users do; no module of the package imports its root.
    package = importlib.import_module("vllm_steer")
    public = [(name, getattr(package, name)) for name in package.__all__]
    errors = [(n, o) for n, o in public if isinstance(o, type) and issubclass(o, SteeringError)]
    models = [(n, o) for n, o in public if isinstance(o, type) and issubclass(o, BaseModel)]
    rest = [(name, thing) for name, thing in public if (name, thing) not in errors + models]
    return [
        "# Python",
        "The names exported by `vllm_steer`, which imports neither torch nor vLLM.",
        *(described(name, thing) for name, thing in rest),
        "## Models",
        "Pydantic models of requests and packs.",
        table(("class", "fields"), ((f"`{n}`", model_link(n)) for n, _ in models)),
        "## Errors",
        table(("class", "raised when"), ((f"`{n}`", summary(o)) for n, o in errors)),
    ]


def _schema() -> str:
    return json.dumps(SteeringRequest.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


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
            markdown(family.documentation),
        )
        for family, metric in families
    ]


def _events() -> list[Sequence[str]]:
    events = [value for value in vars(log).values() if isinstance(value, log.Event)]
    return [(f"`{e.name}`", logging.getLevelName(e.level), e.meaning) for e in events]


def _patches() -> list[Sequence[str]]:
    """A row for each reason, with all its symbols."""
    rows: dict[tuple[str, str], list[str]] = {}
    for patched in patched_symbols():
        rows.setdefault((patched.reason, patched.upstream), []).append(patched.name)
    for wrapped in wrapped_methods():
        kind = wrapped.owners[0][1]
        names = [f"{kind}.{method}" for method in wrapped.methods]
        rows.setdefault((wrapped.reason, wrapped.upstream), []).extend(names)
    return [(", ".join(f"`{name}`" for name in names), *why) for why, names in rows.items()]


def _reasons() -> list[Sequence[str]]:
    kinds: list[type[RequestError]] = [RequestError, *RequestError.__subclasses__()]
    return [(f"`{kind.reason}`", (kind.__doc__ or "").partition("\n")[0]) for kind in kinds]


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A section for each command without subcommands."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in inner:
        for command in action.choices.values():
            yield from _commands(command)
    if not inner:
        format_help = parser._get_formatter()._expand_help
        shown = [a for a in parser._actions if a.dest != "help"]
        rows = [(argument(a), markdown(format_help(a)) if a.help else "") for a in shown]
        yield f"## {parser.prog}"
        if parser.description:
            yield markdown(" ".join(parser.description.split()))
        yield table(("argument", "meaning"), rows)


def _flags(add: Callable[..., Any]) -> str:
    parser = argparse.ArgumentParser(add_help=False)
    add(lambda parser: parser)(parser)
    return table(("flag", "meaning"), ((argument(a), a.help or "") for a in parser._actions))


def main() -> None:
    """Writes the pages into the given directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    folder = parser.parse_args().directory
    for name, text in render().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
