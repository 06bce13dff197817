"""Plots of an extraction and of a sweep: arrays in, PNG bytes out.

They need no display, and equal figures give equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import mode

from vllm_steer.offline.evaluate.results import ClassResult

Floats = NDArray[np.float32] | NDArray[np.float64]

_COLOR, _SECOND, _THIRD, _MUTED = "#1f5fa8", "#c05a1c", "#2e8b57", "#9a9a9a"
_LABELLED_CONCEPTS = 40
_DPI = 120


@dataclass(frozen=True, eq=False)
class BlockDiagnostics:
    """Diagnostics of an extraction for each block, for one concept or averaged over several.

    Attributes:
        attention: ``[blocks, candidates]``, floating; attention of each candidate token to the
            prefix, as the choice of tokens aggregates it over prompts.
        tokens: ``[candidates]``; the candidate tokens as text, in their order in the prompt; None
            labels them by index alone.
        chosen: ``[blocks]``, int; the negative index of each block's token.
        enrichment: ``[blocks]``, floating; concept enrichment score, 0 to 1; None if not tested.
        selected: Blocks that are steered; None for all but block 0.
    """

    attention: Floats
    chosen: NDArray[np.int64]
    tokens: Sequence[str] | None = None
    enrichment: Floats | None = None
    selected: Sequence[int] | None = None

    @classmethod
    def of_concepts(
        cls,
        attention: Floats,
        enrichment: Floats | None = None,
        tokens: Sequence[str] | None = None,
    ) -> BlockDiagnostics:
        """Averages several concepts; of each block, the token that most concepts choose is shown.

        Args:
            attention: ``[concepts, blocks, candidates]``, floating.
            enrichment: Likewise; taken at the token that each concept chooses.
            tokens: ``[candidates]``.
        """
        best = attention.argmax(axis=-1)
        at_best = None
        if enrichment is not None:
            at_best = np.take_along_axis(enrichment, best[..., None], axis=-1)[..., 0].mean(axis=0)
        chosen = mode(best, axis=0).mode - attention.shape[-1]
        return cls(attention.mean(axis=0), chosen, tokens, at_best)


def attention_heat_map(found: BlockDiagnostics, title: str) -> bytes:
    """Draws layer × token attention to the prefix, the chosen token of each layer outlined."""
    blocks, candidates = found.attention.shape
    figure = Figure(figsize=(1.6 + 0.9 * candidates, 1.4 + 0.22 * max(blocks, 8)))
    axes = figure.add_subplot()
    image = axes.imshow(found.attention, aspect="auto", cmap="viridis", origin="lower", vmin=0)
    axes.scatter(
        found.chosen + candidates,
        np.arange(blocks),
        marker="s",
        facecolors="none",
        edgecolors="white",
        label="chosen",
    )
    texts = _visible(found.tokens or [""] * candidates)
    labels = [f"{text}\n{index - candidates}" for index, text in enumerate(texts)]
    axes.set_xticks(range(candidates), labels, fontsize=8)
    axes.set(xlabel="token of the chat template", ylabel="layer", title=title)
    _whole_ticks(axes, blocks)
    figure.colorbar(image, label="attention to the prefix")
    return _png(figure)


def enrichment_bars(found: BlockDiagnostics, title: str) -> bytes:
    """Draws the concept enrichment score of each block; blocks that are not steered are grey.

    Raises:
        ValueError: The diagnostics hold no enrichment.
    """
    if found.enrichment is None:
        raise ValueError("these diagnostics hold no enrichment")
    blocks = len(found.enrichment)
    steered = set(range(1, blocks) if found.selected is None else found.selected)
    figure = Figure(figsize=(6.0, 3.2))
    axes = figure.add_subplot()
    colors = [_COLOR if block in steered else _MUTED for block in range(blocks)]
    axes.bar(np.arange(blocks), found.enrichment, color=colors)
    axes.set(xlabel="layer (grey: not steered)", ylabel="enrichment", title=title, ylim=(0, 1))
    axes.grid(axis="y", alpha=0.3)
    return _png(figure)


def scale_curves(classes: Sequence[ClassResult], title: str) -> bytes:
    """Draws steerability, with its interval, gap closed and perplexity against the scale, by class.

    The chosen scale is the dashed upright line; the level ones are the ceiling, dashed, and the
    unsteered answers' perplexity, dotted.
    """
    shown = [found for found in classes if found.heldout]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(0.8 + 4.4 * columns, 0.6 + 2.9 * rows))
    for index, found in enumerate(shown):
        left = figure.add_subplot(rows, columns, index + 1)
        _scale_panel(left, found)
    figure.suptitle(title)
    return _png(figure)


def concept_cosines(vectors: Mapping[str, Floats], title: str) -> bytes:
    """Draws the cosine between concepts, averaged over layers.

    Args:
        vectors: Concept to ``[layers, hidden_size]``; all concepts have the same layers.
        title: Title of the picture.
    """
    cosines = mean_cosines(vectors)
    names = list(vectors)
    side = 2.2 + 0.22 * min(len(names), _LABELLED_CONCEPTS)
    figure = Figure(figsize=(side + 0.8, side))
    axes = figure.add_subplot()
    image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    if len(names) <= _LABELLED_CONCEPTS:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    else:
        axes.set(xlabel="concept", ylabel="concept")
    axes.set_title(title)
    figure.colorbar(image, label="cosine, mean over layers")
    return _png(figure)


def mean_cosines(vectors: Mapping[str, Floats]) -> NDArray[np.float64]:
    """Returns ``[concepts, concepts]``: cosines between concepts, averaged over layers."""
    stacked = np.stack([np.asarray(vector, dtype=np.float64) for vector in vectors.values()])
    unit = stacked / np.linalg.norm(stacked, axis=-1, keepdims=True)
    cosines: NDArray[np.float64] = np.einsum("alh,blh->ab", unit, unit) / unit.shape[1]
    return cosines


@dataclass(frozen=True)
class Bar:
    """One way to learn directions.

    Attributes:
        name: Its name.
        steerability: At the chosen scale.
        low: Lower end of the interval.
        high: Upper end.
        over_scales: Mean over all scales.
        marked: Whether to set the bar off.
    """

    name: str
    steerability: float
    low: float
    high: float
    over_scales: float
    marked: bool


def method_bars(bars: Sequence[Bar], title: str) -> bytes:
    """Draws one bar per way to learn directions, and the mean over all scales as a dot."""
    figure = Figure(figsize=(7.6, 1.0 + 0.22 * len(bars)))
    axes = figure.add_subplot()
    values = np.array([[bar.steerability, bar.low, bar.high] for bar in bars]).T
    at = np.arange(len(bars))[::-1]
    axes.barh(
        at,
        values[0],
        xerr=np.clip([values[0] - values[1], values[2] - values[0]], 0, None),
        color=[_COLOR if bar.marked else _MUTED for bar in bars],
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    axes.plot([bar.over_scales for bar in bars], at, linestyle="", marker="o", color=_SECOND)
    axes.set_yticks(at, [bar.name for bar in bars], fontsize=8)
    axes.set(xlim=(0, 1.02), ylim=(-0.7, len(bars) - 0.3), xlabel="steerability")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    return _png(figure)


def _scale_panel(left: Axes, found: ClassResult) -> None:
    scales = [point.scale for point in found.heldout]
    figures = [point.figures for point in found.heldout]
    mean, low, high, gap, perplexity = (
        np.array([np.nan if value is None else value for value in values])
        for values in zip(
            *((f.steerability, f.low, f.high, f.gap_closed, f.perplexity) for f in figures),
            strict=True,
        )
    )
    left.plot(scales, mean, color=_COLOR, marker="o", markersize=3)
    left.fill_between(scales, low, high, color=_COLOR, alpha=0.2, linewidth=0)
    left.plot(scales, np.clip(gap, 0, None), color=_THIRD, marker="s", markersize=3)
    if found.prefixed is not None and found.prefixed.steerability is not None:
        left.axhline(found.prefixed.steerability, color=_COLOR, linestyle="--", linewidth=1)
    left.set(xlabel="scale ε", ylim=(-0.03, 1.03), title=found.name)
    left.set_ylabel("steerability; green: gap closed", color=_COLOR)
    if found.scale is not None:
        left.axvline(found.scale, color=_MUTED, linestyle="--", linewidth=1)
    right = left.twinx()
    right.plot(scales, perplexity, color=_SECOND, marker=".", markersize=4)
    if found.unsteered.perplexity is not None:
        right.axhline(found.unsteered.perplexity, color=_SECOND, linestyle=":", linewidth=1)
    right.set_yscale("log")
    right.set_ylabel("perplexity, unsteered model", color=_SECOND)


def _visible(tokens: Sequence[str]) -> list[str]:
    """Tokens as labels: white space becomes visible, and nothing is read as mathematics."""
    return [token.replace("\n", "\\n").replace(" ", "␣").replace("$", r"\$") for token in tokens]


def _whole_ticks(axes: Axes, blocks: int) -> None:
    axes.set_yticks(range(0, blocks, max(1, blocks // 16)))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.set_layout_engine("tight")
    # Without the version of matplotlib in it, equal pictures are equal files.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
