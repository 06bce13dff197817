"""Concepts learned in this process, or spread over the workers of Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

from joblib import Parallel, parallel_config

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.extract.answer_learning import AnswerLearner
from vllm_steer.offline.extract.learning import ConceptLearner, ExtractionJob, Learned
from vllm_steer.offline.models.loading import load_config
from vllm_steer.offline.models.prompts import Concept
from vllm_steer.offline.shards import Shards, spread

# Errors of a single concept, or lack of memory; the others continue.
FAILURES = (ExtractionError, RuntimeError, ValueError)


def learn_all(
    job: ExtractionJob, concepts: Sequence[Concept], shards: Shards
) -> Iterator[tuple[int, Learned | str]]:
    """Yields each concept's index and what it gave, or why it failed, as they are finished.

    Args:
        job: What to extract.
        concepts: Names and prefixes.
        shards: Where.

    Raises:
        ExtractionError: The model cannot be loaded or run, or Ray is missing or has no room.
    """
    if not concepts:
        return
    groups = _groups(job, concepts, shards)
    make = partial(_Worker, job)
    learned: Iterable[tuple[_Group, list[Learned | str]]]
    if shards.count:
        learned = spread(make, groups, shards, job.workers)
    else:
        worker = make()
        learned = ((group, worker(group)) for group in groups)
    for group, found in learned:
        yield from zip(group.indices, found, strict=True)


@dataclass(frozen=True)
class _Group:
    """Concepts that are learned together, and their places among all."""

    indices: range
    concepts: Sequence[Concept]


def _groups(job: ExtractionJob, concepts: Sequence[Concept], shards: Shards) -> list[_Group]:
    size = 1
    if job.settings.estimator == "trained":
        # No worker waits for what another could do.
        size = min(job.settings.train_together, ceil(len(concepts) / max(shards.count, 1)))
    starts = range(0, len(concepts), size)
    parts = [range(start, min(start + size, len(concepts))) for start in starts]
    return [_Group(part, concepts[part.start : part.stop]) for part in parts]


class _Worker:
    """One loaded model; the same whether it lives in this process or in one of Ray's."""

    def __init__(self, job: ExtractionJob) -> None:
        self._workers = job.workers
        self._learner: ConceptLearner | AnswerLearner
        if job.settings.learn_from == "answers":
            self._learner = AnswerLearner(job)
        else:
            self._learner = ConceptLearner(job, load_config(job.model_path, job.settings.chat)[1])

    def __call__(self, group: _Group) -> list[Learned | str]:
        return self.learn(group.concepts)

    def learn(self, concepts: Sequence[Concept]) -> list[Learned | str]:
        """Learns a group; where it fails, its concepts one by one, so that one fails alone."""
        try:
            return list(self._learn(concepts))
        except FAILURES as error:
            if len(concepts) == 1:
                return [str(error)]
            return [found for concept in concepts for found in self.learn([concept])]

    def _learn(self, concepts: Sequence[Concept]) -> list[Learned]:
        with parallel_config("loky", inner_max_num_threads=1):
            parallel = Parallel(n_jobs=self._workers)
            if isinstance(self._learner, AnswerLearner):
                return self._learner.learn([name for name, _ in concepts], parallel)
            return [self._learner.learn(name, prefix, parallel) for name, prefix in concepts]
