"""``convert import-sae`` and ``convert select-features`` of ``vllm-steer``."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_steer.cli.evaluation import add_chat, extras, given_chat
from vllm_steer.errors import ConversionError
from vllm_steer.packs.summary import pack_summary

if TYPE_CHECKING:
    from vllm_steer.offline.convert.sae_files import SaeOptions


def add_sae(ways: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer convert import-sae`` and ``select-features``."""
    sae = ways.add_parser(
        "import-sae",
        help="import features of sparse autoencoders: SAELens, Gemma Scope",
        description="Writes a pack of chosen features. The scale of a request sets the activation of one, on a server with "
        "--steering-ops affine and --steering-rank of as many features as a request may use at once.",
    )
    sae.add_argument(
        "sae",
        type=Path,
        metavar="SAE",
        help="folder with cfg.json and sae_weights.safetensors, or params.npz of Gemma Scope or its folder",
    )
    sae.add_argument(
        "--features",
        nargs="+",
        required=True,
        metavar="[NAME=]ID",
        help="numbers of the features, with names for requests (default: the number)",
    )
    sae.add_argument(
        "--scale",
        type=float,
        required=True,
        help="activation that requests without a scale set; 0 removes the feature",
    )
    _add_common(sae)
    sae.set_defaults(run=_import_sae)
    select = ways.add_parser(
        "select-features",
        help="choose features of a sparse autoencoder by examples",
        description="Runs the model on examples, chooses features by what they do there, and writes a pack of them and a "
        "report. contrast: pairs of prompts; langfir: texts of a language; corrsteer: scored answers.",
    )
    select.add_argument("sae", type=Path, metavar="SAE", help="as of convert import-sae")
    select.add_argument(
        "--preset", required=True, choices=("contrast", "langfir", "corrsteer"), help="the rule"
    )
    select.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines: {prompt, prefixed} for contrast, {text} for langfir, {prompt, answer, score} for corrsteer",
    )
    select.add_argument("--count", type=int, default=10, metavar="N", help="most features (10)")
    select.add_argument("--report", type=Path, metavar="FILE", help="JSON of the figures")
    select.add_argument("--device", help="device of the model (default: cuda where there is one)")
    select.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    select.add_argument("--batch-size", type=int, default=8, metavar="N")
    select.add_argument("--seed", type=int, default=0, help="of random tokens")
    _add_common(select)
    select.set_defaults(run=_select_features)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="checkpoint directory or hub id of its model"
    )
    parser.add_argument("--name", required=True, help="name of the pack, as requests will give it")
    parser.add_argument("--out", type=Path, required=True, help="directory of the pack")
    parser.add_argument(
        "--hook", help="where it reads, if its files do not say: blocks.20.hook_resid_post"
    )
    parser.add_argument(
        "--norm-scaling-factor",
        type=float,
        metavar="C",
        help="constant of normalize_activations expected_average_only_in",
    )
    parser.add_argument(
        "--centered",
        action="store_true",
        help="it was trained with TransformerLens's center_writing_weights, as gpt2-small-res-jb",
    )
    parser.add_argument("--residual-norms", metavar="PATH", help="as of convert import")
    add_chat(parser)


def _import_sae(args: argparse.Namespace) -> None:
    from vllm_steer.offline.convert.model import NormSource
    from vllm_steer.offline.convert.sae import NamedFeature, import_sae
    from vllm_steer.offline.models.chat import ChatFormat
    from vllm_steer.offline.train.directions import Target

    pack = import_sae(
        args.sae,
        [NamedFeature.parse(text, args.scale) for text in args.features],
        Target(args.name, args.out),
        args.model,
        _options(args),
        NormSource(args.residual_norms, ChatFormat(**given_chat(args))),
        _notice,
    )
    sys.stdout.write(pack_summary(pack))


def _notice(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _select_features(args: argparse.Namespace) -> None:
    with extras("offline"):
        from vllm_steer.offline.convert.model import NormSource
        from vllm_steer.offline.convert.select_features import Selection, select_features
        from vllm_steer.offline.convert.selection import PRESETS, report_table
        from vllm_steer.offline.models.chat import ChatFormat
        from vllm_steer.offline.train.directions import Target

    selection = Selection(
        args.preset, args.data, args.count, args.dtype, args.device, args.batch_size, args.seed
    )
    pack, chosen = select_features(
        args.sae,
        selection,
        Target(args.name, args.out),
        args.model,
        _options(args),
        args.report,
        NormSource(args.residual_norms, ChatFormat(**given_chat(args))),
    )
    sys.stderr.write(f"{PRESETS[args.preset].departs}\n")
    sys.stdout.write(f"{pack_summary(pack)}\n{report_table(chosen)}")


def _options(args: argparse.Namespace) -> SaeOptions:
    from vllm_steer.offline.convert.sae_files import SaeOptions

    scale = args.norm_scaling_factor
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ConversionError(f"--norm-scaling-factor: {scale:g} must be a number above 0")
    return SaeOptions(args.hook, scale, args.centered)
