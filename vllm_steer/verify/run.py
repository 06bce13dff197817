"""Runs the verification: starts the engines and sends each its requests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions
from typing import Any

from vllm_steer.config import CONFIG_KEY
from vllm_steer.errors import ConfigError, EngineError, SteeringError
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.verify import speed
from vllm_steer.verify.cases import REQUESTS, Case, Directions, cache_pairs, mixed_batch
from vllm_steer.verify.checks import (
    CACHE,
    ISOLATION,
    PARITY,
    Score,
    Step,
    alone,
    ask,
    check_cache,
    check_isolation,
    check_parity,
    long_prompt,
    without_plugin,
)
from vllm_steer.verify.compare import Difference, tolerance
from vllm_steer.verify.engine_calls import Answer, describe_steering, encode, fit_memory
from vllm_steer.verify.process import PLUGINS, EngineProcess, ProcessOptions
from vllm_steer.verify.report import Check, Report, failed, judged, not_checked

START = "start"
PLUGIN = "vllm_steer"
# Default context length of a verified engine; its requests are short.
LONGEST = 2048
# vLLM's default share of an accelerator's memory.
_MEMORY = 0.9
_SHARE = "gpu_memory_utilization"
_ARGUMENT = "additional_config"

# Model, packs and dtype to the reference, which is closed with the context.
Reference = Callable[[str, Sequence[SteeringPack], str], AbstractContextManager[Score]]


@dataclass(frozen=True)
class VerifyJob:
    """A verification job.

    Attributes:
        model: Checkpoint directory or hub id.
        packs: Packs for the model.
        texts: Texts of the prompts.
        engine: Arguments of ``LLM`` besides the model.
        parity: Whether to compare the engine with the reference.
        overhead: Whether to time it.
        least_ratio: Smallest ratio of throughput to plain vLLM; None for no requirement.
    """

    model: str
    packs: tuple[SteeringPack, ...]
    texts: tuple[str, ...]
    engine: Mapping[str, Any]
    parity: bool = True
    overhead: bool = True
    least_ratio: float | None = None

    def __post_init__(self) -> None:
        if _ARGUMENT in self.engine:
            raise ConfigError(f"{_ARGUMENT} is set by verify itself; give other arguments")

    def arguments(self, steered: bool, **more: Any) -> dict[str, Any]:
        """Arguments of ``LLM``, for an engine with steering or for plain vLLM."""
        own = {
            "model": self.model,
            "max_num_seqs": REQUESTS,
            "enable_prefix_caching": True,
            "seed": 0,
        }
        steering = {CONFIG_KEY: {"packs": [str(pack.path) for pack in self.packs]}}
        return own | dict(self.engine) | more | ({_ARGUMENT: steering} if steered else {})

    @property
    def steps(self) -> int:
        """Number of steps of the progress bar."""
        pairs = len(cache_pairs(Directions.of(self.packs)))
        parity = 1 + REQUESTS if self.parity else 0
        return 4 + REQUESTS + pairs + parity + (2 + speed.steps() if self.overhead else 0)


@dataclass(frozen=True)
class _Seen:
    """Results of the steered engine."""

    facts: dict[str, Any]
    cases: list[Case]
    answers: list[Answer]
    singles: dict[str, Difference]
    checks: dict[str, Check]


def verify(job: VerifyJob, reference: Reference, step: Step) -> Report:
    """Runs all checks.

    Args:
        job: The job.
        reference: The reference model.
        step: Called with the name of each next step.

    Raises:
        ConfigError: vLLM is configured not to load the plugin.
    """
    named = os.environ.get(PLUGINS)
    if named is not None and PLUGIN not in named.split(","):
        raise ConfigError(
            f"{PLUGINS} is {named!r}; without {PLUGIN} in it vLLM does not load steering"
        )
    about = {
        "model": job.model,
        "packs": [f"{pack.name} ({pack.origin})" for pack in job.packs],
    }
    try:
        with _engine(job, True, step) as engine:
            seen = _ask_steered(job, engine, step)
    except EngineError as error:
        return _not_started(job, about, str(error), step)
    checks = seen.checks
    if seen.answers:
        checks[ISOLATION] = checks.get(ISOLATION) or _isolation(job, seen, step)
        checks[PARITY] = _parity(job, seen, reference, step)
    checks[speed.OVERHEAD] = _overhead(job, seen, step)
    order = (START, PARITY, ISOLATION, CACHE, speed.OVERHEAD)
    return Report(about | _shown(seen.facts), [checks[name] for name in order])


def _ask_steered(job: VerifyJob, engine: EngineProcess, step: Step) -> _Seen:
    """Runs all requests on the engine with steering."""
    facts = engine.call(describe_steering)
    encoded = engine.call(encode, job.texts)
    cases = mixed_batch(Directions.of(job.packs), encoded[:REQUESTS])
    checks = {START: _start(facts)}
    answers: list[Answer] = []
    singles: dict[str, Difference] = {}
    allowed = tolerance(facts["dtype"], facts["device"])
    try:
        step("a mixed batch")
        answers = ask(engine, cases)
        singles = alone(engine, cases, answers, step)
    except EngineError as error:
        checks[ISOLATION] = failed(ISOLATION, str(error))
        checks.setdefault(PARITY, failed(PARITY, str(error)))
    if not facts["prefix_cache"]:
        checks[CACHE] = not_checked(CACHE, "vLLM runs this model without a prefix cache")
        return _Seen(facts, cases, answers, singles, checks)
    prompt = long_prompt(encoded, facts["block_size"], facts["max_model_len"] - 2 * REQUESTS)
    pairs = cache_pairs(Directions.of(job.packs))
    checks[CACHE] = _guarded(CACHE, lambda: check_cache(engine, pairs, prompt, allowed, step))
    return _Seen(facts, cases, answers, singles, checks)


def _start(facts: dict[str, Any]) -> Check:
    faults = []
    if not facts.get("self_tested"):
        faults.append("the self-test did not run")
    if not facts.get("layers"):
        faults.append("no layer is hooked")
    summary = (
        f"vLLM {facts['vllm']} is {facts['support']}; it has every patched symbol with the known parameters; the "
        f"self-test confirmed that each hooked layer changes the output."
    )
    return judged(START, faults, summary, {"support": facts["support"]})


def _isolation(job: VerifyJob, seen: _Seen, step: Step) -> Check:
    def check() -> Check:
        with _engine(job, False, step) as plain:
            unsteered = without_plugin(plain, seen.cases, seen.answers, step)
        allowed = tolerance(seen.facts["dtype"], seen.facts["device"])
        return check_isolation(seen.singles, unsteered, allowed)

    return _guarded(ISOLATION, check)


def _parity(job: VerifyJob, seen: _Seen, reference: Reference, step: Step) -> Check:
    if not job.parity:
        return not_checked(PARITY, "skipped by --no-parity: nothing was compared with Hugging Face")
    dtype = seen.facts["dtype"]

    def check() -> Check:
        step("loading the Hugging Face model")
        with reference(job.model, job.packs, dtype) as score:
            allowed = tolerance(dtype, seen.facts["device"])
            return check_parity(seen.cases, seen.answers, score, allowed, dtype, step)

    return _guarded(PARITY, check)


def _overhead(job: VerifyJob, seen: _Seen, step: Step) -> Check:
    if not job.overhead:
        return not_checked(speed.OVERHEAD, "skipped by --quick")
    fields: dict[str, Any] = {"enable_prefix_caching": False}
    if seen.facts["device"] != "cpu" or _SHARE in job.engine:
        # Both engines exist at once.
        fields[_SHARE] = job.engine.get(_SHARE, _MEMORY) / 2
    vocabulary = sorted({token for case in seen.cases for token in case.prompt})

    def check() -> Check:
        with ExitStack() as stack:
            try:
                plain, ours = (
                    stack.enter_context(_engine(job, steered, step, pausing=True, **fields))
                    for steered in (False, True)
                )
            except EngineError as error:
                if job.least_ratio is not None:
                    raise
                return not_checked(speed.OVERHEAD, f"two engines do not start together: {error}")
            return speed.check_overhead(
                plain, ours, Directions.of(job.packs), vocabulary, job.least_ratio, step
            )

    return _guarded(speed.OVERHEAD, check)


def _not_started(job: VerifyJob, about: dict[str, Any], reason: str, step: Step) -> Report:
    """The report on whether plain vLLM starts, or steering is to blame."""
    try:
        with _engine(job, False, step) as plain:
            facts = plain.call(describe_steering)
    except EngineError as error:
        return Report(about, [], f"plain vLLM does not start here either: {error}")
    others = (PARITY, ISOLATION, CACHE, speed.OVERHEAD)
    checks = [not_checked(name, "the engine did not start") for name in others]
    return Report(about | _shown(facts), [failed(START, reason), *checks])


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Runs a check; an engine or reference that dies or refuses fails it, with the reason."""
    try:
        return check()
    except SteeringError as error:
        return failed(name, str(error))


