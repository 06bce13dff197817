"""The calibrator: chooses layers and scales on tuning questions with the engine, and reports on others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.calibrate.grid import Subject, subjects
from vllm_steer.offline.calibrate.measures import (
    Gap,
    Tokens,
    Trial,
    done,
    fluency_of,
    measured_gaps,
    spoken,
    steered_likelihoods,
)
from vllm_steer.offline.calibrate.settings import CalibrationSettings
from vllm_steer.offline.engine.tokens import TokenEngine
from vllm_steer.offline.extract.answer_generation import prefixed_answers
from vllm_steer.offline.measures.fluency import Fluency, Margins
from vllm_steer.offline.models.loading import public_name
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.offline.questions.everyday import Everyday
from vllm_steer.packs.pack import Calibration, CalibrationPoint, Prefix, SteeringPack


@dataclass(frozen=True, eq=False)
class _Measured:
    """A direction with its gaps and its bound on fluency.

    Attributes:
        subject: The direction.
        tuning: Gap of the tuning questions; None if no prefix is known.
        heldout: Gap of the held-out questions; None if no prefix is known.
        bound: The bound of fluent text.
        prefixed: Fluency of the prefixed model's answers; None if no prefix is known.
    """

    subject: Subject
    tuning: Gap | None
    heldout: Gap | None
    bound: Fluency
    prefixed: Fluency | None

    def is_fluent(self, found: Fluency) -> bool:
        return found.within(self.bound)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The choice for a direction on tuning questions."""

    layers: tuple[int, ...]
    scale: float
    safe: float | None
    curve: list[CalibrationPoint]


