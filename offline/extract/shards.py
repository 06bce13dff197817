"""Concepts spread over processes, GPUs and machines with Ray, which is not needed on one machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from joblib import Parallel, parallel_config

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.extract.answer_learning import AnswerLearner
from vllm_steer.offline.extract.learning import ConceptLearner, ExtractionJob, Learned
from vllm_steer.offline.models.loading import load_config
from vllm_steer.offline.models.prompts import Concept

# Errors of a single concept, or lack of memory; the others continue.
FAILURES = (ExtractionError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Shards:
    """Where concepts are learned.

    Attributes:
        count: Ray workers, each with the whole model; 0 for this process alone.
        address: A running Ray cluster; None for one on this machine, for this extraction.
        gpus: GPUs of each worker; None for one where this machine has any, else none.
    """

    count: int = 0
    address: str | None = None
    gpus: float | None = None


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
    if shards.count:
        yield from _learn_with_ray(job, groups, shards)
        return
    worker = _Worker(job, torch.get_num_threads())
    for group in groups:
        yield from zip(group.indices, worker.learn(group.concepts), strict=True)


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

    def __init__(self, job: ExtractionJob, threads: int) -> None:
        # Sums depend on the number of threads in their last bits.
        torch.set_num_threads(threads)
        self._workers = job.workers
        self._learner: ConceptLearner | AnswerLearner
        if job.settings.learn_from == "answers":
            self._learner = AnswerLearner(job)
        else:
            self._learner = ConceptLearner(job, load_config(job.model_path, job.settings.chat)[1])

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


def _learn_with_ray(
    job: ExtractionJob, groups: Sequence[_Group], shards: Shards
) -> Iterator[tuple[int, Learned | str]]:
    try:
        import ray
    except ImportError as error:
        raise ExtractionError(
            "shards need Ray, which is not installed: pip install 'vllm-steer[ray]', or leave "
            "--shards out"
        ) from error
    begun = not ray.is_initialized()
    if begun:
        ray.init(
            address=shards.address,
            # A cluster of this machine gives every worker its place, whatever the cores.
            num_cpus=None if shards.address else shards.count * job.workers,
            include_dashboard=None if shards.address else False,
            log_to_driver=False,
        )
    try:
        gpus = float(torch.cuda.is_available()) if shards.gpus is None else shards.gpus
        remote: Any = ray.remote(
            num_cpus=job.workers, num_gpus=gpus, max_restarts=1, max_task_retries=1
        )(_Worker)
        workers = [remote.remote(job, torch.get_num_threads()) for _ in range(shards.count)]
        yield from _spread(ray, workers, groups)
    except ray.exceptions.RayError as error:
        raise ExtractionError(f"Ray could not run the extraction: {error}") from error
    finally:
        if begun:
            ray.shutdown()


def _spread(
    ray: Any, workers: Sequence[Any], groups: Sequence[_Group]
) -> Iterator[tuple[int, Learned | str]]:
    """Gives every worker the next group as soon as it has finished one."""
    waiting = iter(groups)
    running: dict[Any, tuple[_Group, Any]] = {}

    def give(worker: Any) -> None:
        if (following := next(waiting, None)) is not None:
            running[worker.learn.remote(following.concepts)] = (following, worker)

    for worker in workers:
        give(worker)
    while running:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        group, worker = running.pop(done)
        yield from zip(group.indices, ray.get(done), strict=True)
        give(worker)
