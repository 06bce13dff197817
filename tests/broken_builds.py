"""Builds of the plugin that are broken in one line, for tests of what must notice them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """One line of the plugin, changed."""

    file: str
    line: str
    becomes: str
    seed: int = 0

    def build(self, folder: Path) -> Path:
        """Copies the plugin into a folder, to be imported from there, with the line changed."""
        shutil.copytree(ROOT / "vllm_steer", folder / "vllm_steer")
        (folder / "vllm_steer" / self.file).write_text(self.source())
        return folder

    def source(self) -> str:
        """The file with the line changed, which it has once."""
        source = (ROOT / "vllm_steer" / self.file).read_text()
        assert source.count(self.line) == 1, f"{self.file} has not once: {self.line}"
        return source.replace(self.line, self.becomes)


MUTATIONS = {
    "positions: the first one of a range is left out": Mutation(
        "engine/token_rows.py",
        "inside = (columns[_START] <= positions) & (positions < columns[_END])",
        "inside = (columns[_START] < positions) & (positions < columns[_END])",
    ),
    "positions: a preempted request loses its steering": Mutation(
        "engine/runner_v1.py",
        "for request_id in scheduler_output.finished_req_ids:",
        "for request_id in scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set()):",
    ),
    "prefix cache: blocks are found by token ids alone": Mutation(
        "engine/prefix_cache.py",
        'keys = [*keys, ("steering", f"{segment.key}:{begin - start}:{stop - start}")]',
        "keys = [*keys]",
    ),
    "prefix cache: where a block is steered does not count": Mutation(
        "engine/prefix_cache.py",
        'keys = [*keys, ("steering", f"{segment.key}:{begin - start}:{stop - start}")]',
        'keys = [*keys, ("steering", segment.key)]',
        # A world with room for many cached blocks.
        seed=5,
    ),
    "tokens: those in cached blocks are forgotten": Mutation(
        "engine/runner_v1.py",
        "tokens = request.prompt_token_ids or ()",
        "tokens = ()",
        # A world with room for many cached blocks.
        seed=5,
    ),
    "isolation: rows of the step before stay": Mutation(
        "engine/bank.py",
        "if self._known is not None and np.array_equal(rows, self._known):",
        "if self._known is not None and len(rows) == len(self._known):",
    ),
    "isolation: a new combination does not fill its row": Mutation(
        "engine/worker.py",
        "for row, segment in step.new:",
        "for row, segment in step.new[:1]:",
    ),
}
