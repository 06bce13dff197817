"""The ``fusion`` command of ``vllm-steer``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_steer.cli.evaluation import add_chat, extras, given_chat, json_object


def add_fusion(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer fusion``."""
    fusion = commands.add_parser(
        "fusion",
        help="Fusion Steering: a reference vector per question, with scales searched by its gold answer",
    )
    fusion.add_argument("--model", required=True, help="checkpoint directory or hub id")
    fusion.add_argument(
        "--questions",
        type=Path,
        required=True,
        metavar="FILE",
        help='questions to report on; JSON lines of "question", "answer" and, optionally, "explanation" and '
        '"reference_question"',
    )
    fusion.add_argument(
        "--tuning-questions",
        type=Path,
        metavar="FILE",
        help="other questions, for searching one set of scales to use for all of --questions",
    )
    fusion.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory of fusion.json, fusion.md, the pack and the answers; an interrupted run "
        "continues there",
    )
    fusion.add_argument(
        "--kind", choices=("full", "segmented", "both"), default="both", help="default: %(default)s"
    )
    fusion.add_argument("--trials", type=int, default=5, help="trials per question (default: 5)")
    fusion.add_argument("--low", type=float, default=0.01, help="smallest α and γ (default: 0.01)")
    fusion.add_argument("--high", type=float, default=1.0, help="largest α and γ (default: 1)")
    fusion.add_argument(
        "--right",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the gold answer's words that makes an answer right (default: 1)",
    )
    fusion.add_argument("--max-tokens", type=int, default=100, help="longest answer (default: 100)")
    fusion.add_argument("--seed", type=int, default=0, help="seed of the searches")
    fusion.add_argument("--dtype", default="float32", help="dtype of the model for the vectors")
    add_chat(fusion)
    fusion.add_argument(
        "--device", help="device of the model for the vectors (default: cuda if available)"
    )
    fusion.add_argument(
        "--engine",
        type=json_object,
        default={},
        metavar="JSON",
        help="""more arguments of vllm.LLM, such as '{"dtype": "bfloat16"}'""",
    )
    fusion.set_defaults(run=_fusion)


def _fusion(args: argparse.Namespace) -> None:
    with extras("offline"):
        from vllm_steer.offline.fusion.command import Options, fuse
        from vllm_steer.offline.models.chat import ChatFormat
    from vllm_steer.offline.fusion.results import markdown

    result = fuse(
        Options(
            model=args.model,
            questions=args.questions,
            tuning=args.tuning_questions,
            out=args.out,
            kinds=("full", "segmented") if args.kind == "both" else (args.kind,),
            trials=args.trials,
            low=args.low,
            high=args.high,
            right=args.right,
            max_tokens=args.max_tokens,
            seed=args.seed,
            dtype=args.dtype,
            device=args.device,
            engine=args.engine,
            chat=ChatFormat(**given_chat(args)),
        )
    )
    sys.stdout.write(markdown(result))
