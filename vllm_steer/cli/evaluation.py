"""The ``sweep`` and ``card`` commands of ``vllm-steer``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_steer.cli.prefixes import add_prefixes, given_prefixes
from vllm_steer.errors import EvaluationError, choices
from vllm_steer.packs.pack import Prefix, SteeringPack, load_pack

if TYPE_CHECKING:
    from vllm_steer.offline.evaluate.judges import Judge
    from vllm_steer.offline.questions.by_class import QuestionSet

API_KEY_VARIABLE = "OPENAI_API_KEY"
CHAT_FIELDS = ("chat_template", "chat_template_kwargs")


def add_sweep(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer sweep``."""
    sweep = commands.add_parser(
        "sweep", help="measure how well packs steer, over scales: steerability and fluency"
    )
    sweep.add_argument("packs", nargs="+", type=Path, metavar="PACK", help="directory of a pack")
    sweep.add_argument("--model", required=True, help="checkpoint directory or hub id")
    sweep.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory of sweep.json, sweep.md and the answers; an interrupted run continues there",
    )
    sweep.add_argument(
        "--scales",
        type=float,
        nargs="+",
        metavar="E",
        help="default: around the default scales; for calibrated directions up to slightly beyond the largest "
        "fluent one",
    )
    sweep.add_argument("--concepts", nargs="+", metavar="NAME", help="directions (default: all)")
    sweep.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="K",
        help="default: each direction's default layers",
    )
    sweep.add_argument("--max-tokens", type=int, default=50, help="longest answer (default: 50)")
    add_engine(sweep)
    _add_questions(sweep)
    add_prefixes(sweep, "They define the ceiling; if the pack has none, that of --class is used.")
    add_judge(sweep)
    sweep.set_defaults(run=_sweep)


