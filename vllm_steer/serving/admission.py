"""A request's steering -> a plan allowed by packs, rows and policy, or HTTP 400."""

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
from vllm_steer.plan.resolve import check_token_ids, resolve
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

# Most directions in a log line; a pack may have thousands.
NAMED_DIRECTIONS = 5


@dataclass(frozen=True)
class Wanted:
    """The steering to apply to a request.

    Attributes:
        request: The steering.
        is_default: Whether it is the server's default, which the client may not know about.
    """

    request: SteeringRequest
    is_default: bool = False


@dataclass(frozen=True, eq=False)
class AdmittedPlan:
    """A plan made by admission; a client cannot send one.

    Attributes:
        wanted: The steering that it was made from.
        receipt: The receipt for the response, which holds the plan.
        recompute: Whether the prompt bypasses the prefix cache.
    """

    wanted: Wanted
    receipt: Receipt
    recompute: bool = False

    @property
    def message(self) -> bytes | None:
        """The plan as sent to the engine; None if it changes and reads nothing."""
        plan = self.receipt.plan
        return encode_plan(plan) if plan.segments or plan.reads else None

    def __deepcopy__(self, memo: dict[int, object]) -> AdmittedPlan:
        """vLLM deep-copies sampling parameters; the receipt must stay the same object."""
        return self


class _Unsteered:
    """Placeholder for a plan: the request is not steered. A client cannot send it."""

    def __deepcopy__(self, memo: dict[int, object]) -> _Unsteered:
        return self


UNSTEERED = _Unsteered()


