"""The published methods of extraction, each as tokens, labels and an estimator, and the form it acts by.

A method is a choice of settings, so that all of them are one pipeline; ``Method.fixed`` is what makes it
that method, ``Method.defaults`` is what else its paper does. Hidden states are block outputs, since that
is where steering acts; papers that take others are named below.

``attention_guided``
    arXiv 2602.00333, the module ``vllm_steer.offline.extract.learning``. Form: addition.
``trained``
    A vector for each of the middle blocks, trained to make the prefixed model's own answers likely after
    the plain prompt; the module ``vllm_steer.offline.extract.training``. The prompt is distilled into the vectors. Vectors
    keep their length, so that ε = 1 adds them as trained. Form: addition.
``caa``
    Contrastive activation addition, arXiv 2312.06681: the mean, over pairs, of the difference of the
    hidden states at the answer's last token. With concepts the pairs are every statement with and
    without the prefix, at the prompt's last token. Vectors keep their length, so that ε is the
    paper's multiplier. Form: addition. The paper adds at one layer, chosen by a sweep; here at that in
    the middle until a calibration chooses.
``ablation``
    Directional ablation, arXiv 2406.11717: difference of the means of prefixed and unprefixed prompts
    at the last token. Form: ablation, ε = 1. The paper chooses one layer's direction by what it does to
    the answers and takes it out everywhere; here every block loses its own.
``angular``
    Angular Steering, arXiv 2510.26243: one plane for all layers. Candidates are the blocks' differences
    of means at the last token, of states at length 1; the first axis is the candidate with the largest
    mean cosine to all of them, the second the first principal component of the candidates. So do the
    authors in their code, but at the inputs of both norms of a block. Form: angle, ε in degrees.
``prompt_only``
    Activation addition (ActAdd), arXiv 2308.10248: the difference of one pair of prompts, the prefix
    alone and an empty message; no statements, no answers. Vectors keep their length. Form: addition.
    The paper adds the difference of every position to the same positions of a prompt; here that of
    the last token is added wherever the request says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from vllm_steer.packs.pack import FormChoice

PLANE_SUFFIX = " plane"


@dataclass(frozen=True)
class Method:
    """One way to extract.

    Attributes:
        paper: Its arXiv id; empty for the project's own.
        fixed: Settings that cannot be others.
        defaults: Settings that it has where no others are asked for.
        form: How its directions act; None for addition.
        scale: Default scale (ε) of requests; None where there is none that fits every model.
        plane: Whether a direction brings a second one, which spans its plane.
        statements: Whether it asks about statements.
        one_layer: Whether it acts at one layer: that in the middle, until a calibration finds a better.
    """

    paper: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    form: FormChoice | None = None
    scale: float | None = None
    plane: bool = False
    statements: bool = True
    one_layer: bool = False

    def form_of(self, direction: str) -> FormChoice | None:
        """Returns the form of a direction's record."""
        if self.form is None or not self.plane:
            return self.form
        return self.form.model_copy(update={"plane": direction + PLANE_SUFFIX})


_ALL_ROWS = {"estimator": "mean_difference", "labels": "hard", "held_out": False}
_LAST_TOKEN = {"token": -1, "permutations": 0}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "attention_guided": Method("2602.00333"),
        "trained": Method(
            "",
            {"learn_from": "answers", "estimator": "trained", "unit": False, "held_out": False},
            {"permutations": 0, "labels": "hard", "dtype": "auto", "batch_size": 16},
            scale=1.0,
        ),
        "caa": Method(
            "2312.06681",
            _ALL_ROWS | {"unit": False},
            _LAST_TOKEN | {"paired": True},
            FormChoice(op="add"),
            scale=1.0,
            one_layer=True,
        ),
        "ablation": Method(
            "2406.11717", _ALL_ROWS, _LAST_TOKEN, FormChoice(op="ablate"), scale=1.0
        ),
        "angular": Method(
            "2510.26243",
            _ALL_ROWS | {"estimator": "unit_mean_difference"},
            _LAST_TOKEN,
            FormChoice(op="angle", plane=PLANE_SUFFIX),
            plane=True,
        ),
        "prompt_only": Method(
            "2308.10248",
            _ALL_ROWS | {"learn_from": "prompts", "unit": False},
            _LAST_TOKEN,
            FormChoice(op="add"),
            scale=1.0,
            statements=False,
            one_layer=True,
        ),
    }
)
