"""Features of imported autoencoders in the engine equal encode, edit and decode in Hugging Face with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import engine_arguments
from tests.engine.cases import CHEERFUL, SPIDERS
from tests.offline.sae_cases import (
    Autoencoder,
    autoencoder,
    gemma_scope_file,
    new_config,
    old_config,
    saelens_folder,
)
from vllm_steer.offline.convert.model import NormSource
from vllm_steer.offline.convert.sae import NamedFeature, import_sae
from vllm_steer.offline.convert.sae_files import SaeOptions
from vllm_steer.offline.models.hooks import watched
from vllm_steer.offline.models.loading import find_blocks, load_model
from vllm_steer.offline.train.directions import Target
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.engine import Engine
from vllm_steer.testing.parity import TOLERANCE, assert_equals_hooks
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS, FEATURES = 16, 48
# Layer of each, and the place that its files name.
LAYERS = {"relu": 2, "jump": 3, "scope": 1}


@dataclass(frozen=True, eq=False)
class Setting:
    """Autoencoders, the packs of their most active features, and the model that was run to find them."""

    autoencoders: dict[str, Autoencoder]
    chosen: dict[str, list[int]]
    packs: list[SteeringPack]
    model: Any


@pytest.fixture(scope="module")
def setting(
    model: Path,
    packs: list[SteeringPack],
    prompts: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Setting:
    loaded = load_model(model, "float32", "cpu")
    config = loaded.config.get_text_config()
    seen: dict[int, torch.Tensor] = {}
    blocks = find_blocks(loaded, config.num_hidden_layers)
    with torch.no_grad(), watched(blocks, lambda at, out: seen.setdefault(at, out[0])):
        loaded(torch.tensor([prompts[0]]))
    folder = tmp_path_factory.mktemp("sae")
    made, paths = {}, {}
    for number, (name, layer) in enumerate(LAYERS.items()):
        size = seen[layer].square().mean().sqrt().item()
        made[name] = autoencoder(
            config.hidden_size, FEATURES, name != "relu", name != "scope", number, size
        )
    paths["relu"] = saelens_folder(
        folder / "relu", made["relu"], new_config(made["relu"], "blocks.3.hook_resid_pre")
    )
    paths["jump"] = saelens_folder(
        folder / "jump", made["jump"], old_config(made["jump"], "blocks.3.hook_resid_post")
    )
    paths["scope"] = gemma_scope_file(folder, made["scope"], LAYERS["scope"])
    found, chosen = [], {}
    for name, sae in made.items():
        active = sae.encode(seen[LAYERS[name]])
        assert 0.05 < (active > 0).float().mean() < 0.7
        # Active at some tokens and not at others.
        share = (active > 0).float().mean(0)
        chosen[name] = torch.argsort((share - 0.5).abs())[:2].tolist()
        pack = import_sae(
            paths[name],
            [NamedFeature(number, f"f{at}", 4.0) for at, number in enumerate(chosen[name])],
            Target(name, folder / f"{name}-pack"),
            model,
            SaeOptions(),
            NormSource(packs[0].path),
        )
        assert pack.directions["f0"].layers == [LAYERS[name]]
        found.append(pack)
    return Setting(made, chosen, found, loaded)


def strength(setting: Setting, name: str) -> float:
    """An activation that moves the stream by a good share of its length."""
    pack = next(pack for pack in setting.packs if pack.name == name)
    return round(0.6 * pack.manifest.residual_norms[str(LAYERS[name])], 2)


def edits(setting: Setting) -> list[dict[tuple[str, int], tuple[str, float]]]:
    """For each request, autoencoder and feature to what becomes of its activation."""
    found: list[dict[tuple[str, int], tuple[str, float]]] = []
    for name in LAYERS:
        much = strength(setting, name)
        found += [
            {(name, 0): ("set", much)},
            {(name, 1): ("set", 0.0)},
            {(name, 0): ("multiply", 4.0)},
            # Two of one layer, which read the same stream.
            {(name, 0): ("set", -much), (name, 1): ("multiply", -3.0)},
        ]
    several = {(name, 0): ("set", strength(setting, name)) for name in LAYERS}
    return [*found, several]


def asked(edit: dict[tuple[str, int], tuple[str, float]]) -> dict[str, Any]:
    return {
        "directions": [
            {"name": f"{name}/f{at}", "op": "feature", "scale": value, "activation": how}
            for (name, at), (how, value) in edit.items()
        ]
    }


@contextmanager
def edited(setting: Setting, edit: dict[tuple[str, int], tuple[str, float]]) -> Iterator[None]:
    """Adds what the decoding of the edited activations differs by from that of the activations."""
    config = setting.model.config.get_text_config()
    blocks = find_blocks(setting.model, config.num_hidden_layers)

    def hook(name: str) -> Any:
        sae = setting.autoencoders[name]

        def change(_block: Any, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            before = sae.encode(hidden)
            after = before.clone()
            for (own, at), (how, value) in edit.items():
                if own == name:
                    number = setting.chosen[name][at]
                    after[..., number] = value * after[..., number] if how == "multiply" else value
            moved = hidden + sae.decode(after) - sae.decode(before)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return change

    handles = [
        blocks[LAYERS[name]].register_forward_hook(hook(name))
        for name in {name for name, _ in edit}
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logs(setting: Setting, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Log-probabilities ``[tokens, vocabulary]`` of Hugging Face."""
    found = setting.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return found.float().log_softmax(-1).numpy()


@pytest.mark.parametrize("kind", ["affine-eager", "affine-compiled"])
def test_equals_encode_edit_and_decode(
    setting: Setting,
    model: Path,
    packs: list[SteeringPack],
    prompts: list[list[int]],
    reference: Reference,
    kind: str,
) -> None:
    """Features, other steerings, both in one request, and unsteered requests in one batch."""
    cases = edits(setting)
    others: list[dict[str, Any] | None] = [
        None,
        {"directions": [{"name": SPIDERS, "scale": 10.0}]},
        {"directions": [{"name": CHEERFUL, "op": "ablate"}]},
    ]
    arguments = engine_arguments(model, [*packs, *setting.packs], kind)
    engine = Engine(arguments, fork=True)
    try:
        steerings = [asked(edit) for edit in cases] + others
        given = [prompts[at % len(prompts)] for at in range(len(steerings))]
        outputs = engine.generate(given, steerings, TOKENS)
        for edit, prompt, output in zip(cases, given, outputs, strict=False):
            with edited(setting, edit):
                expected = logs(setting, prompt, output.tokens)
            assert output.tokens == expected.argmax(-1).tolist(), edit
            assert np.abs(output.logprobs - expected).max() < TOLERANCE, edit
            plain = logs(setting, prompt, output.tokens)
            assert np.abs(output.logprobs - plain).max() > 100 * TOLERANCE, edit
        at = len(cases)
        assert_equals_hooks(reference, given[at:], others, outputs[at:], TOKENS)
        # The pack's own form and scale are those that were imported.
        same = [{"directions": [{"name": "jump/f0"}]}]
        same += [{"directions": [{"name": "jump/f0", "op": "feature", "scale": 4.0}]}]
        one, two = engine.generate([prompts[0]] * 2, same, TOKENS)
        assert np.array_equal(one.logprobs, two.logprobs)
    finally:
        engine.close()
