"""Names -> loaded content, once; permissions, dose, limits, plan and receipt of a request use the result.

Packs may be replaced while a request is admitted; names are not looked up again after this. Importing this
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

# Gets a field, the name in it and the full name of the direction; raises if the direction may not be used.
NameCheck = Callable[[str, str, str], None]


@dataclass(frozen=True, eq=False)
class BoundChoice:
    """One direction of a request, with the content of its names.

    Attributes:
        where: Its field, for messages.
        choice: The choice in the request.
        form: Its form, completed by the direction's default.
        direction: The direction.
        partners: The other directions of ``form``, by field.
    """

    where: str
    choice: DirectionChoice
    form: FormChoice
    direction: LoadedDirection
    partners: Mapping[str, LoadedDirection]

    @property
    def directions(self) -> tuple[LoadedDirection, ...]:
        """All directions that it uses, its own first."""
        return self.direction, *self.partners.values()


@dataclass(frozen=True, eq=False)
class BoundRead:
    """One read of a request, with the content of its name.

    Attributes:
        where: Its field, for messages.
        choice: The choice in the request.
        direction: The direction.
    """

    where: str
    choice: ReadChoice
    direction: LoadedDirection


@dataclass(frozen=True, eq=False)
class BoundRequest:
    """A request whose names are resolved to content.

    Attributes:
        request: The request.
        choices: Its directions.
        reads: Its reads.
        registry: The packs in which its names were looked up.
        where: Its field, for messages.
    """

    request: SteeringRequest
    choices: tuple[BoundChoice, ...]
    reads: tuple[BoundRead, ...]
    registry: PackRegistry
    where: str = REQUEST_KEY

    @property
    def directions(self) -> list[LoadedDirection]:
        """All directions that it uses."""
        steering = [direction for choice in self.choices for direction in choice.directions]
        return steering + [read.direction for read in self.reads]

    @property
    def names(self) -> dict[str, str]:
        """``pack/direction`` by content digest; if packs have the same content, the name in the request."""
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
        request: The request.
        registry: The loaded packs.
        check: Called with each name before anything about it is revealed; if there is no such direction, its
            full name is the given one.
        where: Field that holds the request.
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
                # Directions named by a direction's default form belong to it.
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
    return BoundRequest(request, tuple(choices), tuple(reads), registry, where)


def _find(
    field: str, name: str, find: Callable[[str], LoadedDirection], check: NameCheck | None
) -> LoadedDirection:
    try:
        found = find(name)
    except UnknownDirectionError as error:
        if check is not None:
            # Does not reveal whether the direction exists.
            check(field, name, name)
        raise UnknownDirectionError(f"{field}: {error}") from None
    if check is not None:
        check(field, name, found.full_name)
    return found
