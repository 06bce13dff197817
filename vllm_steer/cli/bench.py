"""The ``bench`` command of ``vllm-steer``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_steer.cli.evaluation import API_KEY_VARIABLE, add_endpoint, add_engine, extras
from vllm_steer.errors import EvaluationError
from vllm_steer.packs.pack import SteeringPack, load_pack

if TYPE_CHECKING:
    from vllm_steer.offline.bench.capability import CapabilityTexts
    from vllm_steer.offline.bench.languages import Identifier
    from vllm_steer.offline.bench.ratings import Rater

_CAPABILITY = "a neutral text a line, whose perplexity is measured at every strength"
_CHOICES = "a JSON object a line, {question, choices, answer: number of the right one}, answered at every strength"
# Reasons come before a rating.
_REPLY_TOKENS = 400


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer bench``."""
    bench = commands.add_parser("bench", help="run the field's benchmarks of steering on a pack")
    ways = bench.add_subparsers(required=True, metavar="BENCHMARK")
    _add_axbench(ways)
    _add_clas(ways)
    _add_capability(ways)


def _add_axbench(ways: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    axbench = ways.add_parser(
        "axbench",
        help="AxBench: concept, instruction and fluency, each rated 0 to 2, over a grid of factors",
        description="Answers sampled instructions with every concept at every factor. A factor is chosen on the first "
        "half of the "
        "instructions and reported on the other. ε is the factor times the direction's default scale.",
    )
    _add_common(axbench)
    axbench.add_argument(
        "--concepts",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON list of {description, index}, or lines of {concept, concept_id}, as metadata.jsonl of Concept500",
    )
    axbench.add_argument(
        "--instructions",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON list of {instruction}, as alpaca_eval.json",
    )
    axbench.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="JSON object of concept, by its words or id, to direction (default: the directions named by words, id or "
        "feature)",
    )
    axbench.add_argument(
        "--factors", type=float, nargs="+", metavar="F", help="default: the authors'"
    )
    axbench.add_argument(
        "--per-concept", type=int, default=10, metavar="N", help="instructions (default: 10)"
    )
    axbench.add_argument("--max-tokens", type=int, default=128, help="default: %(default)s")
    axbench.add_argument(
        "--temperature", type=float, default=1.0, help="0 for greedy answers (default: 1)"
    )
    axbench.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    axbench.add_argument(
        "--layers", type=int, nargs="+", metavar="K", help="default: each direction's own"
    )
    _add_rater(axbench, "concept, instruct and fluency, with {concept}, {instruction}, {sentence}")
    axbench.set_defaults(run=_axbench)


