"""The ``vllm-steer`` command: one subcommand for each thing that is done with packs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_steer.cli.bench import add_bench
from vllm_steer.cli.calibrate import add_calibrate
from vllm_steer.cli.demo import add_demo
from vllm_steer.cli.evaluation import add_card, add_chat, add_sweep, given_chat
from vllm_steer.cli.extract import add_extract
from vllm_steer.cli.fusion import add_fusion
from vllm_steer.cli.model import add_model
from vllm_steer.cli.probe import add_probe
from vllm_steer.cli.sae import add_sae
from vllm_steer.cli.train import add_train, forms_to_name
from vllm_steer.cli.verify import add_verify
from vllm_steer.config import plugin_version
from vllm_steer.errors import ConversionError, SteeringError
from vllm_steer.packs.pack import load_pack, resolve_pack
from vllm_steer.packs.summary import pack_summary

if TYPE_CHECKING:
    from vllm_steer.offline.convert.packs import VectorSource

_PACK_HELP = "directory of the pack, or owner/name or owner/name@revision on the hub"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; an error is one line on stderr."""
    args = command_line().parse_args(argv)
    try:
        status: int | None = args.run(args)
    except SteeringError as error:
        sys.stderr.write(f"vllm-steer: {error}\n")
        return 1
    return status or 0


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of the commands."""
    parser = argparse.ArgumentParser(
        prog="vllm-steer",
        description="Steered generation for vLLM: extract, inspect and evaluate packs.",
    )
    parser.add_argument("--version", action="version", version=plugin_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_demo(commands)
    add_model(commands)
    add_extract(commands)
    add_train(commands)
    add_calibrate(commands)
    add_probe(commands)
    add_sweep(commands)
    add_card(commands)
    add_bench(commands)
    add_fusion(commands)
    inspect = commands.add_parser("inspect", help="verify a steering pack and show its content")
    inspect.add_argument("pack", help=_PACK_HELP)
    inspect.add_argument("--json", action="store_true", help="print the manifest instead")
    inspect.set_defaults(run=_inspect)
    _add_convert(commands)
    add_verify(commands)
    return parser


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser(
        "convert", help="convert vectors of other tools to packs, and back"
    )
    ways = convert.add_subparsers(required=True, metavar="WAY")
    into = ways.add_parser(
        "import",
        help="convert vector files to a pack",
        description="Writes a pack from GGUF control vectors, torch.save files, safetensors, .npy or JSON. Layer N is "
        "the output of decoder block N, counted from 0. The documentation's page on importable files lists the "
        "formats.",
    )
    into.add_argument(
        "files",
        nargs="+",
        metavar="NAME=FILE",
        help="name of a direction and its file, or one of its files; FILE#KEY for one of several directions in a file",
    )
    into.add_argument("--model", required=True, help="checkpoint directory or hub id of the model")
    into.add_argument("--name", required=True, help="name of the pack in requests")
    into.add_argument("--out", type=Path, required=True, help="directory of the pack")
    into.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="default scale (ε): llama.cpp's strength, repeng's coefficient (default: 1)",
    )
    into.add_argument(
        "--safe-scale", type=float, help="largest fluent |scale| (default: that of --scale)"
    )
    into.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="K",
        help="keep these layers; for tensors without layers, the layers of their rows",
    )
    into.add_argument(
        "--residual-norms",
        metavar="PATH",
        help="JSON file of layer to median residual norm, or a pack of the same model (default: measured "
        "by running --model)",
    )
    add_chat(into)
    into.set_defaults(run=_import)
    reft = ways.add_parser(
        "import-reft",
        help="import LoReFT of pyreft",
        description="Writes a pack from folders of pyreft, or safetensors files whose names say layers. A form of rank r is "
        "several directions, which a request names together, on a server with --steering-ops affine and --steering-rank r.",
    )
    reft.add_argument(
        "files", nargs="+", metavar="NAME=FOLDER", help="name of a form, and its folder or file"
    )
    reft.add_argument("--model", required=True, help="checkpoint directory or hub id of its model")
    reft.add_argument("--name", required=True, help="name of the pack, as requests will give it")
    reft.add_argument("--out", type=Path, required=True, help="directory of the pack")
    reft.add_argument(
        "--positions",
        required=True,
        help="where it was trained to act: f5+l5 for the prompt's first and last five tokens, or all, prompt, last_prompt",
    )
    reft.add_argument("--residual-norms", metavar="PATH", help="as of convert import")
    add_chat(reft)
    reft.set_defaults(run=_import_reft)
    add_sae(ways)
    out = ways.add_parser("export", help="write a pack's direction as a GGUF control vector")
    out.add_argument("pack", help=_PACK_HELP)
    out.add_argument("direction", help="name of the direction")
    out.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .gguf to write")
    out.add_argument("--layers", type=int, nargs="+", metavar="K", help="write only these layers")
    out.set_defaults(run=_export)


def _import(args: argparse.Namespace) -> None:
    from vllm_steer.offline.convert.model import NormSource
    from vllm_steer.offline.convert.packs import ImportTarget, import_pack
    from vllm_steer.offline.models.chat import ChatFormat

    pack = import_pack(
        _named_files(args.files),
        ImportTarget(
            args.name,
            args.out,
            args.scale,
            abs(args.scale) if args.safe_scale is None else args.safe_scale,
        ),
        args.model,
        layers=args.layers,
        norms=NormSource(args.residual_norms, ChatFormat(**given_chat(args))),
        notice=_note,
    )
    sys.stdout.write(pack_summary(pack))


def _named_files(items: Sequence[str]) -> list[VectorSource]:
    from vllm_steer.offline.convert.packs import VectorSource

    sources = []
    for item in items:
        name, equals, file = item.partition("=")
        if not equals or not name or not file:
            raise ConversionError(f"{item!r} must be NAME=FILE, such as happy=happy.gguf")
        sources.append(VectorSource(name, file))
    return sources


def _import_reft(args: argparse.Namespace) -> None:
    from vllm_steer.offline.convert.model import NormSource
    from vllm_steer.offline.convert.reft import NOTE, import_reft
    from vllm_steer.offline.models.chat import ChatFormat
    from vllm_steer.offline.train.directions import Target
    from vllm_steer.offline.train.positions import Positions

    pack = import_reft(
        _named_files(args.files),
        Target(args.name, args.out),
        args.model,
        Positions.parse(args.positions).served(),
        NormSource(args.residual_norms, ChatFormat(**given_chat(args))),
    )
    _note(NOTE)
    sys.stdout.write(pack_summary(pack) + forms_to_name(pack))


def _note(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _export(args: argparse.Namespace) -> None:
    from vllm_steer.offline.convert.packs import export_direction

    pack = load_pack(resolve_pack(args.pack))
    export_direction(pack, args.direction, args.out, args.layers)
    scale = pack.directions[args.direction].default_scale
    sys.stdout.write(
        f"{args.out}: {pack.name}/{args.direction}, unscaled; the pack's default scale is "
        f"--control-vector-scaled {args.out}:{scale:g} in llama.cpp\n"
    )


def _inspect(args: argparse.Namespace) -> None:
    pack = load_pack(resolve_pack(args.pack))
    if args.json:
        sys.stdout.write(json.dumps(pack.manifest.model_dump(), indent=2) + "\n")
    else:
        sys.stdout.write(pack_summary(pack))
