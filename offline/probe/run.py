"""Probes of a pack, measured through the engine and written into its manifest.

Each file of texts is parted into halves at random. The layer is the one whose AUROC is highest on the first halves, and
a threshold is chosen on the first half of the negative texts; everything that is reported is measured on the second.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_steer.errors import EvaluationError, choices
from vllm_steer.fields import show_layers
from vllm_steer.offline.engine.reading import ReadingEngine
from vllm_steer.offline.engine.tokens import Asked
from vllm_steer.offline.measures.detection import (
    Doubles,
    auroc,
    auroc_intervals,
    rate_above,
    separation,
    threshold,
)
from vllm_steer.offline.models.loading import public_name, template_digest
from vllm_steer.offline.probe.settings import ProbeSettings
from vllm_steer.offline.probe.texts import Text, check_apart, digest_of, rendered
from vllm_steer.packs.pack import (
    Probe,
    ProbeLayer,
    ProbeThreshold,
    SteeringPack,
    update_records,
)
from vllm_steer.request.reads import MAX_READS

STORE = ".probe"
# Texts that are read sooner than an engine is compiled.
_FEW = 512
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class ProbeTexts:
    """Texts of a concept, and texts without it."""

    positive: Sequence[Text]
    negative: Sequence[Text]


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """The scores of all texts for one direction.

    Attributes:
        layers: Layers, ascending.
        positive: Float64 ``[layers, positives]``.
        negative: Float64 ``[layers, negatives]``.
    """

    layers: tuple[int, ...]
    positive: Doubles
    negative: Doubles


@dataclass(frozen=True, eq=False)
class ProbeParts:
    """The scores of texts by what they are for; none that is held out is in another part.

    Attributes:
        choosing: Those that the layer is chosen on.
        thresholds: Those of negative texts that thresholds are chosen on, float64 ``[layers, texts]``.
        heldout: Those that everything is reported on.
    """

    choosing: ProbeScores
    thresholds: Doubles
    heldout: ProbeScores


def probe_pack(
    pack: SteeringPack,
    model_path: str | os.PathLike[str],
    texts: ProbeTexts,
    settings: ProbeSettings,
    directions: Sequence[str] | None = None,
    engine: Mapping[str, Any] | None = None,
) -> tuple[SteeringPack, dict[str, ProbeScores]]:
    """Measures probes and writes them into the pack's manifest.

    The same call after a kill goes on where it was.

    Args:
        pack: The pack.
        model_path: Checkpoint directory or hub id of its model.
        texts: What is scored.
        settings: How.
        directions: Names of the directions; None for all.
        engine: More arguments of ``vllm.LLM``.

    Returns:
        The pack, written anew and read back, and the scores by direction.

    Raises:
        EvaluationError: A direction, a layer or a text is not what can be read, or the engine fails.
        PackError: The pack cannot be written.
    """
    settings.check(len(texts.positive), len(texts.negative))
    check_apart(texts.positive, texts.negative)
    layers = _layers(pack, directions, settings)
    every = [*texts.positive, *texts.negative]
    _check_unanswered(every, settings)
    store = pack.path / STORE
    quick = len(every) <= _FEW
    most = max(len({name for name, _ in part}) for part in _parts(layers))
    with ReadingEngine(model_path, [pack], most, engine, store, quick=quick) as running:
        table = _scored(running, pack, every, layers, settings)
        told = _told(running, texts, settings)
    scores, at = {}, 0
    for name, own in layers.items():
        rows = table[:, at : at + len(own)].T
        at += len(own)
        scores[name] = ProbeScores(
            own, rows[:, : len(texts.positive)], rows[:, len(texts.positive) :]
        )
    probes = {
        name: {"probe": measured(halved(found, settings.seed), settings, told)}
        for name, found in scores.items()
    }
    written = update_records(pack, probes)
    # What was kept is of use to a run that did not end.
    shutil.rmtree(store, ignore_errors=True)
    return written, scores


def halved(scores: ProbeScores, seed: int) -> ProbeParts:
    """Parts texts at random: layer and thresholds are chosen on the first halves, the second are held out.

    Args:
        scores: Scores of all texts.
        seed: Seed of the halves.
    """
    rng = np.random.default_rng(seed)
    positive, negative = (_halves(rng, each) for each in (scores.positive, scores.negative))
    first, second = (
        ProbeScores(scores.layers, *both) for both in zip(positive, negative, strict=True)
    )
    return ProbeParts(first, first.negative, second)


def measured(parts: ProbeParts, settings: ProbeSettings, told: Mapping[str, Any]) -> Probe:
    """Chooses layer and thresholds, and measures them on texts that are held out.

    Args:
        parts: Scores of the texts.
        settings: How they were made.
        told: The other fields of the probe.
    """
    scores = parts.heldout
    chosen = (parts.choosing.positive, parts.choosing.negative)
    held = (scores.positive, scores.negative)
    found, known = auroc(*held), auroc(*chosen)
    ends = auroc_intervals(*held, settings.seed)
    # Where many layers tell all texts apart, the one that does it by the widest margin.
    best = max(zip(known, separation(*chosen), range(len(known)), strict=True))[2]
    layers = []
    for row, layer in enumerate(scores.layers):
        low, high = (float(end[row]) for end in ends)
        apart = low == high
        layers.append(
            ProbeLayer(
                layer=layer,
                auroc=float(found[row]),
                low=None if apart else min(low, float(found[row])),
                high=None if apart else max(high, float(found[row])),
                thresholds=[
                    _threshold(rate, parts.thresholds[row], held[0][row], held[1][row])
                    for rate in sorted(set(settings.rates))
                ],
            )
        )
    return Probe(
        **told,
        layer=scores.layers[best],
        score=settings.score,
        tokens=settings.tokens,
        max_tokens=settings.max_tokens if settings.tokens == "generated" else None,
        seed=settings.seed,
        layers=layers,
    )


def _halves(rng: np.random.Generator, scores: Doubles) -> tuple[Doubles, Doubles]:
    """Parts texts, ``[layers, texts]``, at random; the first half has one more of an odd number."""
    order = rng.permutation(scores.shape[1])
    half = (len(order) + 1) // 2
    return scores[:, order[:half]], scores[:, order[half:]]


def _threshold(
    rate: float, chosen: Doubles, positive: Doubles, negative: Doubles
) -> ProbeThreshold:
    found = threshold(chosen, rate)
    false, true = (rate_above(scores, found.above) for scores in (negative, positive))
    return ProbeThreshold(
        fpr=rate,
        above=found.above,
        low=found.low,
        high=found.high,
        false_positives=false.share,
        false_positives_low=false.low,
        false_positives_high=false.high,
        true_positives=true.share,
        true_positives_low=true.low,
        true_positives_high=true.high,
    )


def _layers(
    pack: SteeringPack, directions: Sequence[str] | None, settings: ProbeSettings
) -> dict[str, tuple[int, ...]]:
    """The layers that are measured, by direction in the order of the pack."""
    for name in directions or ():
        if name not in pack.directions:
            raise EvaluationError(
                f"--direction: pack {pack.name!r} has no direction {name!r}; {choices(name, pack.directions)}"
            )
    found = {}
    for name, record in pack.directions.items():
        if directions is not None and name not in directions:
            continue
        wanted = sorted(set(record.layers if settings.layers is None else settings.layers))
        if unknown := sorted(set(wanted) - set(record.layers)):
            raise EvaluationError(
                f"--layers: direction {name!r} has no vector for layers {unknown}; it has {show_layers(record.layers)}"
            )
        found[name] = tuple(wanted)
    return found


def _check_unanswered(texts: Sequence[Text], settings: ProbeSettings) -> None:
    answered = [text.where for text in texts if text.answered]
    if settings.tokens == "generated" and answered:
        raise EvaluationError(
            f"{answered[0]}: the conversation ends with an answer, so there is none to generate; end it with the user's "
            f"message, or give --tokens prompt"
        )


def _parts(layers: Mapping[str, tuple[int, ...]]) -> list[list[tuple[str, int]]]:
    """Directions with their layers, in parts that one request may read."""
    every = [(name, layer) for name, own in layers.items() for layer in own]
    return [every[at : at + MAX_READS] for at in range(0, len(every), MAX_READS)]


def _scored(
    engine: ReadingEngine,
    pack: SteeringPack,
    texts: Sequence[Text],
    layers: Mapping[str, tuple[int, ...]],
    settings: ProbeSettings,
) -> Doubles:
    """Returns the scores, ``[texts, directions and their layers]``."""
    prompts = [rendered(engine.tokenizer, text) for text in texts]
    answers: list[tuple[int, ...]] = [()] * len(texts)
    columns: list[Doubles] = []
    for part in _parts(layers):
        reads = [{"name": f"{pack.name}/{name}", "layers": [layer]} for name, layer in part]
        asked = [Asked(p, a, {"read": reads}) for p, a in zip(prompts, answers, strict=True)]
        # What was answered once is read again as it is.
        if settings.tokens == "generated" and not columns:
            found = engine.answer(asked, settings.max_tokens, settings.score, "answers")
            answers = [tokens for tokens, _ in found]
            columns.append(np.array([row for _, row in found]))
            _check_read(texts, [len(answer) for answer in answers], "the model answers with")
        else:
            if settings.tokens == "prompt":
                _check_read(texts, [len(prompt) for prompt in prompts], "the prompt has")
            columns.append(np.array(engine.read(asked, settings.score, "scores")))
    return np.concatenate(columns, axis=1)


def _check_read(texts: Sequence[Text], counts: Sequence[int], what: str) -> None:
    """Raises EvaluationError where a text has no token that is read."""
    empty = [text.where for text, count in zip(texts, counts, strict=True) if count < 2]
    if empty:
        raise EvaluationError(
            f"{'; '.join(empty[:_SHOWN])}: {what} one token alone, so none is read; remove {len(empty)} such texts"
        )


def _told(engine: ReadingEngine, texts: ProbeTexts, settings: ProbeSettings) -> dict[str, Any]:
    """What a probe says of its model and texts."""
    return {
        "model": public_name(engine.model),
        "dtype": engine.dtype,
        "chat_template_sha256": template_digest(engine.tokenizer),
        "positives": len(texts.positive),
        "negatives": len(texts.negative),
        "positives_sha256": digest_of(texts.positive),
        "negatives_sha256": digest_of(texts.negative),
    }
