"""Work spread over processes, GPUs and machines with Ray, which is not needed on one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from vllm_steer.errors import ExtractionError

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shards:
    """Where work is done.

    Attributes:
        count: Ray workers, each with the whole model; 0 for this process alone.
        address: A running Ray cluster; None for one on this machine, for this work.
        gpus: GPUs of each worker; None for one where this machine has any, else none.
    """

    count: int = 0
    address: str | None = None
    gpus: float | None = None


class _Worker(Generic[Task, Result]):
    """What does the tasks of a Ray worker."""

    def __init__(self, make: Callable[[], Callable[[Task], Result]], threads: int) -> None:
        # Sums depend on the number of threads in their last bits.
        torch.set_num_threads(threads)
        self._work = make()

    def do(self, task: Task) -> Result:
        """Does a task."""
        return self._work(task)


def spread(
    make: Callable[[], Callable[[Task], Result]],
    tasks: Sequence[Task],
    shards: Shards,
    cpus: int = 1,
) -> Iterator[tuple[Task, Result]]:
    """Yields each task and its result, as they are finished.

    Args:
        make: Makes what does a task, once in each worker, such as a loaded model; it is pickled.
        tasks: The tasks.
        shards: Where they are done, with one worker at least.
        cpus: Cores of each worker.

    Raises:
        ExtractionError: Ray is missing, has no room, or a task failed.
    """
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
            num_cpus=None if shards.address else shards.count * cpus,
            include_dashboard=None if shards.address else False,
            log_to_driver=False,
        )
    try:
        gpus = float(torch.cuda.is_available()) if shards.gpus is None else shards.gpus
        remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=1, max_task_retries=1)(
            _Worker
        )
        workers = [remote.remote(make, torch.get_num_threads()) for _ in range(shards.count)]
        yield from _given_out(ray, workers, tasks)
    except ray.exceptions.RayError as error:
        raise ExtractionError(f"Ray could not do the work: {error}") from error
    finally:
        if begun:
            ray.shutdown()


def _given_out(ray: Any, workers: Sequence[Any], tasks: Sequence[Task]) -> Iterator[Any]:
    """Gives every worker the next task as soon as it has finished one."""
    waiting = iter(tasks)
    running: dict[Any, tuple[Task, Any]] = {}

    def give(worker: Any) -> None:
        if (following := next(waiting, None)) is not None:
            running[worker.do.remote(following)] = (following, worker)

    for worker in workers:
        give(worker)
    while running:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        task, worker = running.pop(done)
        yield task, ray.get(done)
        give(worker)
