"""The ``train`` command of ``vllm-steer``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vllm_steer.cli.evaluation import add_chat, extras, given_chat
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.summary import pack_summary


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer train``."""
    train = commands.add_parser(
        "train",
        help="train vectors and affine forms by gradients and save them as a steering pack",
        description="Trains one direction for each data file, the model frozen. A run that was ended goes on where it was.",
    )
    train.add_argument("--model", required=True, help="checkpoint directory or hub id")
    train.add_argument(
        "--preset",
        required=True,
        choices=("likelihood", "bipo", "reft_r1", "loreft", "prosv", "cdas", "jola"),
        help="objective and form; it sets what follows",
    )
    train.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help="name of a direction and its JSON lines: {prompt, answer} and perhaps prefixed; for bipo {prompt, positive, "
        "negative}; for cdas {prompt, prefixed, positive, negative}",
    )
    train.add_argument("--name", required=True, help="name of the pack, as requests will give it")
    train.add_argument("--out", type=Path, required=True, help="directory of the pack")
    train.add_argument("--device", help="device of the model (default: cuda where there is one)")
    train.add_argument(
        "--shards", type=int, default=0, metavar="N", help="Ray workers, each with the whole model"
    )
    train.add_argument("--ray-address", help="a running Ray cluster (default: start one here)")
    train.add_argument("--gpus", type=float, help="GPUs per shard")
    train.add_argument(
        "--settings", type=Path, metavar="FILE", help="JSON of any training settings"
    )
    group = train.add_argument_group("settings", argument_default=argparse.SUPPRESS)
    group.add_argument("--layers", type=int, nargs="+", metavar="K", help="blocks")
    group.add_argument(
        "--positions", help="all, prompt, generated, last_prompt, or ends of the prompt: f2+l2"
    )
    group.add_argument("--epochs", type=int, metavar="N", help="times that an example is seen")
    group.add_argument("--examples", type=int, metavar="N", help="examples in a step")
    group.add_argument("--rate", type=float, help="step of a parameter")
    group.add_argument("--schedule", choices=("constant", "linear", "cosine"))
    group.add_argument("--warmup", type=float, help="share of the steps in which the step rises")
    group.add_argument("--decay", type=float, help="weight decay")
    group.add_argument("--clip", type=float, help="length that gradients are shortened to")
    group.add_argument(
        "--held-out", type=float, help="share of the examples that says when to stop"
    )
    group.add_argument("--every", type=int, metavar="N", help="steps between two looks at them")
    group.add_argument("--patience", type=int, metavar="N", help="looks without improvement")
    group.add_argument("--penalty", type=float, help="likelihood: weight of squared lengths")
    group.add_argument("--beta", type=float, help="bipo: how far from the unsteered model")
    group.add_argument("--strongest", type=int, metavar="K", help="reft_r1: tokens that count")
    group.add_argument("--sparsity", type=float, help="reft_r1: weight of the other tokens")
    group.add_argument("--rank", type=int, metavar="R", help="loreft: rank of the form")
    group.add_argument("--factor-rate", type=float, help="prosv: step of the factor")
    group.add_argument("--start", type=float, help="prosv: first length, over the stream's")
    group.add_argument(
        "--end", action=argparse.BooleanOptionalAction, help="learn where answers end (default)"
    )
    add_chat(group)
    group.add_argument("--checkpointing", action="store_true", help="less memory for more time")
    group.add_argument("--batch-size", type=int, metavar="N", help="examples in a forward pass")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    group.add_argument("--seed", type=int)
    train.set_defaults(
        run=_train, setting_names=tuple(action.dest for action in group._group_actions)
    )


def _train(args: argparse.Namespace) -> None:
    with extras("offline"):
        from vllm_steer.offline.shards import Shards
        from vllm_steer.offline.train.directions import Target
        from vllm_steer.offline.train.pipeline import read_data, read_settings, train_pack
    given = {name: getattr(args, name) for name in args.setting_names if hasattr(args, name)}
    given |= given_chat(args) | {"preset": args.preset}
    settings = read_settings(args.settings, given)
    data = read_data(args.data, settings.preset)
    shards = Shards(args.shards, args.ray_address, args.gpus)
    target = Target(args.name, args.out)
    pack = train_pack(args.model, data, settings, target, args.device, shards)
    sys.stdout.write(pack_summary(pack) + forms_to_name(pack))


def forms_to_name(pack: SteeringPack) -> str:
    """Returns what a request says of each form of several directions in a pack, in lines of their own; empty without one."""
    from vllm_steer.offline.train.directions import together

    said = ""
    for names in together(pack):
        asked = {"directions": [{"name": f"{pack.name}/{name}"} for name in names]}
        said += f'\nto be asked for together: "steering": {json.dumps(asked)}\n'
    return said
