"""The pipeline: a model, concepts and statements in, a steering pack out.

Finished concepts are kept on disk until the pack is written, so that a killed extraction continues; see
``vllm_steer.offline.extract.parts``. A concept that fails is reported and left out.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from vllm_steer.errors import ExtractionError
from vllm_steer.offline.engine.tokens import TokenEngine
from vllm_steer.offline.estimators.labelled_rows import LEAST_VALIDATION
from vllm_steer.offline.estimators.labels import fixed_tokens
from vllm_steer.offline.extract.answer_generation import AnswerSettings, concept_answers
from vllm_steer.offline.extract.answers import ConceptAnswers
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.figures import FIGURES_FILE, Figures, write_figures
from vllm_steer.offline.extract.learning import ExtractionJob, Learned
from vllm_steer.offline.extract.methods import METHODS
from vllm_steer.offline.extract.parts import Parts, answers_directory, library_versions
from vllm_steer.offline.extract.records import learned_records, learned_vectors, records_of
from vllm_steer.offline.extract.settings import ExtractionSettings
from vllm_steer.offline.extract.shards import learn_all
from vllm_steer.offline.models.loading import (
    check_quantisation,
    chosen_dtype,
    load_config,
    model_identity,
)
from vllm_steer.offline.models.prompts import (
    AnswerPair,
    Concept,
    count_candidates,
    without_thoughts,
)
from vllm_steer.offline.questions.everyday import everyday_questions
from vllm_steer.offline.shards import Shards
from vllm_steer.packs.pack import MethodRecord, PackContent, SteeringPack, load_pack, write_pack

__all__ = [
    "ComputeResources",
    "ExtractionData",
    "ExtractionSettings",
    "PackTarget",
    "Shards",
    "extract_pack",
]

logger = logging.getLogger(__name__)

_HERE = ComputeResources()
# Concepts whose answers come sooner than an engine is compiled.
_FEW = 4


def extract_pack(
    model_path: str | os.PathLike[str],
    data: ExtractionData,
    settings: ExtractionSettings,
    target: PackTarget,
    resources: ComputeResources = _HERE,
) -> SteeringPack:
    """Extracts one direction per concept and writes them as a steering pack.

    The same call after a kill continues with the unfinished concepts. Figures of all blocks and tokens are
    written to the pack's directory; see ``vllm_steer.offline.extract.figures``.

    Args:
        model_path: Checkpoint directory or Hugging Face model id.
        data: What the directions are learned from.
        settings: How to extract.
        target: The pack that is written.
        resources: Where it runs.

    Returns:
        The pack, read back from disk.

    Raises:
        ExtractionError: The arguments do not fit the model or each other, or a concept failed; the
            message names the concept and the block. A pack of the other concepts has been written
            then, and the same call tries the failed ones again.
        EvaluationError: The engine that generates answers fails.
        PackError: The pack cannot be written.
    """
    concepts, pairs = data.concepts, data.pairs
    if resources.workers < 1:
        raise ExtractionError(f"workers is {resources.workers}; it must be at least 1")
    config, tokenizer = load_config(model_path, settings.chat)
    # Checked first, since an engine could answer for hours before unreadable weights are noticed.
    check_quantisation(config, model_path)
    text = config.get_text_config()
    method = METHODS[settings.method]
    settings = settings.model_copy(update={"dtype": chosen_dtype(settings.dtype, resources.device)})
    if settings.learn_from == "answers":
        settings = _silent(settings, tokenizer)
    if pairs:
        concepts = _paired_concepts(pairs, settings)
    positives, negatives = [""], [""]
    if method.statements and not pairs and settings.learn_from == "prompts":
        positives = _taken(data.positive_statements, settings, "positive")
        negatives = _taken(data.negative_statements, settings, "negative")
        if settings.paired:
            positives = negatives = [*positives, *negatives]
    layers = _layers(settings, text.num_hidden_layers)
    # Names and scales are checked before hours of work.
    if target.default_scales is None:
        target = replace(target, default_scales=method.scale)
    records = records_of(target, concepts, layers, method, settings.prefix_role)
    if not pairs and (unprefixed := [name for name, prefix in concepts if not prefix.strip()]):
        raise ExtractionError(f"concepts {unprefixed} have an empty prefix")
    try:
        os.makedirs(target.path, exist_ok=True)
    except OSError as error:
        raise ExtractionError(
            f"{os.fspath(target.path)}: the pack cannot be written ({error.strerror}); give a directory that can be created"
        ) from error
    answers: Mapping[str, ConceptAnswers] = {}
    if settings.learn_from == "answers":
        if pairs:
            raise ExtractionError(
                "answer pairs are prompts to learn from, not learn_from 'answers'"
            )
        asked = data.questions or everyday_questions()
        store = answers_directory(target.path)
        quick = len(concepts) <= _FEW
        # The model answers as it is read.
        options = {"dtype": settings.dtype, **resources.engine}
        with TokenEngine(model_path, options=options, store=store, quick=quick) as answering:
            answers = concept_answers(
                answering,
                tokenizer,
                concepts,
                asked.learned[: settings.questions],
                asked.stopping[: settings.stopping_questions],
                AnswerSettings(settings.answer_length, settings.prefix_role, settings.answer_share),
            )
    job = ExtractionJob(
        model_path=str(model_path),
        settings=settings,
        layers=tuple(layers),
        candidates=_candidates(settings, tokenizer),
        positives=tuple(positives),
        negatives=tuple(negatives),
        probe=concepts[0].prefix,
        device=resources.device,
        workers=resources.workers,
        pairs=pairs,
        contrast=_contrast(settings, concepts),
        answers=answers,
    )
    if settings.token != "attention":
        fixed_tokens(settings.token, text.num_hidden_layers, job.candidates)
    identity = model_identity(model_path, config, tokenizer)
    parts = Parts(target.path, job, identity.model_dump())
    learned, failures = _learn(job, concepts, parts, resources.shards)
    if not learned:
        raise ExtractionError(_failure_text(failures, len(concepts)))
    _say_unvalidated(learned)
    pack = write_pack(
        target.path,
        PackContent(
            name=target.name,
            model=identity,
            directions=learned_records(records, learned, method, target.default_scales is not None),
            vectors=learned_vectors(learned),
            method=_method(job, learned),
            residual_norms=dict(enumerate(next(iter(learned.values())).residual_norms)),
        ),
    )
    if settings.learn_from == "prompts":
        write_figures(pack.path, _figures(learned))
    else:
        # Those of another extraction into this directory say nothing of this one.
        (pack.path / FIGURES_FILE).unlink(missing_ok=True)
    if failures:
        raise ExtractionError(
            f"{_failure_text(failures, len(concepts))}; {pack.path} holds the others, and the same "
            f"command tries these again"
        )
    parts.remove(concepts)
    return load_pack(pack.path)


def _learn(
    job: ExtractionJob, concepts: Sequence[Concept], parts: Parts, shards: Shards
) -> tuple[dict[str, Learned], dict[str, str]]:
    """Returns what each concept gave, in the order of the concepts, and why the others failed."""
    results: dict[str, Learned] = {}
    failures: dict[str, str] = {}
    for name, prefix in concepts:
        if (part := parts.load(name, prefix)) is not None:
            results[name] = part
    left = [concept for concept in concepts if concept.name not in results]
    if results:
        logger.info("%d of %d concepts were finished before", len(results), len(concepts))
    with tqdm(
        total=len(concepts), initial=len(results), desc="concepts", unit="concept"
    ) as progress:
        for index, result in learn_all(job, left, shards):
            name, prefix = left[index]
            if isinstance(result, Learned):
                parts.save(name, prefix, result)
                results[name] = result
            else:
                logger.error("concept %r failed and is left out: %s", name, result)
                failures[name] = result
            progress.update()
    return {name: results[name] for name, _ in concepts if name in results}, failures


def _silent(settings: ExtractionSettings, tokenizer: PreTrainedTokenizerBase) -> ExtractionSettings:
    """Returns the settings, without thoughts where nothing is said of them; the tokenizer renders by them."""
    chat = without_thoughts(tokenizer, settings.chat)
    if chat == settings.chat:
        return settings
    chat.apply_to(tokenizer)
    logger.warning(
        "this model thinks before it answers; directions are learned and measured without thoughts, which is recorded in "
        'the pack, and requests should say "chat_template_kwargs": {"enable_thinking": false} likewise; '
        "--chat-template-kwargs '{\"enable_thinking\": true}' learns from thoughts"
    )
    return settings.model_copy(update={"chat_template_kwargs": chat.chat_template_kwargs})


def _failure_text(failures: Mapping[str, str], total: int) -> str:
    shown = "; ".join(failures[name] for name in list(failures)[:5])
    return f"{len(failures)} of {total} concepts failed: {shown}"


def _say_unvalidated(learned: Mapping[str, Learned]) -> None:
    unvalidated = [
        name for name, concept in learned.items() if None in concept.metrics.get("validation_r", ())
    ]
    if unvalidated:
        logger.warning(
            "%d of %d directions were learned without validation, such as %r: a fifth of their prompts is fewer "
            "than %d, too few to choose an estimator's parameters by, so that the fixed ones are taken, all prompts "
            "are learned from, and validation_r is null; %d prompts of each side are enough",
            len(unvalidated), len(learned), unvalidated[0], LEAST_VALIDATION, 5 * LEAST_VALIDATION // 2,
        )  # fmt: skip


def _candidates(settings: ExtractionSettings, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns N, the number of tokens at the end of a prompt that may be chosen."""
    if settings.learn_from == "answers":
        return 1
    return settings.candidate_tokens or count_candidates(tokenizer)


