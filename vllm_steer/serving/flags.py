"""``--enable-steering`` and its companions <-> ``additional_config["steering"]``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable
from typing import Any

from vllm_steer.config import (
    CONFIG_KEY,
    GRAPH_REVISION,
    ResolvedConfig,
    SteeringConfig,
    parse_config,
    plugin_version,
)
from vllm_steer.errors import ConfigError, PackError
from vllm_steer.hub import hub_snapshot, resolve_pack
from vllm_steer.model import model_shape
from vllm_steer.registry import PackRegistry
from vllm_steer.serving.compatibility import refuse_unsupported

# Under vLLM's own logger, so that its configuration applies.
logger = logging.getLogger("vllm.steer")


def add_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``EngineArgs.add_cli_args`` so that every vLLM command has the steering flags."""

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(
            title="SteeringConfig",
            # vLLM's short help shows a group's description alone, so the flags stand in it.
            description="Per-request steering of the residual stream (vllm-steer): "
            "--enable-steering, --steering-packs PACK ..., --steering-rows N.",
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
            metavar="PACK",
            default=None,
            help="Steering packs to load: directories, or hub repositories as owner/name or owner/name@revision.",
        )
        group.add_argument(
            "--steering-rows",
            type=int,
            default=None,
            help="Distinct combinations of directions that one step can hold, and one row of zeros; each of "
            "max_num_seqs requests may use an equal share. Default: 2 * max_num_seqs + 1.",
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
    packs, rows = getattr(args, "steering_packs", None), getattr(args, "steering_rows", None)
    if not getattr(args, "enable_steering", False):
        if packs is not None or rows is not None:
            raise ConfigError("--steering-packs and --steering-rows need --enable-steering")
        _move_hub_packs(args)
        return
    if not packs:
        raise ConfigError("--enable-steering needs --steering-packs PACK [PACK ...]")
    given = getattr(args, "additional_config", None) or {}
    if CONFIG_KEY in given:
        raise ConfigError(
            f"give steering by flags or in --additional-config {CONFIG_KEY!r}, not both"
        )
    config: dict[str, Any] = {"packs": _resolve_packs(packs, "--steering-packs")} | (
        {} if rows is None else {"rows": rows}
    )
    args.additional_config = {**given, CONFIG_KEY: config}
    args.enable_steering, args.steering_packs, args.steering_rows = False, None, None


def _move_hub_packs(args: argparse.Namespace) -> None:
    """Resolves the packs in ``--additional-config``: several API servers must not each ask the hub."""
    given = getattr(args, "additional_config", None)
    if not isinstance(given, dict) or CONFIG_KEY not in given:
        return
    config = parse_config(given[CONFIG_KEY])
    packs = _resolve_packs(config.packs, f"additional_config.{CONFIG_KEY}.packs")
    args.additional_config = {**given, CONFIG_KEY: {**given[CONFIG_KEY], "packs": packs}}


def _resolve_packs(sources: Iterable[str], field: str) -> list[str]:
    """Returns the absolute directory of each pack; what is on the hub is fetched and named in the log.

    Args:
        sources: Directories or hub repositories.
        field: What the user wrote them in, for messages.
    """
    paths = []
    for source in sources:
        try:
            path = resolve_pack(source)
        except PackError as error:
            raise PackError(f"{field}: {error}") from error
        paths.append(str(path))
        if (snapshot := hub_snapshot(path)) is not None:
            logger.info("Steering pack %s is %s.", source, snapshot)
    return paths


def resolve_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``EngineArgs.create_engine_config`` to check the configuration against the model."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        value = (vllm_config.additional_config or {}).get(CONFIG_KEY)
        if value is None:
            return vllm_config
        refuse_unsupported(vllm_config)
        resolved = _resolve(parse_config(value), vllm_config)
        # A new dict: the user's may serve for several engines.
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            CONFIG_KEY: resolved.model_dump(),
        }
        return vllm_config

    return create_engine_config


def _resolve(config: SteeringConfig, vllm_config: Any) -> ResolvedConfig:
    packs = _resolve_packs(config.packs, f"additional_config.{CONFIG_KEY}.packs")
    registry = PackRegistry.load(packs)
    registry.check_model(**model_shape(vllm_config.model_config))
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    rows = 2 * max_num_seqs + 1 if config.rows is None else config.rows
    if rows < max_num_seqs + 1:
        raise ConfigError(
            f"steering rows {rows} are fewer than max_num_seqs + 1 = {max_num_seqs + 1}, so a step could need more "
            f"combinations than there are rows; raise --steering-rows or lower --max-num-seqs"
        )
    return ResolvedConfig(
        packs=packs,
        rows=rows,
        sums_per_request=(rows - 1) // max_num_seqs,
        layers=registry.layers,
        digests=[pack.manifest.tensors.sha256 for pack in registry.packs.values()],
        version=plugin_version(),
        graph_revision=GRAPH_REVISION,
    )
