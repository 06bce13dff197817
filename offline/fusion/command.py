"""``vllm-steer fusion``: files of questions to reference vectors, a pack and a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steer.offline.evaluate.generation import generating
from vllm_steer.offline.fusion.evaluate import FusionQuestions, run_fusion, words_are_there
from vllm_steer.offline.fusion.pack import FusionDeltas, write_deltas
from vllm_steer.offline.fusion.questions import read_questions
from vllm_steer.offline.fusion.references import measure_references
from vllm_steer.offline.fusion.results import FusionResult, write_result
from vllm_steer.offline.fusion.search import Budget, Kind, cases_of
from vllm_steer.offline.fusion.steered import steered_deltas
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.offline.models.loading import load_config, load_model, model_identity

PACK_NAME = "fusion"


@dataclass(frozen=True)
class Options:
    """Options of a run.

    Attributes:
        model: Checkpoint directory or hub id.
        questions: File of questions to report on.
        tuning: File of questions to search common scales on; None for none.
        out: Output directory.
        kinds: Which layers share a scale.
        trials: Trials of each search.
        low: Smallest value of alpha and of gamma.
        high: Largest value of either.
        right: Share of the gold answer's words that makes an answer right.
        max_tokens: Longest answer.
        seed: Seed of the searches.
        dtype: Dtype of the model for the vectors.
        device: Its device; None for CUDA if available, else CPU.
        engine: More arguments of ``vllm.LLM``.
        chat: Format of the prompts.
    """

    model: str
    questions: Path
    tuning: Path | None
    out: Path
    kinds: tuple[Kind, ...]
    trials: int
    low: float
    high: float
    right: float
    max_tokens: int
    seed: int
    dtype: str
    device: str | None
    engine: Mapping[str, Any]
    chat: ChatFormat = ChatFormat()


def fuse(options: Options) -> FusionResult:
    """Measures reference vectors, searches scales and writes pack and result.

    Raises:
        EvaluationError: A file or an option is unusable, or answers could not be generated.
        ExtractionError: The model cannot be used.
        PackError: The pack cannot be written.
    """
    budget = Budget(options.trials, options.low, options.high, options.seed)
    questions = read_questions(options.questions)
    tuning = read_questions(options.tuning) if options.tuning else []
    _, tokenizer = load_config(options.model, options.chat)
    model = load_model(options.model, options.dtype, options.device)
    every = [*questions, *tuning]
    references = measure_references(model, tokenizer, every)
    layers = references.reference.shape[1]
    cases = cases_of(len(questions), len(tuning), options.kinds, layers, budget)
    deltas = steered_deltas(model, references, cases)
    pack = write_deltas(
        options.out / "pack",
        PACK_NAME,
        model_identity(options.model, model.config, tokenizer),
        FusionDeltas(every, cases, deltas, references.residual_norms),
        model.dtype,
        options.chat,
    )
    # Frees the memory for the engine.
    del model
    store = options.out / "answers"
    given = (options.model, [pack], options.max_tokens, store, options.engine)
    with generating(*given, bar=False) as generator:
        result = run_fusion(
            generator,
            pack,
            FusionQuestions(questions, tuning),
            cases,
            budget,
            words_are_there(options.right),
        )
    write_result(options.out, result)
    return result
