"""A direction as a probe: how well its scores tell texts apart, and above which of them few of the others are.

``vllm-steer probe`` writes it into the manifest, and requests name its thresholds. Importing this module
imports neither torch nor vllm.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vllm_steer.fields import Finite, LayerIndex, Line, Record, Sha256, Share, is_ascending

TextScore = Literal["max", "mean", "last"]
ReadTokens = Literal["generated", "prompt"]
FalsePositiveRate = Annotated[float, Field(gt=0, lt=1)]


def _check_interval(low: float | None, value: float | None, high: float | None, what: str) -> None:
    """Raises ValueError where the ends of an interval are on the wrong side of what lies in it."""
    known = [end for end in (low, value, high) if end is not None]
    if sorted(known) != known:
        raise ValueError(f"{what} must lie between the ends of its interval")


class ProbeThreshold(Record):
    """A threshold, chosen on one half of the negative texts, and what it does on texts that are held out.

    Intervals are of 95 %.

    Attributes:
        fpr: False-positive rate that it was chosen for: as many of such texts score higher, at most, on average over
            choices of the negative texts, however their scores are distributed.
        above: The threshold; a text counts as positive where its score is greater.
        low: Lower end of the interval of the score that this share of all such texts exceeds; None where there are
            too few texts to tell.
        high: Upper end, None likewise.
        false_positives: Share of the negative texts that are held out which score higher.
        false_positives_low: Lower end of its interval, of Clopper and Pearson.
        false_positives_high: Upper end.
        true_positives: Share of the positive texts that are held out which score higher.
        true_positives_low: Lower end of its interval, of Clopper and Pearson.
        true_positives_high: Upper end.
    """

    fpr: FalsePositiveRate
    above: Finite
    low: Finite | None
    high: Finite | None
    false_positives: Share
    false_positives_low: Share
    false_positives_high: Share
    true_positives: Share
    true_positives_low: Share
    true_positives_high: Share

    @model_validator(mode="after")
    def _within_intervals(self) -> ProbeThreshold:
        _check_interval(self.low, self.above, self.high, "above")
        for field in ("false_positives", "true_positives"):
            ends = (getattr(self, f"{field}_low"), getattr(self, f"{field}_high"))
            _check_interval(ends[0], getattr(self, field), ends[1], field)
        return self


class ProbeLayer(Record):
    """What a probe does at one layer.

    Attributes:
        layer: The layer.
        auroc: Area under the ROC curve of texts that are held out: how often a positive text scores higher than a
            negative one.
        low: Lower end of its 95 % interval, by the bootstrap over texts; None where the scores do not overlap.
        high: Upper end, None likewise.
        thresholds: Thresholds, ascending by ``fpr``.
    """

    layer: LayerIndex
    auroc: Share
    low: Share | None
    high: Share | None
    thresholds: list[ProbeThreshold] = Field(min_length=1, max_length=100)

    @property
    def rates(self) -> list[float]:
        """The false-positive rates that there are thresholds for, ascending."""
        return [threshold.fpr for threshold in self.thresholds]

    @model_validator(mode="after")
    def _in_order(self) -> ProbeLayer:
        if not is_ascending(self.rates):
            raise ValueError("thresholds must be ascending by fpr, each fpr once")
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high must both be given or both be null")
        return self


class Probe(Record):
    """What was measured of a direction's scores, the projections of the residual stream on it at length 1.

    Each file of texts was parted into two halves at random. Layer and thresholds were chosen on the first halves; all
    that is reported was measured on the second.

    Attributes:
        model: Name or path of the model that was read.
        dtype: Data type that the model ran in.
        chat_template_sha256: Digest of the chat template that texts were rendered by; None for none.
        layer: The layer that tells the texts apart best; a request that names none reads it.
        score: What the score of a text is: the maximum or the mean over its tokens, or that of the last.
        tokens: Which tokens were read: those of the model's own answer, or of the prompt but for its first.
        max_tokens: Longest answer; None where the prompt was read.
        positives: Texts of the concept.
        negatives: Texts without it.
        positives_sha256: Digest of the texts of the concept.
        negatives_sha256: Digest of the others.
        seed: Seed of the halves and of the bootstrap.
        layers: What the direction does at each layer, ascending.
    """

    model: Line
    dtype: Line
    chat_template_sha256: Sha256 | None
    layer: LayerIndex
    score: TextScore
    tokens: ReadTokens
    max_tokens: int | None = Field(gt=0, le=2**30)
    positives: int = Field(gt=0)
    negatives: int = Field(gt=0)
    positives_sha256: Sha256
    negatives_sha256: Sha256
    seed: int = Field(ge=0, lt=2**64)
    layers: list[ProbeLayer] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _consistent(self) -> Probe:
        layers = [each.layer for each in self.layers]
        if not is_ascending(layers):
            raise ValueError("layers must be ascending by layer, each layer once")
        if self.layer not in layers:
            raise ValueError(f"layer must be one of those in layers; {self.layer} is not")
        if any(each.rates != self.rates for each in self.layers):
            raise ValueError("all layers must have thresholds for the same fpr")
        if (self.max_tokens is None) != (self.tokens == "prompt"):
            raise ValueError("max_tokens must be given where an answer is read, and null elsewhere")
        return self

    @property
    def rates(self) -> list[float]:
        """The false-positive rates that there are thresholds for, ascending."""
        return self.layers[0].rates

    def at(self, layer: int) -> ProbeLayer | None:
        """Returns what was measured at a layer; None where nothing was."""
        return next((each for each in self.layers if each.layer == layer), None)
