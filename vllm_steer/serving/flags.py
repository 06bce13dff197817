"""``--enable-steering`` and its companions <-> ``additional_config["steering"]``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from vllm.usage.usage_lib import UsageContext

from vllm_steer.config import (
    CONFIG_KEY,
    GRAPH_REVISION,
    ResolvedConfig,
    SteeringConfig,
    parse_config,
    plugin_version,
)
from vllm_steer.errors import ConfigError, UnknownDirectionError
from vllm_steer.model import model_shape
from vllm_steer.policy import load_policy
from vllm_steer.registry import PackRegistry
from vllm_steer.serving.compatibility import refuse_unsupported


def add_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``EngineArgs.add_cli_args`` so that every vLLM command has the steering flags."""

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(
            title="SteeringConfig",
            # vLLM's short help shows a group's description alone, so the flags stand in it.
            description="Per-request steering of the residual stream (vllm-steer): "
            "--enable-steering, --steering-packs DIR ..., --steering-rows N, --steering-layers N ..., "
            "--steering-policy FILE, --steering-pack-roots DIR ....",
        )
        group.add_argument(
            "--enable-steering",
            action="store_true",
            default=False,
            help="Let requests steer the model with the directions of the packs given by --steering-packs.",
        )
        group.add_argument(
            "--steering-packs",
            nargs="+",
            metavar="DIR",
            default=None,
            help="Directories of the steering packs to load.",
        )
        group.add_argument(
            "--steering-rows",
            type=int,
            default=None,
            help="Distinct combinations of directions that can be active at once, and one row of zeros. A server lets "
            "requests wait while there is no room; in LLM(...) each of max_num_seqs requests may use an equal share. "
            "Default: 2 * max_num_seqs + 1.",
        )
        group.add_argument(
            "--steering-layers",
            nargs="+",
            type=int,
            metavar="N",
            default=None,
            help="Layers that can be steered, 0-based block outputs. Default: those of the packs. Packs that are loaded "
            "later can have no others.",
        )
        group.add_argument(
            "--steering-pack-roots",
            nargs="+",
            metavar="DIR",
            default=None,
            help="Directories that packs may be loaded from, by name, while the server runs: POST /v1/steering/packs. "
            "Off by default.",
        )
        group.add_argument(
            "--steering-policy",
            metavar="FILE",
            default=None,
            help="JSON file with aliases, a default steering, a limit of the dose, and what each API key may use.",
        )
        return parser

    return add_cli_args


def read_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``EngineArgs.from_cli_args`` to write the flags into ``additional_config``."""

    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        _move_flags(args)
        return original(cls, args)

    return from_cli_args


def _move_flags(args: argparse.Namespace) -> None:
    """Moves the flags into ``args.additional_config``.

    Where several API servers run, each reads the same arguments again, before its plugins are
    loaded: it knows ``additional_config`` but none of our flags.
    """
    config = {
        field: value
        for field in SteeringConfig.model_fields
        if (value := getattr(args, f"steering_{field}", None)) is not None
    }
    if not getattr(args, "enable_steering", False):
        if config:
            flags = ", ".join(f"--steering-{field.replace('_', '-')}" for field in config)
            raise ConfigError(f"{flags}: needs --enable-steering")
        return
    if not config.get("packs"):
        raise ConfigError("--enable-steering needs --steering-packs DIR [DIR ...]")
    given = getattr(args, "additional_config", None) or {}
    if CONFIG_KEY in given:
        raise ConfigError(
            f"give steering by flags or in --additional-config {CONFIG_KEY!r}, not both"
        )
    args.additional_config = {**given, CONFIG_KEY: config}
    args.enable_steering = False
    for field in config:
        setattr(args, f"steering_{field}", None)


def resolve_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``EngineArgs.create_engine_config`` to check the configuration against the model."""

    def create_engine_config(self: Any, usage_context: Any = None, **kwargs: Any) -> Any:
        vllm_config = original(self, usage_context, **kwargs)
        value = (vllm_config.additional_config or {}).get(CONFIG_KEY)
        if value is None:
            return vllm_config
        refuse_unsupported(vllm_config)
        # Only the server of the OpenAI API lets requests wait for rows.
        gated = usage_context == UsageContext.OPENAI_API_SERVER
        resolved = _resolve(parse_config(value), vllm_config, gated)
        # A new dict: the user's may serve for several engines.
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            CONFIG_KEY: resolved.model_dump(),
        }
        return vllm_config

    return create_engine_config


def _resolve(config: SteeringConfig, vllm_config: Any, gated: bool) -> ResolvedConfig:
    packs = [os.path.abspath(os.path.expanduser(path)) for path in config.packs]
    registry = PackRegistry.load(packs)
    shape = model_shape(vllm_config.model_config)
    registry.check_model(**shape)
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    rows = 2 * max_num_seqs + 1 if config.rows is None else config.rows
    servers = max(1, getattr(vllm_config.parallel_config, "_api_process_count", 1))
    sums = (rows - 1) // (servers if gated else max_num_seqs)
    if sums < 1:
        raise ConfigError(
            f"steering rows {rows} are fewer than "
            + (
                f"one for each of {servers} API servers and one of zeros; raise --steering-rows"
                if gated
                else f"max_num_seqs + 1 = {max_num_seqs + 1}, so a step could need more combinations than there are "
                f"rows; raise --steering-rows or lower --max-num-seqs"
            )
        )
    return ResolvedConfig(
        packs=packs,
        rows=rows,
        policy=_policy_path(config, registry),
        pack_roots=_pack_roots(config, servers),
        sums_per_request=sums,
        gated=gated,
        layers=_layers(config, registry, shape["num_layers"]),
        digests=[pack.manifest.tensors.sha256 for pack in registry.packs.values()],
        version=plugin_version(),
        graph_revision=GRAPH_REVISION,
    )


def _policy_path(config: SteeringConfig, registry: PackRegistry) -> str | None:
    """Absolute path of the policy, whose names must all exist."""
    if config.policy is None:
        return None
    path = os.path.abspath(os.path.expanduser(config.policy))
    policy = load_policy(path)
    named = {f"aliases.{name}": request for name, request in policy.aliases.items()}
    if policy.default is not None:
        named["default"] = policy.default
    for where, request in named.items():
        for index, choice in enumerate(request.directions):
            try:
                registry.find(choice.name)
            except UnknownDirectionError as error:
                raise ConfigError(
                    f"--steering-policy: {path}: {where}.directions.{index}.name: {error}"
                ) from None
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


def _pack_roots(config: SteeringConfig, servers: int) -> list[str] | None:
    """Absolute paths of the directories that packs may be loaded from."""
    if config.pack_roots is None:
        return None
    if servers > 1:
        raise ConfigError(
            f"--steering-pack-roots: {servers} API servers would not know of each other's packs; start one, with "
            f"--api-server-count 1"
        )
    roots = [os.path.abspath(os.path.expanduser(root)) for root in config.pack_roots]
    for root in roots:
        if not os.path.isdir(root):
            raise ConfigError(f"--steering-pack-roots: {root} is not a directory")
    return roots
