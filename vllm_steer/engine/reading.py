"""The reads of one worker: the reader rows of a step's tokens, and their scores for the scheduler.

Scores are copied to the host after the step that computes them, with the absolute positions of its tokens,
which only the device knows under speculative decoding. They are sent with the step's output, so the scheduler
can treat them like its tokens: wait, drop rejected ones, recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_steer.engine.readers import ReaderBank
from vllm_steer.engine.row_allocator import RowAllocator
from vllm_steer.engine.step_scores import ReadBatch, StepScores
from vllm_steer.engine.unsent_scores import STEP_SCORES
from vllm_steer.packs.registry import LoadedDirection
from vllm_steer.plan.reads import Read, probes_of
from vllm_steer.vllm_compat.patches import override

# Used only before the first request, while no row is assigned.
PROBE_ROW = 1


@dataclass(eq=False)
class _Batch:
    """The requests of a step and their readers, until a request comes or goes.

    Attributes:
        request_ids: All of them, in the order of their tokens.
        columns: int32 ``[requests, reads]``, the rows of each one's readers.
        reading: int ``[R]``, indices of the requests with reads.
        reads: Their reads; None if there are none.
        lengths: int ``[requests]``, tokens of each in the step before; of none before the first.
        rows: int32 ``[tokens, reads]``, the rows of the readers of that step's tokens.
    """

    request_ids: list[str]
    columns: np.ndarray
    reading: np.ndarray
    reads: ReadBatch | None
    lengths: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class _ReadStep:
    """A step with tokens that are read.

    Attributes:
        reads: The requests with reads.
        begins: int ``[R]``, the first token of each in the step.
        lengths: int ``[R]``, its number of tokens.
        tokens: Tokens of the step.
        positions: Absolute position of each, being copied to the host.
    """

    reads: ReadBatch
    begins: np.ndarray
    lengths: np.ndarray
    tokens: int
    positions: torch.Tensor


class Reading:
    """The reads of one worker."""

    def __init__(self, bank: ReaderBank, find: Callable[[str], LoadedDirection]) -> None:
        """Makes an object without requests.

        Args:
            bank: The device tensors.
            find: Direction by content digest.
        """
        self.bank = bank
        self._find = find
        self._allocator = RowAllocator(len(bank.after))
        self._reads: dict[str, tuple[Read, ...]] = {}
        self._batch: _Batch | None = None
        self._step: _ReadStep | None = None
        self._received: torch.Tensor | None = None
        self._probing = False

    def add(self, request_id: str, reads: tuple[Read, ...]) -> None:
        """Adds a request; a known one gets the new reads."""
        self.remove(request_id)
        if not reads:
            return
        self._reads[request_id] = reads
        self._allocator.acquire(self._keys(request_id))
        self._batch = None

    def remove(self, request_id: str) -> None:
        """Removes a request; unknown ones are ignored."""
        if request_id in self._reads:
            self._allocator.release(self._keys(request_id))
            del self._reads[request_id]
            self._batch = None

    def prepare_step(
        self, request_ids: Sequence[str], lengths: np.ndarray, positions: torch.Tensor
    ) -> None:
        """Sets the reader rows of each token of a step, before the model runs.

        Args:
            request_ids: The step's requests, in the order of their tokens in the batch.
            lengths: int ``[num_requests or more]``, each one's number of tokens.
            positions: Absolute position of each token on the device; may be longer than the step.
        """
        self._step = None
        if not self._reads:
            self.bank.clear_rows()
            return
        if self._batch is None or request_ids != self._batch.request_ids:
            self._batch = self._batch_of(request_ids)
        batch = self._batch
        if batch.reads is None:
            self.bank.clear_rows()
            return
        lengths = lengths[: len(batch.request_ids)]
        ends = np.cumsum(lengths)
        if not np.array_equal(lengths, batch.lengths):
            # vLLM writes the lengths of the next step where those of this one are.
            batch.lengths = lengths.copy()
            batch.rows = np.repeat(batch.columns, lengths, axis=0)
        self.bank.set_rows(batch.rows)
        own, tokens = lengths[batch.reading], int(ends[-1])
        begins = ends[batch.reading] - own
        self._step = _ReadStep(batch.reads, begins, own, tokens, _to_host(positions[:tokens]))

    def prepare_dummy_step(self) -> None:
        """Disables reads for a profiling, warm-up, capture or padding run, unless the self-test probes."""
        self._step = None
        if self._probing:
            self.bank.set_rows(np.full(self.bank.rows.shape, PROBE_ROW, dtype=np.int32))
        else:
            self.bank.clear_rows()

    @contextmanager
    def probing(self, layer: int, vector: np.ndarray, *, after: bool) -> Iterator[torch.Tensor]:
        """Within it, every token of a dummy run is read at one layer.

        Args:
            layer: The layer.
            vector: Float32 ``[hidden_size]``, the reader.
            after: Whether it reads after the change.

        Yields:
            Float32 ``[max_num_tokens, reads]``, the buffer of the scores.
        """
        at, vectors = self.bank.layers.index(layer), np.zeros(self._shape, dtype=np.float32)
        vectors[at] = vector
        self._probing = True
        self.bank.write_row(PROBE_ROW, vectors, after)
        try:
            yield self.bank.scores_at(layer)
        finally:
            self._probing = False
            self.bank.write_row(PROBE_ROW, np.zeros(self._shape, dtype=np.float32), False)
            self.bank.clear_rows()

    def collect(self) -> Callable[[], StepScores] | None:
        """Starts the copy of a step's scores to the host, after its model ran.

        Returns:
            A function that waits for the copy and returns the scores of each request with reads; None if
            there are none.
        """
        step, self._step = self._step, None
        if step is None:
            return None
        scores = _to_host(self._with_earlier_stages(step))
        copied = _recorded(self.bank.scores.device)

        def finish() -> StepScores:
            if copied is not None:
                copied.synchronize()
            found, positions = scores.numpy(), step.positions.numpy()
            return step.reads.scores(found, positions, step.begins, step.lengths)

        return finish

    def receive(self, scores: torch.Tensor | None) -> None:
        """Receives the previous pipeline stage's scores of the coming step.

        Args:
            scores: Float32 ``[len(all_layers), tokens, reads]``; None if no request reads.
        """
        self._received = scores

    def hand_on(self) -> torch.Tensor | None:
        """Returns the scores of this stage and those before, for the next one, after the model ran.

        Returns:
            The argument of :meth:`receive`.
        """
        step, self._step = self._step, None
        return None if step is None else self._with_earlier_stages(step).contiguous()

    def _with_earlier_stages(self, step: _ReadStep) -> torch.Tensor:
        own, received = self.bank.scores[:, : step.tokens], self._received
        self._received = None
        # At every layer all stages except one have zeros.
        return own if received is None else own + received

    @property
    def _shape(self) -> tuple[int, int]:
        """Shape of a row's vectors: layers and width."""
        return len(self.bank.layers), self.bank.probes.shape[-1]

    def _keys(self, request_id: str) -> list[str]:
        return [f"{digest}:{int(after)}" for digest, after in probes_of(self._reads[request_id])]

    def _batch_of(self, request_ids: Sequence[str]) -> _Batch:
        """Assigns rows to the readers of a batch, and returns the batch."""
        columns = np.zeros((len(request_ids), self.bank.rows.shape[1]), dtype=np.int32)
        reading = [number for number, each in enumerate(request_ids) if each in self._reads]
        names = [request_ids[number] for number in reading]
        keys = [self._keys(name) for name in names]
        needed = {key for own in keys for key in own}
        new, _ = self._allocator.assign(sorted(needed), lambda: needed)
        for row, key in new:
            digest, _, after = key.partition(":")
            self._write(row, digest, bool(int(after)))
        for number, own in zip(reading, keys, strict=True):
            columns[number, : len(own)] = [self._allocator.row(key) for key in own]
        reads = [self._reads[name] for name in names]
        read = ReadBatch(names, reads, self.bank.all_layers) if reads else None
        # vLLM changes its list in place.
        places = np.array(reading, dtype=np.intp)
        return _Batch(list(request_ids), columns, places, read, np.zeros(0, np.int32), columns[:0])

    def _write(self, row: int, digest: str, after: bool) -> None:
        direction = self._find(digest)
        vectors = np.zeros(self._shape, dtype=np.float32)
        for at, layer in enumerate(self.bank.layers):
            if layer in direction.rows:
                vectors[at] = direction.at(layer).astype(np.float64) / direction.lengths[layer]
        self.bank.write_row(row, vectors, after)


def carry_scores(runner: Any, reading: Reading) -> None:
    """Attaches the scores of each step to a model runner's outputs.

    Args:
        runner: A model runner of vLLM, whose ``sample_tokens`` is called after each step of the model.
        reading: The worker's reads.
    """
    sample_tokens = runner.sample_tokens

    def _sample_tokens(*args: Any, **kwargs: Any) -> Any:
        # Started before sampling, which takes the device longer than the copy.
        finish = reading.collect()
        output = sample_tokens(*args, **kwargs)
        if finish is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            get_output = output.get_output

            def _get_output() -> Any:
                found = get_output()
                STEP_SCORES.set(found, finish())
                return found

            override(output, get_output=_get_output)
        else:
            STEP_SCORES.set(output, finish())
        return output

    override(runner, sample_tokens=_sample_tokens)


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy on the host; from CUDA asynchronous, so wait for :func:`_recorded`."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return host.copy_(values, non_blocking=values.is_cuda)


def _recorded(device: torch.device) -> torch.Event | None:
    """An event after all work sent to the device; None if copies are synchronous."""
    if device.type != "cuda":
        return None
    event = torch.Event(device)
    event.record()
    return event
