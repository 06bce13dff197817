"""A request's steering -> a plan that the packs, the rows and the policy allow, or HTTP 400."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm_steer import log
from vllm_steer.config import ResolvedConfig, resolved_config
from vllm_steer.errors import (
    ConflictError,
    DoseError,
    NotAllowedError,
    PackError,
    RequestError,
)
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import UPLOADED, PackRegistry
from vllm_steer.packs.store import PackStore, configured_store
from vllm_steer.plan.binding import bind
from vllm_steer.plan.bounds import check_distance
from vllm_steer.plan.capacity import check_capacity
from vllm_steer.plan.dose import relative_dose, scaled
from vllm_steer.plan.message import encode_plan
from vllm_steer.plan.reads import Read, check_reads
from vllm_steer.plan.resolve import resolve
from vllm_steer.plan.steering_plan import SteeringPlan, count_steered
from vllm_steer.plan.strength import strengths_of
from vllm_steer.request.schema import (
    NONE,
    REQUEST_KEY,
    SteeringRequest,
    parse,
)
from vllm_steer.serving import metrics
from vllm_steer.serving.http_context import HttpContext, current_http_context
from vllm_steer.serving.policy import Policy, load_policy
from vllm_steer.serving.receipt import LimitedPlan, Receipt
from vllm_steer.serving.refusals import as_http_400
from vllm_steer.vllm_compat.attached import Attached
from vllm_steer.vllm_compat.model_shape import dtype_name, model_shape

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

# Most directions that a line of the log names; a pack may have thousands.
NAMED_DIRECTIONS = 5


@dataclass(frozen=True)
class Wanted:
    """What a request is to be steered by.

    Attributes:
        request: The steering.
        is_default: Whether it is the server's default, which the client may not know of.
    """

    request: SteeringRequest
    is_default: bool = False


@dataclass(frozen=True, eq=False)
class AdmittedPlan:
    """A plan that admission made; a client cannot send one.

    Attributes:
        wanted: What it was made from.
        receipt: What was decided, for the response; it has the plan.
        recompute: Whether the prefix cache is left out for the prompt.
    """

    wanted: Wanted
    receipt: Receipt
    recompute: bool = False

    @property
    def message(self) -> bytes | None:
        """The plan as it travels to the engine; None where it changes and reads nothing."""
        plan = self.receipt.plan
        return encode_plan(plan) if plan.segments or plan.reads else None

    def __deepcopy__(self, memo: dict[int, object]) -> AdmittedPlan:
        """vLLM copies sampling parameters deeply; the receipt has to stay the one."""
        return self


class _Unsteered:
    """In the place of a plan: it was decided that a request is not steered. A client cannot send it."""

    def __deepcopy__(self, memo: dict[int, object]) -> _Unsteered:
        return self


UNSTEERED = _Unsteered()


class Admission:
    """Checks the steering of the requests of one engine."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Loads the packs and the policy that the engine was started with.

        Args:
            vllm_config: The engine's ``VllmConfig``.
        """
        self.config = resolved_config(vllm_config.additional_config)
        # Its own: what one engine of a process loads is not for another that was started alike.
        self.store = PackStore(configured_store(self.config).registry) if self.config else None
        self.policy = (
            load_policy(self.config.policy) if self.config and self.config.policy else Policy()
        )
        self._max_len = vllm_config.model_config.max_model_len
        self._dtype = dtype_name(vllm_config.model_config.dtype)
        self._shape = model_shape(vllm_config.model_config)
        # Requests under way by content digest of the directions that they use.
        self.active: Counter[str] = Counter()
        if self.config is not None and self.store is not None:
            self._announce(self.config, self.store.registry)

    def parse(self, extra_args: dict[str, Any] | None) -> SteeringRequest | None:
        """Reads the steering in a request's extra arguments.

        Returns:
            The request, or None when it asks for none.

        Raises:
            VLLMValidationError: It is malformed; becomes HTTP 400.
        """
        with as_http_400():
            return parse(extra_args)

    def check_servable(self, pack: SteeringPack) -> None:
        """Checks a pack that is to be loaded against the engine that runs.

        Raises:
            PackError: It was made for another model, or steers layers that are not hooked.
        """
        registry = PackRegistry([pack])
        registry.check_model(**self._shape)
        hooked = self.config.layers if self.config else []
        others = [layer for layer in registry.layers if layer not in hooked]
        if others:
            raise PackError(
                f"steering pack {pack.name!r} has vectors for layers {others}, but this server steers only {hooked}; "
                f"add them to --steering-layers and restart"
            )

    def unit_of(self, read: Read) -> float:
        """Returns the median norm of the residual stream that a read looks at, the mean over its layers."""
        if self.store is None:
            raise RequestError("an engine without steering reads nothing")
        norms = self.store.by_digest(read.digest).norms
        return sum(norms[layer] for layer in read.layers) / len(read.layers)

    def metric_name_of(self, read: Read) -> str:
        """Returns what the metrics call a read: no name that a client has chosen, of which there are ever new ones."""
        pack = self.store.registry.packs.get(read.name.partition("/")[0]) if self.store else None
        sent = pack is None or pack.manifest.method.name == UPLOADED
        return UPLOADED if sent else read.name

    def pin(self, receipt: Receipt) -> None:
        """Counts a request in; the content that it uses stays loaded."""
        self.active.update(list(receipt.names))
        metrics.ACTIVE_DIRECTIONS.set(len(self.active))

    def check_content(self, receipt: Receipt) -> None:
        """Checks that what a request was admitted with is still there.

        Raises:
            VLLMValidationError: Its pack was unloaded meanwhile.
        """
        with as_http_400():
            for digest, name in receipt.names.items():
                try:
                    if self.store is not None:
                        self.store.by_digest(digest)
                except PackError:
                    raise ConflictError(
                        f"{REQUEST_KEY}.directions: {name!r} was unloaded before the request ran; send it again"
                    ) from None

    def unpin(self, receipt: Receipt) -> None:
        """Counts it out again."""
        self.active.subtract(list(receipt.names))
        self.active += Counter()
        metrics.ACTIVE_DIRECTIONS.set(len(self.active))

    @contextmanager
    def answering(self, http_context: HttpContext) -> Iterator[None]:
        """Lets vLLM answer an HTTP request, and counts out what it was admitted with."""
        token = current_http_context.set(http_context)
        try:
            yield
        finally:
            current_http_context.reset(token)
            http_context.ended = True
            for receipt in http_context.receipts:
                self.unpin(receipt)

    def default(self, extra_args: dict[str, Any]) -> SteeringRequest | None:
        """Returns the steering of a request that names none, None where it declines the default."""
        return None if extra_args.get(REQUEST_KEY) == NONE else self.policy.default

    def watch(self) -> SteeringRequest | None:
        """Returns what the operator reads of the request that is being handled."""
        return self.policy.watch_of(_key_digest())

    def admit(
        self,
        wanted: Wanted,
        prompt_len: int,
        sampling_params: SamplingParams | None = None,
    ) -> AdmittedPlan:
        """Turns a request into a plan of absolute positions that the policy allows.

        Args:
            wanted: What it is to be steered by.
            prompt_len: Tokens of the prompt.
            sampling_params: Its ``SamplingParams``; None for one answer of any length.

        Returns:
            The plan with its receipt.

        Raises:
            VLLMValidationError: It cannot be carried out; becomes HTTP 400.
        """
        with as_http_400():
            if self.config is None or self.store is None:
                raise RequestError(
                    "this engine was started without steering; start it with --enable-steering --steering-packs DIR"
                )
            registry, key_digest = self.store.registry, _key_digest()
            watch = self.watch()
            # What the operator reads is not the client's to be allowed.
            alone = wanted.request is watch
            check = None if alone else partial(self._check_allowed, key_digest)
            sees = partial(self.policy.sees, key_digest)
            bound = bind(wanted.request, registry, check, sees=sees)
            plan = resolve(bound, prompt_len, self._max_len)
            check_capacity(plan, self.config)
            limited = self._limit_dose(plan, registry)
            plan = limited.plan
            check_distance(plan, registry, self._dtype)
            if not wanted.is_default:
                _check_reached(plan, prompt_len, sampling_params)
            strengths, names, own = strengths_of(bound, plan), bound.names, len(plan.reads)
            if watch is not None and not alone:
                others = bind(watch, registry, where="watch")
                plan = plan.watched(resolve(others, prompt_len, self._max_len))
                names = others.names | names
            check_reads(plan.reads, self.config)
        answers = getattr(sampling_params, "n", None) or 1
        limited = limited._replace(plan=plan)
        receipt = Receipt.of(limited, names, prompt_len, answers, strengths)
        receipt.own_reads, receipt.silent = 0 if alone else own, alone
        recompute = wanted.request.recompute or (watch is not None and watch.recompute)
        return AdmittedPlan(wanted, receipt, recompute)

    def _announce(self, config: ResolvedConfig, registry: PackRegistry) -> None:
        """Says in metrics and log what requests can use."""
        packs, policy = registry.packs, self.policy
        log.STARTED.write(
            packs={name: pack.manifest.tensors.sha256 for name, pack in packs.items()},
            directions=sum(len(pack.directions) for pack in packs.values()),
            layers=config.layers,
            ops=config.ops,
            rows=config.rows,
            policy={
                "aliases": sorted(policy.aliases),
                "default": policy.default is not None,
                "max_dose": policy.max_dose,
                "dose_action": policy.dose_action,
                "keys": None if policy.keys is None else len(policy.keys),
                "watch": len(policy.watch),
            },
        )
        for pack in packs.values():
            announce_pack(pack)

    def _check_allowed(self, key_digest: str | None, field: str, name: str, full_name: str) -> None:
        if not self.policy.allows(key_digest, full_name):
            raise NotAllowedError(
                f"{field}: this API key is not allowed to use {name!r}; ask the server's operator for access"
            )

    def _limit_dose(self, plan: SteeringPlan, registry: PackRegistry) -> LimitedPlan:
        dose, limit = relative_dose(plan, registry), self.policy.max_dose
        if limit is None or dose <= limit:
            return LimitedPlan(plan, dose)
        if self.policy.dose_action == "reject":
            raise DoseError(
                f"{REQUEST_KEY}.directions: their total dose is {dose:.4g}, and this server allows at most {limit:g}; "
                f"multiply the scales by {limit / dose:.3g}"
            )
        weaker = scaled(plan, limit / dose)
        if weaker is None:
            raise DoseError(
                f"{REQUEST_KEY}.directions: their total dose is {dose:.4g}, and this server allows at most {limit:g}; "
                f"the scales could not be reduced, since op clamp, rotate and angle do not get weaker that way"
            )
        # Rounding may leave it a little above.
        return LimitedPlan(weaker, min(limit, relative_dose(weaker, registry)), limit / dose)


def _key_digest() -> str | None:
    """SHA-256 of the API key of the request that is being handled; None without one."""
    http_context = current_http_context.get()
    return http_context.key_digest if http_context is not None else None


def _check_reached(
    plan: SteeringPlan, prompt_len: int, sampling_params: SamplingParams | None
) -> None:
    """Raises RequestError where a plan steers no token that goes through the model, or a read finds none."""
    longest = getattr(sampling_params, "max_tokens", None)
    if longest is None:
        return
    # The last token of an answer goes through no model.
    tokens = prompt_len + max(0, longest - 1)
    for number, read in enumerate(plan.reads):
        if all(start >= tokens for start, _ in read.ranges):
            raise RequestError(
                f"{REQUEST_KEY}.read.{number}.at: no token is read: of a prompt of {prompt_len} tokens and an answer of at "
                f"most {longest}, {tokens} go through the model, and all positions come later; let it answer more tokens"
            )
    if plan.segments and not count_steered(plan, tokens):
        raise RequestError(
            f"{REQUEST_KEY}.positions: no token would be steered: the prompt has {prompt_len} tokens and the answer at "
            f"most {longest}, so the model reads {tokens}, and all positions come later; steer 'all' or 'prompt', or "
            f"raise max_tokens"
        )


def announce_pack(pack: SteeringPack) -> None:
    """Says in metrics and log what a pack that was loaded has, and which of it does not steer."""
    metrics.DIRECTIONS.labels(pack.name).set(len(pack.directions))
    idle = [
        name
        for name, record in pack.directions.items()
        if record.calibration is not None and not record.calibration.steers
    ]
    if idle:
        log.DIRECTIONS_DO_NOT_STEER.write(
            name=pack.name,
            count=len(idle),
            directions=idle[:NAMED_DIRECTIONS],
            advice="learn them by another method or from other prompts, or leave them out of the pack; `vllm-steer "
            "inspect` shows what their calibration found",
        )


_ADMISSION = Attached[Admission]("admission")
_current: Admission | None = None


def admission_of(processor: InputProcessor) -> Admission:
    """Returns the admission of an engine, whose input processor has it."""
    admission = _ADMISSION.get(processor)
    if admission is None:
        raise RuntimeError("the engine's input processor was made before vllm-steer was loaded")
    return admission


def current_admission() -> Admission | None:
    """Returns the admission of this process's engine; None before it has one."""
    return _current


def remember_engine(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``InputProcessor.__init__`` to give each engine's front end its admission."""

    def __init__(
        self: InputProcessor, vllm_config: VllmConfig, *args: object, **kwargs: object
    ) -> None:
        global _current
        original(self, vllm_config, *args, **kwargs)
        # A server process has one engine; its HTTP models know of no engine and ask here.
        _current = _ADMISSION.set(self, Admission(vllm_config))

    return __init__
