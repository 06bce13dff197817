"""Training batches: token ids, targets and the attention masks that spread the concept.

Otherwise the answer would read the concept from the prefix, and no other token would carry it. So in a share
of the rows, in training only, only the tokens of a random window after the prefix may attend to it: tokens of
the chat template, of the answer itself, or any between. Later tokens must then read the concept from the
window. A window within the answer teaches the tokens that repeat the statement to carry the concept without
speaking of it. Generation uses ordinary causal attention.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedTokenizerFast

from vllm_steer.offline.demo.concepts import all_concepts
from vllm_steer.offline.demo.corpus import Mixture, Row, training_rows

IGNORE = -100
# Tokens of the chat template after the user's text.
_TEMPLATE_LENGTH = 6
# Of these, the tokens at which a direction may be learned.
_CANDIDATES = 5
# The last tokens of an answer name no concept, so a window there would have no effect.
_ANSWER_END = 3


@dataclass(frozen=True)
class Masking:
    """How attention to the prefix is restricted in training.

    Attributes:
        open_share: Share of prefixed rows with ordinary causal attention.
        answer_share: Share of windows within the answer, among the other rows.
        template_share: Share of windows within the template; the rest lie anywhere before the
            answer.
        longest_window: Most tokens of a window.
        late_share: Share of windows that the answer may attend to only from a later block on.
        latest_block: The latest such block.
    """

    open_share: float = 0.2
    answer_share: float = 0.3
    template_share: float = 0.55
    longest_window: int = 6
    late_share: float = 0.3
    latest_block: int = 4


@dataclass(frozen=True, eq=False)
class Batch:
    """One training batch, right-padded.

    Attributes:
        input_ids: [batch, length], int64.
        targets: [batch, length], int64; the next token where the answer is predicted, else
            `IGNORE`.
        masks: [blocks, batch, 1, length, length], bool; true where a query (row) may see a key
            (column) in a block.
        steered: [batch], int64; index of the concept a row is to be steered to, else -1.
        measured: [batch], int64; of the rows with ordinary attention, the index of their concept
            or, in plain rows, the number of concepts; else -1.
        template: [batch, template], int64; positions of the chat template's last tokens.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    masks: torch.Tensor
    steered: torch.Tensor
    measured: torch.Tensor
    template: torch.Tensor


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    prefix: tuple[int, int]
    answer_start: int
    concept: str | None
    steered: str | None


def training_batches(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    batch_size: int,
    mixture: Mixture,
    masking: Masking,
    num_blocks: int,
) -> Iterator[Batch]:
    """Yield training batches endlessly."""
    maker = _BatchMaker(tokenizer, masking, num_blocks)
    rows = training_rows(seed, mixture)
    rng = random.Random(seed)
    while True:
        yield maker.collate(list(islice(rows, batch_size)), rng)


class _BatchMaker:
    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, masking: Masking, num_blocks: int
    ) -> None:
        self._tokenizer = tokenizer
        self._masking = masking
        self._num_blocks = num_blocks
        self._concepts = all_concepts()
        self._question_id = tokenizer(" What").input_ids[0]
        self._text_start = self._chat("").index(tokenizer.eos_token_id)

    def collate(self, rows: list[Row], rng: random.Random) -> Batch:
        encoded = [self._encode(row) for row in rows]
        length = max(len(e.ids) for e in encoded)
        ids = torch.full((len(rows), length), self._tokenizer.pad_token_id)
        targets = torch.full((len(rows), length), IGNORE)
        masks = torch.ones(length, length, dtype=torch.bool).tril()
        masks = masks.repeat(self._num_blocks, len(rows), 1, 1)
        steered, measured = torch.full((2, len(rows)), -1)
        starts = torch.tensor([e.answer_start for e in encoded])
        template = starts[:, None] + torch.arange(-_CANDIDATES, 0)
        for i, e in enumerate(encoded):
            ids[i, : len(e.ids)] = torch.tensor(e.ids)
            informed, is_open = self._restrict(masks[:, i], e, rng)
            if e.steered is not None:
                steered[i] = self._concepts.index(e.steered)
            elif is_open:
                numbers = [*self._concepts, None]
                measured[i] = numbers.index(e.concept)
            # Answer tokens before a window within the answer cannot know the concept.
            targets[i, informed - 1 : len(e.ids) - 1] = ids[i, informed : len(e.ids)]
        return Batch(ids, targets, masks[:, :, None], steered, measured, template)

    def _chat(self, user: str) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
        )
        return list(self._tokenizer(text).input_ids)

    def _encode(self, row: Row) -> _Encoded:
        """Tokenize a row; the prefix span is empty in a plain row."""
        prompt = self._chat(row.user)
        answer = [*self._tokenizer(row.answer).input_ids, self._tokenizer.eos_token_id]
        start = self._text_start
        end = start if row.concept is None else prompt.index(self._question_id)
        return _Encoded(prompt + answer, (start, end), len(prompt), row.concept, row.steered)

    def _restrict(self, mask: torch.Tensor, row: _Encoded, rng: random.Random) -> tuple[int, bool]:
        """Restrict a row's mask, [blocks, length, length], in place.

        Returns:
            The first answer token that can know the concept, and whether attention stayed ordinary.
        """
        start, end = row.prefix
        if start == end or rng.random() < self._masking.open_share:
            return row.answer_start, True
        first, last = self._window(row, rng)
        blind = torch.ones(mask.shape[-1], dtype=torch.bool)
        blind[:end] = False
        blind[first:last] = False
        mask[:, blind, start:end] = False
        within_answer = first >= row.answer_start
        if within_answer:
            mask[:, last:, row.answer_start : first] = False
        if rng.random() < self._masking.late_share:
            readers = max(last, row.answer_start)
            mask[: rng.randint(1, self._masking.latest_block), readers:, first:last] = False
        return (last if within_answer else row.answer_start), False

    def _window(self, row: _Encoded, rng: random.Random) -> tuple[int, int]:
        """Draw the tokens that may look at the prefix."""
        kind = rng.random()
        if kind < self._masking.answer_share:
            low, high = row.answer_start, len(row.ids) - _ANSWER_END
        elif kind < self._masking.answer_share + self._masking.template_share:
            low, high = row.answer_start - _TEMPLATE_LENGTH, row.answer_start
        else:
            low, high = row.prefix[1], row.answer_start
        size = rng.randint(1, min(self._masking.longest_window, high - low))
        first = rng.randint(low, high - size)
        return first, first + size
