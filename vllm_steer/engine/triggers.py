"""Tokens that end steering, or that it acts on, found on the device.

The host may not yet know a step's tokens (asynchronous scheduling) nor which drafts will be accepted, so the
tokens are checked where the model reads them, without waiting. What a token starts or ends concerns the positions
after it; whether it was accepted shows in the request's next position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vllm_steer.request.stop_tokens import MAX_TRIGGERS, StopTokens, first_token
from vllm_steer.request.token_matches import TokenMatch

_NEVER = np.iinfo(np.int32).max
# The slot of every request that is not watched.
_NO_SLOT = 0
# No token has this id.
_NO_TOKEN = -1


class Found(NamedTuple):
    """What was found in a step.

    Attributes:
        owner: int64 ``[num_tokens]``, the slot of each token's request.
        here: int32 ``[num_tokens]``, its absolute position.
        hit: bool ``[num_tokens]``, whether it is one of the watched tokens.
        first: int32 ``[num_tokens]``, position of the first watched token of its request so far.
    """

    owner: torch.Tensor
    here: torch.Tensor
    hit: torch.Tensor
    first: torch.Tensor


class FirstTokens:
    """Tracks where the first of some tokens is in each watched request."""

    def __init__(self, device: torch.device, width: int = MAX_TRIGGERS) -> None:
        """Makes a watch.

        Args:
            device: Device of the model.
            width: Token ids that a request may have at first; grows when one has more.
        """
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._device = device
        # The position of the first accepted token of each slot, and the first of its last step.
        self._firsts = self._full((_NO_SLOT + 1,), _NEVER)
        self._seen = self._full((_NO_SLOT + 1,), _NEVER)
        self._origins = self._full((_NO_SLOT + 1,), 0)
        self._wanted = self._full((_NO_SLOT + 1, width), _NO_TOKEN)

    def add(self, request_id: str, wanted: StopTokens | TokenMatch, tokens: Sequence[int]) -> int:
        """Watches a request.

        Args:
            request_id: Its id.
            wanted: The tokens, and the position from which on they count.
            tokens: Its tokens so far, which may include generated ones from before a preemption.

        Returns:
            Its slot.
        """
        missing = len(wanted.tokens) - self._wanted.shape[1]
        if not self._free or missing > 0:
            slots = len(self._wanted)
            self._resize(slots if self._free else 2 * slots, max(0, missing))
        slot = self._slots[request_id] = self._free.pop()
        padding = self._wanted.shape[1] - len(wanted.tokens)
        self._wanted[slot] = torch.tensor([*wanted.tokens, *[_NO_TOKEN] * padding])
        self._origins[slot] = wanted.origin
        first = first_token(wanted, tokens)
        self._firsts[slot] = _NEVER if first is None else first
        self._seen[slot] = _NEVER
        return slot

    def remove(self, request_id: str) -> None:
        """Removes a request; unknown ones are ignored."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

    def find(
        self,
        request_ids: Sequence[str],
        lengths: np.ndarray,
        positions: torch.Tensor,
        tokens: torch.Tensor,
    ) -> Found | None:
        """Finds the tokens of a step.

        Args:
            request_ids: The step's requests, in the order of their tokens.
            lengths: int ``[num_requests or more]``, each one's number of tokens.
            positions: Absolute position of each token on the device; may be longer than the step.
            tokens: Token ids on the device; may be longer than the step.

        Returns:
            What was found; None if the step has no watched requests.
        """
        if not self._slots:
            return None
        slots = np.array([self._slots.get(request, _NO_SLOT) for request in request_ids])
        if not slots.any():
            return None
        owners = np.repeat(slots, lengths[: len(slots)])
        owner = torch.from_numpy(owners).to(self._device, non_blocking=True)
        count = len(owners)
        here = positions[:count].to(torch.int32)
        begins = self._least(owner, here)
        present = begins < _NEVER
        # One of the previous step holds if the request continues after it.
        held = present & (self._seen < begins)
        self._firsts = torch.where(held, torch.minimum(self._firsts, self._seen), self._firsts)
        hit = (tokens[:count, None] == self._wanted[owner]).any(1) & (here >= self._origins[owner])
        seen = self._least(owner, torch.where(hit, here, _NEVER))
        self._seen = torch.where(present, seen, self._seen)
        return Found(owner, here, hit, torch.minimum(self._firsts, seen)[owner])

    def _least(self, owner: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The minimum of each slot's values, int32 ``[slots]``."""
        none = torch.full_like(self._firsts, _NEVER)
        return none.scatter_reduce(0, owner, values, "amin")

    def _resize(self, slots: int, wider: int) -> None:
        """Grows the tensors to a number of slots, and to hold some more token ids."""
        before, width = self._wanted.shape
        old = self._firsts, self._seen, self._origins
        self._firsts, self._seen = self._full((slots,), _NEVER), self._full((slots,), _NEVER)
        self._origins = self._full((slots,), 0)
        for tensor, values in zip((self._firsts, self._seen, self._origins), old, strict=True):
            tensor[:before] = values
        wanted = self._full((slots, width + wider), _NO_TOKEN)
        wanted[:before, :width] = self._wanted
        self._wanted = wanted
        self._free += range(before, slots)

    def _full(self, size: tuple[int, ...], value: int) -> torch.Tensor:
        return torch.full(size, value, dtype=torch.int32, device=self._device)


class TriggerWatch(FirstTokens):
    """Tracks where the steering of each watched request has ended."""

    def apply(
        self,
        request_ids: Sequence[str],
        lengths: np.ndarray,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        rows: torch.Tensor,
    ) -> bool:
        """Clears the row of tokens after a trigger.

        Args:
            request_ids: As :meth:`FirstTokens.find` takes it.
            lengths: Likewise.
            positions: Likewise.
            tokens: Likewise.
            rows: int32, the row of each token; changed in place.

        Returns:
            Whether the step has any watched requests.
        """
        found = self.find(request_ids, lengths, positions, tokens)
        if found is None:
            return False
        rows[: len(found.here)].masked_fill_(found.here > found.first, 0)
        return True


class MatchWatch:
    """Tracks which matches of each watched request hold."""

    def __init__(self, device: torch.device) -> None:
        """Makes a watch.

        Args:
            device: Device of the model.
        """
        self._device = device
        # By the index of a match in its plan; the tensors are by slot.
        self._watches: list[FirstTokens] = []
        self._onward: list[torch.Tensor] = []
        self._watched: set[str] = set()

    def add(self, request_id: str, matches: Sequence[TokenMatch], tokens: Sequence[int]) -> None:
        """Watches a request.

        Args:
            request_id: Its id.
            matches: Its matches.
            tokens: Its tokens so far: those of the prompt, of which the prefix cache may hold some, and generated ones.
        """
        for number, match in enumerate(matches):
            if number == len(self._watches):
                self._watches.append(FirstTokens(self._device))
                self._onward.append(self._none(1))
            # Of the others no token matters to those after it.
            slot = self._watches[number].add(request_id, match, tokens if match.onward else ())
            onward = self._onward[number]
            if slot >= len(onward):
                onward = torch.cat([onward, self._none(1 + slot - len(onward))])
            onward[slot] = match.onward
            self._onward[number] = onward
        self._watched.add(request_id)

    def remove(self, request_id: str) -> None:
        """Removes a request; unknown ones are ignored."""
        if request_id in self._watched:
            self._watched.remove(request_id)
            for watch in self._watches:
                watch.remove(request_id)

    def states(
        self,
        request_ids: Sequence[str],
        lengths: np.ndarray,
        positions: torch.Tensor,
        tokens: torch.Tensor,
    ) -> torch.Tensor | None:
        """Returns which matches hold at each token of a step.

        Args:
            request_ids: As :meth:`FirstTokens.find` takes it.
            lengths: Likewise.
            positions: Likewise.
            tokens: Likewise.

        Returns:
            int32 ``[num_tokens]``; bit k is set where match k of the request holds. None where none is watched.
        """
        states: torch.Tensor | None = None
        for number, watch in enumerate(self._watches):
            found = watch.find(request_ids, lengths, positions, tokens)
            if found is None:
                continue
            onward = self._onward[number][found.owner]
            holds = torch.where(onward, found.here >= found.first, found.hit)
            bit = holds.to(torch.int32) << number
            states = bit if states is None else states | bit
        return states

    def _none(self, slots: int) -> torch.Tensor:
        return torch.zeros(slots, dtype=torch.bool, device=self._device)
