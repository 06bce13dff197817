"""Plain vLLM, the plugin and the rivals side by side on one model, and a workload on all of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import arms
from benchmarks.arms import Arm, Workload
from benchmarks.engine import describe, start_engine
from benchmarks.models import BenchModel, write_pack
from benchmarks.rivals import NOT_RUN, Rival, install_hotwire
from benchmarks.steers import check_steers
from vllm_steer.errors import EngineError
from vllm_steer.verify.engine_calls import Timing, time_batch
from vllm_steer.verify.interleave import Ratio, ratio_to, rounds
from vllm_steer.verify.process import EngineProcess

PLAIN_ARM = Arm(arms.PLAIN, arms.PLAIN, arms.unsteered)
CONTROL_ARM = Arm(arms.CONTROL, arms.CONTROL, arms.unsteered)
STRONG_ARM = Arm("strong", arms.PLUGIN, arms.strongly_steered)
STEERING_ARGUMENT = "additional_config"
NO_PLUGIN = {"VLLM_PLUGINS": ""}
PLUGIN_ENVIRONMENT = {"VLLM_PLUGINS": "vllm_steer"}
# The part of a core that an engine may use while others are timed, before the figures are doubted.
WAITING_LIMIT = 0.02


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
    engines: dict[str, EngineProcess]
    arms: tuple[Arm, ...]
    notes: dict[str, str]
    checks: dict[str, str]
    described: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Rounds:
    """Timings of a workload on the engines of one start.

    Attributes:
        times: By arm, of each round.
        waiting_share: The part of a core that waiting engines used while others were timed.
    """

    times: list[dict[str, Timing]]
    waiting_share: float


@dataclass(frozen=True)
class Measurement:
    """A workload on every arm, on the engines of one start or of several.

    Two processes of the same engine may differ by a percent or two for as long as they live, by how
    their memory happens to lie, so plain vLLM is the mean of two where there is a control, and
    several starts tell more than many rounds.

    Attributes:
        workload: The workload.
        starts: What each start showed.
    """

    workload: Workload
    starts: list[Rounds]

    @property
    def times(self) -> list[dict[str, Timing]]:
        """The rounds of all starts."""
        return [one for start in self.starts for one in start.times]

    @property
    def ratios(self) -> dict[str, Ratio]:
        """Ratio of each arm's tokens a second to plain vLLM's."""
        return _ratios(self.times, lambda timing: timing.speed)

    @property
    def speeds(self) -> dict[str, float]:
        """Median tokens a second by arm."""
        return {
            name: statistics.median(one[name].speed for one in self.times) for name in self.times[0]
        }

    @property
    def waiting_share(self) -> float:
        """The part of a core that waiting engines used, of the worst start."""
        return max(start.waiting_share for start in self.starts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``cpu_ratios`` are of tokens by processor second, which others disturb less."""
        cpu = _ratios(self.times, lambda timing: timing.tokens / timing.cpu_seconds)
        by_start = [_ratios(start.times, lambda timing: timing.speed) for start in self.starts]
        return {
            "workload": asdict(self.workload),
            "ratios": {name: ratio.as_dict() for name, ratio in self.ratios.items()},
            "cpu_ratios": {name: ratio.as_dict() for name, ratio in cpu.items()},
            "ratios_by_start": [
                {name: ratio.as_dict() for name, ratio in ratios.items()} for ratios in by_start
            ],
            "tokens_per_second": {name: round(speed, 1) for name, speed in self.speeds.items()},
            "waiting_share": round(self.waiting_share, 4),
            "times": [{name: asdict(timing) for name, timing in one.items()} for one in self.times],
        }


def _ratios(
    times: Sequence[Mapping[str, Timing]], figure: Callable[[Timing], float]
) -> dict[str, Ratio]:
    """Ratio of each arm to plain vLLM, or to both plain engines; of the control to the other one."""
    figures = [{name: figure(timing) for name, timing in one.items()} for one in times]
    plain = [name for name in (arms.PLAIN, arms.CONTROL) if name in times[0]]
    return {
        name: ratio_to([arms.PLAIN] if name == arms.CONTROL else plain, name, figures)
        for name in times[0]
        if name != arms.PLAIN
    }


