"""``convert import-sae`` of ``vllm-steer``."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from vllm_steer.cli.evaluation import add_chat, given_chat
from vllm_steer.errors import ConversionError
from vllm_steer.packs.summary import pack_summary


def add_sae(ways: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer convert import-sae``."""
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
    from vllm_steer.offline.convert.sae_files import SaeOptions
    from vllm_steer.offline.models.chat import ChatFormat
    from vllm_steer.offline.train.directions import Target

    scale = args.norm_scaling_factor
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ConversionError(f"--norm-scaling-factor: {scale:g} must be a number above 0")
    pack = import_sae(
        args.sae,
        [NamedFeature.parse(text, args.scale) for text in args.features],
        Target(args.name, args.out),
        args.model,
        SaeOptions(args.hook, scale, args.centered),
        NormSource(args.residual_norms, ChatFormat(**given_chat(args))),
        lambda line: sys.stderr.write(f"{line}\n"),
    )
    sys.stdout.write(pack_summary(pack))