class Admission:
    """Checks the steering of the requests of one engine."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Loads the packs and the policy of the engine.

        Args:
            vllm_config: The engine's ``VllmConfig``.
        """
        self.config = resolved_config(vllm_config.additional_config)
        # Not shared: packs loaded by one engine of a process are not for another with the same configuration.
        self.store = PackStore(configured_store(self.config).registry) if self.config else None
        self.policy = (
            load_policy(self.config.policy) if self.config and self.config.policy else Policy()
        )
        self._max_len = vllm_config.model_config.max_model_len
        self._dtype = dtype_name(vllm_config.model_config.dtype)
        self._shape = model_shape(vllm_config.model_config)
        self._vocabulary = vllm_config.model_config.get_vocab_size()
        # Running requests by content digest of their directions.
        self.active: Counter[str] = Counter()
        if self.config is not None and self.store is not None:
            self._announce(self.config, self.store.registry)

    def parse(self, extra_args: dict[str, Any] | None) -> SteeringRequest | None:
        """Reads the steering in a request's extra arguments.

        Returns:
            The request, or None without steering.

        Raises:
            VLLMValidationError: It is malformed; becomes HTTP 400.
        """
        with as_http_400():
            return parse(extra_args)

    def check_servable(self, pack: SteeringPack) -> None:
        """Checks that a pack can be loaded into the running engine.

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
        """Returns the median norm of the residual stream, averaged over a read's layers."""
        if self.store is None:
            raise RequestError("an engine without steering has no reads")
        norms = self.store.by_digest(read.digest).norms
        return sum(norms[layer] for layer in read.layers) / len(read.layers)

    def metric_name_of(self, read: Read) -> str:
        """Returns what the metrics call a read: no name that a client has chosen, of which there are ever new ones."""
        pack = self.store.registry.packs.get(read.name.partition("/")[0]) if self.store else None
        sent = pack is None or pack.manifest.method.name == UPLOADED
        return UPLOADED if sent else read.name

    def pin(self, receipt: Receipt) -> None:
        """Adds a running request, whose content stays loaded."""
        self.active.update(list(receipt.names))
        metrics.ACTIVE_DIRECTIONS.set(len(self.active))

    def check_content(self, receipt: Receipt) -> None:
        """Checks that the content of an admitted request is still loaded.

        Raises:
            VLLMValidationError: Its pack was unloaded.
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
        """Removes a request added by :meth:`pin`."""
        self.active.subtract(list(receipt.names))
        self.active += Counter()
        metrics.ACTIVE_DIRECTIONS.set(len(self.active))

    @contextmanager
    def answering(self, http_context: HttpContext) -> Iterator[None]:
        """Lets vLLM answer an HTTP request, and unpins its content afterwards."""
        token = current_http_context.set(http_context)
        try:
            yield
        finally:
            current_http_context.reset(token)
            http_context.ended = True
            for receipt in http_context.receipts:
                self.unpin(receipt)

    def default(self, extra_args: dict[str, Any]) -> SteeringRequest | None:
        """Returns the steering of a request without any, None if it turns off the default."""
        return None if extra_args.get(REQUEST_KEY) == NONE else self.policy.default

    def watch(self) -> SteeringRequest | None:
        """Returns the operator's reads of the current request."""
        return self.policy.watch_of(_key_digest())

    def admit(
        self,
        wanted: Wanted,
        prompt_len: int,
        sampling_params: SamplingParams | None = None,
    ) -> AdmittedPlan:
        """Resolves a request to a plan that the policy allows.

        Args:
            wanted: The steering.
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
            # The operator's reads need no permission of the client.
            alone = wanted.request is watch
            check = None if alone else partial(self._check_allowed, key_digest)
            sees = partial(self.policy.sees, key_digest)
            bound = bind(wanted.request, registry, check, sees=sees)
            check_token_ids(bound, self._vocabulary)
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
        """Reports the available directions in metrics and log."""
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
                f"the scales could not be reduced, since that does not weaken op clamp, rotate and angle"
            )
        # Rounding may leave it slightly above.
        return LimitedPlan(weaker, min(limit, relative_dose(weaker, registry)), limit / dose)


def _key_digest() -> str | None:
    """SHA-256 of the API key of the current request; None without one."""
    http_context = current_http_context.get()
    return http_context.key_digest if http_context is not None else None


def _check_reached(
    plan: SteeringPlan, prompt_len: int, sampling_params: SamplingParams | None
) -> None:
    """Raises RequestError if a plan steers, or a read covers, no token that goes through the model."""
    longest = getattr(sampling_params, "max_tokens", None)
    if longest is None:
        return
    # The last token of an answer does not go through the model.
    tokens = prompt_len + max(0, longest - 1)
    for number, read in enumerate(plan.reads):
        if all(start >= tokens for start, _ in read.ranges):
            raise RequestError(
                f"{REQUEST_KEY}.read.{number}.at: no token is read: of a prompt of {prompt_len} tokens and an answer of at "
                f"most {longest}, {tokens} go through the model, and all positions come later; raise max_tokens"
            )
    if plan.segments and not count_steered(plan, tokens):
        raise RequestError(
            f"{REQUEST_KEY}.positions: no token would be steered: the prompt has {prompt_len} tokens and the answer at "
            f"most {longest}, so the model reads {tokens}, and all positions come later; steer 'all' or 'prompt', or "
            f"raise max_tokens"
        )


def announce_pack(pack: SteeringPack) -> None:
    """Reports a loaded pack in metrics and log, with its directions that do not steer."""
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
            "inspect` shows their calibration",
        )


_ADMISSION = Attached[Admission]("admission")
_current: Admission | None = None


def admission_of(processor: InputProcessor) -> Admission:
    """Returns the admission of an engine, from its input processor."""
    admission = _ADMISSION.get(processor)
    if admission is None:
        raise RuntimeError("the engine's input processor was made before vllm-steer was loaded")
    return admission


def current_admission() -> Admission | None:
    """Returns the admission of this process's engine; None before there is one."""
    return _current


def remember_engine(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``InputProcessor.__init__`` to give each engine's front end its admission."""

    def __init__(
        self: InputProcessor, vllm_config: VllmConfig, *args: object, **kwargs: object
    ) -> None:
        global _current
        original(self, vllm_config, *args, **kwargs)
        # A server process has one engine; its HTTP models have no reference to it and use this.
        _current = _ADMISSION.set(self, Admission(vllm_config))

    return __init__