def engine_arguments(
    model: BenchModel, folder: Path, settings: Mapping[str, Any], requests: int
) -> dict[str, Any]:
    """Arguments of ``LLM`` for the plugin; without :data:`STEERING_ARGUMENT`, for plain vLLM.

    Args:
        model: The model.
        folder: For the pack.
        settings: Arguments beside the model.
        requests: Most requests of a batch.
    """
    pack = write_pack(model, folder, arms.DIRECTIONS)
    return {
        "model": str(model.path),
        "load_format": model.load_format,
        "max_num_seqs": requests,
        "seed": 0,
        **settings,
        STEERING_ARGUMENT: {"steering": {"packs": [str(pack.path)]}},
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
    variants: Sequence[str] = (),
    seed: int = 0,
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
        variants: Keys of :data:`benchmarks.arms.VARIANTS` to start as well.
        seed: Seed of the order in which engines start.

    Raises:
        EngineError: Plain vLLM or the plugin does not start, or the plugin does not steer.
    """
    steering = engine_arguments(model, folder, settings, requests)
    arguments = {key: value for key, value in steering.items() if key != STEERING_ARGUMENT}
    also = {name: arms.variant(name, model.identity.num_layers) for name in variants}
    notes: dict[str, str] = {}
    found: list[Rival] = []
    if rivals:
        notes |= NOT_RUN
        try:
            found.append(
                install_hotwire(folder, write_pack(model, folder, arms.DIRECTIONS), requests)
            )
        except RuntimeError as error:
            notes["hotwire"] = f"not run: {error}"
    with (
        ExitStack() as stack,
        tqdm(total=2 + control + len(variants) + len(found), desc="engines") as bar,
    ):
        engines: dict[str, EngineProcess] = {}

        def start(
            name: str, given: Mapping[str, Any], env: Mapping[str, str], path: Sequence[Path] = ()
        ) -> EngineProcess:
            bar.set_postfix_str(name)
            engine = start_engine(name, given, {**environment, **env}, path)
            stack.callback(engine.close)
            engines[name] = engine
            bar.update()
            return engine

        own = {arms.PLAIN: (arguments, NO_PLUGIN), arms.PLUGIN: (steering, PLUGIN_ENVIRONMENT)}
        if control:
            own[arms.CONTROL] = (arguments, NO_PLUGIN)
        for name in also:
            given = steering[STEERING_ARGUMENT]["steering"] | also[name].steering
            own[name] = (
                {**steering, STEERING_ARGUMENT: {"steering": given}},
                PLUGIN_ENVIRONMENT,
            )
        # In an order of its own each time: the engine that starts first is not quite like the others.
        for name in random.Random(seed).sample(list(own), len(own)):
            start(name, *own[name])
        verdict = check_steers(engines[arms.PLUGIN], STRONG_ARM, model.vocabulary)
        if not verdict.steers:
            raise EngineError(f"the plugin {verdict.told}")
        checks, measured = {arms.PLUGIN: verdict.told}, [PLAIN_ARM, *arms.PLUGIN_ARMS]
        if control:
            measured.append(CONTROL_ARM)
        for name in also:
            measured += also[name].arms
        for rival in found:
            try:
                engine = start(rival.name, arguments, rival.environment, [rival.path])
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
        described = {name: engine.call(describe) for name, engine in engines.items()}
        yield Fleet(model, engines, tuple(measured), notes, checks, described)


def measure(running: Fleet, workload: Workload, repetitions: int, seed: int = 0) -> Rounds:
    """Times a workload on every arm, ``repetitions`` times after one round that does not count.

    Args:
        running: The engines.
        workload: The workload.
        repetitions: Rounds that count.
        seed: Seed of prompts, steering and orders.
    """
    by_name = {arm.name: arm for arm in running.arms}
    waiting = timed = 0.0

    def run(name: str, rng: random.Random) -> Timing:
        nonlocal waiting, timed
        arm = by_name[name]
        prompts = workload.prompts(running.model.vocabulary, rng)
        extra = arm.steering(workload.requests, rng)
        others = [engine for key, engine in running.engines.items() if key != arm.engine]
        before = sum(engine.cpu_seconds() for engine in others)
        timing = running.engines[arm.engine].call(time_batch, prompts, extra, workload.answer)
        waiting += sum(engine.cpu_seconds() for engine in others) - before
        timed += timing.seconds
        return timing

    with tqdm(total=(repetitions + 1) * len(by_name), desc=workload.name, unit="run") as bar:
        rounds(list(by_name), run, 1, seed - 1, bar.update)
        times = rounds(list(by_name), run, repetitions, seed, bar.update)
    return Rounds(times, waiting / timed)
