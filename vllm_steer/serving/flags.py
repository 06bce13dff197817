"""The ``--enable-steering`` and ``--steering-*`` flags, moved into ``additional_config["steering"]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, get_args

from vllm_steer.config import CONFIG_KEY, SteeringConfig, parse_config
from vllm_steer.errors import ConfigError
from vllm_steer.serving.configure import resolve_packs

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

Parser = TypeVar("Parser", bound=argparse.ArgumentParser)
R = TypeVar("R")


def add_flags(original: Callable[[Parser], Parser]) -> Callable[[Parser], Parser]:
    """Wraps ``EngineArgs.add_cli_args`` so that every vLLM command has the steering flags."""

    def add_cli_args(parser: Parser) -> Parser:
        parser = original(parser)
        group = parser.add_argument_group(
            title="SteeringConfig",
            # vLLM's short help shows only a group's description, so it lists the flags.
            description="Per-request steering of the residual stream (vllm-steer): "
            "--enable-steering, --steering-packs PACK ..., --steering-rows N, --steering-wait-seconds N, "
            "--steering-layers N ..., "
            "--steering-policy FILE, --steering-pack-roots DIR ..., --steering-ops {additive,affine}, --steering-rank N, "
            "--steering-multiply, --steering-reads N, "
            "--steering-upload-mib N, --steering-upload-total-mib N, --steering-upload-count N, --steering-playground.",
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
            metavar="N",
            default=None,
            help="Distinct combinations of directions that can be active at once, plus one row of zeros. In a server, "
            "requests wait for free rows; in LLM(...) each of max_num_seqs requests may use an equal share. "
            "Default: 2 * max_num_seqs + 1.",
        )
        group.add_argument(
            "--steering-wait-seconds",
            type=float,
            metavar="N",
            default=None,
            help="How long a request waits for rows before it is answered with HTTP 503. Default: 60.",
        )
        group.add_argument(
            "--steering-layers",
            nargs="+",
            type=int,
            metavar="N",
            default=None,
            help="Layers that can be steered, 0-based block outputs. Default: those of the packs. Packs loaded "
            "later cannot have others.",
        )
        group.add_argument(
            "--steering-pack-roots",
            nargs="+",
            metavar="DIR",
            default=None,
            help="Directories from which packs may be loaded, by name, while the server runs: POST /v1/steering/packs. "
            "Off by default.",
        )
        group.add_argument(
            "--steering-upload-mib",
            type=int,
            metavar="N",
            default=None,
            help="Let clients send vectors of up to N MiB, served for a limited time: PUT /v1/steering/vectors/NAME. "
            "Off by default.",
        )
        group.add_argument(
            "--steering-upload-total-mib",
            type=int,
            metavar="N",
            default=None,
            help="Limit of the total size of all served uploads, in MiB. Default: 8 times "
            "--steering-upload-mib.",
        )
        group.add_argument(
            "--steering-upload-count",
            type=int,
            metavar="N",
            default=None,
            help="Limit of the number of uploads served at once. Default: 64.",
        )
        group.add_argument(
            "--steering-ops",
            choices=get_args(SteeringConfig.model_fields["ops"].annotation),
            default=None,
            help="Supported operations: additive adds directions; affine also removes, sets and rotates components, gated "
            "by probes if asked, at the cost of memory and some speed for every request. Default: additive.",
        )
        group.add_argument(
            "--steering-rank",
            type=int,
            metavar="N",
            default=None,
            help="With --steering-ops affine: components that a request may use at one layer and position; even. "
            "Default: 2.",
        )
        group.add_argument(
            "--steering-multiply",
            action="store_true",
            default=None,
            help="With --steering-ops affine: support op multiply too, which scales each dimension, at the cost of one more "
            "vector of memory per row and layer, and some speed for every request. Off by default.",
        )
        group.add_argument(
            "--steering-reads",
            type=int,
            metavar="N",
            default=None,
            help="Let requests read the component of the residual stream along directions, token by token: up to N "
            "different directions per request, at most 16. Takes memory for N * max_num_seqs vectors at every hooked layer. "
            "Default: 0, no reads and no cost.",
        )
        group.add_argument(
            "--steering-policy",
            metavar="FILE",
            default=None,
            help="JSON file with aliases, a default steering, a dose limit, and the directions that each API key may use.",
        )
        group.add_argument(
            "--steering-playground",
            action="store_true",
            # Given or not, as with the other flags.
            default=None,
            help="Serve the playground, a web page for trying directions, under /steering. Off by default. The page is "
            "served without an API key; all that it shows needs the key that its user enters.",
        )
        return parser

    return add_cli_args


def read_flags(original: Callable[..., R]) -> Callable[..., R]:
    """Wraps ``EngineArgs.from_cli_args`` to write the flags into ``additional_config``."""

    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> R:
        _move_flags(args)
        return original(cls, args)

    return from_cli_args


def _move_flags(args: argparse.Namespace) -> None:
    """Moves the flags into ``args.additional_config``.

    If several API servers run, each parses the same arguments again before it loads plugins: it knows
    ``additional_config`` but not these flags.
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
        _move_hub_packs(args)
        return
    if not config.get("packs"):
        raise ConfigError("--enable-steering needs --steering-packs PACK [PACK ...]")
    given = getattr(args, "additional_config", None) or {}
    if CONFIG_KEY in given:
        raise ConfigError(
            f"give steering by flags or in --additional-config {CONFIG_KEY!r}, not both"
        )
    config["packs"] = resolve_packs(config["packs"], "--steering-packs")
    args.additional_config = {**given, CONFIG_KEY: config}
    args.enable_steering = False
    for field in config:
        setattr(args, f"steering_{field}", None)


def _move_hub_packs(args: argparse.Namespace) -> None:
    """Resolves the packs in ``--additional-config``, so that not every API server asks the hub."""
    given = getattr(args, "additional_config", None)
    if not isinstance(given, dict) or CONFIG_KEY not in given:
        return
    config = parse_config(given[CONFIG_KEY])
    packs = resolve_packs(config.packs, f"additional_config.{CONFIG_KEY}.packs")
    args.additional_config = {**given, CONFIG_KEY: {**given[CONFIG_KEY], "packs": packs}}
