"""A vLLM engine in a process of its own, for benchmarks: on random weights and beside rivals as well.

Several live side by side, stopped by a signal while they wait, since some of their threads poll; so timed
runs can alternate between them. An engine may run in another environment: a rival's plugin is put on its path alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import ExtraArgs
from vllm_steer.verify.process import EngineProcess, ProcessOptions

ROOT = Path(__file__).parents[1]
START_TIMEOUT = 900
TOP = 2


class Engine(EngineProcess):
    """A running engine."""

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        path: Sequence[Path] = (),
    ) -> None:
        """Starts an engine and waits until it is ready.

        Args:
            name: Name in messages.
            arguments: Arguments of ``LLM``.
            environment: Environment variables that differ from this process's.
            path: Folders that only this engine imports from.
        """
        own = {
            # One process for front end and engine: nothing hides behind another core, and
            # admission is part of what is timed.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
        }
        super().__init__(
            name,
            arguments,
            own | dict(environment),
            ProcessOptions("benchmarks.engine_child", [*path, ROOT], True, START_TIMEOUT),
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], extra: Sequence[ExtraArgs], count: int
    ) -> list[tuple[list[int], list[dict[int, float]]]]:
        """Greedy tokens of each prompt and, for each token, the best log-probabilities by token."""
        answers = self.answer(prompts, extra, count, TOP)
        return [(answer.tokens, answer.logprobs) for answer in answers]

    def profile(
        self, prompts: Sequence[Sequence[int]], extra: Sequence[ExtraArgs], steps: int
    ) -> dict[str, Any]:
        """Profiles decode steps; :func:`benchmarks.profile_step.profile_decode` says what returns."""
        answer: dict[str, Any] = self._ask("profile", list(prompts), list(extra), steps)
        return answer
