"""Aliases: model names with steering, added and removed while the server runs.

Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pydantic import TypeAdapter, ValidationError

from vllm_steer import log
from vllm_steer.errors import RequestError, UnknownDirectionError, explain_faults
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.strict_json import parse_json
from vllm_steer.plan.binding import bind
from vllm_steer.request.schema import SteeringRequest
from vllm_steer.serving.policy import AliasName, Policy, named_directions

_MAX_VALUES = 20_000


@dataclass(frozen=True)
class Named:
    """A model name with an alias.

    Attributes:
        served: Name of the served model.
        steering: Steering of the alias.
    """

    served: str
    steering: SteeringRequest


def named_alias(policy: Policy, model: str) -> Named | None:
    """Parses ``SERVED:ALIAS``; None if the name has no alias of the policy."""
    served, _, alias = model.rpartition(":")
    steering = policy.aliases.get(alias) if served else None
    return None if steering is None else Named(served, steering)


def with_alias(
    policy: Policy, registry: PackRegistry, alias: str, body: bytes, key_digest: str | None
) -> Policy:
    """Returns the policy with an alias added or replaced.

    Args:
        policy: The policy.
        registry: The loaded packs.
        alias: The alias.
        body: The steering, a :class:`SteeringRequest` as JSON.
        key_digest: SHA-256 of the requesting API key.

    Raises:
        RequestError: The alias or the steering is malformed, names something that is not loaded, or gives a
            strength of an uncalibrated direction.
        NotAllowedError: The key may not use all directions of the new or the old steering.
    """
    try:
        name = TypeAdapter(AliasName).validate_python(alias)
        parse_json(body, _MAX_VALUES)
        request = SteeringRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestError(explain_faults(error, "body")) from error
    except ValueError as error:
        raise RequestError(f"body: {error}") from error
    _check_change(policy, registry, [request, policy.aliases.get(name)], key_digest)
    changed = policy.model_copy(update={"aliases": policy.aliases | {name: request}})
    _check_names(changed, registry, name, key_digest)
    directions = [
        {"name": choice.name, "scale": choice.scale, "strength": choice.strength}
        for choice in request.directions
    ]
    log.ALIAS_SET.write(alias=name, directions=directions, key=log.short_key(key_digest))
    return changed


def without_alias(
    policy: Policy, registry: PackRegistry, alias: str, key_digest: str | None
) -> Policy:
    """Returns the policy without an alias; arguments as in :func:`with_alias`.

    Raises:
        RequestError: There is no alias of that name.
        NotAllowedError: The key may not use all of its directions.
    """
    if alias not in policy.aliases:
        raise RequestError(f"there is no alias {alias!r}")
    _check_change(policy, registry, [policy.aliases[alias]], key_digest)
    kept = {name: request for name, request in policy.aliases.items() if name != alias}
    log.ALIAS_DROPPED.write(alias=alias, key=log.short_key(key_digest))
    return policy.model_copy(update={"aliases": kept})


def _check_names(
    changed: Policy, registry: PackRegistry, name: str, key_digest: str | None
) -> None:
    """Raises RequestError where a name leads to no direction, and names only directions that the key is told of."""
    where = f"aliases.{name}"
    bind(changed.aliases[name], registry, where=where, sees=partial(changed.sees, key_digest))
    try:
        changed.check(registry)
    except UnknownDirectionError:
        raise RequestError(
            f"{where}: a direction's name is that of several; name each as 'pack/direction'"
        ) from None


def _check_change(
    policy: Policy,
    registry: PackRegistry,
    requests: list[SteeringRequest | None],
    key_digest: str | None,
) -> None:
    names = {n for each in requests if each is not None for n in named_directions(each, registry)}
    policy.check_change(key_digest, sorted(names))
