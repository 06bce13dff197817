"""The server's policy: aliases, a default steering, a dose limit, and permissions by API key.

The policy is one JSON file, given by ``--steering-policy``. Importing this module imports neither
torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from vllm_steer.errors import (
    ConfigError,
    NotAllowedError,
    RequestError,
    UnknownDirectionError,
    explain_faults,
)
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.strict_json import parse_json
from vllm_steer.plan.binding import bind
from vllm_steer.plan.strength import check_calibrated
from vllm_steer.plan.thresholds import check_named
from vllm_steer.request.schema import SteeringRequest

MAX_POLICY_BYTES = 2**20
ANY_KEY = "*"

AliasName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
KeyDigest = Annotated[str, Field(pattern=r"^(\*|[0-9a-f]{64})$")]
OneKeyDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Policy(BaseModel):
    """The content of a policy file; every part is optional.

    Attributes:
        aliases: Names of steerings: a request for the model ``SERVED:ALIAS`` is steered by one, and
            ``/v1/models`` lists them.
        default: Steering of requests without any; ``"steering": "none"`` turns it off.
        max_dose: Largest dose of a request. 1 is the largest at which the calibration of a direction found
            the text fluent. The dose of an uncalibrated direction is |ε|·‖v‖ divided by the median norm of
            the residual stream, summed over its layers, at the largest factor of its schedule; near 1 the
            text of real models breaks. The doses of directions at one position are summed, and the position
            with the largest sum counts.
        dose_action: Action for a request above it: ``reject`` answers 400, ``reduce`` multiplies all its
            scales by one factor below 1, which the receipt states.
        keys: The directions that each API key may use. It maps the SHA-256 of the key in hexadecimal, or
            ``*`` for all other keys and for requests without one, to patterns of ``pack/direction``
            such as ``moods/*``. Without it, everyone may use everything.
        watch: Reads of every request of an API key, whatever it asks for; keys as in ``keys``: ``read`` with
            ``stop_when`` or ``abort_when``, so that a probe ends an answer regardless of the client. Clients
            do not see its scores. It counts towards the ``--steering-reads`` probes of each request.
        administrators: SHA-256 of each API key that may see and change all packs, aliases and uploads.
            Without it, the keys in ``keys`` may change their own uploads, and packs and aliases whose
            directions they may use; without either, everyone may.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    aliases: dict[AliasName, SteeringRequest] = Field(default_factory=dict)
    default: SteeringRequest | None = None
    max_dose: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    dose_action: Literal["reject", "reduce"] = "reject"
    keys: dict[KeyDigest, list[str]] | None = None
    watch: dict[KeyDigest, SteeringRequest] = Field(default_factory=dict)
    administrators: list[OneKeyDigest] | None = None

    @model_validator(mode="after")
    def _watch_only_reads(self) -> Policy:
        for key, request in self.watch.items():
            if request.directions:
                raise PydanticCustomError(
                    "watch",
                    "watch.{key}: a watch only reads; directions belong in a request or the default",
                    {"key": key},
                )
        return self

    def steerings(self) -> dict[str, SteeringRequest]:
        """Returns every steering in the policy, by its field."""
        found = {f"aliases.{name}": request for name, request in self.aliases.items()}
        found |= {f"watch.{key}": request for key, request in self.watch.items()}
        return found if self.default is None else found | {"default": self.default}

    def check(self, registry: PackRegistry) -> None:
        """Checks that every named direction and threshold exists, and is calibrated if given a strength.

        Raises:
            RequestError: One does not, or is not; the message starts with the field.
        """
        for where, request in self.steerings().items():
            whole = bind(request, registry, where=where)
            for bound in whole.choices:
                try:
                    check_calibrated(bound.choice, bound.direction)
                except RequestError as error:
                    raise RequestError(f"{bound.where}.{error}") from None
            check_named(whole)

    def named(self, registry: PackRegistry, pack: str) -> list[str]:
        """Returns the fields of the policy that need a pack."""
        return [
            field
            for field, request in self.steerings().items()
            if pack in {direction.pack.name for direction in bind(request, registry).directions}
        ]

    def watch_of(self, key_digest: str | None) -> SteeringRequest | None:
        """Reads of every request of a key.

        Args:
            key_digest: SHA-256 of the request's API key, in hexadecimal; None without a key.
        """
        return self.watch.get(key_digest or ANY_KEY, self.watch.get(ANY_KEY))

    def allows(self, key_digest: str | None, direction: str) -> bool:
        """Whether a request may use a direction.

        Args:
            key_digest: SHA-256 of the request's API key, in hexadecimal; None without a key.
            direction: ``pack/direction``.
        """
        if self.keys is None:
            return True
        patterns = self.keys.get(key_digest or ANY_KEY, self.keys.get(ANY_KEY, []))
        return any(fnmatchcase(direction, pattern) for pattern in patterns)

    def administers(self, key_digest: str | None) -> bool:
        """Whether a key may see and change everything on the server."""
        if self.administrators is not None:
            return key_digest in self.administrators
        return self.keys is None

    def check_change(self, key_digest: str | None, directions: Iterable[str]) -> None:
        """Checks that a key may change packs, aliases and uploads of some directions.

        Args:
            key_digest: SHA-256 of the API key, in hexadecimal; None without one.
            directions: ``pack/direction`` of each.

        Raises:
            NotAllowedError: It may not.
        """
        if self.administers(key_digest):
            return
        if self.administrators is not None or key_digest not in (self.keys or {}):
            raise NotAllowedError(
                "this API key is not allowed to change packs, aliases or uploads; ask the server's operator for access"
            )
        for direction in directions:
            if not self.allows(key_digest, direction):
                raise NotAllowedError(
                    f"this API key is not allowed to use {direction!r}, so it cannot change it; ask the server's operator "
                    f"for access"
                )

    def sees(self, key_digest: str | None, direction: str) -> bool:
        """Whether a direction is shown to a key."""
        return self.administers(key_digest) or self.allows(key_digest, direction)

    def shown_aliases(self, key_digest: str | None, registry: PackRegistry) -> list[str]:
        """Returns the aliases whose directions a key may all use."""
        return sorted(
            name
            for name, request in self.aliases.items()
            if all(self.sees(key_digest, found) for found in named_directions(request, registry))
        )


def named_directions(request: SteeringRequest, registry: PackRegistry) -> list[str]:
    """Returns ``pack/direction`` of every direction of a steering; nonexistent ones as named."""
    try:
        return [direction.full_name for direction in bind(request, registry).directions]
    except UnknownDirectionError:
        steering = [n for c in request.directions for n in (c.name, *c.partners().values())]
        return steering + [read.name for read in request.read]


def load_policy(path: str) -> Policy:
    """Reads a policy file.

    Raises:
        ConfigError: It cannot be read, or a field is wrong; the message names it.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_POLICY_BYTES:
            raise ConfigError(f"--steering-policy: {path} is larger than {MAX_POLICY_BYTES} bytes")
        text = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"--steering-policy: {path} cannot be read: {error.strerror}") from error
    try:
        parse_json(text, MAX_POLICY_BYTES)
        return Policy.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            f"--steering-policy: {path}: {explain_faults(error, 'policy')}"
        ) from error
    except ValueError as error:
        # Of a part that is given twice, nobody would miss the first.
        raise ConfigError(f"--steering-policy: {path}: policy: {error}") from error
