"""The ``vllm-steer`` command: demo, extract, sweep, card, fusion, inspect, convert, verify."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_steer.cli_evaluation import add_card, add_sweep
from vllm_steer.cli_fusion import add_fusion
from vllm_steer.cli_verify import add_verify
from vllm_steer.config import plugin_version
from vllm_steer.errors import ConversionError, ExtractionError, SteeringError
from vllm_steer.pack import SteeringPack, load_pack, resolve_pack

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
        prog="vllm-steer", description="Steered generation for vLLM: extract and look at packs."
    )
    parser.add_argument("--version", action="version", version=plugin_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_extract(commands)
    add_sweep(commands)
    add_card(commands)
    add_fusion(commands)
    inspect = commands.add_parser("inspect", help="verify a steering pack and show what it holds")
    inspect.add_argument("pack", help=_PACK_HELP)
    inspect.add_argument("--json", action="store_true", help="print the manifest instead")
    inspect.set_defaults(run=_inspect)
    _add_convert(commands)
    add_verify(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo", help="extract packs from the shipped model, serve it, show steered answers"
    )
    demo.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="default: %(default)s"
    )
    demo.add_argument(
        "--concepts", type=int, default=3, help="concepts of each class (default: %(default)s)"
    )
    demo.add_argument("--workers", type=int, default=_cores(), help="processes that learn vectors")
    demo.set_defaults(run=_demo)


def _add_extract(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    extract = commands.add_parser(
        "extract", help="learn the directions of concepts and save them as a steering pack"
    )
    extract.add_argument("--model", required=True, help="checkpoint directory or hub id")
    extract.add_argument("--name", required=True, help="name of the pack, as requests will give it")
    extract.add_argument("--out", type=Path, required=True, help="directory of the pack")
    source = extract.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--concepts",
        type=Path,
        metavar="FILE",
        help="concepts, one per line; with --class or --prefix",
    )
    source.add_argument(
        "--prefixes", type=Path, metavar="FILE", help="lines of 'name: whole prefix'"
    )
    source.add_argument(
        "--lists",
        type=Path,
        metavar="DIR",
        help="a concept list for each class (fears.txt, ...), and statements_0.txt, statements_1.txt",
    )
    kind = extract.add_mutually_exclusive_group()
    kind.add_argument(
        "--class", dest="concept_class", help="fears, moods, experts, personas, places"
    )
    kind.add_argument("--prefix", help="prefix of a class of your own, {concept} in its place")
    extract.add_argument(
        "--positive",
        type=Path,
        metavar="FILE",
        help="statements asked with the prefix (default: those of --lists, or the project's own)",
    )
    extract.add_argument(
        "--negative", type=Path, metavar="FILE", help="statements asked without it (likewise)"
    )
    extract.add_argument("--scale", type=float, required=True, help="default scale (ε) of requests")
    extract.add_argument(
        "--safe-scale", type=float, help="largest fluent |scale| (default: that of --scale)"
    )
    extract.add_argument(
        "--workers", type=int, default=_cores(), help="processes that learn vectors"
    )
    extract.add_argument("--device", help="device of the model (default: cuda where there is one)")
    extract.add_argument(
        "--shards", type=int, default=0, metavar="N", help="Ray workers, each with the whole model"
    )
    extract.add_argument("--ray-address", help="a running Ray cluster (default: one started here)")
    extract.add_argument("--gpus", type=float, help="GPUs of each shard")
    _add_settings(extract)
    extract.set_defaults(run=_extract)


def _add_settings(extract: argparse.ArgumentParser) -> None:
    """Adds the settings that have a flag; those left out keep the file's value or the default."""
    extract.add_argument(
        "--settings", type=Path, metavar="FILE", help="JSON of any extraction settings"
    )
    group = extract.add_argument_group("settings", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--estimator", choices=("rfm", "ridge", "logistic", "pca", "mean_difference")
    )
    group.add_argument("--labels", choices=("soft", "hard"))
    group.add_argument("--token", type=_token, help="attention, or a fixed one such as -1")
    group.add_argument("--token-statistic", choices=("max", "mean"), help="over prompts")
    group.add_argument("--block-choice", choices=("all", "top_k", "bottom_k", "threshold"))
    group.add_argument("--block-count", type=int, metavar="K", help="of top_k and bottom_k")
    group.add_argument("--block-threshold", type=float, metavar="E", help="of the enrichment score")
    group.add_argument("--permutations", type=int, help="of the enrichment test; 0 for no test")
    group.add_argument("--paired", action="store_true", help="ask every statement both ways")
    group.add_argument("--compat", action="store_true", help="choose as the authors' code does")
    group.add_argument("--batch-size", type=int)
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    group.add_argument("--seed", type=int)
    group.add_argument("--rfm-ridge", type=float, help="the authors': 1e-3")
    group.add_argument(
        "--rfm-uncentered",
        dest="rfm_center_gradients",
        action="store_false",
        help="leave the RFM's gradients uncentred, for prompts that lie far apart",
    )
    group.add_argument("--rfm-iterations", type=int, help="the best is taken of so many")
    group.add_argument("--rfm-bandwidths", type=float, nargs="+", metavar="L", help="likewise")
    group.set_defaults(setting_names=tuple(action.dest for action in group._group_actions))


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser(
        "convert", help="vectors of llama.cpp, repeng, EasySteer and PyTorch from and to packs"
    )
    ways = convert.add_subparsers(required=True, metavar="WAY")
    into = ways.add_parser(
        "import",
        help="vector files to a pack",
        description="Writes a pack from GGUF control vectors and torch.save files of tensors. direction.N of "
        "a control vector is layer N: the output of decoder block N, counted from 0.",
    )
    into.add_argument(
        "files", nargs="+", metavar="NAME=FILE", help="name of a direction and its .gguf or .pt"
    )
    into.add_argument("--model", required=True, help="checkpoint directory or hub id of its model")
    into.add_argument("--name", required=True, help="name of the pack, as requests will give it")
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
        help="JSON file of layer to mean residual norm, or a pack of the same model (default: measured "
        "by running --model)",
    )
    into.set_defaults(run=_import)
    out = ways.add_parser("export", help="a pack's direction to a GGUF control vector")
    out.add_argument("pack", help=_PACK_HELP)
    out.add_argument("direction", help="name of the direction")
    out.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .gguf to write")
    out.add_argument("--layers", type=int, nargs="+", metavar="K", help="write only these layers")
    out.set_defaults(run=_export)


