"""Chooses features of a sparse autoencoder by what they do on a file of examples; each preset is a paper's rule.

Activations are of the prompt's or answer's tokens without the first token of the whole, an attention sink.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.activations import ActivationReader, Pool, Reading
from vllm_steer.offline.convert.sae_files import Features
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.offline.train.data import read_lines_of

Floats = NDArray[np.float64]
_Text = Annotated[str, Field(min_length=1, max_length=2**20)]
# Shares of the texts, and of the sequences of random tokens, on which a feature of LangFIR is active.
CONSISTENT: Final = 0.9
SELDOM: Final = 0.1


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PairLine(_Line):
    """A line for ``contrast``.

    Attributes:
        prompt: What the user says.
        prefixed: The same, with what the features are to stand for.
    """

    prompt: _Text
    prefixed: _Text


class TextLine(_Line):
    """A line for ``langfir``.

    Attributes:
        text: A text of the language.
    """

    text: _Text


class ScoredLine(_Line):
    """A line for ``corrsteer``.

    Attributes:
        prompt: What the user says.
        answer: The model's own answer.
        score: How good it is; above 0 for success.
    """

    prompt: _Text
    answer: _Text
    score: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, eq=False)
class Measured:
    """What the features do, each ``[features]``.

    Attributes:
        score: By which they are ranked; −inf where a feature may not be chosen.
        scale: Activation to set.
        mean: Mean activation on the examples that show the concept.
        mean_without: On the others.
        active: Share of the former on which a feature is active.
        active_without: Of the others.
    """

    score: Floats
    scale: Floats
    mean: Floats
    mean_without: Floats
    active: Floats
    active_without: Floats


@dataclass(frozen=True)
class Chosen:
    """A chosen feature, with its figures of :class:`Measured`."""

    feature: int
    score: float
    scale: float
    mean: float
    mean_without: float
    active: float
    active_without: float


@dataclass(frozen=True)
class Preset:
    """A rule of choice.

    Attributes:
        line: What each line of the file must be.
        measure: Makes the figures.
        positions: Where the features act where a request names none.
        says: What it does.
        departs: Where it departs from its paper.
    """

    line: type[_Line]
    measure: Callable[[ActivationReader, PreTrainedTokenizerBase, Sequence[Any], int], Measured]
    positions: str
    says: str
    departs: str


def _measured(score: Floats, scale: Floats, shown: Floats, other: Floats) -> Measured:
    """Figures of pooled activations ``[examples, features]`` with and without the concept."""
    return Measured(
        score,
        scale,
        shown.mean(axis=0),
        other.mean(axis=0),
        (shown > 0).mean(axis=0),
        (other > 0).mean(axis=0),
    )


def contrast(
    reader: ActivationReader,
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[PairLine],
    seed: int,
) -> Measured:
    """By the difference of activations between the prompts of a pair, over its standard error."""

    def pooled(texts: Sequence[str]) -> Floats:
        prompts = [render_question(tokenizer, text, strip=False).token_ids for text in texts]
        return reader.pooled([Reading(ids, 0, len(ids)) for ids in prompts], Pool.MEAN)

    shown, plain = (
        pooled([line.prefixed for line in lines]),
        pooled([line.prompt for line in lines]),
    )
    away = shown - plain
    error = away.std(axis=0, ddof=1) / len(lines) ** 0.5
    mean = away.mean(axis=0)
    # Relative to the largest, so that a feature that hardly moves is not chosen for moving evenly.
    floor = 0.05 * float(np.abs(mean).max(initial=0.0)) + np.finfo(np.float64).tiny
    score = np.where(mean > 0, mean / (error + floor), -np.inf)
    return _measured(score, _mean_active(shown), shown, plain)


def langfir(
    reader: ActivationReader,
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[TextLine],
    seed: int,
) -> Measured:
    """By mean activation, of features that are active on nearly all texts and on few sequences of random tokens."""
    texts = [tuple(tokenizer(line.text)["input_ids"]) for line in lines]
    special = set(tokenizer.all_special_ids)
    known = range(min(len(tokenizer), reader.vocabulary))
    plain = np.array([number for number in known if number not in special])
    random = np.random.default_rng(seed)
    # What the tokenizer puts in front stays, so that the first token is the same one.
    noise = [
        tuple(t if t in special else int(random.choice(plain)) for t in tokens) for tokens in texts
    ]
    shown, other = (
        reader.pooled([Reading(ids, 0, len(ids)) for ids in found], Pool.MEAN)
        for found in (texts, noise)
    )
    consistent = (shown > 0).mean(axis=0) >= CONSISTENT
    kept = consistent & ((other > 0).mean(axis=0) <= SELDOM)
    score = np.where(kept, shown.mean(axis=0), -np.inf)
    return _measured(score, _mean_active(shown), shown, other)


def corrsteer(
    reader: ActivationReader,
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[ScoredLine],
    seed: int,
) -> Measured:
    """By Pearson's correlation of the largest activation over an answer's tokens with the answer's score."""
    readings = []
    for line in lines:
        prompt = render_question(tokenizer, line.prompt, strip=False).token_ids
        answer = tokenizer(line.answer, add_special_tokens=False)["input_ids"]
        readings.append(Reading((*prompt, *answer), len(prompt), len(prompt) + len(answer)))
    scores = np.array([line.score for line in lines])
    good = scores > 0
    if not 0 < good.sum() < len(good):
        raise ConversionError(
            "corrsteer compares answers with a score above 0 and others; the file has only one kind"
        )
    peaks = reader.pooled(readings, Pool.MAX)
    spread = peaks.std(axis=0) * scores.std()
    away = ((peaks - peaks.mean(axis=0)) * (scores - scores.mean())[:, None]).mean(axis=0)
    found = np.divide(away, spread, out=np.zeros_like(away), where=spread > 0)
    score = np.where(found > 0, found, -np.inf)
    return _measured(score, peaks[good].mean(axis=0), peaks[good], peaks[~good])


