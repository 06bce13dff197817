"""A complete run: unsteered answers, a search for each question, and scales of other questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.evaluate.generation import Answer, Generator, Request
from vllm_steer.offline.fusion.objective import overlap
from vllm_steer.offline.fusion.questions import GoldQuestion
from vllm_steer.offline.fusion.results import Arm, Chosen, Figures, FusionResult, Share
from vllm_steer.offline.fusion.search import (
    Budget,
    Case,
    Kind,
    Target,
    Trial,
    best,
    search,
)
from vllm_steer.offline.measures.intervals import SHARE, mean_interval
from vllm_steer.offline.models.loading import public_name
from vllm_steer.packs.pack import SteeringPack

Right = Callable[[GoldQuestion, Answer], bool]
"""Whether an answer to a question is right."""


def words_are_there(least: float) -> Right:
    """Judges an answer right if it has at least this share of the gold answer's words."""

    def right(question: GoldQuestion, answer: Answer) -> bool:
        return overlap(answer.text, question.answer) >= least

    return right


@dataclass(frozen=True)
class FusionQuestions:
    """Questions by purpose.

    Attributes:
        reported: Questions to report on; those that the model gets right unsteered are left out.
        tuning: Other questions to search common scales on; may be empty.
    """

    reported: Sequence[GoldQuestion]
    tuning: Sequence[GoldQuestion] = ()


def run_fusion(
    generator: Generator,
    pack: SteeringPack,
    asked: FusionQuestions,
    cases: Sequence[Case],
    budget: Budget,
    right: Right,
) -> FusionResult:
    """Answers, searches and measures.

    As in the method, a search uses the gold answer of the reported question itself. With
    tuning questions there is also an arm with one set of scales searched on those.

    Args:
        generator: Engine with the pack.
        pack: Directions of all cases.
        asked: The questions.
        cases: What is tried on those that are reported, then on those for tuning; see
            ``vllm_steer.offline.fusion.search.cases_of``.
        budget: How the scales were drawn.
        right: Says which answers are right.

    Raises:
        EvaluationError: Generation failed, the model gets every question right, or a question is
            both reported and for tuning.
    """
    questions, tuning = asked.reported, asked.tuning
    _check_apart(questions, tuning)
    plain = generator.answer([Request(question.question) for question in questions])
    wrong = [
        index
        for index, (question, answer) in enumerate(zip(questions, plain, strict=True))
        if not right(question, answer)
    ]
    if not wrong:
        raise EvaluationError(f"the model gets all {len(questions)} questions right unsteered")
    kept = [questions[index] for index in wrong]
    measured = _Measuring(kept, right)
    every = [*questions, *tuning]
    arms: dict[str, Arm] = {}
    for kind in dict.fromkeys(case.kind for case in cases):
        own = _trials(pack, every, cases, kind, common=False)
        began = time.perf_counter()
        studies = [[[target] for target in _of(own, index)] for index in wrong]
        found = search(generator.answer, studies)
        arms[kind] = measured.searched(studies, found, time.perf_counter() - began)
        if tuning:
            shared = _trials(pack, every, cases, kind, common=True)
            places = range(len(questions), len(every))
            trials = list(zip(*(_of(shared, place) for place in places), strict=True))
            began = time.perf_counter()
            (common,) = search(generator.answer, [trials])
            chosen, seconds = common.index(best(common)), time.perf_counter() - began
            targets = [_of(shared, index)[chosen] for index in wrong]
            answers = generator.answer([target.request for target in targets])
            arms[f"{kind}, scales of other questions"] = measured.common(targets, answers, seconds)
    return FusionResult(
        model=public_name(generator.engine.model),
        pack=pack.manifest.tensors.sha256,
        max_tokens=generator.max_tokens,
        trials=budget.trials,
        scales=(budget.low, budget.high),
        seed=budget.seed,
        questions=len(questions),
        wrong=len(wrong),
        tuning_questions=len(tuning),
        unsteered=measured.figures([plain[index] for index in wrong]),
        arms=arms,
    )


def _trials(
    pack: SteeringPack,
    questions: Sequence[GoldQuestion],
    cases: Sequence[Case],
    kind: Kind,
    common: bool,
) -> list[Target]:
    """The trials of a kind, for single questions or all together."""
    return [
        Target(questions[c.question].question, questions[c.question].answer, pack.name, c)
        for c in cases
        if (c.kind, c.common) == (kind, common)
    ]


def _of(targets: Sequence[Target], question: int) -> list[Target]:
    """The trials of one question, in their order."""
    return [target for target in targets if target.case.question == question]


def _check_apart(questions: Sequence[GoldQuestion], tuning: Sequence[GoldQuestion]) -> None:
    both = {q.question for q in questions} & {q.question for q in tuning}
    if both:
        raise EvaluationError(
            f"{len(both)} questions are both reported and for tuning, such as {min(both)!r}; "
            f"remove them from one of the files"
        )


class _Measuring:
    """Turns answers to the reported questions into figures."""

    def __init__(self, questions: Sequence[GoldQuestion], right: Right) -> None:
        self._questions, self._right = questions, right

    def figures(self, answers: Sequence[Answer]) -> Figures:
        pairs = list(zip(self._questions, answers, strict=True))
        perplexities = [a.perplexity for a in answers if a.perplexity is not None]
        return Figures(
            right=self._share([float(self._right(q, a)) for q, a in pairs]),
            overlap=self._share([overlap(a.text, q.answer) for q, a in pairs]),
            perplexity=float(np.exp(np.log(perplexities).mean())) if perplexities else None,
        )

    def searched(
        self,
        studies: Sequence[Sequence[Sequence[Target]]],
        found: Sequence[Sequence[Trial]],
        seconds: float,
    ) -> Arm:
        """Returns the arm of a search, with one study per question."""
        count = len(found[0])
        by_trials = [
            self.figures([best(trials[:length]).answers[0] for trials in found])
            for length in range(1, count + 1)
        ]
        places = [trials.index(best(trials)) for trials in found]
        targets = [study[place][0] for study, place in zip(studies, places, strict=True)]
        answers = [trials[place].answers[0] for trials, place in zip(found, places, strict=True)]
        return Arm(
            figures=by_trials[-1],
            by_trials=by_trials,
            answers_per_question=count,
            seconds=seconds,
            chosen=self._chosen(targets, answers),
        )

    def common(self, targets: Sequence[Target], answers: Sequence[Answer], seconds: float) -> Arm:
        """Returns the arm of one set of scales, searched on other questions."""
        return Arm(
            figures=self.figures(answers),
            by_trials=[],
            answers_per_question=0.0,
            seconds=seconds,
            chosen=self._chosen(targets, answers),
        )

    def _chosen(self, targets: Sequence[Target], answers: Sequence[Answer]) -> list[Chosen]:
        return [
            Chosen(
                question=question.question,
                gold=question.answer,
                answer=answer.text,
                right=self._right(question, answer),
                overlap=overlap(answer.text, question.answer),
                perplexity=answer.perplexity,
                scales=list(target.case.scales),
                steering=target.request.steering(),
            )
            for question, target, answer in zip(self._questions, targets, answers, strict=True)
        ]

    def _share(self, values: Sequence[float]) -> Share:
        low, high = mean_interval(np.array(values), SHARE)
        return Share(mean=float(np.mean(values)), low=low, high=high)
