"""Distributions of a concept's prompt, by setting one component: CDAS, arXiv 2602.05234."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_steer.offline.models.hooks import Change
from vllm_steer.offline.models.likelihood import by_row
from vllm_steer.offline.train.batches import total
from vllm_steer.offline.train.edits import clamped
from vllm_steer.offline.train.examples import Contrast, Row, Tokens
from vllm_steer.offline.train.forms import UnitVectors, where
from vllm_steer.offline.train.objectives.objective import Moment, Objective


def jensen_shannon(logits: Tensor, others: Tensor) -> Tensor:
    """Returns the Jensen-Shannon divergence of distributions, natural logarithm, ``[tokens]``.

    Args:
        logits: ``[tokens, vocabulary]``.
        others: ``[tokens, vocabulary]``.
    """
    first, second = logits.log_softmax(-1), others.log_softmax(-1)
    middle = torch.logaddexp(first, second) - torch.log(torch.tensor(2.0))
    divergences = [(each.exp() * (each - middle)).sum(-1) for each in (first, second)]
    return 0.5 * (divergences[0] + divergences[1])


class DistributionMatching(Objective[Contrast]):
    """CDAS: the component that one prompt has makes the other's answers as likely as it does, both ways.

    The component w·h of the source prompt's last token is set at the positions of the other prompt and its
    answer (a distributed interchange intervention of rank 1).
    """

    form: UnitVectors

    def loss(self, rows: Sequence[Row[Contrast]], moment: Moment) -> Tensor:
        found = self._divergences([r.example for r in rows], [r.lesson for r in rows])
        weights = torch.tensor([1.0 / row.examples for row in rows], device=found.device)
        return (found * weights).sum()

    def score(self, lesson: int, examples: Sequence[Contrast], batch_size: int) -> float:
        """Returns the mean divergence, negative."""
        found = total(
            lambda part: self._divergences(part, [lesson] * len(part)), examples, batch_size
        )
        return -found / len(examples)

    def components(self, units: Tensor, examples: Sequence[Contrast]) -> Tensor:
        """Returns w·h at the last tokens of the prompts with the concept and of those without, ``[2, examples]``, float64.

        Args:
            units: ``[1, hidden_size]``, w.
            examples: The examples, each of which is read alone.
        """
        found = []
        for example in examples:
            both = [
                self._source([prompt], [example.positive])[0]
                for prompt in (example.prefixed, example.prompt)
            ]
            found.append(torch.cat(both).double() @ units[0].double())
        return torch.stack(found, dim=1)

    def _divergences(self, examples: Sequence[Contrast], lessons: Sequence[int]) -> Tensor:
        """Returns D⁺ + D⁻ of each example, ``[examples]``, each the mean over the tokens of its answer."""
        plain, prefixed = [e.prompt for e in examples], [e.prefixed for e in examples]
        towards = self._matched(plain, prefixed, [e.positive for e in examples], lessons)
        away = self._matched(prefixed, plain, [e.negative for e in examples], lessons)
        return towards + away

    def _matched(
        self,
        prompts: Sequence[Tokens],
        sources: Sequence[Tokens],
        answers: Sequence[Tokens],
        lessons: Sequence[int],
    ) -> Tensor:
        last, wanted = self._source(sources, answers)
        batch, acting = self.batch(prompts, answers)
        unit = self.form.units[list(lessons), 0]
        value = (last * unit).sum(-1)

        def change(_: int, hidden: Tensor) -> Tensor:
            return where(acting, clamped(hidden.float(), unit, value).to(hidden.dtype), hidden)

        put: Change = change
        found = jensen_shannon(self.answers.logits(batch, put), wanted)
        return by_row(batch, found) / batch.real.sum(-1)

    @torch.no_grad()
    def _source(
        self, prompts: Sequence[Tokens], answers: Sequence[Tokens]
    ) -> tuple[Tensor, Tensor]:
        """Returns the states of the prompts' last tokens, float32 ``[rows, hidden_size]``, and the answers' logits."""
        batch, _ = self.batch(prompts, answers)
        hidden, logits = self.unchanged(batch)
        last = [len(prompt) - 1 for prompt in prompts]
        return hidden[range(len(prompts)), last], logits
