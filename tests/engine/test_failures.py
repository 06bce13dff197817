"""Engines that do not start or die: the last line says why, whichever process failed."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from tqdm import tqdm

from vllm_steer.cli import main
from vllm_steer.errors import EngineError, EvaluationError
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.server import free_port, running
from vllm_steer.offline.engine import tokens
from vllm_steer.offline.engine.tokens import TokenEngine
from vllm_steer.offline.evaluate.generation import Answer, Generator, Request, generating
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import MANIFEST_FILE, SteeringPack, load_pack
from vllm_steer.testing.forked import PRELOAD
from vllm_steer.vllm_compat.root_cause import cause_in_log

pytestmark = pytest.mark.engine

R = TypeVar("R")
ENGINE = {"dtype": "float32", "enforce_eager": True}
QUESTIONS = [user_text(statement.text) for statement in statements("heldout")[:4]]


def elsewhere(function: Callable[..., R], *args: Any) -> R:
    """What a function returns in a process of its own, which vLLM was imported for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def run(command: list[str]) -> tuple[int, str]:
    """Exit status and errors of ``vllm-steer``."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return main(command), errors.getvalue()


def test_a_sweep_without_room_for_a_cache_says_so_last(
    model: Path, packs: list[SteeringPack], tmp_path: Path
) -> None:
    """The engine core fails, after its worker has loaded the model."""
    engine = json.dumps(ENGINE | {"kv_cache_memory_bytes": 1000})
    command = ["sweep", str(packs[0].path), "--model", str(model), "--out", str(tmp_path)]
    status, errors = elsewhere(run, [*command, "--judge", "demo", "--engine", engine])
    assert status == 1
    expected = (
        "vllm-steer: the engine does not start: ValueError: No available memory for the cache"
    )
    assert errors.splitlines()[-1].startswith(expected)


def test_a_server_without_weights_says_so_last(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker fails, which its engine core waits for, which the server waits for."""
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    log = tmp_path / "log"
    # Short: vLLM's sockets are there, whose paths may not be long.
    temporary = tempfile.mkdtemp()
    monkeypatch.setenv("TMPDIR", temporary)
    port = free_port()
    options = ["--enforce-eager", "--kv-cache-memory-bytes", "64M"]
    with (
        pytest.raises(EngineError) as failure,
        running(["vllm", "serve", str(bare), "--port", str(port), *options], port, log),
    ):
        pass
    cause = str(failure.value).partition(" says: ")[2]
    assert cause.startswith(f"RuntimeError: Cannot find any model weights with `{bare}")
    lines = log.read_text().splitlines()
    assert lines[-1].startswith("RuntimeError: Engine core initialization failed.")
    assert lines[-1].endswith(f"Root cause: {cause}")
    assert not list(Path(temporary).glob("*.failures"))
    # Without the plugin there would be the lines of the other processes alone.
    others = [line for line in lines if line.startswith(("(Worker", "(EngineCore"))]
    assert cause_in_log("\n".join(others)) == cause


def test_a_pack_of_another_model_is_named(
    model: Path, packs: list[SteeringPack], tmp_path: Path
) -> None:
    """The process that asks for the engine fails."""
    foreign = shutil.copytree(packs[0].path, tmp_path / "foreign")
    manifest = json.loads((foreign / MANIFEST_FILE).read_text())
    manifest["model"]["num_layers"] = 9
    (foreign / MANIFEST_FILE).write_text(json.dumps(manifest))
    generator = Generator(TokenEngine(model, [load_pack(foreign)], ENGINE), 8)
    expected = "does not start: PackError: .*num_layers 9 where the served model has 6"
    with pytest.raises(EvaluationError, match=expected):
        generator.answer([Request(QUESTIONS[0])])


class Counted(tqdm):
    """A bar that remembers how it moved."""

    moves: list[float] = []  # noqa: RUF012

    def update(self, n: float | None = 1) -> bool | None:
        if self.desc == "answers":
            self.moves.append(n or 0)
        return super().update(n)


@dataclass(frozen=True)
class Life:
    """What an engine did until its worker was killed.

    Attributes:
        answers: Its answers.
        moves: How the bar moved meanwhile.
        cache: Bytes that its cache was given.
        blocks: Bytes of the blocks that vLLM made of them.
        most: Bytes that 256 requests of the longest kind need.
        death: What was said of its death.
        closed: Whether its sockets were closed, rather than left to the garbage collector.
    """

    answers: list[Answer]
    moves: list[float]
    cache: int
    blocks: int
    most: int
    death: str
    closed: bool


def live(model: Path, pack: Path, requests: list[Request], store: Path) -> Life:
    """Lets an engine answer, kills its worker and asks again."""
    tokens.PART = 2
    tokens.tqdm = Counted
    with generating(model, [load_pack(pack)], 8, store, ENGINE) as generator:
        answers = generator.answer(requests)
        moves = list(Counted.moves)
        config = generator.engine._llm.llm_engine.vllm_config
        cache, shape = config.cache_config, config.model_config
        token = 2 * shape.get_total_num_kv_heads() * shape.get_head_size() * 4
        token *= shape.get_total_num_hidden_layers()
        client = generator.engine._llm.llm_engine.engine_core
        (core,) = client.resources.engine_manager.processes
        children = psutil.Process(core.pid).children()
        (worker,) = [child for child in children if "resource_tracker" not in str(child.cmdline())]
        worker.send_signal(signal.SIGKILL)
        try:
            generator.answer([*requests[:2], Request(QUESTIONS[3])])
            death = "none"
        except EvaluationError as error:
            death = str(error)
    return Life(
        answers,
        moves,
        cache.kv_cache_memory_bytes,
        cache.num_gpu_blocks * cache.block_size * token,
        256 * (shape.max_model_len + 2 * cache.block_size) * token,
        death,
        client.ctx.closed,
    )


def test_an_engine_that_dies_leaves_what_it_has_answered(
    model: Path, packs: list[SteeringPack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory was not asked for: others use the machine as well."""
    pack = packs[0]
    direction = f"{pack.name}/{next(iter(pack.directions))}"
    requests = [Request(question, direction, 8.0) for question in QUESTIONS[:3]]
    life = elsewhere(live, model, pack.path, requests, tmp_path)
    # One by one as they finish, not a part at once.
    assert life.moves == [0, 1, 1, 1]
    assert life.death == (
        "the engine died: VllmWorker-0 was ended by SIGKILL, as the kernel does when memory runs out"
    )
    assert life.closed
    # Two parts of answers, two of their perplexities.
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(tokens, "PART", 2)
    assert (
        Generator(TokenEngine(model, [pack], ENGINE, tmp_path), 8).answer(requests) == life.answers
    )
    assert life.most / 256 <= life.cache <= min(life.most, psutil.virtual_memory().total / 4)
    # A token needs what it was thought to need.
    assert life.cache * 0.9 < life.blocks <= life.cache
