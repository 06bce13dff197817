"""Models that see images: directions are learned from the language model in them, and serve it alone too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from tests.offline.wrapped_models import FAMILIES, TEXT, wrapped
from vllm_steer.errors import ExtractionError, PackError
from vllm_steer.offline.convert.packs import ImportTarget, VectorSource, import_pack
from vllm_steer.offline.extract.data import ComputeResources, ExtractionData, PackTarget
from vllm_steer.offline.extract.pipeline import extract_pack
from vllm_steer.offline.extract.settings import ExtractionSettings
from vllm_steer.offline.models.likelihood import AnswerModel, padded
from vllm_steer.offline.models.loading import find_blocks, load_config, load_model
from vllm_steer.offline.models.prompts import Concept, render_prompt
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.packs.registry import PackRegistry
from vllm_steer.vllm_compat.model_shape import model_shape

STATEMENTS = [
    f"{thing} is {kind}." for thing in ("rain", "tea", "iron") for kind in ("good", "old")
]
SETTINGS = ExtractionSettings(
    method="attention_guided",
    estimator="mean_difference",
    dtype="float32",
    permutations=0,
    batch_size=4,
)


@pytest.fixture(scope="module", params=FAMILIES)
def folders(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    chatml: PreTrainedTokenizerFast,
) -> tuple[Path, Path]:
    """Checkpoints of the whole and of its language model alone."""
    root = tmp_path_factory.mktemp(request.param)
    for model, name in zip(wrapped(request.param), ("whole", "alone"), strict=True):
        model.save_pretrained(root / name)
        chatml.save_pretrained(root / name)
    return root / "whole", root / "alone"


@pytest.fixture(scope="module")
def packs(
    folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[SteeringPack]:
    return [
        extract_pack(
            folder,
            ExtractionData(
                [Concept("spiders", "Personify someone who is terrified of spiders.")],
                STATEMENTS,
                STATEMENTS[::-1],
            ),
            SETTINGS,
            PackTarget("p", tmp_path_factory.mktemp("pack") / folder.name, 1.0, 2.0),
            ComputeResources(device="cpu"),
        )
        for folder in folders
    ]


def served(folder: Path, **changes: int) -> dict[str, object]:
    """What a server of a checkpoint compares packs with."""
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    return model_shape(
        SimpleNamespace(
            hf_config=config,
            hf_text_config=text,
            get_hidden_size=lambda: changes.get("hidden_size", text.hidden_size),
            get_total_num_hidden_layers=lambda: changes.get("num_layers", text.num_hidden_layers),
        )
    )


def test_blocks_are_those_of_the_language_model(folders: tuple[Path, Path]) -> None:
    """The other tower has as many, and weights of every part are there."""
    whole = load_model(folders[0], "float32", "cpu")
    blocks = find_blocks(whole, TEXT["num_hidden_layers"])
    assert blocks is whole.get_decoder().layers
    tokens = torch.arange(3, 12)[None]
    alone = load_model(folders[1], "float32", "cpu")
    with torch.inference_mode():
        assert torch.allclose(whole(tokens).logits, alone(tokens).logits, atol=1e-5)


def test_directions_are_those_of_the_language_model_alone(packs: list[SteeringPack]) -> None:
    whole, alone = packs
    assert whole.directions["spiders"].layers == alone.directions["spiders"].layers == [1, 2]
    assert np.allclose(whole.vectors["spiders"], alone.vectors["spiders"], atol=1e-5)
    assert whole.manifest.model.num_layers == 3
    norms = (pack.manifest.residual_norms for pack in packs)
    first, second = ([*found.values()] for found in norms)
    assert np.allclose(first, second, rtol=1e-4)


def test_answers_are_as_likely_as_after_the_language_model_alone(
    folders: tuple[Path, Path],
) -> None:
    """As directions are trained, through changes of its blocks."""
    batch = padded([[5, 6, 7], [8, 9]], [[10, 11], [12]], torch.device("cpu"))
    change = torch.ones(1, 2, 32)
    whole, alone = (
        AnswerModel(load_model(folder, "float32", "cpu"), [0, 1]).log_likelihoods(batch, change)
        for folder in folders
    )
    assert torch.allclose(whole, alone, atol=1e-4)


def test_a_template_that_the_processor_alone_has_is_found(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "older"
    shutil.copytree(folders[0], folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ExtractionError, match="no chat template"):
        render_prompt(load_config(folder)[1], "rain is good.")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert "rain is good." in render_prompt(load_config(folder)[1], "rain is good.").text


def test_a_pack_of_either_serves_both(
    packs: list[SteeringPack], folders: tuple[Path, Path]
) -> None:
    for pack in packs:
        for folder in folders:
            PackRegistry([pack]).check_model(**served(folder))
            with pytest.raises(PackError, match="hidden_size 32 where the served model has 64"):
                PackRegistry([pack]).check_model(**served(folder, hidden_size=64))
            with pytest.raises(PackError, match="num_layers 3 where the served model has 4"):
                PackRegistry([pack]).check_model(**served(folder, num_layers=4))


def test_a_pack_of_another_family_serves_neither(
    packs: list[SteeringPack], folders: tuple[Path, Path]
) -> None:
    config = AutoConfig.from_pretrained(folders[0])
    others = {"llama", "gemma3_text", "qwen3"} - {AutoConfig.from_pretrained(folders[1]).model_type}
    for other in others:
        for pack in packs:
            with pytest.raises(PackError, match="where the served model has"):
                PackRegistry([pack]).check_model(
                    **{**served(folders[0]), "model_types": (other, f"{other}_wrapper")}
                )
    assert config.model_type in served(folders[0])["model_types"]  # type: ignore[operator]


def test_vectors_of_other_tools_are_imported_for_it(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.save({1: torch.ones(32)}, tmp_path / "v.pt")
    pack = import_pack(
        [VectorSource("one", tmp_path / "v.pt")],
        ImportTarget("p", tmp_path / "p", 1.0, 1.0),
        folders[0],
    )
    for folder in folders:
        PackRegistry([pack]).check_model(**served(folder))
