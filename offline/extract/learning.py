"""One concept: its prompts run once, tokens and blocks are chosen, and a direction is fitted per block.

Prefixed prompts run once per concept; unprefixed prompts run once and are shared by all concepts. One
pass keeps attention and hidden states of all candidate tokens, and the token of each block is chosen
afterwards. The training positives are the prompts that tokens are chosen on, so that no prompt is run
for the choice alone; under ``compat`` the authors' mixture of both sets of statements is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vllm_steer.offline.estimators.fit import fit_direction
from vllm_steer.offline.estimators.labelled_rows import Direction, LabelledRows
from vllm_steer.offline.estimators.labels import (
    choose_tokens,
    fixed_tokens,
    hard_labels,
    interleave,
    soft_labels,
)
from vllm_steer.offline.extract.answers import ConceptAnswers
from vllm_steer.offline.extract.block_choice import choose_blocks, seeing_blocks
from vllm_steer.offline.extract.capture import (
    REFERENCE,
    Captured,
    CaptureOptions,
    CapturePath,
    capture,
    choose_path,
)
from vllm_steer.offline.extract.enrichment import PermutationTest, TokenChoice
from vllm_steer.offline.extract.fits import fit_options, fitted_vectors, validation_metrics
from vllm_steer.offline.extract.settings import ExtractionSettings
from vllm_steer.offline.models.loading import load_model
from vllm_steer.offline.models.prompts import (
    AnswerPair,
    RenderedPrompt,
    render_answer,
    render_prompt,
)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ExtractionJob:
    """What is extracted, resolved for a model; enough for any process to learn any concept.

    Attributes:
        model_path: Checkpoint directory or Hugging Face model id.
        settings: How to extract.
        layers: Blocks to learn directions for, or to choose among, ascending.
        candidates: Number of candidate tokens, N.
        positives: Statements of the prefixed prompts.
        negatives: Statements of the unprefixed prompts.
        probe: A prefix like those to come, to try the model with.
        device: Device of the model; None for CUDA if available, else CPU.
        workers: Processes that fit directions.
        pairs: Answer pairs by concept, in place of statements and prefixes.
        contrast: Prefixes of the negative statements, taken by turns; without any they have none.
        answers: Answers by concept, in place of statements, where they are learned from.
    """

    model_path: str
    settings: ExtractionSettings
    layers: tuple[int, ...]
    candidates: int
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    probe: str
    device: str | None
    workers: int
    pairs: Mapping[str, Sequence[AnswerPair]] = field(default_factory=dict)
    contrast: tuple[str, ...] = ("",)
    answers: Mapping[str, ConceptAnswers] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Learned:
    """The result of learning one concept.

    Attributes:
        layers: Blocks that have a direction, ascending.
        vectors: ``[layers, hidden_size]``, float32; unit rows unless the settings keep lengths.
        metrics: Figures for the manifest; each list has one entry per layer.
        figures: Figures of every block and candidate token, ``[blocks, candidates]``, float32:
            ``attention_mean`` and ``attention_max`` over prompts, and where the enrichment was tested
            ``enrichment``, ``enrichment_p``, ``enrichment_q`` and ``enriched_heads``.
        residual_norms: Median residual norm of every block on the unprefixed prompts.
        prompts_sha256: Digest of the unprefixed and the concept's own prompts.
        device: Type of the device that the model ran on.
        plane: Likewise the second axes of steering planes, where the method has them.
    """

    layers: list[int]
    vectors: Floats
    metrics: dict[str, Any]
    figures: dict[str, Floats]
    residual_norms: list[float]
    prompts_sha256: str
    device: str
    plane: Floats | None = None


class ConceptLearner:
    """A loaded model with the unprefixed prompts' states."""

    def __init__(self, job: ExtractionJob, tokenizer: PreTrainedTokenizerBase) -> None:
        """Loads the model and runs the unprefixed prompts.

        Args:
            job: What to extract.
            tokenizer: The model's tokenizer.

        Raises:
            ExtractionError: The model cannot be loaded or hooked, or a prompt cannot be rendered.
        """
        self._job, self._tokenizer = job, tokenizer
        settings = job.settings
        self._model: PreTrainedModel = load_model(job.model_path, settings.dtype, job.device)
        self._path = self._fastest() if settings.attention == "auto" else REFERENCE
        self._unprefixed: Captured | None = None
        self._digest = hashlib.sha256()
        if not job.pairs:
            prompts = [
                render_prompt(tokenizer, statement, prefix, strip=not settings.compat)
                for statement, prefix in zip(job.negatives, cycle(job.contrast), strict=False)
            ]
            self._digest.update(_content(prompts))
            self._unprefixed = self._capture(prompts, "unprefixed prompts", None)

    def learn(self, name: str, prefix: str, parallel: Parallel) -> Learned:
        """Learns one concept.

        Args:
            name: Name of the concept.
            prefix: What makes the model take it on.
            parallel: Runs the fits of the blocks.

        Raises:
            ExtractionError: A prompt cannot be rendered, or a fit failed; the message names the
                concept and the block.
        """
        settings = self._job.settings
        mixed = _authors_mixture(self._job) if settings.compat else []
        pairs = self._job.pairs.get(name, ())
        prompts = [render_answer(self._tokenizer, pair.prompt, pair.positive) for pair in pairs]
        prompts = prompts or self._render([*self._job.positives, *mixed], prefix)
        test = None
        if settings.permutations:
            longest = max(len(prompt.token_ids) for prompt in prompts)
            choice = self._token_choice(len(prompts))
            test = PermutationTest(settings.permutations, settings.seed, longest, choice)
        prefixed = self._capture(prompts, name, test)
        digest = self._digest.copy()
        digest.update(_content(prompts))
        plain = self._unprefixed
        if plain is None:
            others = [render_answer(self._tokenizer, pair.prompt, pair.negative) for pair in pairs]
            digest.update(_content(others))
            plain = self._capture(others, name, None)
        tokens = self._tokens(prefixed)
        layers = self._layers(name, prefixed, tokens)
        found: list[Direction] = parallel(
            delayed(fit_direction)(settings.estimator, rows, fit_options(settings))
            for rows in self._rows(name, prefixed, plain, tokens, layers)
        )
        vectors, plane = fitted_vectors(settings, found)
        return Learned(
            layers=layers,
            vectors=vectors,
            metrics=self._metrics(prefixed, tokens, layers, found),
            figures=_figures(prefixed),
            residual_norms=plain.residual_norms.tolist(),
            prompts_sha256=digest.hexdigest(),
            device=self._model.device.type,
            plane=plane,
        )

    def _render(self, statements: Sequence[str], prefix: str = "") -> list[RenderedPrompt]:
        strip = not self._job.settings.compat
        return [
            render_prompt(self._tokenizer, statement, prefix, strip=strip)
            for statement in statements
        ]

    def _fastest(self) -> CapturePath:
        pairs = [
            render_answer(self._tokenizer, pair.prompt, pair.positive)
            for one in self._job.pairs.values()
            for pair in one
        ]
        prompts = pairs or self._render(self._job.positives, self._job.probe)
        prompts.sort(key=lambda prompt: len(prompt.text))
        few = [prompts[0], prompts[len(prompts) // 2], prompts[-1]]
        return choose_path(self._model, few, self._job.candidates)

    def _capture(
        self, prompts: Sequence[RenderedPrompt], name: str, test: PermutationTest | None
    ) -> Captured:
        return capture(
            self._model,
            prompts,
            candidates=self._job.candidates,
            batch_size=self._job.settings.batch_size,
            options=CaptureOptions(self._path, test, self._job.settings.compat, name),
        )

    def _token_choice(self, prompts: int) -> TokenChoice | None:
        """Returns how attention chooses tokens, given the number of prefixed prompts; None for fixed
        tokens."""
        settings = self._job.settings
        if settings.token != "attention":
            return None
        chosen_on = np.ones(prompts, dtype=np.bool_)
        if settings.compat:
            chosen_on[1 : len(self._job.positives) : 2] = False
        return TokenChoice(chosen_on, settings.token_statistic)

    def _tokens(self, prefixed: Captured) -> NDArray[np.int64]:
        """Returns the token of every block, ``[blocks]``."""
        attention, token = prefixed.attention, self._job.settings.token
        choice = self._token_choice(len(attention))
        if choice is not None:
            return choose_tokens(attention[choice.prompts], choice.statistic)
        return fixed_tokens(int(token), *attention.shape[1:])

    def _layers(self, name: str, prefixed: Captured, tokens: NDArray[np.int64]) -> list[int]:
        settings, layers = self._job.settings, list(self._job.layers)
        if settings.labels == "soft":
            learned_on = prefixed.attention[: self._positives(name)]
            layers = seeing_blocks(soft_labels(learned_on, tokens), layers, name)
        if prefixed.enrichment is None:
            return layers
        score = prefixed.enrichment.score[np.arange(len(tokens)), tokens]
        return choose_blocks(
            score, layers, settings.block_choice, settings.block_count, settings.block_threshold
        )

    def _positives(self, name: str) -> int:
        """Returns the number of prefixed prompts to learn from; they come first."""
        return len(self._job.pairs.get(name, self._job.positives))

    def _rows(
        self,
        name: str,
        prefixed: Captured,
        plain: Captured,
        tokens: NDArray[np.int64],
        layers: Sequence[int],
    ) -> list[LabelledRows]:
        """Returns the rows of every layer, in training order."""
        count = self._positives(name)
        order, positive = interleave(count, len(plain.hidden))
        rows = []
        for layer in layers:
            at = (layer, tokens[layer])
            hidden = np.concatenate([prefixed.hidden[:count, *at], plain.hidden[:, *at]])
            soft = np.concatenate([prefixed.attention[:count, *at], plain.attention[:, *at]])
            labels = soft[order] if self._job.settings.labels == "soft" else hard_labels(positive)
            rows.append(
                LabelledRows(f"concept {name!r}, block {layer}", hidden[order], labels, positive)
            )
        return rows

    def _metrics(
        self,
        prefixed: Captured,
        tokens: NDArray[np.int64],
        layers: Sequence[int],
        found: Sequence[Direction],
    ) -> dict[str, Any]:
        """Returns a direction's figures; each list has one entry per layer."""
        attention = soft_labels(prefixed.attention, tokens)[:, layers]
        metrics: dict[str, Any] = {
            "token": tokens[layers].tolist(),
            "attention_mean": attention.mean(axis=0).tolist(),
            "attention_max": attention.max(axis=0).tolist(),
        }
        if self._job.settings.held_out:
            metrics |= validation_metrics(found)
        if enrichment := prefixed.enrichment:
            p_values, q_values = enrichment.at(tokens)
            metrics["enrichment"] = enrichment.score[list(layers), tokens[layers]].tolist()
            metrics["enrichment_p"] = p_values[layers].tolist()
            metrics["enrichment_q"] = q_values[layers].tolist()
        for key in found[0].choice:
            metrics[key] = [direction.choice[key] for direction in found]
        return metrics


def _figures(prefixed: Captured) -> dict[str, Floats]:
    figures = {
        "attention_mean": prefixed.attention.mean(axis=0),
        "attention_max": prefixed.attention.max(axis=0),
    }
    if enrichment := prefixed.enrichment:
        figures |= enrichment.figures
    return figures


def _authors_mixture(job: ExtractionJob) -> list[str]:
    """Returns what the authors choose tokens on in addition to every other training positive.

    They ask every other of all statements, those of the prefixed prompts before the others, with
    the prefix.
    """
    return list(job.negatives[len(job.positives) % 2 :: 2])


def _content(prompts: Sequence[RenderedPrompt]) -> bytes:
    """Returns the prompts in a form without ambiguous ends, for the data digest."""
    return json.dumps([prompt.text for prompt in prompts]).encode()
