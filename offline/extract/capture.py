"""One forward pass per prompt: block outputs and attention to the prefix at the candidate tokens.

Each block's attention is reduced to the candidates' prefix sums by a hook as soon as it exists, and its
output to the candidates' rows, so that the memory of a pass does not grow with the number of blocks.
Block outputs are taken by hooks because ``hidden_states[-1]`` of Hugging Face has passed the final norm,
but steering adds before it.

Hugging Face's eager attention on whole prompts is the reference. Two shortcuts give the same numbers
faster, and are taken where ``choose_path`` sees them do so on the model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.extract.attention_rows import UnsupportedAttentionError, only_rows
from vllm_steer.offline.extract.enrichment import Enrichment, PermutationTest
from vllm_steer.offline.models.batches import Batch, make_batches, run_shared, shared_length
from vllm_steer.offline.models.hooks import watched
from vllm_steer.offline.models.loading import find_blocks
from vllm_steer.offline.models.prompts import RenderedPrompt


@dataclass(frozen=True)
class CapturePath:
    """How forward passes are computed; the results are the same up to rounding.

    Attributes:
        rows: Whether attention is computed by a fused kernel, and its weights for the candidates alone.
        share: Whether the tokens that all prompts begin with run once.
    """

    rows: bool
    share: bool


REFERENCE = CapturePath(rows=False, share=False)
# From the fastest to the reference.
PATHS = (
    CapturePath(rows=True, share=True),
    CapturePath(rows=False, share=True),
    CapturePath(rows=True, share=False),
    REFERENCE,
)
# Largest difference from the reference, relative to the largest value, that is rounding.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, eq=False)
class Captured:
    """What the forward passes leave behind, in the order of the prompts.

    Attributes:
        attention: ``[prompts, blocks, candidates]``, float32; mean over heads of the attention
            that a candidate token pays to all prefix tokens together, 0 without a prefix.
        hidden: ``[prompts, blocks, candidates, hidden_size]``, float32; block outputs, the last
            block's before the final norm.
        residual_norms: ``[blocks]``, float64; median Euclidean norm of the block output over the
            tokens of all prompts, without each prompt's first: that one is an attention sink whose
            norm may be a hundred times the others'.
        enrichment: The permutation test's figures, where one was asked for.
    """

    attention: NDArray[np.float32]
    hidden: NDArray[np.float32]
    residual_norms: NDArray[np.float64]
    enrichment: Enrichment | None = None


class _Recorder:
    """What the hooks reduce and keep of one call of ``capture``."""

    def __init__(
        self, captured: Captured, path: CapturePath, permutations: PermutationTest | None
    ) -> None:
        self._captured, self._path, self._test = captured, path, permutations
        self._norms: dict[int, list[NDArray[np.float32]]] = {}
        self._seen: set[int] = set()

    def begin(self, batch: Batch) -> None:
        self._batch, self._prefix = batch, batch.prefix
        self._rows = torch.arange(len(batch.token_ids), device=batch.token_ids.device)[:, None]
        if self._test:
            self._test.begin(batch)
        self._seen.clear()

    def see_attention(self, block: int, weights: Tensor) -> None:
        """Reduces weights ``[batch, heads, queries or N, keys]`` to the candidates' prefix sums."""
        batch = self._batch
        if not self._path.rows:
            weights = weights[self._rows, :, batch.candidates].transpose(1, 2)
        weights = weights.float()
        to_prefix = (weights * self._prefix[:, None, None, :]).sum(dim=-1)
        mean = to_prefix.mean(dim=1).cpu().numpy()
        self._captured.attention[list(batch.indices), block] = mean
        if self._test:
            self._test.see(block, weights, to_prefix)
        self._seen.add(block)

    def see_output(self, block: int, output: Tensor) -> None:
        """Keeps the candidates of a block output ``[batch, length, hidden_size]``."""
        batch = self._batch
        chosen = output[self._rows, batch.candidates].float().cpu().numpy()
        self._captured.hidden[list(batch.indices), block] = chosen
        counted = batch.real.clone()
        if not batch.shared:
            counted[:, 0] = False
        norms = torch.linalg.vector_norm(output.float(), dim=-1)[counted]
        self._norms.setdefault(block, []).append(norms.cpu().numpy())

    def see_final(self, output: Tensor) -> None:
        """Keeps the candidates of the final norm's output in place of the last block's."""
        chosen = output[self._rows, self._batch.candidates].float().cpu().numpy()
        self._captured.hidden[list(self._batch.indices), -1] = chosen

    def see_shared(self, block: int, output: Tensor, prompts: int) -> None:
        """Counts the shared tokens' norms, ``[1, shared, hidden_size]``, once for every prompt."""
        norms = torch.linalg.vector_norm(output.float(), dim=-1)[0, 1:].cpu().numpy()
        self._norms.setdefault(block, []).append(np.tile(norms, prompts))

    def finish(self, blocks: int) -> None:
        missing = sorted(set(range(blocks)) - self._seen)
        if missing:
            raise ExtractionError(
                f"blocks {missing} gave no attention weights; load the model with "
                f"attn_implementation='eager' (blocks without attention cannot be used)"
            )

    def norms(self, blocks: int) -> NDArray[np.float64]:
        every = (np.concatenate(self._norms[block]) for block in range(blocks))
        # A prompt of one token has nothing but its first.
        return np.array([float(np.median(norms)) if len(norms) else 0.0 for norms in every])


