"""Ends steering after a generated token, on the device.

The host may not yet know a step's tokens (asynchronous scheduling) nor which drafts will be accepted, so the
tokens are checked where the model reads them, without waiting. A trigger takes effect after its position;
whether it was accepted shows in the request's next position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_steer.request.stop_tokens import MAX_TRIGGERS, StopTokens, stop_position

_NEVER = np.iinfo(np.int32).max
# The slot of every request without triggers.
_NO_SLOT = 0
# No token has this id.
_NO_TOKEN = -1


class TriggerWatch:
    """Tracks where the steering of each watched request has ended."""

    def __init__(self, device: torch.device) -> None:
        """Makes a watch.

        Args:
            device: Device of the model.
        """
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._device = device
        # The last steered position of each slot, and the first trigger of its last step.
        self._ends = self._full((_NO_SLOT + 1,), _NEVER)
        self._seen = self._full((_NO_SLOT + 1,), _NEVER)
        self._origins = self._full((_NO_SLOT + 1,), 0)
        self._triggers = self._full((_NO_SLOT + 1, MAX_TRIGGERS), _NO_TOKEN)

    def add(self, request_id: str, stop: StopTokens, tokens: Sequence[int]) -> None:
        """Watches a request.

        Args:
            request_id: Its id.
            stop: Its triggers.
            tokens: Its tokens so far, which may include generated ones from before a preemption.
        """
        if not self._free:
            self._resize(2 * len(self._triggers))
        slot = self._slots[request_id] = self._free.pop()
        padded = [*stop.tokens, *[_NO_TOKEN] * (MAX_TRIGGERS - len(stop.tokens))]
        self._triggers[slot] = torch.tensor(padded)
        self._origins[slot] = stop.origin
        ended = stop_position(stop, tokens)
        self._ends[slot] = _NEVER if ended is None else ended
        self._seen[slot] = _NEVER

    def remove(self, request_id: str) -> None:
        """Removes a request; unknown ones are ignored."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

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
            request_ids: The step's requests, in the order of their tokens.
            lengths: int ``[num_requests or more]``, each one's number of tokens.
            positions: Absolute position of each token on the device; may be longer than the step.
            tokens: Token ids on the device; may be longer than the step.
            rows: int32, the row of each token; changed in place.

        Returns:
            Whether the step has any watched requests.
        """
        if not self._slots:
            return False
        slots = np.array([self._slots.get(request, _NO_SLOT) for request in request_ids])
        if not slots.any():
            return False
        owners = np.repeat(slots, lengths[: len(slots)])
        owner = torch.from_numpy(owners).to(self._device, non_blocking=True)
        count = len(owners)
        here = positions[:count].to(torch.int32)
        begins = self._least(owner, here)
        present = begins < _NEVER
        # A trigger of the previous step holds if the request continues after it.
        held = present & (self._seen < begins)
        self._ends = torch.where(held, torch.minimum(self._ends, self._seen), self._ends)
        hit = (tokens[:count, None] == self._triggers[owner]).any(1) & (
            here >= self._origins[owner]
        )
        seen = self._least(owner, torch.where(hit, here, _NEVER))
        self._seen = torch.where(present, seen, self._seen)
        ended = torch.minimum(self._ends, seen)[owner]
        rows[:count].masked_fill_(here > ended, 0)
        return True

    def _least(self, owner: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The minimum of each slot's values, int32 ``[slots]``."""
        none = torch.full_like(self._ends, _NEVER)
        return none.scatter_reduce(0, owner, values, "amin")

    def _resize(self, slots: int) -> None:
        """Grows the tensors to a number of slots."""
        before = len(self._ends)
        old = self._ends, self._seen, self._origins, self._triggers
        self._ends, self._seen = self._full((slots,), _NEVER), self._full((slots,), _NEVER)
        self._origins = self._full((slots,), 0)
        self._triggers = self._full((slots, MAX_TRIGGERS), _NO_TOKEN)
        new = self._ends, self._seen, self._origins, self._triggers
        for tensor, values in zip(new, old, strict=True):
            tensor[:before] = values
        self._free += range(before, slots)

    def _full(self, size: tuple[int, ...], value: int) -> torch.Tensor:
        return torch.full(size, value, dtype=torch.int32, device=self._device)
