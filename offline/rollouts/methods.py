"""The published methods that learn from the model's own scored answers, and where each departs from its paper.

``roast``
    ROAST, arXiv 2602.14143: several sampled answers to every question, told right from wrong; the difference of the means
    of the right and of the wrong ones' states at their last token, of every question that has both, at length 1, so that
    each question has one vote; the mean of these. Form: addition. It departs in these: questions that are answered only
    rightly or only wrongly are left out, where the authors' code reads a right answer that it shows to the model, at half
    the weight; states are block outputs, where that code reads the MLP; it adds at all positions, where that code adds to
    the prompt's.
``persona``
    Persona vectors, arXiv 2507.21509: the same questions after instructions that ask for a trait and after ones that ask
    for its opposite; of the pairs of answers of which the first is judged to show the trait and the second not to, the
    difference of the mean states of their tokens. It keeps its length, so that ε is the paper's coefficient, and acts at
    one block, that in the middle until a calibration finds a better. Form: addition to generated tokens. It departs in
    these: the judge is the one that is asked for, where the paper asks a language model for numbers from 0 to 100; in
    place of a second number for coherence, answers that loop are left out.
``corrsteer``
    CorrSteer, arXiv 2508.12535: how the largest activation of each feature over an answer's tokens goes with the answer's
    score, by Pearson's correlation; the feature that goes with it most, of all blocks (the paper's S) or of every block
    (its A), is added at its mean activation in right answers. Form: addition to generated tokens, ε = 1. It departs in
    these: features are the coordinates of the residual stream, which its authors' code has as ``--raw``, where the paper has
    a sparse autoencoder's; validation does not drop blocks again (its P).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from vllm_steer.request.positions import AnyPositions

RolloutMethodName = Literal["roast", "persona", "corrsteer"]
Pool = Literal["last", "mean", "max"]


@dataclass(frozen=True)
class RolloutMethod:
    """One way to learn from scored answers.

    Attributes:
        paper: Its arXiv id.
        pool: How an answer's tokens become one state.
        positions: Where its directions act.
        contrasted: Whether questions are asked after two opposite instructions.
        one_layer: Whether its direction acts at one block.
        unit: Whether ε is a length, for want of one in the vectors.
        defaults: Settings that it has where no others are asked for.
    """

    paper: str
    pool: Pool
    positions: AnyPositions
    contrasted: bool = False
    one_layer: bool = False
    unit: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


ROLLOUT_METHODS: Mapping[str, RolloutMethod] = MappingProxyType(
    {
        "roast": RolloutMethod(
            "2602.14143",
            "last",
            "all",
            unit=True,
            defaults={"samples": 8, "temperature": 0.8, "top_p": 0.9},
        ),
        "persona": RolloutMethod(
            "2507.21509",
            "mean",
            "generated",
            contrasted=True,
            one_layer=True,
            defaults={"samples": 10, "temperature": 1.0},
        ),
        "corrsteer": RolloutMethod(
            "2508.12535", "max", "generated", defaults={"samples": 1, "temperature": 1.0}
        ),
    }
)
