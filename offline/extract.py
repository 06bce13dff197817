"""The pipeline: a model, concepts and statements in, a steering pack out.

Prefixed prompts run once per concept; unprefixed prompts run once and are shared by all concepts.
One pass keeps attention and hidden states of all candidate tokens, and the token of each block is
chosen afterwards. The training positives are the prompts that tokens are chosen on, where the
authors choose on another mixture of statements: no prompt is run for the choice alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from joblib import Parallel, delayed, parallel_config
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline.capture import Captured, capture
from offline.estimators import Direction, RfmOptions, Rows, fit_direction
from offline.labels import choose_tokens, fixed_tokens, hard_labels, interleave, soft_labels
from offline.models import load_model, model_identity
from offline.prompts import RenderedPrompt, count_candidates, render_prompt
from offline.settings import ExtractionSettings
from vllm_steer.errors import ExtractionError, choices
from vllm_steer.pack import (
    DirectionRecord,
    MethodRecord,
    PackName,
    SteeringPack,
    write_pack,
)

__all__ = ["ExtractionSettings", "extract_pack"]

_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "xrfm")


@dataclass(frozen=True, eq=False)
class _Extractor:
    """A loaded model with the settings resolved for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: ExtractionSettings
    layers: list[int]
    candidates: int

    @classmethod
    def load(
        cls, model_path: str | os.PathLike[str], settings: ExtractionSettings, device: str | None
    ) -> _Extractor:
        model, tokenizer = load_model(model_path, settings.dtype, device)
        blocks = model.config.get_text_config().num_hidden_layers
        layers = sorted(set(range(1, blocks) if settings.layers is None else settings.layers))
        if not layers or layers[-1] >= blocks:
            raise ExtractionError(f"layers {layers} asked for; the model has 0 to {blocks - 1}")
        candidates = settings.candidate_tokens or count_candidates(tokenizer)
        if settings.token != "attention":
            fixed_tokens(settings.token, blocks, candidates)
        return cls(model, tokenizer, settings, layers, candidates)

    def render(self, statements: Sequence[str], prefix: str = "") -> list[RenderedPrompt]:
        return [render_prompt(self.tokenizer, statement, prefix) for statement in statements]

    def run(self, prompts: Sequence[RenderedPrompt], name: str) -> Captured:
        return capture(
            self.model,
            prompts,
            candidates=self.candidates,
            batch_size=self.settings.batch_size,
            progress=name,
        )

    def tokens(self, captured: Captured) -> NDArray[np.int64]:
        """Returns the token of every block, ``[blocks]``, from a concept's prefixed prompts."""
        if self.settings.token == "attention":
            return choose_tokens(captured.attention)
        return fixed_tokens(self.settings.token, *captured.attention.shape[1:])

    def rows(
        self, concept: str, prefixed: Captured, unprefixed: Captured, tokens: NDArray[np.int64]
    ) -> list[Rows]:
        """Returns the rows of every layer, in training order."""
        sides = (prefixed, unprefixed)
        order, positive = interleave(len(prefixed.hidden), len(unprefixed.hidden))
        soft = np.concatenate([soft_labels(side.attention, tokens) for side in sides])[order]
        rows = []
        for layer in self.layers:
            hidden = np.concatenate([side.hidden[:, layer, tokens[layer]] for side in sides])[order]
            labels = soft[:, layer] if self.settings.labels == "soft" else hard_labels(positive)
            rows.append(Rows(f"concept {concept!r}, block {layer}", hidden, labels, positive))
        return rows

    def metrics(
        self, prefixed: Captured, tokens: NDArray[np.int64], found: Sequence[Direction]
    ) -> dict[str, Any]:
        """Returns a direction's figures; each list has one entry per layer."""
        attention = soft_labels(prefixed.attention, tokens)[:, self.layers]
        keys = found[0].choice
        return {
            "token": tokens[self.layers].tolist(),
            "attention_mean": attention.mean(axis=0).tolist(),
            "attention_max": attention.max(axis=0).tolist(),
            "validation_r": [direction.validation_r for direction in found],
            **{key: [direction.choice[key] for direction in found] for key in keys},
        }

    def method(self, data_sha256: str) -> MethodRecord:
        """Returns how the directions were learned."""
        resolved: dict[str, Any] = {"layers": self.layers, "candidate_tokens": self.candidates}
        return MethodRecord(
            name="attention_guided" if self.settings.token == "attention" else "fixed_token",
            settings={
                **self.settings.model_dump(mode="json", exclude={"seed"}),
                **resolved,
                "device": self.model.device.type,
            },
            libraries={library: version(library) for library in _LIBRARIES},
            seed=self.settings.seed,
            data_sha256=data_sha256,
        )


@dataclass(frozen=True, eq=False)
class _Learned:
    """What a pack is written from.

    Attributes:
        vectors: Concept to ``[layers, hidden_size]``, float32.
        metrics: Concept to figures.
        residual_norms: Mean residual norm of every block.
        data_sha256: Digest of the prompts, in the order they ran.
    """

    vectors: dict[str, NDArray[np.float32]]
    metrics: dict[str, dict[str, Any]]
    residual_norms: list[float]
    data_sha256: str


