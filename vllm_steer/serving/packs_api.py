"""The routes under ``/v1/steering``: listing packs and aliases, and changing them while the server runs.

``GET packs`` and ``GET aliases`` list, ``GET limits`` says what a request may ask for; ``POST packs`` and
``DELETE packs/NAME`` load and unload; ``PUT`` and ``DELETE`` of ``aliases/NAME`` change aliases, those of
``vectors/NAME`` uploads.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm_steer.config import ResolvedConfig
from vllm_steer.errors import ConflictError, NotAllowedError, PackError, RequestError
from vllm_steer.packs.calibration import Calibration
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.store import PackStore
from vllm_steer.request.positions import plain_positions
from vllm_steer.serving.admission import Admission
from vllm_steer.serving.asgi import (
    Message,
    Receive,
    Send,
    key_digest,
    read_limited,
    send_error,
    send_json,
)
from vllm_steer.serving.pack_manager import PackManager
from vllm_steer.serving.policy import Policy
from vllm_steer.serving.refusals import log_refusal
from vllm_steer.serving.uploads import expiry
from vllm_steer.vllm_compat.attached import Attached

PREFIX = "/v1/steering/"
ROUTES = {
    "GET /v1/steering/packs": "The packs that the API key may use: `packs`, a list of `name`, `model`, `sha256` and "
    "`directions`, each with `name`, `layers`, `default_layers` (null: all), `positions`, `default_scale`, `safe_scale` "
    "(null: not measured), `form` (FormChoice; null: addition), `calibration` (Calibration without its curve, with "
    "`scales`, the least and the greatest that was measured; null: none), `probe` (Probe without its layers, "
    "with the rates `fpr` that requests may name; null: none) and content `digest`.",
    "GET /v1/steering/aliases": "The aliases all of whose directions the API key may use: `aliases`, a list of `name` and "
    "`steering`, a SteeringRequest.",
    "GET /v1/steering/limits": "What requests may ask for: `ops` and `rank`, `layers` that are hooked, number of `reads`, "
    "and `max_dose` (null: any) with `dose_action`.",
    "POST /v1/steering/packs": 'Loads or reloads the pack `{"name": NAME}` from a directory of that name in a root, '
    "and returns it as above. Running requests keep the content they were admitted with.",
    "DELETE /v1/steering/packs/NAME": "Unloads a pack; 409 while a request, an alias or the default needs it.",
    "PUT /v1/steering/vectors/NAME?seconds=600": "Serves the vectors in the body as the pack NAME for that many seconds, "
    "and returns it as above: a safetensors file with a float32 tensor `[layers, hidden_size]` for each direction and "
    'the metadata `{"layers": "[0, 1, ...]"}`. A second upload of the name replaces them; running requests keep theirs.',
    "DELETE /v1/steering/vectors/NAME": "Removes them now; 409 while a request, an alias or the default needs them.",
    "PUT /v1/steering/aliases/ALIAS": "Makes `SERVED:ALIAS` an alias for the SteeringRequest in the body.",
    "DELETE /v1/steering/aliases/ALIAS": "Removes an alias.",
}
_REFUSED: dict[type, tuple[str, int]] = {
    ConflictError: ("conflict", 409),
    NotAllowedError: ("not_allowed", 403),
}
_MANAGER = Attached[PackManager]("pack_manager")
_MAX_BODY = 2**20
# As clients write them.
_SPARSE: dict[str, Any] = {"exclude_defaults": True, "by_alias": True}
_FIXED = {
    "packs": "packs cannot be changed on this server; start it with --steering-pack-roots DIR",
    "aliases": "aliases cannot be changed on this server; start it with --steering-pack-roots DIR",
    "vectors": "uploads are disabled on this server; start it with --steering-upload-mib N",
}


async def answer(
    admission: Admission, store: PackStore, route: str, scope: Message, receive: Receive, send: Send
) -> None:
    """Answers a request on a route under ``/v1/steering``."""
    method, (kind, _, name) = scope["method"], route.removeprefix(PREFIX).partition("/")
    if method == "GET" and not name and (listed := _listed(admission, store, kind, scope)):
        await send_json(send, 200, listed)
        return
    changes = {("POST", "packs", False), ("DELETE", "packs", True)}
    changes |= {(m, k, True) for m in ("PUT", "DELETE") for k in ("aliases", "vectors")}
    if (method, kind, bool(name)) not in changes:
        await send_error(send, f"there is no {method} {route}", "path", 404)
        return
    key, config = key_digest(scope), admission.config
    allowed = config and (config.upload_mib if kind == "vectors" else config.pack_roots)
    if not allowed or config is None:
        log_refusal("change", kind, route, key)
        await send_error(send, _FIXED[kind], "path", 403)
        return
    try:
        # Before any input of an untrusted client is read.
        admission.policy.check_change(key, [])
    except NotAllowedError as error:
        log_refusal("not_allowed", kind, route, key)
        await send_error(send, str(error), kind, 403)
        return
    limit = (config.upload_mib or 0) * 2**20 if kind == "vectors" else _MAX_BODY
    body = await read_limited(receive, limit)
    if body is None:
        log_refusal("change", kind, route, key)
        await send_error(send, f"the body is larger than {limit} bytes", "body", 413)
        return
    manager = _manager(admission, store, config.pack_roots or [], scope)
    try:
        content = await _change(manager, method, kind, name, body, scope["query_string"], key)
    except (RequestError, PackError) as error:
        reason, status = _REFUSED.get(type(error), ("change", 400))
        log_refusal(reason, kind, route, key)
        await send_error(send, str(error), kind, status)
    else:
        await send_json(send, 200, content)


def _listed(
    admission: Admission, store: PackStore, kind: str, scope: Message
) -> dict[str, Any] | None:
    """What ``GET`` of a kind answers; None if it lists nothing of that kind."""
    key, policy = key_digest(scope), admission.policy
    if kind == "packs":
        return describe(store.registry, policy, key)
    if kind == "aliases":
        return describe_aliases(store.registry, policy, key)
    if kind == "limits" and admission.config is not None:
        return describe_limits(admission.config, policy)
    return None


async def _change(
    manager: PackManager,
    method: str,
    kind: str,
    name: str,
    body: bytes,
    query: bytes,
    key: str | None,
) -> Any:
    if (method, kind) == ("PUT", "vectors"):
        return describe_pack(await manager.upload(name, body, expiry(query), key))
    if method == "POST":
        return describe_pack(await manager.load(body, key))
    if kind == "vectors":
        await manager.drop_upload(name, key)
    elif kind == "packs":
        await manager.unload(name, key)
    elif method == "PUT":
        await manager.set_alias(name, body, key)
    else:
        manager.drop_alias(name, key)
    return {"name": name}


def _manager(
    admission: Admission, store: PackStore, roots: list[str], scope: Message
) -> PackManager:
    """The server's pack manager."""
    state = scope["app"].state
    return _MANAGER.get_or_make(
        state, lambda: PackManager(admission, store, roots, state.engine_client)
    )