def _mean_active(pooled: Floats) -> Floats:
    """Mean over the examples on which a feature is active; 0 where there are none."""
    active = (pooled > 0).sum(axis=0)
    return np.divide(pooled.sum(axis=0), active, out=np.zeros(pooled.shape[1]), where=active > 0)


PRESETS: Final[Mapping[str, Preset]] = {
    "contrast": Preset(
        PairLine,
        contrast,
        "all",
        "pairs of prompts with and without the concept; features whose activation rises evenly",
        "Pairwise prompts (arXiv 2511.00029): its composite score is replaced by the mean difference over its standard "
        "error, of mean activations over the prompt; one layer is ranked, and no strength is searched for.",
    ),
    "langfir": Preset(
        TextLine,
        langfir,
        "all",
        "texts of a language and random tokens; features active on nearly all texts and on little noise",
        "LangFIR (arXiv 2604.03532): the shares of 0.9 and 0.1 are this project's; random tokens are as many as the texts'; "
        'activations are set, where the paper adds a vector: ask with op "add" for that.',
    ),
    "corrsteer": Preset(
        ScoredLine,
        corrsteer,
        "generated",
        "scored answers of the model; features whose largest activation over an answer rises with the score",
        "CorrSteer (arXiv 2508.12535): one layer is ranked, answers come from a file, and the choice is not validated by "
        'steering; activations are set, where the paper adds the coefficient times the decoder row: ask with op "add".',
    ),
}


def read_examples(file: Path, preset: str) -> list[_Line]:
    """Reads the lines of a file for a preset.

    Raises:
        ExtractionError: It cannot be read, has fewer than two lines, or a line is not what the preset needs.
    """
    return read_lines_of(PRESETS[preset].line, file)


def choose(measured: Measured, features: Features, count: int) -> list[Chosen]:
    """Returns the features of the highest scores, the best first.

    Args:
        measured: The figures.
        features: The features.
        count: Most features.

    Raises:
        ConversionError: None may be chosen.
    """
    order = np.argsort(-measured.score, kind="stable")[:count]
    kept = [int(at) for at in order if np.isfinite(measured.score[at]) and measured.scale[at] > 0]
    if not kept:
        raise ConversionError(
            "no feature does what the preset looks for; give more or clearer examples, or another layer's autoencoder"
        )
    names = ("score", "scale", "mean", "mean_without", "active", "active_without")
    return [
        Chosen(features.ids[at], **{name: float(getattr(measured, name)[at]) for name in names})
        for at in kept
    ]


def report_json(
    preset: str, chosen: Sequence[Chosen], features: Features, examples: int, seed: int
) -> str:
    """Returns the report of a choice as JSON."""
    content = {
        "preset": preset,
        "departs": PRESETS[preset].departs,
        "format": features.format,
        "sha256": features.sha256,
        "hook": features.hook,
        "layer": features.layer,
        "examples": examples,
        "seed": seed,
        "features": [asdict(each) for each in chosen],
    }
    return json.dumps(content, indent=2) + "\n"


def report_table(chosen: Sequence[Chosen]) -> str:
    """Returns the report as a text table that ends in a newline."""
    lines = [
        f"{'feature':>9} {'score':>9} {'scale':>9} {'mean':>9} {'without':>9} {'active':>7} {'without':>7}"
    ]
    lines += [
        f"{each.feature:>9} {each.score:>9.3g} {each.scale:>9.3g} {each.mean:>9.3g} {each.mean_without:>9.3g} "
        f"{each.active:>7.2f} {each.active_without:>7.2f}"
        for each in chosen
    ]
    return "\n".join(lines) + "\n"