def add_engine(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of the answering engine."""
    command.add_argument(
        "--engine",
        type=json_object,
        default={},
        metavar="JSON",
        help="""more arguments of vllm.LLM, such as '{"dtype": "bfloat16"}'""",
    )


def add_chat(command: argparse._ActionsContainer) -> None:
    """Adds the arguments of the prompt format, which have no value if omitted."""
    command.add_argument(
        "--chat-template",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a Jinja file, or plain for verbatim texts, as for base models (default: the tokenizer's template)",
    )
    command.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        default=argparse.SUPPRESS,
        help="""arguments of the template, such as '{"enable_thinking": false}'""",
    )


def given_chat(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments added by :func:`add_chat`, as fields of a format.

    Raises:
        ExtractionError: The template file cannot be read.
    """
    from vllm_steer.offline.models.chat import read_template

    given = {key: value for key, value in vars(args).items() if key in CHAT_FIELDS}
    if CHAT_FIELDS[0] in given:
        given[CHAT_FIELDS[0]] = read_template(given[CHAT_FIELDS[0]])
    return given


def _add_questions(sweep: argparse.ArgumentParser) -> None:
    asked = sweep.add_argument_group("questions (default: the built-in ones for the class)")
    asked.add_argument(
        "--class",
        dest="concept_class",
        help="fears, moods, experts, personas, places or general (default: the pack's name)",
    )
    asked.add_argument(
        "--tuning-questions",
        type=Path,
        metavar="FILE",
        help="questions for choosing the scale, one per line",
    )
    asked.add_argument(
        "--questions", type=Path, metavar="FILE", help="questions to report on, one per line"
    )
    asked.add_argument(
        "--statements",
        action="store_true",
        help="the lines are statements, and prompts ask about them as in extraction",
    )


def add_judge(command: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the arguments of the judge of answers."""
    judge = command.add_argument_group("judge")
    judge.add_argument(
        "--judge",
        choices=("llm", "keywords", "script", "demo"),
        required=required,
        help="demo: only for the demo model",
    )
    judge.add_argument(
        "--script",
        metavar="FILE",
        help="grade by a program of your own: FILE.py or FILE.py:FUNCTION, which takes an answer as a dictionary and "
        "returns "
        "a number from 0 to 1, or an executable, which reads JSON lines and writes a number for each",
    )
    judge.add_argument(
        "--script-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="time for all answers together (default: 600)",
    )
    add_endpoint(judge)
    judge.add_argument(
        "--keywords",
        type=Path,
        metavar="FILE",
        help="lines of 'concept: word, stem*' (default: the names)",
    )
    judge.add_argument("--least", type=int, default=1, help="keywords that must occur (default: 1)")
    judge.add_argument("--judge-mode", choices=("graded", "yes-no"), default="graded")
    judge.add_argument(
        "--rubric",
        type=Path,
        metavar="FILE",
        help="grading rubric with {concept} for the concept (default: built-in); the "
        f"endpoint's key is read from {API_KEY_VARIABLE}",
    )


def add_endpoint(group: argparse._ArgumentGroup) -> None:
    """Adds the arguments of a judge's endpoint."""
    group.add_argument("--judge-url", help="OpenAI-compatible endpoint, ending in /v1")
    group.add_argument("--judge-model", help="model at that endpoint")
    group.add_argument(
        "--concurrency", type=int, default=16, help="concurrent requests to the judge"
    )
    group.add_argument("--retries", type=int, default=4, help="retries of a failed request")


def add_card(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``vllm-steer card``."""
    card = commands.add_parser("card", help="write a pack's README.md with plots")
    card.add_argument("pack", type=Path, help="directory of the pack")
    card.add_argument("--sweep", type=Path, metavar="FILE", help="sweep.json to show")
    card.set_defaults(run=_card)


def json_object(text: str) -> dict[str, Any]:
    """Reads a JSON object, as the type of an argument.

    Raises:
        ValueError: It is not one.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _sweep(args: argparse.Namespace) -> None:
    with extras("offline"):
        from vllm_steer.offline.evaluate.subjects import Selection, class_of, subject_of
    from vllm_steer.offline.evaluate.generation import generating
    from vllm_steer.offline.evaluate.sweep import run_sweep
    from vllm_steer.offline.evaluate.tables import markdown, write_result

    packs = [load_pack(path) for path in args.packs]
    prefixes = _prefixes(args, packs)
    subjects = [
        subject_of(
            pack,
            _questions(args, args.concept_class or class_of(pack)),
            Selection(args.concept_class, args.scales, concepts, args.layers),
            prefixes[pack.name],
        )
        for pack, concepts in _concepts(args.concepts, packs)
    ]
    judge = given_judge(args, [name for pack in packs for name in pack.directions])
    store = args.out / "answers"
    with generating(args.model, packs, args.max_tokens, store, args.engine) as generator:
        result = run_sweep(generator, subjects, judge)
    write_result(args.out, result)
    sys.stdout.write(markdown(result))


def _card(args: argparse.Namespace) -> None:
    with extras("offline,plots"):
        from vllm_steer.offline.evaluate.card import diagnostics_of, write_card
    from vllm_steer.offline.evaluate.results import read_result

    sweep = read_result(args.sweep) if args.sweep else None
    written = write_card(load_pack(args.pack), sweep, diagnostics_of(args.pack))
    sys.stdout.write(f"{written}\n")


def _concepts(
    wanted: list[str] | None, packs: list[SteeringPack]
) -> list[tuple[SteeringPack, list[str]]]:
    """Returns the packs with wanted directions, each with those it has."""
    known = [name for pack in packs for name in pack.directions]
    for name in wanted or ():
        if name not in known:
            raise EvaluationError(f"no pack has a direction {name!r}; {choices(name, known)}")
    chosen = [
        (pack, [name for name in pack.directions if wanted is None or name in wanted])
        for pack in packs
    ]
    return [(pack, names) for pack, names in chosen if names]


def _prefixes(args: argparse.Namespace, packs: list[SteeringPack]) -> dict[str, dict[str, Prefix]]:
    """Returns the prefixes that replace those of the packs, by pack and direction."""
    from vllm_steer.offline.models.prompts import PREFIX_TEMPLATES

    names = [name for pack in packs for name in pack.directions]
    given = given_prefixes(args, names)
    if unknown := sorted(set(given) - set(names)):
        raise EvaluationError(f"prefixes are given for {unknown}, which are in no pack")
    unknown = [name for pack in packs for name, d in pack.directions.items() if d.prefix is None]
    if not given and args.concept_class in PREFIX_TEMPLATES:
        given = given_prefixes(args, unknown, args.concept_class)
    return {
        pack.name: {name: given[name] for name in pack.directions if name in given}
        for pack in packs
    }


def _questions(args: argparse.Namespace, concept_class: str) -> QuestionSet:
    from vllm_steer.offline.files import read_lines
    from vllm_steer.offline.questions.by_class import given_questions, own_questions

    files = (args.tuning_questions, args.questions)
    if files == (None, None) and not args.statements:
        return own_questions(concept_class)
    if None in files:
        raise EvaluationError(
            "give both --tuning-questions and --questions: a scale chosen on the reported questions "
            "would look better than it is"
        )
    tuning, reported = (read_lines(file, EvaluationError) for file in files)
    return given_questions(tuning, reported, args.statements)


def given_judge(args: argparse.Namespace, names: Sequence[str]) -> Judge:
    """Returns the judge that is asked for.

    Args:
        args: The arguments of :func:`add_judge`.
        names: Names of the directions, whose words are looked for where no keywords are given.

    Raises:
        EvaluationError: What the judge needs is missing.
    """
    from vllm_steer.offline.demo.judge import DemoJudge
    from vllm_steer.offline.evaluate.judges import KeywordJudge
    from vllm_steer.offline.files import read_lines, read_text

    if args.judge == "demo":
        return DemoJudge()
    if args.judge == "keywords":
        if args.keywords is not None:
            return KeywordJudge.of_lines(read_lines(args.keywords, EvaluationError), args.least)
        return KeywordJudge.of_names(names)
    if args.judge == "script":
        from vllm_steer.offline.evaluate.script import Script, ScriptJudge

        if not args.script:
            raise EvaluationError("--judge script needs --script FILE")
        return ScriptJudge(Script.parse(args.script, args.script_timeout))
    if not args.judge_url or not args.judge_model:
        raise EvaluationError("--judge llm needs --judge-url and --judge-model")
    with extras("cpu"):
        from vllm_steer.offline.evaluate.llm_judge import LlmJudge
    from vllm_steer.offline.evaluate.rubrics import RUBRICS
    from vllm_steer.offline.questions.by_class import GENERAL

    return LlmJudge(
        args.judge_url,
        args.judge_model,
        os.environ.get(API_KEY_VARIABLE, "none"),
        args.judge_mode,
        rubrics=RUBRICS
        if args.rubric is None
        else {GENERAL: read_text(args.rubric, EvaluationError)},
        concurrency=args.concurrency,
        retries=args.retries,
    )


@contextmanager
def extras(names: str) -> Iterator[None]:
    """Context of imports that need extras.

    Args:
        names: The extras.

    Raises:
        EvaluationError: One of them is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"{error.name} is not installed; pip install 'vllm-steer[{names}]'"
        ) from error
