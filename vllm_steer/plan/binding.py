"""Names -> loaded content, once: what permission, dose, limits, plan and receipt of a request read.

Packs may be replaced while a request is admitted; after this nobody asks for a name again. Importing this
module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from vllm_steer.errors import UnknownDirectionError
from vllm_steer.operations import FormChoice
from vllm_steer.packs.registry import LoadedDirection, PackRegistry
from vllm_steer.request.reads import ReadChoice
from vllm_steer.request.schema import REQUEST_KEY, DirectionChoice, SteeringRequest

# Gets a field, the name that stands in it and the full name of the direction; raises where it may not be used.
NameCheck = Callable[[str, str, str], None]


@dataclass(frozen=True, eq=False)
class BoundChoice:
    """One direction of a request, with the content that its names mean.

    Attributes:
        where: The field that it stands in, for messages.
        choice: What was asked for.
        form: How it acts, completed by the direction's own form.
        direction: The direction.
        partners: The further directions of ``form``, by field.
    """

    where: str
    choice: DirectionChoice
    form: FormChoice
    direction: LoadedDirection
    partners: Mapping[str, LoadedDirection]

    @property
    def directions(self) -> tuple[LoadedDirection, ...]:
        """All directions that it needs, its own first."""
        return self.direction, *self.partners.values()


@dataclass(frozen=True, eq=False)
class BoundRead:
    """One read of a request, with the content that its name means.

    Attributes:
        where: The field that it stands in, for messages.
        choice: What was asked for.
        direction: The direction.
    """

    where: str
    choice: ReadChoice
    direction: LoadedDirection


@dataclass(frozen=True, eq=False)
class BoundRequest:
    """A request whose names are content.

    Attributes:
        request: The request.
        choices: Its directions.
        reads: What it reads.
        registry: The packs that its names were looked up in.
    """

    request: SteeringRequest
    choices: tuple[BoundChoice, ...]
    reads: tuple[BoundRead, ...]
    registry: PackRegistry

    @property
    def directions(self) -> list[LoadedDirection]:
        """All directions that it needs."""
        steering = [direction for choice in self.choices for direction in choice.directions]
        return steering + [read.direction for read in self.reads]

    @property
    def names(self) -> dict[str, str]:
        """``pack/direction`` by content digest; of packs with the same content, that which was asked for."""
        return {direction.digest: direction.full_name for direction in self.directions}


def bind(
    request: SteeringRequest,
    registry: PackRegistry,
    check: NameCheck | None = None,
    where: str = REQUEST_KEY,
    sees: Callable[[str], bool] = lambda full_name: True,
) -> BoundRequest:
    """Looks up every name of a request.

    Args:
        request: What was asked for.
        registry: The loaded packs.
        check: Called with each name before anything else is said about it; where there is no such
            direction its full name is what was given.
        where: Field that the request stands in.
        sees: As :meth:`PackRegistry.find` takes it.

    Raises:
        UnknownDirectionError: A direction does not exist; the message starts with the field.
    """
    find = partial(registry.find, sees=sees)
    choices = []
    for index, choice in enumerate(request.directions):
        field = f"{where}.directions.{index}"
        direction = _find(f"{field}.name", choice.name, find, check)
        form = choice.over(direction.record.form)
        named, beside = choice.partners(), partial(registry.find_beside, direction)
        partners = {
            part: _find(
                f"{field}.{part}",
                name,
                # What a direction's own form names belongs to it.
                partial(beside, sees=sees) if part in named else beside,
                check if part in named else None,
            )
            for part, name in form.partners().items()
        }
        choices.append(BoundChoice(field, choice, form, direction, partners))
    reads = []
    for index, read in enumerate(request.read):
        field = f"{where}.read.{index}"
        found = _find(f"{field}.name", read.name, find, check)
        reads.append(BoundRead(field, read, found))
    return BoundRequest(request, tuple(choices), tuple(reads), registry)


def _find(
    field: str, name: str, find: Callable[[str], LoadedDirection], check: NameCheck | None
) -> LoadedDirection:
    try:
        found = find(name)
    except UnknownDirectionError as error:
        if check is not None:
            # Who may not use it does not learn whether it exists.
            check(field, name, name)
        raise UnknownDirectionError(f"{field}: {error}") from None
    if check is not None:
        check(field, name, found.full_name)
    return found