class Calibrator:
    """Measures the directions of one pack."""

    def __init__(
        self,
        engine: TokenEngine,
        pack: SteeringPack,
        questions: Everyday,
        settings: CalibrationSettings,
        prefixes: Mapping[str, Prefix | None],
    ) -> None:
        self._engine, self._settings, self._prefixes = engine, settings, prefixes
        self._tokenizer = engine.tokenizer
        self._blocks = pack.manifest.model.num_layers
        self._subjects = subjects(pack)
        self._tuning = questions.tuning[: settings.tuning_questions]
        self._heldout = questions.heldout[: settings.heldout_questions]

    def run(self) -> dict[str, tuple[Chosen, Calibration]]:
        """Returns choices and measurements by direction."""
        measured = self._measured()
        starts = self._starts(measured)
        curves = self._curves(
            [
                (m, start.layers, self._scales(m, start))
                for m, start in zip(measured, starts, strict=True)
            ]
        )
        chosen = [
            self._choose(m, start.layers, curve)
            for m, start, curve in zip(measured, starts, curves, strict=True)
        ]
        return self._reported(measured, chosen)

    def _measured(self) -> list[_Measured]:
        """Asks the prefixed and the unsteered model, and measures the gaps between them."""
        settings = self._settings
        known = [s for s in self._subjects if self._prefixes[s.record.name] is not None]
        gaps: dict[str, tuple[Gap, Gap]] = {}
        fluent: dict[str, Fluency] = {}
        by_role: dict[str, list[Subject]] = {}
        for subject in known:
            by_role.setdefault(self._prefix(subject).role, []).append(subject)
        for role, group in by_role.items():
            examples = prefixed_answers(
                self._engine,
                self._tokenizer,
                [self._prefix(s).text for s in group],
                [*self._tuning, *self._heldout],
                settings.max_tokens,
                role,  # type: ignore[arg-type]  # a key of a dict of roles
            )
            for subject, gap in zip(
                group, measured_gaps(self._engine, examples, "the gap"), strict=True
            ):
                tuning = {render_question(self._tokenizer, q).text for q in self._tuning}
                count = sum(e.plain.text in tuning for e in gap.examples)
                if not 0 < count < len(gap.examples):
                    raise EvaluationError(
                        f"direction {subject.record.name!r}: the model's answers to its prefixed questions are "
                        f"empty; try another prefix, or longer answers"
                    )
                texts = [
                    str(self._tokenizer.decode(list(e.answer), skip_special_tokens=True))
                    for e in gap.examples
                ]
                surprise = [
                    -value / len(e.answer) for value, e in zip(gap.plain, gap.examples, strict=True)
                ]
                fluent[subject.name] = fluency_of(texts, surprise)
                gaps[subject.name] = gap.some(count), gap.rest(count)
        plain = self._plain_fluency() if len(known) < len(self._subjects) else None
        margins = Margins(settings.repetition, settings.perplexity, settings.unknown_perplexity)
        found = []
        for subject in self._subjects:
            tuning_gap, heldout_gap = gaps.get(subject.name, (None, None))
            own = fluent.get(subject.name)
            bound = margins.bound(own, plain)
            found.append(_Measured(subject, tuning_gap, heldout_gap, bound, own))
        return found

    def _prefix(self, subject: Subject) -> Prefix:
        prefix = self._prefixes[subject.record.name]
        assert prefix is not None
        return prefix

    def _plain_fluency(self) -> Fluency:
        prompts = self._prompts(self._tuning)
        asked = [(None, prompts)]
        return spoken(self._engine, asked, self._settings.max_tokens, "plain answers")[0].fluency

    def _prompts(self, questions: Sequence[str]) -> list[Tokens]:
        return [render_question(self._tokenizer, question).token_ids for question in questions]

    def _starts(self, measured: Sequence[_Measured]) -> list[Trial]:
        """Returns the layers and the scale of each direction that close most of the gap on a few questions."""
        trials: list[tuple[int, Trial, Gap]] = []
        best: list[tuple[float, Trial]] = []
        for at, m in enumerate(measured):
            own = tuple(m.subject.record.steered_layers)
            best.append((-np.inf, Trial(m.subject, m.subject.scales(own)[0], own)))
            if m.tuning is None:
                continue
            gap = m.tuning.some(self._settings.window_questions)
            tried = [
                Trial(m.subject, scale, layers)
                for layers in m.subject.windows(self._blocks)
                for scale in m.subject.scales(layers)
            ]
            # A single one is the best.
            trials += [(at, trial, gap) for trial in tried if len(tried) > 1]
        found = steered_likelihoods(self._engine, [(t, g) for _, t, g in trials], "layers")
        for (at, trial, gap), steered in zip(trials, found, strict=True):
            if (closed := gap.closed(steered)) > best[at][0]:
                best[at] = (closed, trial)
        return [trial for _, trial in best]

    def _scales(self, m: _Measured, start: Trial) -> list[float]:
        """Returns the scales to measure on all tuning questions."""
        tried = m.subject.scales(start.layers)
        return tried if m.tuning is None else m.subject.finer(start.scale, tried)

    def _curves(
        self, asked: Sequence[tuple[_Measured, tuple[int, ...], Sequence[float]]]
    ) -> list[list[CalibrationPoint]]:
        """Returns a point for every scale, ascending."""
        trials = [
            (m, Trial(m.subject, scale, layers))
            for m, layers, scales in asked
            for scale in sorted(scales)
        ]
        with_gap = [(t, m.tuning) for m, t in trials if m.tuning is not None]
        likely = iter(steered_likelihoods(self._engine, with_gap, "scales"))
        prompts = self._prompts(self._tuning)
        answers = spoken(
            self._engine,
            [(t, prompts if m.tuning is None else m.tuning) for m, t in trials],
            self._settings.max_tokens,
            "answers",
        )
        points = iter(
            [
                CalibrationPoint(
                    scale=trial.scale,
                    gap_closed=None if m.tuning is None else m.tuning.closed(next(likely)),
                    expression=found.expression,
                    repetition=found.fluency.repetition,
                    perplexity=found.fluency.perplexity,
                    fluent=m.is_fluent(found.fluency),
                )
                for (m, trial), found in zip(trials, answers, strict=True)
            ]
        )
        return [[next(points) for _ in scales] for _, _, scales in asked]

    def _choose(
        self, m: _Measured, layers: tuple[int, ...], curve: list[CalibrationPoint]
    ) -> Chosen:
        """Returns the fluent scale that reproduces most of the prefix's effect; without any, half of the
        weakest.

        Effects beyond that of the prefix do not count, so that strength is not gained at the cost of the
        text.
        """
        # A smaller angle is stronger.
        by_strength = curve[::-1] if m.subject.record.op == "angle" else curve
        fluent = [point for point in by_strength if point.fluent]
        if not fluent:
            return Chosen(layers, m.subject.half(by_strength[0].scale), None, curve)
        safe = fluent[-1].scale
        if m.tuning is None:
            return Chosen(layers, m.subject.half(safe), safe, curve)
        return Chosen(layers, max(fluent, key=done).scale, safe, curve)

    def _reported(
        self, measured: Sequence[_Measured], chosen: Sequence[Chosen]
    ) -> dict[str, tuple[Chosen, Calibration]]:
        """Measures the chosen scales on held-out questions, with other directions as controls."""
        trials = [
            Trial(m.subject, c.scale, c.layers) for m, c in zip(measured, chosen, strict=True)
        ]
        known = [at for at, m in enumerate(measured) if m.heldout is not None]
        own = self._closed(measured, [(at, trials[at]) for at in known], "held-out questions")
        # Far apart in the pack, where similar concepts are adjacent.
        half = max(len(known) // 2, 1)
        others = (
            {at: known[(i + half) % len(known)] for i, at in enumerate(known)}
            if len(known) > 1
            else {}
        )
        control = self._closed(
            measured, [(at, trials[other]) for at, other in others.items()], "controls"
        )
        prompts = self._prompts(self._heldout)
        answers = spoken(
            self._engine,
            [
                (trial, prompts if m.heldout is None else m.heldout)
                for trial, m in zip(trials, measured, strict=True)
            ],
            self._settings.max_tokens,
            "held-out answers",
        )
        found = {}
        for at, (m, c) in enumerate(zip(measured, chosen, strict=True)):
            gap, interval = own.get(at, (None, None))
            other, _ = control.get(at, (None, None))
            answer = answers[at]
            found[m.subject.record.name] = (
                c,
                Calibration(
                    model=public_name(self._engine.model),
                    dtype=self._engine.dtype,
                    steers=gap is None
                    or (
                        gap >= self._settings.least
                        and (interval is None or interval[0] > 0)
                        and (other is None or gap > other)
                        and (answer.expression is None or answer.expression >= self._settings.least)
                    ),
                    gap_closed=gap,
                    low=interval[0] if interval else None,
                    high=interval[1] if interval else None,
                    control=other,
                    expression=answer.expression,
                    repetition=answer.fluency.repetition,
                    repetition_prefixed=m.prefixed.repetition if m.prefixed else None,
                    perplexity=answer.fluency.perplexity,
                    fluent_dose=_dose(m.subject, c),
                    questions=len(self._heldout),
                    questions_sha256=hashlib.sha256(
                        json.dumps([self._tuning, self._heldout]).encode()
                    ).hexdigest(),
                    curve=c.curve,
                ),
            )
        return found

    def _closed(
        self, measured: Sequence[_Measured], trials: Sequence[tuple[int, Trial]], name: str
    ) -> dict[int, tuple[float, tuple[float, float] | None]]:
        """Returns the share of the gap that each trial closes, and its interval, by direction."""
        gaps = [
            (at, trial, gap) for at, trial in trials if (gap := measured[at].heldout) is not None
        ]
        found = steered_likelihoods(self._engine, [(t, gap) for _, t, gap in gaps], name)
        return {
            at: (gap.closed(steered), gap.interval(steered))
            for (at, _, gap), steered in zip(gaps, found, strict=True)
        }


def _dose(subject: Subject, chosen: Chosen) -> float | None:
    """Returns the raw dose at the largest fluent scale; forms other than addition have none."""
    if chosen.safe is None or subject.record.op != "add":
        return None
    return subject.dose(chosen.safe, chosen.layers)
