"""The steering state of one worker: packs, bank, planner and hooked blocks.

The runner adapters pass it requests and the positions of their tokens; it is the same for every model runner.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from vllm_steer import log
from vllm_steer.config import ResolvedConfig
from vllm_steer.engine.bank import BankShape, SteeringBank
from vllm_steer.engine.blocks import find_blocks, hook_blocks, hook_finite
from vllm_steer.engine.finite import overflows
from vllm_steer.engine.readers import ReaderBank
from vllm_steer.engine.reading import Reading
from vllm_steer.engine.row_values import RowValues, row_values
from vllm_steer.engine.token_rows import TokenRowMapper
from vllm_steer.engine.triggers import MatchWatch, TriggerWatch
from vllm_steer.packs.store import configured_store
from vllm_steer.plan.message import plan_of
from vllm_steer.plan.steering_plan import Segment

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

# Used only before the first request, while no row is assigned.
PROBE_ROW = 1


@dataclass(frozen=True)
class RunnerFacts:
    """Properties of a worker's model runner.

    Attributes:
        num_layers: Decoder blocks of the whole model.
        hidden_size: Width of the residual stream.
        max_num_tokens: Largest number of tokens of a step, including padding.
        dtype: Model dtype.
        device: Device of the model.
        speculative: Whether steps have drafts that may be rejected.
    """

    num_layers: int
    hidden_size: int
    max_num_tokens: int
    dtype: torch.dtype
    device: torch.device
    speculative: bool


class WorkerSteering:
    """The steering of one worker's model.

    Attributes:
        bank: The device tensors.
        layers: Layers hooked in this worker.
        blocks: Each of them with its block.
        reading: The worker's reads; None if reads are off.
    """

    def __init__(self, config: ResolvedConfig, model: nn.Module, runner: RunnerFacts) -> None:
        """Loads the packs, allocates the bank and hooks the blocks.

        Args:
            config: The engine's steering configuration.
            model: The model as loaded, before it is compiled or profiled.
            runner: Its runner.

        Raises:
            PackError: The packs on disk are not the configured ones.
            CompatibilityError: The model's blocks cannot be found.
        """
        self._store = configured_store(config)
        blocks = find_blocks(model, runner.num_layers)
        present = [(layer, blocks[layer]) for layer in config.layers if _is_present(blocks[layer])]
        self.blocks = tuple(present)
        self.layers = tuple(layer for layer, _ in present)
        self.bank = SteeringBank(
            BankShape(
                self.layers,
                config.rows,
                runner.hidden_size,
                runner.max_num_tokens,
                rank=config.rank if config.ops == "affine" else 0,
                multiply=config.multiply,
            ),
            runner.dtype,
            runner.device,
        )
        self._planner = TokenRowMapper(
            config.rows, self.bank.rank, starts_are_exact=not runner.speculative
        )
        self._watch, self._matches = TriggerWatch(runner.device), MatchWatch(runner.device)
        self._probing, self._probe_factor = False, 1.0
        self._steps, self._seconds, self._cut = 0, 0.0, 0
        readers = None
        if config.reads:
            size = config.read_rows, config.reads, runner.hidden_size, runner.max_num_tokens
            readers = ReaderBank(self.layers, config.layers, *size, runner.dtype, runner.device)
        self.reading = Reading(readers, self._store.by_digest) if readers is not None else None
        hook_blocks(present, self.bank, readers)
        if overflows(runner.dtype):
            after = range(config.layers[0], runner.num_layers)
            hook_finite(blocks[layer] for layer in after if _is_present(blocks[layer]))
        log.WORKER_READY.write(
            layers=list(self.layers),
            ops=config.ops,
            rows=config.rows,
            bank_bytes=self.bank.num_bytes + (readers.num_bytes if readers is not None else 0),
        )

    def add_request(
        self, request_id: str, sampling_params: SamplingParams | None, tokens: Sequence[int] = ()
    ) -> None:
        """Adds a request, steered or not.

        Args:
            request_id: Its id.
            sampling_params: Its ``SamplingParams``, None for pooling requests.
            tokens: Its tokens so far, from the prompt's first; a resumed request may have generated some.
        """
        plan = plan_of(sampling_params)
        self.remove_request(request_id)
        if plan is not None:
            self._planner.add(request_id, plan)
            if plan.stop is not None:
                self._watch.add(request_id, plan.stop, tokens)
            if plan.matches:
                self._matches.add(request_id, plan.matches, tokens)
            if self.reading is not None:
                self.reading.add(request_id, plan.reads)

    def remove_request(self, request_id: str) -> None:
        """Removes a request."""
        self._planner.remove(request_id)
        self._watch.remove(request_id)
        self._matches.remove(request_id)
        if self.reading is not None:
            self.reading.remove(request_id)

    def prepare_step(
        self,
        request_ids: Sequence[str],
        starts: np.ndarray,
        lengths: np.ndarray,
        positions: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        """Prepares the bank for the tokens of a step, before the model runs.

        Args:
            request_ids: The step's requests, in the order of their tokens in the batch.
            starts: int ``[num_requests or more]``, absolute position of each one's first token
                as the host knows it.
            lengths: int ``[num_requests or more]``, each one's number of tokens.
            positions: Absolute position of each token on the device; may be longer than the step.
            tokens: Token ids on the device; may be longer than the step.
        """
        started = time.perf_counter()
        step = self._planner.plan(request_ids, starts, lengths)
        for row, segment in step.new:
            if self.bank.write_row(row, self._values(segment)):
                self._cut += 1
                log.ROW_CUT.write(directions=[term.digest for term in segment.terms])
        self.bank.apply(
            step, positions, self._matches.states(request_ids, lengths, positions, tokens)
        )
        if self._watch.apply(request_ids, lengths, positions, tokens, self.bank.rows):
            self.bank.forget_known()
        if self.reading is not None:
            self.reading.prepare_step(request_ids, lengths, positions)
        self._steps += 1
        self._seconds += time.perf_counter() - started

    def take_times(self) -> tuple[int, float, int]:
        """Returns the planned steps, their planning time in seconds, and rows cut since the last call."""
        times = self._steps, self._seconds, self._cut
        self._steps, self._seconds, self._cut = 0, 0.0, 0
        return times

    def prepare_dummy_step(self) -> None:
        """Disables steering for a profiling, warm-up, capture or padding run, unless the self-test probes."""
        if self.reading is not None:
            self.reading.prepare_dummy_step()
        if self._probing:
            count = len(self.bank.rows)
            shape = 1 + self.bank.rank, count
            factors = np.full(shape, self._probe_factor, dtype=np.float32)
            self.bank.set_rows(np.full(count, PROBE_ROW, dtype=np.int32), factors)
        else:
            self.bank.clear_rows()

    @contextmanager
    def probing(self, values: RowValues, factor: float = 1.0) -> Iterator[None]:
        """Within it, every token of a dummy run is steered by ``values``.

        Args:
            values: The values of its row.
            factor: The factor of its change; only used by the affine form.
        """
        self._probing, self._probe_factor = True, factor
        self.bank.write_row(PROBE_ROW, values)
        try:
            yield
        finally:
            self._probing = False
            self.bank.write_row(PROBE_ROW, self.no_values())
            self.bank.clear_rows()

    def no_values(self) -> RowValues:
        """Values of a row that change nothing."""
        bank = self.bank
        return RowValues.zeros(
            len(self.layers), bank.rank, bank.hidden_size, multiply=bank.multiply
        )

    def residual_norm(self, layer: int) -> float:
        """Largest median norm of the residual stream after a layer among the loaded packs."""
        norms = (
            pack.manifest.residual_norms.get(str(layer), 0.0)
            for pack in self._store.registry.packs.values()
        )
        return max(norms)

    def _values(self, segment: Segment) -> RowValues:
        bank, find = self.bank, self._store.by_digest
        return row_values(
            segment, bank.index, bank.rank, bank.hidden_size, find, multiply=bank.multiply
        )


def _is_present(block: nn.Module) -> bool:
    """Whether a block is in this pipeline stage (vLLM uses ``PPMissingLayer`` for the others)."""
    return type(block).__name__ != "PPMissingLayer"
