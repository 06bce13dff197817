"""The ``extract`` command of ``vllm-steer``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_steer.cli.evaluation import (
    add_chat,
    add_engine,
    add_judge,
    extras,
    given_chat,
    given_judge,
)
from vllm_steer.errors import ExtractionError
from vllm_steer.packs.summary import pack_summary

if TYPE_CHECKING:
    from vllm_steer.offline.models.prompts import AnswerPair, Concept
    from vllm_steer.offline.questions.everyday import Everyday
    from vllm_steer.packs.pack import SteeringPack


ROLLOUT_METHODS = ("roast", "persona", "corrsteer")
"""Methods of --rollouts."""


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def add_extract(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer extract``."""
    extract = commands.add_parser(
        "extract", help="learn directions of concepts and write a steering pack"
    )
    extract.add_argument("--model", required=True, help="checkpoint directory or hub id")
    extract.add_argument("--name", required=True, help="name of the pack in requests")
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
        help="directory of a concept list per class (fears.txt, ...), statements_0.txt and statements_1.txt",
    )
    source.add_argument(
        "--pairs",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="method caa: one direction per file of JSON lines {prompt, positive, negative}, named by its stem",
    )
    source.add_argument(
        "--prompt",
        nargs="+",
        metavar="NAME=FILE",
        help="one direction per file, whose whole text is the prefix, such as a long system prompt",
    )
    source.add_argument(
        "--rollouts",
        nargs="+",
        metavar="NAME=FILE",
        help="methods roast, persona and corrsteer: one direction per file of questions, learned from the model's own "
        "answers "
        "as --judge scores them; JSON lines {prompt, reference}, or for persona one object {instruction: [{pos, neg}], "
        "questions}",
    )
    kind = extract.add_mutually_exclusive_group()
    kind.add_argument(
        "--class", dest="concept_class", help="fears, moods, experts, personas, places"
    )
    kind.add_argument("--prefix", help="custom prefix, with {concept} for the concept")
    extract.add_argument(
        "--positive",
        type=Path,
        metavar="FILE",
        help="statements asked with the prefix (default: those of --lists, or built-in)",
    )
    extract.add_argument(
        "--negative",
        type=Path,
        metavar="FILE",
        help="statements asked without it (default: as for --positive)",
    )
    extract.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="everyday questions, one per line, for learning and calibration (default: built-in)",
    )
    extract.add_argument(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure layers and strength of every direction with the engine (default: yes)",
    )
    extract.add_argument(
        "--scale",
        type=float,
        help="default scale (ε), in degrees for angular, until the pack is calibrated",
    )
    extract.add_argument(
        "--safe-scale", type=float, help="largest fluent |scale|, until the pack is calibrated"
    )
    add_engine(extract)
    extract.add_argument(
        "--workers", type=int, default=cores(), help="processes for learning vectors"
    )
    extract.add_argument("--device", help="device of the model (default: cuda if available)")
    extract.add_argument(
        "--shards", type=int, default=0, metavar="N", help="Ray workers, each with the whole model"
    )
    extract.add_argument("--ray-address", help="a running Ray cluster (default: start one here)")
    extract.add_argument("--gpus", type=float, help="GPUs per shard")
    _add_settings(extract)
    add_judge(extract, required=False)
    extract.set_defaults(run=_extract)


def _add_settings(extract: argparse.ArgumentParser) -> None:
    """Adds the settings that have a flag; omitted ones keep the file's value or the default."""
    extract.add_argument(
        "--settings", type=Path, metavar="FILE", help="JSON file of any extraction settings"
    )
    group = extract.add_argument_group("settings", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--method",
        choices=(
            "trained",
            "attention_guided",
            "caa",
            "ablation",
            "angular",
            "prompt_only",
            *ROLLOUT_METHODS,
        ),
        help="how directions are learned; sets some of the following (default: trained, or "
        "attention_guided if one of its settings is given, or caa for --pairs)",
    )
    group.add_argument(
        "--learn-from",
        choices=("prompts", "answers"),
        help="from the last tokens of prompts, or the tokens of the prefixed model's answers",
    )
    group.add_argument(
        "--estimator",
        choices=(
            "rfm",
            "ridge",
            "logistic",
            "pca",
            "mean_difference",
            "unit_mean_difference",
            "trained",
        ),
    )
    group.add_argument(
        "--answer-tokens",
        choices=("mean", "weighted", "attention", "telling"),
        help="all tokens of an answer alike, weighted by attention to the prefix, the one with most attention, or those "
        "before tokens that the prefix makes likelier",
    )
    group.add_argument(
        "--answer-length", type=int, metavar="N", help="largest number of tokens of an answer"
    )
    group.add_argument(
        "--prefix-role", choices=("user", "system"), help="message with the prefix (default: user)"
    )
    add_chat(group)
    group.add_argument(
        "--train-steps", type=int, metavar="N", help="largest number of training steps"
    )
    group.add_argument("--train-rate", type=float, help="length of a training step")
    group.add_argument("--train-penalty", type=float, help="weight of the vectors' squared lengths")
    group.add_argument(
        "--train-checkpointing", action="store_true", help="use less memory and more time"
    )
    group.add_argument(
        "--train-together",
        type=int,
        metavar="N",
        help="concepts trained in the same forward passes",
    )
    group.add_argument("--labels", choices=("soft", "hard"))
    group.add_argument("--token", type=_token, help="attention, or a fixed index such as -1")
    group.add_argument(
        "--contrast",
        choices=("nothing", "concepts"),
        help="prefixes of the negative statements: none (default), or those of all concepts in turn",
    )
    group.add_argument(
        "--layers", type=int, nargs="+", metavar="K", help="blocks (default: all except block 0)"
    )
    group.add_argument("--token-statistic", choices=("max", "mean"), help="over prompts")
    group.add_argument("--block-choice", choices=("all", "top_k", "bottom_k", "threshold"))
    group.add_argument(
        "--block-count", type=int, metavar="K", help="number of blocks for top_k and bottom_k"
    )
    group.add_argument(
        "--block-threshold",
        type=float,
        metavar="E",
        help="threshold of the enrichment score, above 0",
    )
    group.add_argument(
        "--permutations",
        type=int,
        help="permutations of the enrichment test, at least 100; 0 for no test",
    )
    group.add_argument(
        "--paired",
        action=argparse.BooleanOptionalAction,
        help="ask every statement with and without the prefix",
    )
    group.add_argument("--compat", action="store_true", help="choose as the authors' code does")
    group.add_argument("--batch-size", type=int)
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
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
    own = extract.add_argument_group(
        "settings of the methods of --rollouts", argument_default=argparse.SUPPRESS
    )
    own.add_argument("--samples", type=int, metavar="N", help="answers to each question")
    own.add_argument("--temperature", type=float, help="of the sampling")
    own.add_argument("--top-p", type=float, help="of the sampling")
    own.add_argument(
        "--threshold", type=float, help="score from which an answer is right (default: 0.5)"
    )
    own.add_argument(
        "--features",
        choices=("best", "each"),
        help="corrsteer: the best feature of all blocks (default), or of each block",
    )
    extract.set_defaults(
        setting_names=tuple(a.dest for a in (*group._group_actions, *own._group_actions)),
        rollout_names=tuple(a.dest for a in own._group_actions),
    )