def extract_pack(
    model_path: str | os.PathLike[str],
    pack_name: str,
    concepts: Sequence[tuple[str, str]],
    positive_statements: Sequence[str],
    negative_statements: Sequence[str],
    settings: ExtractionSettings,
    default_scales: Mapping[str, float] | float,
    safe_scales: Mapping[str, float] | float,
    out_dir: str | os.PathLike[str],
    workers: int = 1,
    device: str | None = None,
) -> SteeringPack:
    """Extracts one direction per concept and writes them as a steering pack.

    Tokens are chosen on the training positives alone (selection restricted to the training
    positives), a deviation from the authors, who choose on both statement sets.

    Args:
        model_path: Checkpoint directory or Hugging Face model id.
        pack_name: Name of the pack.
        concepts: Name of each direction, and the prefix that makes the model take it on.
        positive_statements: Statements of the prefixed prompts.
        negative_statements: Statements of the unprefixed prompts; better different ones.
        settings: How to extract.
        default_scales: Scale (ε) used when a request names none: one number, or one by concept.
        safe_scales: Largest |scale| that leaves the text fluent, likewise.
        out_dir: Directory of the pack.
        workers: Processes that fit directions; the result does not depend on it.
        device: Device of the model; None for CUDA where there is one, else CPU.

    Returns:
        The pack, read back from disk.

    Raises:
        ExtractionError: The arguments do not fit the model or each other, or a concept's fit
            failed; the message names the concept and the block.
        PackError: The pack cannot be written.
    """
    positives = _taken(positive_statements, settings.positive_count, "positive")
    negatives = _taken(negative_statements, settings.negative_count, "negative")
    extractor = _Extractor.load(model_path, settings, device)
    # Names and scales are checked before hours are spent on them.
    records = _records(pack_name, concepts, extractor.layers, default_scales, safe_scales)
    learned = _learn(extractor, concepts, positives, negatives, workers)
    return write_pack(
        out_dir,
        name=pack_name,
        model=model_identity(model_path, extractor.model.config, extractor.tokenizer),
        directions=[
            record.model_copy(update={"metrics": learned.metrics[record.name]})
            for record in records
        ],
        vectors=learned.vectors,
        method=extractor.method(learned.data_sha256),
        residual_norms=dict(enumerate(learned.residual_norms)),
    )


def _learn(
    extractor: _Extractor,
    concepts: Sequence[tuple[str, str]],
    positives: Sequence[str],
    negatives: Sequence[str],
    workers: int,
) -> _Learned:
    """Runs every prompt, concept after concept, and fits the blocks of each side by side."""
    settings, fit = extractor.settings, delayed(fit_direction)
    options = RfmOptions(
        ridge=settings.rfm_ridge,
        center_gradients=settings.rfm_center_gradients,
        iterations=settings.rfm_iterations,
        bandwidths=settings.rfm_bandwidths,
    )
    prompts = extractor.render(negatives)
    digest = hashlib.sha256(_content(prompts))
    unprefixed = extractor.run(prompts, "unprefixed prompts")
    vectors, metrics = {}, {}
    with parallel_config("loky", inner_max_num_threads=1), Parallel(n_jobs=workers) as parallel:
        for name, prefix in tqdm(concepts, desc="concepts", unit="concept"):
            prompts = extractor.render(positives, prefix)
            digest.update(_content(prompts))
            prefixed = extractor.run(prompts, name)
            tokens = extractor.tokens(prefixed)
            rows = extractor.rows(name, prefixed, unprefixed, tokens)
            found = parallel(
                fit(settings.estimator, block, settings.seed, options) for block in rows
            )
            vectors[name] = np.stack([direction.vector for direction in found])
            metrics[name] = extractor.metrics(prefixed, tokens, found)
    norms = unprefixed.residual_norms.tolist()
    return _Learned(vectors, metrics, norms, digest.hexdigest())


def _taken(statements: Sequence[str], count: int | None, side: str) -> list[str]:
    """Returns the statements to use, stripped."""
    stripped = [statement.strip() for statement in statements]
    if not stripped or not all(stripped):
        raise ExtractionError(f"{side} statements must be given, and none may be empty")
    if count is not None and count > len(stripped):
        raise ExtractionError(
            f"{side}_count is {count}, but there are {len(stripped)} {side} statements"
        )
    return stripped[:count]


def _records(
    pack_name: str,
    concepts: Sequence[tuple[str, str]],
    layers: list[int],
    default_scales: Mapping[str, float] | float,
    safe_scales: Mapping[str, float] | float,
) -> list[DirectionRecord]:
    """Returns a record without metrics for each concept."""
    names = [name for name, _ in concepts]
    if not names or len(set(names)) != len(names):
        raise ExtractionError("concepts must be given, each under a name of its own")
    if unprefixed := [name for name, prefix in concepts if not prefix.strip()]:
        raise ExtractionError(f"concepts {unprefixed} have an empty prefix")
    try:
        TypeAdapter(PackName).validate_python(pack_name)
        return [
            DirectionRecord(
                name=name,
                layers=layers,
                default_scale=_scale(default_scales, name, "default"),
                safe_scale=_scale(safe_scales, name, "safe"),
                positions="all",
            )
            for name in names
        ]
    except ValidationError as error:
        faults = "; ".join(f"{fault['input']!r}: {fault['msg']}" for fault in error.errors())
        raise ExtractionError(f"pack {pack_name!r} could not be written: {faults}") from error


def _scale(scales: Mapping[str, float] | float, name: str, kind: str) -> float:
    if not isinstance(scales, Mapping):
        return float(scales)
    if name not in scales:
        raise ExtractionError(f"concept {name!r} has no {kind} scale; {choices(name, scales)}")
    return float(scales[name])


def _content(prompts: Sequence[RenderedPrompt]) -> bytes:
    """Returns the prompts in a form without ambiguous ends, for the data digest."""
    return json.dumps([prompt.text for prompt in prompts]).encode()