def describe(registry: PackRegistry, policy: Policy, key_digest: str | None) -> dict[str, Any]:
    """Returns the packs and directions that a key may use, as JSON."""
    shown = []
    for pack in registry.packs.values():
        seen = [n for n in pack.directions if policy.sees(key_digest, f"{pack.name}/{n}")]
        if seen:
            shown.append(describe_pack(pack, seen))
    return {"packs": shown}


def describe_aliases(
    registry: PackRegistry, policy: Policy, key_digest: str | None
) -> dict[str, Any]:
    """Returns the aliases that ``/v1/models`` shows to a key, with their steering, as JSON."""
    return {
        "aliases": [
            {"name": name, "steering": policy.aliases[name].model_dump(**_SPARSE)}
            for name in policy.shown_aliases(key_digest, registry)
        ]
    }


def describe_limits(config: ResolvedConfig, policy: Policy) -> dict[str, Any]:
    """Returns what requests may ask for, as JSON."""
    limits = config.model_dump(include={"ops", "rank", "layers", "reads"})
    return limits | {"max_dose": policy.max_dose, "dose_action": policy.dose_action}


def describe_pack(pack: SteeringPack, names: Collection[str] | None = None) -> dict[str, Any]:
    """Returns one pack as JSON, with the directions in ``names``, or all."""
    return {
        "name": pack.name,
        "model": pack.manifest.model.name,
        "sha256": pack.manifest.tensors.sha256,
        "directions": [
            {
                "name": record.name,
                "layers": record.layers,
                "default_layers": record.default_layers,
                "positions": plain_positions(record.positions),
                "default_scale": record.default_scale,
                "safe_scale": record.safe_scale,
                "form": record.form and record.form.model_dump(**_SPARSE),
                "calibration": record.calibration and _without_curve(record.calibration),
                "probe": record.probe
                and {**record.probe.model_dump(exclude={"layers"}), "fpr": record.probe.rates},
                "digest": pack.digests[name],
            }
            for name, record in pack.directions.items()
            if names is None or name in names
        ],
    }


def _without_curve(calibration: Calibration) -> dict[str, Any]:
    """A calibration with the ends of its curve in place of the curve, which is long."""
    first, last = calibration.curve[0], calibration.curve[-1]
    return calibration.model_dump(exclude={"curve"}) | {"scales": [first.scale, last.scale]}