def _demo(args: argparse.Namespace) -> None:
    from offline.demo.run import run_demo

    args.output.mkdir(parents=True, exist_ok=True)
    run_demo(args.output, args.concepts, args.workers)


def _extract(args: argparse.Namespace) -> None:
    from offline import inputs
    from offline.extract import Shards, extract_pack

    if args.prefixes is not None:
        concepts = inputs.whole_prefixes(args.prefixes)
    elif args.lists is not None:
        concepts = inputs.listed_concepts(args.lists)
    elif args.prefix is not None:
        concepts = inputs.template_concepts(args.concepts, args.prefix)
    elif args.concept_class is not None:
        concepts = inputs.class_concepts(args.concepts, args.concept_class)
    else:
        raise ExtractionError("--concepts needs --class, or --prefix with {concept} in it")
    given = {name: getattr(args, name) for name in args.setting_names if hasattr(args, name)}
    positives, negatives = inputs.statement_sides(args.positive, args.negative, args.lists)
    pack = extract_pack(
        args.model,
        args.name,
        concepts,
        positives,
        negatives,
        inputs.read_settings(args.settings, given),
        args.scale,
        abs(args.scale) if args.safe_scale is None else args.safe_scale,
        args.out,
        workers=args.workers,
        device=args.device,
        shards=Shards(args.shards, args.ray_address, args.gpus),
    )
    sys.stdout.write(_summary(pack))


def _token(text: str) -> str | int:
    return text if text == "attention" else int(text)


def _import(args: argparse.Namespace) -> None:
    from offline.convert.packs import import_pack

    sources: dict[str, str] = {}
    for item in args.files:
        name, equals, file = item.partition("=")
        if not equals or not name or name in sources:
            raise ConversionError(
                f"{item!r} must be NAME=FILE, such as happy=happy.gguf, each name once"
            )
        sources[name] = file
    pack = import_pack(
        sources,
        name=args.name,
        model_path=args.model,
        out_dir=args.out,
        scale=args.scale,
        safe_scale=abs(args.scale) if args.safe_scale is None else args.safe_scale,
        layers=None if args.layers is None else sorted(set(args.layers)),
        residual_norms=args.residual_norms,
    )
    sys.stdout.write(_summary(pack))


def _export(args: argparse.Namespace) -> None:
    from offline.convert.packs import export_direction

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
        sys.stdout.write(_summary(pack))


def _summary(pack: SteeringPack) -> str:
    manifest = pack.manifest
    model = manifest.model
    lines = [
        f"steering pack {pack.name!r}, verified: {pack.origin}",
        f"model      {model.name} ({model.architecture}, {model.model_type}), "
        f"hidden size {model.hidden_size}, {model.num_layers} layers",
        f"method     {manifest.method.name}, seed {manifest.method.seed}, "
        f"data {manifest.method.data_sha256[:12]}",
        "layers     layer k is the output of decoder block k, counted from 0",
        "",
        f"{'direction':<32} {'scale':>8} {'safe':>8}  {'positions':<10} {'digest':<12}  layers",
    ]
    for name, record in pack.directions.items():
        lines.append(
            f"{name:<32} {record.default_scale:>8g} {record.safe_scale:>8g}  {record.positions:<10} "
            f"{pack.digests[name][:12]}  {', '.join(map(str, record.layers))}"
        )
    return "\n".join(lines) + "\n"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())