@dataclass(frozen=True)
class CaptureOptions:
    """How prompts are run, and what is kept besides.

    Attributes:
        path: How to compute; see ``choose_path``.
        permutations: Collects the enrichment test of prefixed prompts; None for no test.
        final_norm: Whether the last block's state is taken after the final norm.
        progress: Label of the progress bar; None for no bar.
    """

    path: CapturePath = REFERENCE
    permutations: PermutationTest | None = None
    final_norm: bool = False
    progress: str | None = None


_DEFAULT = CaptureOptions()


def capture(
    model: PreTrainedModel,
    prompts: Sequence[RenderedPrompt],
    *,
    candidates: int,
    batch_size: int,
    options: CaptureOptions = _DEFAULT,
) -> Captured:
    """Runs every prompt once and keeps what the method needs of it.

    Padding is on the right and masked, and the results equal those of single prompts; prompts are
    batched by length and come back in their own order.

    Args:
        model: A decoder-only model, loaded with ``attn_implementation="eager"``.
        prompts: Rendered prompts; at least one, each of at least ``candidates`` tokens.
        candidates: Number of last tokens to keep, N.
        batch_size: Prompts per forward pass.
        options: How to compute, and what is kept besides.

    Raises:
        ExtractionError: The model's blocks or attention weights cannot be found, or a block output
            is not finite.
        UnsupportedAttentionError: The path takes rows, and the model's attention has none.
    """
    path, permutations, progress = options.path, options.permutations, options.progress
    config = model.config.get_text_config()
    blocks = find_blocks(model, config.num_hidden_layers)
    shape = (len(prompts), len(blocks), candidates)
    captured = Captured(
        attention=np.zeros(shape, dtype=np.float32),
        hidden=np.zeros((*shape, config.hidden_size), dtype=np.float32),
        residual_norms=np.zeros(len(blocks)),
    )
    recorder = _Recorder(captured, path, permutations)
    common = shared_length(prompts, candidates)
    shared = common if path.share else 0
    model.train(False)
    with (
        torch.inference_mode(),
        tqdm(
            total=len(prompts), desc=progress, unit="prompt", disable=progress is None, leave=False
        ) as bar,
    ):
        cache = None
        if shared:
            with watched(blocks, lambda at, out: recorder.see_shared(at, out, len(prompts))):
                cache = run_shared(model, prompts[0].token_ids[:shared])
        for batch in make_batches(prompts, candidates, batch_size, shared, model.device):
            recorder.begin(batch)
            rows = only_rows(model, batch.candidates, shared) if path.rows else nullcontext()
            with rows, watched(blocks, recorder.see_output, recorder.see_attention):
                # The backbone alone: logits over the vocabulary would be computed for nothing.
                output = model.base_model(
                    input_ids=batch.token_ids,
                    attention_mask=batch.attention_mask,
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
            recorder.finish(len(blocks))
            if options.final_norm:
                recorder.see_final(output.last_hidden_state)
            bar.update(len(batch.indices))
    check_finite(captured.hidden)
    captured.residual_norms[:] = recorder.norms(len(blocks))
    return Captured(
        captured.attention,
        captured.hidden,
        captured.residual_norms,
        permutations.result() if permutations else None,
    )


def choose_path(
    model: PreTrainedModel, prompts: Sequence[RenderedPrompt], candidates: int
) -> CapturePath:
    """Returns the fastest path that gives the reference's numbers for this model.

    Args:
        model: The model.
        prompts: A few prompts like those to come, of different lengths and with a prefix.
        candidates: Number of last tokens to keep, N.
    """
    size = len(prompts)
    expected = capture(model, prompts, candidates=candidates, batch_size=size)
    for path in PATHS[:-1]:
        try:
            found = capture(
                model, prompts, candidates=candidates, batch_size=size, options=CaptureOptions(path)
            )
        # Families raise different errors for what they do not support.
        except (UnsupportedAttentionError, ExtractionError, AttributeError, KeyError,
                NotImplementedError, RuntimeError, TypeError, ValueError):  # fmt: skip
            continue
        if _equal(found, expected, _ROUNDING[model.dtype]):
            return path
    return REFERENCE


def _equal(found: Captured, expected: Captured, rounding: float) -> bool:
    pairs = [(found.attention, expected.attention)]
    # Block by block: the last blocks' states are larger than the first ones'.
    pairs += [
        (found.hidden[:, block], expected.hidden[:, block])
        for block in range(expected.hidden.shape[1])
    ]
    return all(
        np.isfinite(ours).all() and np.abs(ours - theirs).max() <= rounding * np.abs(theirs).max()
        for ours, theirs in pairs
    )


def check_finite(hidden: NDArray[np.float32]) -> None:
    """Refuses block outputs ``[prompts, blocks, tokens, hidden_size]`` that are not finite.

    Raises:
        ExtractionError: Some are not; the message names their blocks.
    """
    finite = np.isfinite(hidden).all(axis=(0, 2, 3))
    if not finite.all():
        raise ExtractionError(
            f"blocks {np.flatnonzero(~finite).tolist()} give NaN or Inf; run the model in float32 "
            f"or bfloat16"
        )