def _extract(args: argparse.Namespace) -> None:
    with extras("offline"):
        from vllm_steer.offline.extract import inputs
        from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
        from vllm_steer.offline.extract.pipeline import Shards, extract_pack
    from vllm_steer.offline.questions.everyday import everyday_questions

    given = {name: getattr(args, name) for name in args.setting_names if hasattr(args, name)}
    given |= given_chat(args)
    questions = everyday_questions(args.questions)
    if args.rollouts is not None:
        pack = _rolled_out(args, given)
        _finish(args, pack, questions)
        return
    _without_rollouts(args, given)
    settings = inputs.read_settings(args.settings, given, pairs=args.pairs is not None)
    concepts: list[Concept] = []
    pairs: dict[str, list[AnswerPair]] = {}
    if args.pairs is not None:
        pairs = inputs.answer_pairs(args.pairs)
    elif args.prompt is not None:
        concepts = inputs.prompt_files(args.prompt)
    elif args.prefixes is not None:
        concepts = inputs.whole_prefixes(args.prefixes)
    elif args.lists is not None:
        concepts = inputs.listed_concepts(args.lists)
    elif args.prefix is not None:
        concepts = inputs.template_concepts(args.concepts, args.prefix)
    elif args.concept_class is not None:
        concepts = inputs.class_concepts(args.concepts, args.concept_class)
    else:
        raise ExtractionError("--concepts needs --class, or --prefix with {concept} in it")
    positives, negatives = inputs.statement_sides(
        args.positive, args.negative, args.lists, strip=not settings.compat
    )
    pack = extract_pack(
        args.model,
        ExtractionData(concepts, positives, negatives, pairs=pairs, questions=questions),
        settings,
        PackTarget(args.name, args.out, args.scale, args.safe_scale),
        ComputeResources(
            workers=args.workers,
            device=args.device,
            shards=Shards(args.shards, args.ray_address, args.gpus),
            engine=args.engine,
        ),
    )
    _finish(args, pack, questions)


def _rolled_out(args: argparse.Namespace, given: dict[str, Any]) -> SteeringPack:
    """Learns a pack from the model's own answers."""
    from vllm_steer.offline.rollouts.data import read_askings
    from vllm_steer.offline.rollouts.pipeline import learn_pack
    from vllm_steer.offline.rollouts.settings import read_settings
    from vllm_steer.offline.train.directions import Target

    for flag in ("positive", "negative", "concept_class", "prefix", "scale", "safe_scale"):
        if getattr(args, flag) is not None:
            raise ExtractionError(
                f"--{flag.replace('concept_', '').replace('_', '-')} has no meaning for --rollouts"
            )
    if args.shards:
        raise ExtractionError("--rollouts learns in one process; leave --shards out")
    if args.judge is None:
        raise ExtractionError("--rollouts needs --judge, which scores the answers")
    settings = read_settings(args.settings, given)
    askings = read_askings(args.rollouts, settings.of)
    return learn_pack(
        args.model,
        askings,
        settings,
        given_judge(args, list(askings)),
        Target(args.name, args.out),
        args.device,
        args.engine,
    )


def _without_rollouts(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Refuses what only --rollouts has."""
    if given.get("method") in ROLLOUT_METHODS:
        raise ExtractionError(f"method {given['method']!r} needs --rollouts NAME=FILE and --judge")
    for name in args.rollout_names:
        if name in given:
            raise ExtractionError(
                f"--{name.replace('_', '-')} belongs to the methods of --rollouts"
            )
    if args.judge is not None:
        raise ExtractionError("--judge belongs to the methods of --rollouts")


def _finish(args: argparse.Namespace, pack: SteeringPack, questions: Everyday) -> None:
    """Calibrates a pack if that is wanted, and shows it."""
    if args.calibrate:
        from vllm_steer.offline.calibrate.run import CalibrationSettings, calibrate_pack

        pack = calibrate_pack(
            pack, args.model, questions, CalibrationSettings(), engine=args.engine
        )
    sys.stdout.write(pack_summary(pack))


def _token(text: str) -> str | int:
    return text if text == "attention" else int(text)
