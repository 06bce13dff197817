"""Plain vLLM, the plugin and the rivals side by side on one model, and a workload on all of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import arms
from benchmarks.arms import Arm, Workload
from benchmarks.engine import Engine, EngineError, Timing
from benchmarks.interleave import Ratio, ratio_to, rounds
from benchmarks.models import BenchModel, write_pack
from benchmarks.rivals import NOT_RUN, Rival, install_hotwire
from benchmarks.steers import check_steers

PLAIN_ARM = Arm(arms.PLAIN, arms.PLAIN, arms.unsteered)
CONTROL_ARM = Arm(arms.CONTROL, arms.CONTROL, arms.unsteered)
STRONG_ARM = Arm("strong", arms.PLUGIN, arms.strongly_steered)
NO_PLUGIN = {"VLLM_PLUGINS": ""}
# The part of a core that an engine may use while others are timed, before the figures are doubted.
IDLE_LIMIT = 0.02


@dataclass(frozen=True)
class Fleet:
    """Running engines.

    Attributes:
        model: The model that all of them have.
        engines: By name.
        arms: The arms that can be measured.
        notes: Rivals without a speed, and why.
        checks: What the check for steering showed, by engine.
        described: What each engine runs with.
    """

    model: BenchModel
    engines: dict[str, Engine]
    arms: tuple[Arm, ...]
    notes: dict[str, str]
    checks: dict[str, str]
    described: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Measurement:
    """A workload on every arm.

    Attributes:
        workload: The workload.
        ratios: Ratio of each arm's tokens a second to plain vLLM's.
        cpu_ratios: The same of tokens by processor second, which other processes disturb less.
        speeds: Median tokens a second by arm.
        times: Every timing, by round and arm.
        idle_share: The part of a core that waiting engines used while others were timed.
    """

    workload: Workload
    ratios: dict[str, Ratio]
    cpu_ratios: dict[str, Ratio]
    speeds: dict[str, float]
    times: list[dict[str, Timing]]
    idle_share: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "workload": asdict(self.workload),
            "ratios": {name: ratio.as_dict() for name, ratio in self.ratios.items()},
            "cpu_ratios": {name: ratio.as_dict() for name, ratio in self.cpu_ratios.items()},
            "tokens_per_second": {name: round(speed, 1) for name, speed in self.speeds.items()},
            "idle_share": round(self.idle_share, 4),
            "times": [{name: asdict(timing) for name, timing in one.items()} for one in self.times],
        }


@contextmanager
def fleet(
    model: BenchModel,
    folder: Path,
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    requests: int,
    control: bool,
    rivals: bool,
) -> Iterator[Fleet]:
    """Starts the engines, checks that those which should do steer, and ends them.

    Args:
        model: The model.
        folder: For packs and rivals.
        settings: Arguments of ``LLM`` beside the model.
        environment: Variables of every engine.
        requests: Most requests of a batch.
        control: Whether to start a second plain engine.
        rivals: Whether to install and start rivals.

    Raises:
        EngineError: Plain vLLM or the plugin does not start, or the plugin does not steer.
    """
    pack = write_pack(model, folder, arms.DIRECTIONS)
    arguments = {
        "model": str(model.path),
        "load_format": model.load_format,
        "max_num_seqs": requests,
        "seed": 0,
        **settings,
    }
    steering = {"additional_config": {"steering": {"packs": [str(pack.path)]}}}
    notes: dict[str, str] = {}
    found: list[Rival] = []
    if rivals:
        notes |= NOT_RUN
        try:
            found.append(install_hotwire(folder, pack, requests))
        except RuntimeError as error:
            notes["hotwire"] = f"not run: {error}"
    with ExitStack() as stack, tqdm(total=2 + control + len(found), desc="engines") as bar:
        engines: dict[str, Engine] = {}

        def start(
            name: str, extra: Mapping[str, Any], env: Mapping[str, str], path: Sequence[Path] = ()
        ) -> Engine:
            bar.set_postfix_str(name)
            engine = Engine(name, {**arguments, **extra}, {**environment, **env}, path)
            stack.callback(engine.close)
            engines[name] = engine
            bar.update()
            return engine

        start(arms.PLAIN, {}, NO_PLUGIN)
        plugin = start(arms.PLUGIN, steering, {"VLLM_PLUGINS": "vllm_steer"})
        if control:
            start(arms.CONTROL, {}, NO_PLUGIN)
        verdict = check_steers(plugin, STRONG_ARM, model.vocabulary)
        if not verdict.steers:
            raise EngineError(f"the plugin {verdict.told}")
        checks, measured = {arms.PLUGIN: verdict.told}, [PLAIN_ARM, *arms.PLUGIN_ARMS]
        if control:
            measured.append(CONTROL_ARM)
        for rival in found:
            try:
                engine = start(rival.name, {}, rival.environment, [rival.path])
                verdict = check_steers(engine, rival.strong, model.vocabulary)
            except EngineError as error:
                notes[rival.name] = f"not run: {str(error).splitlines()[0]}"
                continue
            checks[rival.name] = verdict.told
            if verdict.steers:
                measured += rival.arms
            else:
                notes[rival.name] = verdict.told
                engines.pop(rival.name).close()
        described = {name: engine.describe() for name, engine in engines.items()}
        yield Fleet(model, engines, tuple(measured), notes, checks, described)


def measure(
    running: Fleet,
    workload: Workload,
    repetitions: int,
    seed: int = 0,
    chosen: Sequence[Arm] | None = None,
) -> Measurement:
    """Times a workload on every arm, ``repetitions`` times after one round that does not count.

    Args:
        running: The engines.
        workload: The workload.
        repetitions: Rounds that count.
        seed: Seed of prompts, steering and orders.
        chosen: The arms; all by default.
    """
    by_name = {arm.name: arm for arm in chosen or running.arms}
    waiting = timed = 0.0

    def run(name: str, rng: random.Random) -> Timing:
        nonlocal waiting, timed
        arm = by_name[name]
        prompts = workload.prompts(running.model.vocabulary, rng)
        extra = arm.steering(workload.requests, rng)
        others = [engine for key, engine in running.engines.items() if key != arm.engine]
        before = sum(engine.cpu_seconds() for engine in others)
        timing = running.engines[arm.engine].run(prompts, extra, workload.answer)
        waiting += sum(engine.cpu_seconds() for engine in others) - before
        timed += timing.seconds
        return timing

    total = (repetitions + 1) * len(by_name)
    with tqdm(total=total, desc=workload.name, unit="run") as bar:
        rounds(list(by_name), run, 1, seed - 1, bar.update)
        times = rounds(list(by_name), run, repetitions, seed, bar.update)
    speeds = [{name: timing.speed for name, timing in one.items()} for one in times]
    work = [{name: t.tokens / t.cpu_seconds for name, t in one.items()} for one in times]
    compared = [name for name in by_name if name != arms.PLAIN]
    return Measurement(
        workload,
        {name: ratio_to(arms.PLAIN, name, speeds) for name in compared},
        {name: ratio_to(arms.PLAIN, name, work) for name in compared},
        {name: statistics.median(one[name] for one in speeds) for name in by_name},
        times,
        waiting / timed,
    )
