"""The trainer: an objective's parameters, step by step, until held-out examples say that it is enough.

Lessons in one training share forward passes and nothing else: each has its own draw of examples, its own optimiser state
and its own stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.train.batches import draws, parts
from vllm_steer.offline.train.examples import E, Row
from vllm_steer.offline.train.forms import snapshot
from vllm_steer.offline.train.objectives.objective import Moment, Objective
from vllm_steer.offline.train.schedule import Schedule, factor


@dataclass(frozen=True)
class TrainerOptions:
    """How an objective is optimised, by AdamW.

    Attributes:
        steps: Most steps.
        examples: Examples in a step.
        rate: Step of a parameter.
        schedule: How the step changes.
        warmup: First steps, in which it rises.
        decay: Weight decay.
        clip: Length that gradients are shortened to; None leaves them.
        every: Steps between two looks at the held-out examples.
        patience: Looks without improvement after which a lesson stops; None for never.
        batch_size: Rows of a forward pass.
        seed: Seed of the draws.
    """

    steps: int
    examples: int
    rate: float
    schedule: Schedule = "constant"
    warmup: int = 0
    decay: float = 0.0
    clip: float | None = None
    every: int = 4
    patience: int | None = 2
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Lesson(Generic[E]):
    """What one direction is trained on.

    Attributes:
        learned: Examples that the loss is taken on.
        held_out: Others that say when to stop; without any, the last step is kept.
    """

    learned: Sequence[E]
    held_out: Sequence[E] = ()


@dataclass(frozen=True, eq=False)
class Result:
    """What a lesson has learned.

    Attributes:
        learned: Float32 tensors by name, as the form gives them.
        score: The objective's score on the held-out examples; None where there are none.
        steps: Steps that it took to get there.
    """

    learned: dict[str, Tensor]
    score: float | None
    steps: int


@dataclass
class State:
    """All that changes while it is trained.

    Attributes:
        step: Steps that are done.
        best: What each lesson keeps so far.
        active: Lessons that go on.
        parameters: State of the form.
        moments: State of the optimiser, by the number of the parameter and the name of the moment.
    """

    step: int
    best: list[Result | None]
    active: list[int]
    parameters: dict[str, Tensor]
    moments: dict[tuple[int, str], Tensor]


class Keeper(Protocol):
    """Keeps the state of a training that may be killed."""

    def load(self) -> State | None:
        """Returns what was kept of the same training; None where there is nothing."""

    def save(self, state: State) -> None:
        """Keeps a state in the place of the one before."""


class Trainer(Generic[E]):
    """One training."""

    def __init__(
        self,
        objective: Objective[E],
        lessons: Sequence[Lesson[E]],
        options: TrainerOptions,
        keeper: Keeper | None = None,
    ) -> None:
        """Prepares it, where it was if it was killed.

        Args:
            objective: What is optimised; its form has as many lessons.
            lessons: What each is trained on.
            options: How.
            keeper: What keeps its state at every look; None for nobody.
        """
        self._objective, self._lessons, self._options = objective, lessons, options
        self._keeper, self._form = keeper, objective.form
        self._form.to(objective.answers.model.device)
        self._optimizer = torch.optim.AdamW(
            self._form.rates(options.rate), weight_decay=options.decay
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._draws = [draws(len(x.learned), options.examples, options.seed) for x in lessons]
        self._best: list[Result | None] = [None] * len(lessons)
        self._active = list(range(len(lessons)))
        self._step = 0
        if keeper is not None and (state := keeper.load()) is not None:
            self._restore(state)

    def run(self, progress: str | None) -> list[Result]:
        """Trains, and returns what each lesson keeps.

        Args:
            progress: Text beside the progress bar; None for no bar.

        Raises:
            ExtractionError: A loss is not finite, or nothing is learned from.
        """
        options = self._options
        with tqdm(
            total=options.steps,
            initial=self._step,
            desc=progress,
            unit="step",
            disable=progress is None,
            leave=False,
        ) as bar:
            while self._step < options.steps and self._active:
                self._advance()
                bar.update()
                if self._step % options.every == 0 or self._step == options.steps:
                    self._look()
                    if self._keeper is not None:
                        self._keeper.save(self._state())
        return [best for best in self._best if best is not None]

    def _advance(self) -> None:
        """Makes a step."""
        options, form = self._options, self._form
        given = factor(options.schedule, self._step, options.steps, options.warmup)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * given
        self._optimizer.zero_grad()
        self._accumulate()
        form.before_step()
        if options.clip is not None:
            torch.nn.utils.clip_grad_norm_(form.parameters(), options.clip)
        self._optimizer.step()
        form.after_step()
        self._step += 1

    def _accumulate(self) -> None:
        """Adds up the gradients of a step."""
        rows: list[Row[E]] = []
        for lesson in self._active:
            examples = [self._lessons[lesson].learned[i] for i in next(self._draws[lesson])]
            tokens = sum(example.tokens for example in examples)
            rows += [Row(lesson, example, tokens, len(examples)) for example in examples]
        moment = Moment(self._step, self._options.steps)
        for part in parts(rows, self._options.batch_size):
            loss = self._objective.loss(part, moment)
            check_finite(float(loss.detach()))
            torch.autograd.backward(loss)
        if (penalty := self._objective.penalty(self._active)) is not None:
            torch.autograd.backward(penalty)

    @torch.no_grad()
    def _look(self) -> None:
        """Measures what was learned and stops what no longer improves."""
        options = self._options
        for lesson in list(self._active):
            held_out = self._lessons[lesson].held_out
            if not held_out:
                self._keep(lesson, None)
                continue
            score = self._objective.score(lesson, held_out, options.batch_size)
            check_finite(score)
            best = self._best[lesson]
            if best is None or best.score is None or score > best.score:
                self._keep(lesson, score)
            elif (
                options.patience is not None
                and self._step - best.steps >= options.patience * options.every
            ):
                self._active.remove(lesson)

    def _keep(self, lesson: int, score: float | None) -> None:
        self._best[lesson] = Result(snapshot(self._form.learned(lesson)), score, self._step)

    def _state(self) -> State:
        moments = {
            (number, name): value
            for number, state in self._optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        return State(
            self._step, list(self._best), list(self._active), self._form.state_dict(), moments
        )

    def _restore(self, state: State) -> None:
        self._step, self._best, self._active = state.step, list(state.best), list(state.active)
        self._form.load_state_dict(state.parameters)
        optimizer = self._optimizer.state_dict()
        kept: dict[int, dict[str, Tensor]] = {}
        for (number, name), value in state.moments.items():
            kept.setdefault(number, {})[name] = value
        self._optimizer.load_state_dict({**optimizer, "state": kept})
        for lesson in self._active:
            for _ in range(self._step):
                next(self._draws[lesson])


def check_finite(loss: float) -> None:
    """Raises ExtractionError where a loss or a score is not finite."""
    if not math.isfinite(loss):
        raise ExtractionError(
            "the loss of training is not finite; train in float32 or bfloat16, with a smaller rate or, in extract, a "
            "smaller train_rate"
        )