@contextmanager
def _engine(
    job: VerifyJob, steered: bool, step: Step, *, pausing: bool = False, **more: Any
) -> Iterator[EngineProcess]:
    name = "vLLM with steering" if steered else "plain vLLM"
    step(f"starting {name}")
    environment = {} if steered else {PLUGINS: _other_plugins()}
    if pausing:
        # One process for front end and engine, so that all of it is suspended while the other is timed.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    arguments = job.arguments(steered, **more)
    options = ProcessOptions(pausing=pausing, prepare=partial(fit_memory, longest=LONGEST))
    engine = EngineProcess(name, arguments, environment, options)
    try:
        yield engine
    finally:
        engine.close()


def _other_plugins() -> str:
    """Names of vLLM's other plugins, including those for device types."""
    given = os.environ.get(PLUGINS)
    names = (
        {
            point.name
            for distribution in distributions()
            for point in distribution.entry_points
            if point.group.startswith("vllm.")
        }
        if given is None
        else set(given.split(","))
    )
    return ",".join(sorted(names - {PLUGIN}))


def _shown(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts at the top of the page."""
    eager = facts["compilation"] in ("NONE", "None", "0")
    shown = {
        "versions": facts["versions"],
        "device": facts["device"],
        "model runner": facts["model_runner"],
        "graphs": "eager"
        if eager
        else f"compiled ({facts['compilation']}), CUDA graphs {facts['cuda_graphs']}",
        "dtype": facts["dtype"],
    }
    return shown | ({"layers hooked": facts["layers"]} if "layers" in facts else {})
