"""The requests of ``benchmarks.load_http``, and what the server must make of each."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from benchmarks.fuzz_schedule import draw_ranges
from vllm_steer.offline.demo.corpus import user_text
from vllm_steer.offline.demo.server import SERVED_NAME
from vllm_steer.offline.questions.statements import statements
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.request.positions import plain_positions
from vllm_steer.verify.oracle_forms import steered_positions

ROUTES = ("/completions", "/chat/completions", "/responses")
STEERINGS = 50
_UNSTEERED = 6
_ALIASES = 3
_LEAVING = 3
_CONTEXT = 512
# So long that a client which leaves after the first token leaves before the last.
_LONG = 300
_STRONGEST = 12.0
# Share of each kind among the requests.
_SHARES = {"steered": 0.70, "unsteered": 0.10, "alias": 0.08, "leaving": 0.05, "refused": 0.07}


@dataclass(frozen=True)
class Case:
    """A request that clients send again and again.

    Attributes:
        kind: A key of ``_SHARES``.
        route: Route below ``/v1``.
        text: What the user says.
        prompt: Token ids of the prompt, the same on all routes.
        steering: What the answer must be steered by, None by nothing.
        fields: What the body says of it.
        max_tokens: Length of the answer.
        refused: Reason under which a wrong request is counted; None when it is right.
    """

    kind: str
    route: str
    text: str
    prompt: tuple[int, ...]
    steering: dict[str, Any] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 16
    refused: str | None = None

    @property
    def leaves(self) -> bool:
        """Whether the client goes away after the first token."""
        return self.kind == "leaving"

    def body(self) -> dict[str, Any]:
        """The request, streaming and greedy, with the log-probability of each token."""
        body: dict[str, Any] = {"model": SERVED_NAME, "temperature": 0.0, "stream": True}
        body |= {"ignore_eos": True} | self.fields
        if self.route == "/completions":
            return body | {
                "prompt": list(self.prompt),
                "max_tokens": self.max_tokens,
                "logprobs": 0,
            }
        said = [{"role": "user", "content": self.text}]
        if self.route == "/chat/completions":
            return body | {
                "messages": said,
                "max_tokens": self.max_tokens,
                "logprobs": True,
                "top_logprobs": 0,
            }
        include = ["message.output_text.logprobs"]
        body |= {"input": said, "max_output_tokens": self.max_tokens, "include": include}
        # A token without text has no event on this route.
        return body | {"skip_special_tokens": False}


@dataclass(frozen=True)
class Terms:
    """What a steering adds where, computed without the code that the server uses.

    Attributes:
        mask: bool ``[context]``, the positions where something is added.
        dose: Largest sum of |scale|·‖vector‖ over the norm of the residual stream, over layers, in
            units of each direction's fluent dose where it is calibrated.
    """

    mask: np.ndarray
    dose: float

    def steered(self, num_tokens: int) -> int:
        """Steered ones of the first ``num_tokens`` positions."""
        return int(self.mask[:num_tokens].sum())


def terms_of(case: Case, packs: Mapping[str, SteeringPack]) -> Terms:
    """Returns the terms of a steered case; packs by name."""
    assert case.steering is not None
    steering, positions = case.steering, torch.arange(_CONTEXT)
    mask, doses = np.zeros(_CONTEXT, dtype=bool), np.zeros(_CONTEXT)
    for choice in steering["directions"]:
        pack, _, name = choice["name"].partition("/")
        record, vector = packs[pack].directions[name], packs[pack].vectors[name]
        scale = choice.get("scale", record.default_scale)
        where = choice.get("positions") or steering.get("positions")
        where = where or plain_positions(record.positions)
        here = steered_positions(where, positions, len(case.prompt)).numpy()
        mask |= here & (scale != 0)
        norms = packs[pack].manifest.residual_norms
        fluent = record.calibration.fluent_dose if record.calibration else None
        layers = choice.get("layers") or steering.get("layers") or record.default_layers
        for layer in layers or record.layers:
            length = float(np.linalg.norm(vector[record.layers.index(layer)].astype(np.float64)))
            doses[here] += abs(scale) * length / norms[str(layer)] / (fluent or 1.0)
    return Terms(mask, float(doses.max()))


class CaseBook:
    """All cases of one load.

    Attributes:
        cases: By kind.
        aliases: Policy's aliases that the cases of kind ``alias`` use.
    """

    def __init__(self, tokenizer: Any, packs: Sequence[SteeringPack], seed: int) -> None:
        """Draws them.

        Args:
            tokenizer: The served model's.
            packs: The loaded packs.
            seed: Seed that gives the same cases again.
        """
        self._rng = random.Random(seed)
        self._packs = packs
        texts = [user_text(statement.text) for statement in statements("heldout")]
        self._prompts = [
            (text, tuple(_chat_ids(tokenizer, text))) for text in self._rng.sample(texts, 24)
        ]
        self.aliases: dict[str, dict[str, Any]] = {}
        self.cases = {
            "steered": [self._steered(number) for number in range(STEERINGS)],
            "unsteered": [self._plain("unsteered", number) for number in range(_UNSTEERED)],
            "alias": [self._alias(number) for number in range(_ALIASES)],
            "leaving": [self._leaving(number) for number in range(_LEAVING)],
            "refused": self._refused(),
        }

    def draw(self, rng: random.Random) -> Case:
        """Draws the next request of a client."""
        (kind,) = rng.choices(list(_SHARES), list(_SHARES.values()))
        return rng.choice(self.cases[kind])

    def _plain(self, kind: str, number: int) -> Case:
        text, prompt = self._rng.choice(self._prompts)
        tokens = self._rng.randint(4, 40)
        return Case(kind, ROUTES[number % len(ROUTES)], text, prompt, max_tokens=tokens)

    def _steered(self, number: int) -> Case:
        case = self._plain("steered", number)
        # One of them adds nothing, and is a steered request all the same.
        steering = self._steering(len(case.prompt), 0.0 if number == 0 else _STRONGEST)
        text_form = {"vllm_xargs": {"steering": json.dumps(steering)}}
        fields = text_form if number % 5 == 1 else {"steering": steering}
        return replace(case, steering=steering, fields=fields)

    def _alias(self, number: int) -> Case:
        case, alias = self._plain("alias", number), f"alias{number}"
        self.aliases[alias] = self._steering(len(case.prompt), _STRONGEST)
        fields = {"model": f"{SERVED_NAME}:{alias}"}
        return replace(case, steering=self.aliases[alias], fields=fields)

    def _leaving(self, number: int) -> Case:
        # Of these the count of steered tokens is the prompt's, whenever the client leaves.
        steering = self._steering(1, _STRONGEST) | {"positions": "prompt"}
        for choice in steering["directions"]:
            choice.pop("positions", None)
        fields = {"steering": steering}
        case = self._plain("leaving", number)
        return replace(case, steering=steering, fields=fields, max_tokens=_LONG)

    def _refused(self) -> list[Case]:
        name = self._names()[0]
        good: dict[str, Any] = {"directions": [{"name": name}]}
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("unknown_direction", {"steering": {"directions": [{"name": f"{name}x"}]}}),
            ("unknown_direction", {"steering": {"directions": [{"name": "nopack/x"}]}}),
            ("malformed", {"steering": good | {"strength": 1}}),
            ("malformed", {"steering": {"directions": []}}),
            ("malformed", {"steering": good | {"positions": [[-_CONTEXT, None]]}}),
            ("malformed", {"steering": good, "vllm_xargs": {"steering": json.dumps(good)}}),
            ("malformed", {"steering": good, "model": f"{SERVED_NAME}:alias0"}),
            ("malformed", {"steer": [f"{name}:3"], "model": f"{SERVED_NAME}:alias0"}),
            ("dose", {"steering": {"directions": [{"name": name, "scale": 1e30}]}}),
        ]
        return [
            replace(self._plain("refused", number), fields=fields, refused=reason)
            for number, (reason, fields) in enumerate(wrong)
        ]

    def _names(self) -> list[str]:
        return [f"{pack.name}/{name}" for pack in self._packs for name in pack.directions]

    def _steering(self, prompt_len: int, strongest: float) -> dict[str, Any]:
        """One to three directions; what they leave out stands beside them or is the default."""
        rng, by_name = self._rng, {pack.name: pack for pack in self._packs}
        directions = []
        for full_name in rng.sample(self._names(), rng.randint(1, 3)):
            pack, _, name = full_name.partition("/")
            layers = by_name[pack].directions[name].layers
            choice: dict[str, Any] = {
                "name": full_name,
                "scale": round(rng.uniform(-strongest, strongest), 3),
                "positions": draw_ranges(rng, prompt_len),
            }
            if rng.random() < 0.5:
                choice["layers"] = sorted(rng.sample(layers, rng.randint(1, len(layers))))
            directions.append(choice)
        steering: dict[str, Any] = {"directions": directions}
        if rng.random() < 0.3:
            steering["positions"] = draw_ranges(rng, prompt_len)
            del directions[0]["positions"]
        return steering


def _chat_ids(tokenizer: Any, text: str) -> list[int]:
    said = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer.apply_chat_template(
        said, add_generation_prompt=True, return_dict=False
    )
    return ids
