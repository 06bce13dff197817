"""Asynchronous scheduling on CPU, where vLLM switches it off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class _Event:
    """An event that has happened."""

    def __init__(self, **options: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def schedule_asynchronously() -> None:
    """Lets an engine of this process schedule as on a GPU; what a GPU copies beside its work is copied at once."""
    import torch
    from vllm.platforms.cpu import CpuPlatform

    platform: Any = CpuPlatform
    cuda: Any = torch.cuda
    check = platform.check_and_update_config.__func__

    def keep(cls: type, vllm_config: Any) -> None:
        asynchronous = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asynchronous

    def stream(_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    platform.check_and_update_config = classmethod(keep)
    cuda.Event, cuda.stream, cuda.current_stream = _Event, stream, lambda: None
