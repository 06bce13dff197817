"""A picture of what a probe tells apart: histograms of both kinds of texts, by layer."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllm_steer.offline.measures.detection import Doubles
from vllm_steer.offline.probe.run import ProbeScores
from vllm_steer.packs.pack import Probe, SteeringPack

_POSITIVE, _NEGATIVE, _MUTED = "#c05a1c", "#1f5fa8", "#6b6b6b"
_BINS = 40
# Of the distance between two layers.
_HEIGHT = 0.85
_COLUMNS = 3
_DPI = 120


def histograms(pack: SteeringPack, scores: Mapping[str, ProbeScores]) -> bytes:
    """Draws the histograms of scores of positive and negative texts, a row for each layer.

    Scores are shown over the median norm of the residual stream at their layer. The upright marks are thresholds, and the
    layer of the probe is set in bold.

    Args:
        pack: A pack whose directions have probes.
        scores: The scores that they were measured from, by direction.

    Returns:
        A PNG file.
    """
    columns = min(_COLUMNS, len(scores))
    rows = -(-len(scores) // columns)
    tallest = max(len(found.layers) for found in scores.values())
    figure = Figure(figsize=(1.0 + 4.4 * columns, 0.6 + (1.1 + 0.3 * tallest) * rows))
    for number, (name, found) in enumerate(scores.items()):
        probe = pack.directions[name].probe
        if probe is None:
            raise ValueError(f"direction {name!r} has no probe")
        axes = figure.add_subplot(rows, columns, number + 1)
        _panel(axes, found, probe, pack.manifest.residual_norms)
        axes.set_title(name, fontsize=10)
    figure.set_layout_engine("tight")
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, equal pictures are equal files.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, found: ProbeScores, probe: Probe, norms: Mapping[str, float]) -> None:
    for row, layer in enumerate(found.layers):
        norm = norms[str(layer)]
        positive, negative = found.positive[row] / norm, found.negative[row] / norm
        both = np.concatenate([positive, negative])
        edges = np.histogram_bin_edges(both, bins=_BINS)
        for values, color in ((negative, _NEGATIVE), (positive, _POSITIVE)):
            _fill(axes, values, edges, row, color)
        measured = probe.at(layer)
        for threshold in measured.thresholds if measured else ():
            at = threshold.above / norm
            axes.plot([at, at], [row, row + _HEIGHT], color=_MUTED, linewidth=1)
    labels = [
        f"{layer}: {each.auroc:.2f}" for layer, each in zip(found.layers, probe.layers, strict=True)
    ]
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.get_yticklabels()[found.layers.index(probe.layer)].set_fontweight("bold")
    axes.set(xlabel="score / ‖h‖; blue: negative, orange: positive", ylabel="layer: AUROC")
    axes.xaxis.label.set_fontsize(8)


def _fill(axes: Axes, values: Doubles, edges: Doubles, row: int, color: str) -> None:
    counts, _ = np.histogram(values, bins=edges)
    heights = row + _HEIGHT * counts / max(1, counts.max())
    axes.fill_between(edges[:-1], row, heights, step="post", color=color, alpha=0.55, linewidth=0)
