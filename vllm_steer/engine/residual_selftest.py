"""The second self-test, for everything that reads the residual stream: its parts are read correctly.

A block may return its output in two parts, or an unused second tensor. The stream is their sum if and only if
moving a vector from one part to the other changes nothing, and hidden alone if and only if adding to the
second changes nothing. Both are tested by Python hooks, so the model runs uncompiled meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vllm_steer.engine.affine import residual_of
from vllm_steer.engine.selftest import NUM_TOKENS
from vllm_steer.engine.worker import WorkerSteering
from vllm_steer.errors import CompatibilityError

# Flag of vLLM's @support_torch_compile that makes a module run its Python code.
_EAGER = "do_not_compile"
# Tolerance, relative to the change by the same vector in hidden alone, for the coarse rounding of the parts
# in half precision.
_ROUNDING = 0.25


def check_residuals(
    steering: WorkerSteering, model: nn.Module, forward: Callable[[int], torch.Tensor]
) -> None:
    """Proves that ``residual_of`` identifies the residual stream correctly.

    Args:
        steering: The worker's steering, of the affine form or with reads.
        model: The worker's model.
        forward: Runs it on a number of dummy tokens and returns its final hidden states.

    Raises:
        CompatibilityError: At some block it does not, or cannot be tested.
    """
    num_tokens = min(NUM_TOKENS, steering.bank.rows.shape[0])
    generator = torch.Generator().manual_seed(0)
    with _uncompiled(model):
        plain = _run(forward, num_tokens)
        for layer, block in steering.blocks:
            vector = torch.randn(steering.bank.hidden_size, generator=generator)
            vector *= steering.residual_norm(layer) / vector.norm()
            probe = _Probe(block, vector)
            moved = (probe.run(forward, num_tokens, neutral=False) - plain).norm()
            if not probe.has_second:
                continue
            unmoved = (probe.run(forward, num_tokens, neutral=True) - plain).norm()
            if unmoved > _ROUNDING * moved:
                raise CompatibilityError(
                    f"the steering self-test cannot identify the residual stream after layer {layer} in what "
                    f"{type(block).__name__} returns; --steering-ops affine and --steering-reads do not fit this model, "
                    f"additive steering may"
                )


class _Probe:
    """Adds a vector to a block's output: to hidden alone, or so that nothing should change."""

    def __init__(self, block: nn.Module, vector: torch.Tensor) -> None:
        self._block = block
        self._vector = vector
        self.has_second: bool | None = None

    def run(
        self, forward: Callable[[int], torch.Tensor], num_tokens: int, *, neutral: bool
    ) -> torch.Tensor:
        def hook(block: nn.Module, _args: Any, output: Any) -> Any:
            parts = list(output) if isinstance(output, tuple) else [output]
            vector = self._vector.to(parts[0])
            self.has_second = len(parts) == 2 and parts[1] is not None
            live = residual_of(block, output) is not None
            if live or not neutral:
                parts[0] = parts[0] + vector
            if neutral and self.has_second:
                parts[1] = parts[1] - vector if live else parts[1] + vector
            return tuple(parts) if isinstance(output, tuple) else parts[0]

        handle = self._block.register_forward_hook(hook)
        try:
            found = _run(forward, num_tokens)
        finally:
            handle.remove()
        if self.has_second is None:
            raise CompatibilityError(
                f"the steering self-test could not run {type(self._block).__name__} uncompiled, so it cannot prove "
                f"what its residual stream is; start without --steering-ops affine and --steering-reads"
            )
        return found


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Within it, the model runs its Python code, hooks included."""
    with ExitStack() as stack:
        for module in model.modules():
            before = getattr(module, _EAGER, None)
            if before is False:
                setattr(module, _EAGER, True)
                stack.callback(setattr, module, _EAGER, False)
        yield


def _run(forward: Callable[[int], torch.Tensor], num_tokens: int) -> torch.Tensor:
    return forward(num_tokens)[:num_tokens].float().clone()
