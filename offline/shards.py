"""Concepts spread over processes, GPUs and machines with Ray; one machine needs none of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from joblib import Parallel, parallel_config

from offline.learning import ConceptLearner, Learned, Plan
from offline.models import load_config
from vllm_steer.errors import ExtractionError

# Whatever a concept may fail with by its own fault or for want of memory; the others go on.
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
    plan: Plan, concepts: Sequence[tuple[str, str]], shards: Shards
) -> Iterator[tuple[int, Learned | str]]:
    """Yields each concept's index and what it gave, or why it failed, as they are finished.

    Args:
        plan: What to extract.
        concepts: Names and prefixes.
        shards: Where.

    Raises:
        ExtractionError: The model cannot be loaded or run, or Ray is missing or has no room.
    """
    if not concepts:
        return
    if shards.count:
        yield from _learn_with_ray(plan, concepts, shards)
        return
    worker = _Worker(plan, torch.get_num_threads())
    for index, (name, prefix) in enumerate(concepts):
        yield index, worker.learn(name, prefix)


class _Worker:
    """One loaded model; the same whether it lives in this process or in one of Ray's."""

    def __init__(self, plan: Plan, threads: int) -> None:
        # Sums depend on the number of threads in their last bits.
        torch.set_num_threads(threads)
        self._workers = plan.workers
        self._learner = ConceptLearner(plan, load_config(plan.model_path)[1])

    def learn(self, name: str, prefix: str) -> Learned | str:
        with parallel_config("loky", inner_max_num_threads=1):
            try:
                return self._learner.learn(name, prefix, Parallel(n_jobs=self._workers))
            except FAILURES as error:
                return str(error)


def _learn_with_ray(
    plan: Plan, concepts: Sequence[tuple[str, str]], shards: Shards
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
            num_cpus=None if shards.address else shards.count * plan.workers,
            include_dashboard=None if shards.address else False,
            log_to_driver=False,
        )
    try:
        gpus = float(torch.cuda.is_available()) if shards.gpus is None else shards.gpus
        remote: Any = ray.remote(
            num_cpus=plan.workers, num_gpus=gpus, max_restarts=1, max_task_retries=1
        )(_Worker)
        workers = [remote.remote(plan, torch.get_num_threads()) for _ in range(shards.count)]
        yield from _spread(ray, workers, concepts)
    except ray.exceptions.RayError as error:
        raise ExtractionError(f"Ray could not run the extraction: {error}") from error
    finally:
        if begun:
            ray.shutdown()


def _spread(
    ray: Any, workers: Sequence[Any], concepts: Sequence[tuple[str, str]]
) -> Iterator[tuple[int, Learned | str]]:
    """Gives every worker the next concept as soon as it has finished one."""
    waiting = iter(enumerate(concepts))
    running: dict[Any, tuple[int, Any]] = {}

    def give(worker: Any) -> None:
        if (following := next(waiting, None)) is not None:
            index, (name, prefix) = following
            running[worker.learn.remote(name, prefix)] = (index, worker)

    for worker in workers:
        give(worker)
    while running:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        index, worker = running.pop(done)
        yield index, ray.get(done)
        give(worker)