def _layers(settings: ExtractionSettings, blocks: int) -> list[int]:
    default = range(1, blocks)
    if settings.estimator == "trained":
        # Below them a concept is not yet read, above them it is too late to say more than the next word.
        default = range(blocks // 4, max(blocks * 3 // 4, blocks // 4 + 1))
    layers = sorted(set(default if settings.layers is None else settings.layers))
    if not layers or layers[-1] >= blocks:
        raise ExtractionError(f"layers {layers} asked for; the model has 0 to {blocks - 1}")
    return layers


def _method(job: ExtractionJob, learned: Mapping[str, Learned]) -> MethodRecord:
    """Returns how the directions were learned."""
    settings = job.settings
    digest = hashlib.sha256()
    for concept in learned.values():
        digest.update(bytes.fromhex(concept.prompts_sha256))
    resolved: dict[str, Any] = {"layers": list(job.layers), "candidate_tokens": job.candidates}
    device = next(iter(learned.values())).device
    return MethodRecord(
        name=settings.method
        if METHODS[settings.method].fixed or settings.token == "attention"
        else "fixed_token",
        settings={
            **settings.model_dump(mode="json", exclude={"seed"}),
            **resolved,
            "device": device,
        },
        libraries=library_versions(),
        seed=settings.seed,
        data_sha256=digest.hexdigest(),
    )


def _contrast(settings: ExtractionSettings, concepts: Sequence[Concept]) -> tuple[str, ...]:
    """Returns the prefixes of the negative statements."""
    if settings.contrast == "nothing":
        return ("",)
    if len(concepts) < 2:
        raise ExtractionError("contrast 'concepts' needs at least two concepts")
    return tuple(prefix for _, prefix in concepts)


def _paired_concepts(
    pairs: Mapping[str, Sequence[AnswerPair]], settings: ExtractionSettings
) -> list[Concept]:
    """Returns the directions of answer pairs as concepts without prefix."""
    if settings.method != "caa":
        raise ExtractionError(f"answer pairs belong to method 'caa', not to {settings.method!r}")
    if empty := [name for name, given in pairs.items() if not given]:
        raise ExtractionError(f"no answer pairs for {empty}")
    return [Concept(name, "") for name in pairs]


def _figures(learned: Mapping[str, Learned]) -> Figures:
    keys = next(iter(learned.values())).figures
    arrays = {key: np.stack([concept.figures[key] for concept in learned.values()]) for key in keys}
    return Figures(list(learned), arrays)


def _taken(statements: Sequence[str], settings: ExtractionSettings, side: str) -> list[str]:
    """Returns the statements to use, stripped but under ``compat``."""
    stripped = [statement.strip() for statement in statements]
    if not stripped or not all(stripped):
        raise ExtractionError(f"{side} statements must be given, and none may be empty")
    count = settings.positive_count if side == "positive" else settings.negative_count
    if count is not None and count > len(stripped):
        raise ExtractionError(
            f"{side}_count is {count}, but there are {len(stripped)} {side} statements"
        )
    return list(statements if settings.compat else stripped)[:count]
