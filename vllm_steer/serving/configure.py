"""Validates the user's configuration against the model and completes it: ``additional_config["steering"]``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from vllm.usage.usage_lib import UsageContext

from vllm_steer import log
from vllm_steer.config import (
    CONFIG_KEY,
    GRAPH_REVISION,
    ResolvedConfig,
    SteeringConfig,
    parse_config,
    plugin_version,
)
from vllm_steer.errors import ConfigError, PackError, RequestError
from vllm_steer.packs.hub import hub_snapshot, resolve_pack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.packs.store import keep_store
from vllm_steer.plan.binding import bind
from vllm_steer.plan.resolve import resolve
from vllm_steer.serving.compatibility import refuse_unread, refuse_unsupported
from vllm_steer.serving.policy import load_policy
from vllm_steer.vllm_compat.model_shape import model_shape

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# Length of a prompt that has every position a policy may name.
_LONG_PROMPT = 2**30
# Number of uploads of the largest size that fit into the default total.
_UPLOADS = 8


def resolve_packs(sources: Iterable[str], field: str) -> list[str]:
    """Returns the absolute directory of each pack; packs on the hub are fetched and logged.

    Args:
        sources: Directories or hub repositories.
        field: The user's field for them, for messages.
    """
    paths = []
    for source in sources:
        try:
            path = resolve_pack(source)
        except PackError as error:
            raise PackError(f"{field}: {error}") from error
        paths.append(str(path))
        if (snapshot := hub_snapshot(path)) is not None:
            log.PACK_FETCHED.write(source=source, snapshot=str(snapshot))
    return paths


def resolve_config(original: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
    """Wraps ``EngineArgs.create_engine_config`` to check the configuration against the model."""

    def create_engine_config(
        self: EngineArgs, usage_context: UsageContext | None = None, **kwargs: object
    ) -> VllmConfig:
        vllm_config = original(self, usage_context, **kwargs)
        given = vllm_config.additional_config
        value = given.get(CONFIG_KEY) if isinstance(given, dict) else None
        if not isinstance(given, dict) or value is None:
            return vllm_config
        refuse_unsupported(vllm_config)
        # Only the OpenAI API server queues requests for rows.
        queued = usage_context == UsageContext.OPENAI_API_SERVER
        config = parse_config(value)
        if config.playground and not queued:
            raise ConfigError(
                f"additional_config.{CONFIG_KEY}.playground: only vllm serve has the playground; remove it"
            )
        if config.reads:
            refuse_unread(vllm_config)
        resolved = _resolve(config, vllm_config, queued)
        # A new dict: the user may use theirs for several engines.
        vllm_config.additional_config = {
            **given,
            CONFIG_KEY: resolved.model_dump(),
        }
        return vllm_config

    return create_engine_config


def _resolve(config: SteeringConfig, vllm_config: VllmConfig, queued: bool) -> ResolvedConfig:
    packs = resolve_packs(config.packs, f"additional_config.{CONFIG_KEY}.packs")
    registry = PackRegistry.load(packs)
    shape = model_shape(vllm_config.model_config)
    registry.check_model(**shape)
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    rows = 2 * max_num_seqs + 1 if config.rows is None else config.rows
    servers = max(1, getattr(vllm_config.parallel_config, "_api_process_count", 1))
    sums = (rows - 1) // (servers if queued else max_num_seqs)
    if sums < 1:
        raise ConfigError(
            f"steering rows {rows} are fewer than "
            + (
                f"one for each of {servers} API servers and one of zeros; raise --steering-rows"
                if queued
                else f"max_num_seqs + 1 = {max_num_seqs + 1}, so a step could need more combinations than there are "
                f"rows; raise --steering-rows or lower --max-num-seqs"
            )
        )
    resolved = ResolvedConfig(
        packs=packs,
        rows=rows,
        policy=_policy_path(config, registry),
        pack_roots=_pack_roots(config, servers),
        wait_seconds=config.wait_seconds,
        upload_mib=_upload_mib(config, servers),
        upload_total_mib=_upload_total_mib(config),
        upload_count=config.upload_count,
        sums_per_request=sums,
        queued=queued,
        reads=config.reads,
        playground=config.playground,
        read_rows=config.reads * max_num_seqs + 1,
        layers=_layers(config, registry, shape["num_layers"]),
        ops=config.ops,
        rank=config.rank,
        multiply=config.multiply,
        digests=[pack.manifest.tensors.sha256 for pack in registry.packs.values()],
        version=plugin_version(),
        graph_revision=GRAPH_REVISION,
    )
    if servers == 1:
        # Only if this process is the front end; one that only starts others does not need the vectors.
        keep_store(resolved, registry)
    return resolved


def _policy_path(config: SteeringConfig, registry: PackRegistry) -> str | None:
    """Absolute path of the policy, after checking that all its names exist, and are calibrated if given a
    strength.

    Its reads must be possible too, since otherwise every request would be refused.
    """
    if config.policy is None:
        return None
    path = os.path.abspath(os.path.expanduser(config.policy))
    try:
        policy = load_policy(path)
        policy.check(registry)
        for field, request in policy.steerings().items():
            count = len({(read.name, read.when) for read in request.read})
            if count > config.reads:
                raise ConfigError(
                    f"--steering-policy: {path}: {field} reads {count} probes; start with at least --steering-reads {count}"
                )
        for key, request in policy.watch.items():
            resolve(bind(request, registry, where=f"watch.{key}"), _LONG_PROMPT)
    except RequestError as error:
        raise ConfigError(f"--steering-policy: {path}: {error}") from None
    return path


def _layers(config: SteeringConfig, registry: PackRegistry, num_layers: int) -> list[int]:
    """The layers to hook, ascending."""
    if config.layers is None:
        return registry.layers
    layers = sorted(set(config.layers))
    if layers[-1] >= num_layers:
        raise ConfigError(
            f"--steering-layers: {layers[-1]} is not a layer of the model, which has 0 to {num_layers - 1}"
        )
    missing = sorted(set(registry.layers) - set(layers))
    if missing:
        raise ConfigError(
            f"--steering-layers: the packs have vectors for layers {missing} too; add them"
        )
    return layers


def _upload_mib(config: SteeringConfig, servers: int) -> int | None:
    if config.upload_mib is not None and servers > 1:
        raise ConfigError(
            f"--steering-upload-mib: {servers} API servers would not share vectors; start only one, with "
            f"--api-server-count 1"
        )
    return config.upload_mib


def _upload_total_mib(config: SteeringConfig) -> int | None:
    if config.upload_mib is None:
        given = [f for f in ("upload_total_mib", "upload_count") if f in config.model_fields_set]
        if given:
            flags = ", ".join(f"--steering-{field.replace('_', '-')}" for field in given)
            raise ConfigError(f"{flags}: needs --steering-upload-mib")
        return None
    total = config.upload_total_mib or _UPLOADS * config.upload_mib
    if total < config.upload_mib:
        raise ConfigError(
            f"--steering-upload-total-mib: {total} is less than the size of one upload, --steering-upload-mib "
            f"{config.upload_mib}"
        )
    return total


def _pack_roots(config: SteeringConfig, servers: int) -> list[str] | None:
    """Absolute paths of the directories from which packs may be loaded."""
    if config.pack_roots is None:
        return None
    if servers > 1:
        raise ConfigError(
            f"--steering-pack-roots: {servers} API servers would not share packs; start only one, with "
            f"--api-server-count 1"
        )
    roots = [os.path.abspath(os.path.expanduser(root)) for root in config.pack_roots]
    for root in roots:
        if not os.path.isdir(root):
            raise ConfigError(f"--steering-pack-roots: {root} is not a directory")
    return roots
