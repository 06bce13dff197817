"""Concepts learned from the prefixed model's own answers: by an estimator of labelled states, or trained.

Answers are generated before, see ``vllm_steer.offline.extract.answer_generation``; here they are read and learned from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray

from vllm_steer.offline.estimators.fit import fit_direction
from vllm_steer.offline.estimators.labelled_rows import Direction, LabelledRows
from vllm_steer.offline.estimators.labels import hard_labels, interleave
from vllm_steer.offline.extract.answer_states import BY_ATTENTION, AnswerStates, read_answers
from vllm_steer.offline.extract.answers import ConceptAnswers
from vllm_steer.offline.extract.block_choice import seeing_blocks
from vllm_steer.offline.extract.fits import fit_options, fitted_vectors, validation_metrics
from vllm_steer.offline.extract.learning import ExtractionJob, Learned
from vllm_steer.offline.extract.training import Lesson, Trained, TrainingOptions, train
from vllm_steer.offline.models.likelihood import AnswerModel
from vllm_steer.offline.models.loading import load_model

Floats = NDArray[np.float32]

# Training starts from a difference of means over so many answers, which is enough for a start.
_WARM_ANSWERS = 24
# Answers that residual norms are measured on where nothing else is read.
_NORM_ANSWERS = 16


class AnswerLearner:
    """A loaded model that learns concepts from answers."""

    def __init__(self, job: ExtractionJob) -> None:
        """Loads the model.

        Args:
            job: What to extract; it holds the answers of every concept.

        Raises:
            ExtractionError: The model cannot be loaded.
        """
        self._job, settings = job, job.settings
        self._reads_attention = settings.estimator != "trained" and (
            settings.labels == "soft" or settings.answer_tokens in BY_ATTENTION
        )
        # Eager attention alone hands out its weights; for all else the library's own choice is faster.
        attention = "eager" if self._reads_attention else None
        self._model = load_model(job.model_path, settings.dtype, job.device, attention)

    def learn(self, names: Sequence[str], parallel: Parallel) -> list[Learned]:
        """Learns concepts, those that are trained in the same forward passes.

        Args:
            names: Names of the concepts.
            parallel: Runs the fits of the blocks.

        Raises:
            ExtractionError: A state is not finite, or a fit failed; the message names the concept.
        """
        if self._job.settings.estimator == "trained":
            return self._train(names)
        return [self._fit(name, self._job.answers[name], parallel) for name in names]

    def _fit(self, name: str, answers: ConceptAnswers, parallel: Parallel) -> Learned:
        settings, layers = self._job.settings, list(self._job.layers)
        states = self._read(answers, name)
        if settings.labels == "soft":
            layers = seeing_blocks(states.attention, layers, name)
        order, positive = interleave(*2 * (len(states.plain),))
        zeros = np.zeros(len(states.plain), dtype=np.float32)
        rows = []
        for layer in layers:
            hidden = np.concatenate([states.prefixed[:, layer], states.plain[:, layer]])[order]
            soft = np.concatenate([states.attention[:, layer], zeros])[order]
            labels = soft if settings.labels == "soft" else hard_labels(positive)
            rows.append(LabelledRows(f"concept {name!r}, block {layer}", hidden, labels, positive))
        found: list[Direction] = parallel(
            delayed(fit_direction)(settings.estimator, each, fit_options(settings)) for each in rows
        )
        vectors, plane = fitted_vectors(settings, found)
        metrics: dict[str, Any] = {}
        if self._reads_attention:
            metrics["attention_mean"] = states.attention[:, layers].mean(axis=0).tolist()
            metrics["attention_max"] = states.attention[:, layers].max(axis=0).tolist()
        if settings.held_out:
            metrics |= validation_metrics(found)
        for key in found[0].choice:
            metrics[key] = [direction.choice[key] for direction in found]
        return self._learned(answers, layers, vectors, metrics, states.residual_norms, plane)

    def _train(self, names: Sequence[str]) -> list[Learned]:
        settings, layers = self._job.settings, list(self._job.layers)
        concepts = [self._job.answers[name] for name in names]
        lessons, norms = [], []
        for name, answers in zip(names, concepts, strict=True):
            count = _WARM_ANSWERS if settings.train_warm else _NORM_ANSWERS
            states = self._read(answers, name, count)
            norms.append(states.residual_norms)
            difference = (states.prefixed - states.plain).mean(axis=0)[layers]
            start = settings.train_warm * difference
            lessons.append(Lesson(answers.learned, answers.stopping, start.astype(np.float32)))
        options = TrainingOptions(
            steps=settings.train_steps,
            answers=settings.train_answers,
            rate=settings.train_rate,
            penalty=settings.train_penalty,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        model = AnswerModel(self._model, layers, checkpointing=settings.train_checkpointing)
        steps = np.stack(norms)[:, layers].astype(np.float32)
        trained = train(model, lessons, steps, options, progress=", ".join(names))
        return [
            self._learned(answers, layers, found.vectors, _metrics(answers, found), norm)
            for answers, found, norm in zip(concepts, trained, norms, strict=True)
        ]

    def _read(self, answers: ConceptAnswers, name: str, count: int | None = None) -> AnswerStates:
        settings = self._job.settings
        return read_answers(
            self._model,
            [*answers.learned, *answers.stopping][:count],
            tokens=settings.answer_tokens,
            attention=self._reads_attention,
            batch_size=settings.batch_size,
            progress=name,
        )

    def _learned(
        self,
        answers: ConceptAnswers,
        layers: list[int],
        vectors: Floats,
        metrics: dict[str, Any],
        norms: NDArray[np.float64],
        plane: Floats | None = None,
    ) -> Learned:
        return Learned(
            layers=layers,
            vectors=vectors,
            metrics=metrics,
            figures={},
            residual_norms=norms.tolist(),
            prompts_sha256=hashlib.sha256(answers.digest.encode()).hexdigest(),
            device=self._model.device.type,
            plane=plane,
        )


def _metrics(answers: ConceptAnswers, found: Trained) -> dict[str, Any]:
    return {
        "stopping_gap_closed": found.gap_closed,
        "steps": found.steps,
        "tokens_saved": answers.tokens_saved,
    }