def _add_clas(ways: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    clas = ways.add_parser(
        "clas-bench",
        help="CLaS-Bench: answers forced into other languages, and their relevance",
        description="Asks every language's questions towards every language. The pack's directions are named by languages.",
    )
    _add_common(clas)
    clas.add_argument(
        "--questions",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of LANGUAGE.txt, a question a line, the same in all",
    )
    clas.add_argument("--languages", nargs="+", metavar="CODE", help="default: all that there are")
    clas.add_argument("--count", type=int, metavar="N", help="questions, the first (default: all)")
    clas.add_argument(
        "--strengths", type=float, nargs="+", metavar="S", default=[5.0], help="default: 5"
    )
    clas.add_argument("--layers", type=int, nargs="+", metavar="K", help="tried one at a time")
    clas.add_argument(
        "--towards",
        choices=("difference", "target"),
        default="difference",
        help="steer by the target's direction minus the source's at length 1 (default), or by the target's, whose "
        "default scale "
        "strengths multiply",
    )
    clas.add_argument("--max-tokens", type=int, default=1024, help="default: %(default)s")
    clas.add_argument(
        "--language-script",
        metavar="FILE",
        help="tell languages by a program of your own, which is sent {answer} and says a code (default: py3langid)",
    )
    _add_rater(clas, "relevance, with {question}, {response}")
    clas.set_defaults(run=_clas)


def _add_capability(ways: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    capability = ways.add_parser(
        "capability",
        help="capability beside steering: perplexity of neutral text, and multiple choice, at every strength",
    )
    _add_common(capability)
    capability.add_argument("--directions", nargs="+", metavar="NAME", help="default: all")
    capability.add_argument(
        "--factors",
        type=float,
        nargs="+",
        metavar="F",
        default=[0.5, 1.0, 1.5, 2.0],
        help="of the default scales (default: 0.5 1 1.5 2)",
    )
    capability.add_argument("--layers", type=int, nargs="+", metavar="K")
    capability.set_defaults(run=_capability)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("pack", type=Path, help="directory of the pack")
    command.add_argument("--model", required=True, help="checkpoint directory or hub id")
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of the results and the answers; a run that was ended goes on there",
    )
    command.add_argument("--neutral", type=Path, metavar="FILE", help=_CAPABILITY)
    command.add_argument("--multiple-choice", type=Path, metavar="FILE", help=_CHOICES)
    add_engine(command)


def _add_rater(command: argparse.ArgumentParser, questions: str) -> None:
    judge = command.add_argument_group("judge")
    judge.add_argument("--judge", choices=("llm", "script"), required=True)
    judge.add_argument(
        "--script",
        metavar="FILE",
        help="rate by a program of your own: FILE.py or FILE.py:FUNCTION, which takes a dictionary with question and "
        "what it "
        "speaks of and returns a number from 0 to 2, or an executable, which reads JSON lines and writes a number for each",
    )
    judge.add_argument(
        "--script-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="time for all answers together (default: 600)",
    )
    judge.add_argument(
        "--judge-questions",
        type=Path,
        metavar="FILE",
        help=f"what the model is asked, a JSON object with {questions} (default: built-in)",
    )
    judge.add_argument(
        "--reply-tokens",
        type=int,
        default=_REPLY_TOKENS,
        help="longest reply (default: %(default)s)",
    )
    add_endpoint(judge)


def _rater(
    args: argparse.Namespace, questions: Mapping[str, str], fields: Mapping[str, Sequence[str]]
) -> Rater:
    from vllm_steer.offline.bench.axbench_data import read_json
    from vllm_steer.offline.bench.ratings import EndpointRater, ScriptRater, check_questions
    from vllm_steer.offline.evaluate.script import Script

    if args.judge == "script":
        if not args.script:
            raise EvaluationError("--judge script needs --script FILE")
        return ScriptRater(Script.parse(args.script, args.script_timeout))
    if not args.judge_url or not args.judge_model:
        raise EvaluationError("--judge llm needs --judge-url and --judge-model")
    with extras("cpu"):
        from vllm_steer.offline.evaluate.endpoint import ChatEndpoint
    if args.judge_questions is not None:
        questions = check_questions(read_json(args.judge_questions), fields)
    endpoint = ChatEndpoint(
        args.judge_url,
        args.judge_model,
        os.environ.get(API_KEY_VARIABLE, "none"),
        concurrency=args.concurrency,
        retries=args.retries,
        max_tokens=args.reply_tokens,
    )
    return EndpointRater(endpoint, questions)


def _texts(args: argparse.Namespace) -> CapabilityTexts:
    from vllm_steer.offline.bench.capability import read_capability

    return read_capability(args.neutral, args.multiple_choice)


def _given(args: argparse.Namespace) -> SteeringPack:
    with extras("offline"):
        import vllm_steer.offline.engine.tokens  # noqa: F401
    return load_pack(args.pack)


def _axbench(args: argparse.Namespace) -> None:
    pack = _given(args)
    from vllm_steer.offline.bench import axbench
    from vllm_steer.offline.bench.axbench_data import (
        matched,
        read_concepts,
        read_instructions,
        read_names,
    )
    from vllm_steer.offline.engine.tokens import TokenEngine
    from vllm_steer.offline.files import write_atomically

    settings = axbench.AxBenchSettings(
        factors=axbench.FACTORS if args.factors is None else tuple(args.factors),
        instructions=args.per_concept,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        layers=None if args.layers is None else tuple(args.layers),
    )
    concepts = matched(read_concepts(args.concepts), pack, read_names(args.names))
    instructions, texts = read_instructions(args.instructions), _texts(args)
    rater = _rater(args, axbench.QUESTIONS, axbench.FIELDS)
    with TokenEngine(args.model, [pack], args.engine, args.out / "answers") as engine:
        result = axbench.run_axbench(engine, pack, concepts, instructions, rater, settings, texts)
    write_atomically(args.out / "axbench.json", result.model_dump_json(indent=2) + "\n")
    write_atomically(args.out / "axbench.md", axbench.table(result))
    sys.stdout.write(axbench.table(result))


def _clas(args: argparse.Namespace) -> None:
    pack = _given(args)
    from vllm_steer.offline.bench import clas
    from vllm_steer.offline.bench.clas_data import read_questions
    from vllm_steer.offline.engine.tokens import TokenEngine
    from vllm_steer.offline.files import write_atomically

    settings = clas.ClasSettings(
        strengths=tuple(args.strengths),
        layers=None if args.layers is None else tuple(args.layers),
        towards=args.towards,
        max_tokens=args.max_tokens,
    )
    questions = read_questions(args.questions, args.languages, args.count)
    texts, rater = _texts(args), _rater(args, clas.QUESTIONS, clas.FIELDS)
    identifier = _identifier(args)
    with TokenEngine(args.model, [pack], args.engine, args.out / "answers") as engine:
        result = clas.run_clas(engine, pack, questions, rater, identifier, settings, texts)
    write_atomically(args.out / "clas-bench.json", result.model_dump_json(indent=2) + "\n")
    write_atomically(args.out / "clas-bench.md", clas.table(result))
    sys.stdout.write(clas.table(result))


def _identifier(args: argparse.Namespace) -> Identifier:
    from vllm_steer.offline.bench.languages import Langid, ScriptIdentifier
    from vllm_steer.offline.evaluate.script import Script

    if args.language_script:
        return ScriptIdentifier(Script.parse(args.language_script, args.script_timeout))
    return Langid()


def _capability(args: argparse.Namespace) -> None:
    pack = _given(args)
    from vllm_steer.offline.bench.capability import capability
    from vllm_steer.offline.bench.figures import shown
    from vllm_steer.offline.bench.steers import Part, Steer, direction_of
    from vllm_steer.offline.engine.tokens import TokenEngine
    from vllm_steer.offline.files import write_atomically

    texts = _texts(args)
    if not texts:
        raise EvaluationError("--neutral or --multiple-choice is needed")
    layers = None if args.layers is None else tuple(args.layers)
    cells = []
    for name in args.directions or list(pack.directions):
        record = direction_of(pack, name)
        for factor in args.factors:
            part = Part(f"{pack.name}/{name}", record, factor * record.default_scale, layers)
            cells.append((name, factor, part))
    with TokenEngine(args.model, [pack], args.engine, args.out / "answers") as engine:
        plain, *found = capability(engine, texts, [Steer(), *(Steer((p,)) for *_, p in cells)])
    rows = [{"direction": None, "factor": 0.0, "scale": 0.0, **plain.model_dump()}]
    rows += [
        {"direction": name, "factor": factor, "scale": part.scale, **one.model_dump()}
        for (name, factor, part), one in zip(cells, found, strict=True)
    ]
    lines = [
        "| direction | factor | ε | neutral perplexity | multiple choice |",
        "|---|---|---|---|---|",
        *(
            f"| {row['direction'] or '–'} | {row['factor']:g} | {row['scale']:g} | {shown(row['perplexity'], 2)} | "
            f"{shown(row['accuracy'])} |"
            for row in rows
        ),
    ]
    write_atomically(args.out / "capability.json", json.dumps(rows, indent=2) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
