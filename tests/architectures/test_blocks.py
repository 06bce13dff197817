"""Blocks are found by structure; a model whose blocks cannot be told apart refuses to start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.architectures.checkpoint import write_checkpoint
from tests.architectures.families import COMMON, LAYERS, Family
from tests.architectures.parity import engine_arguments
from vllm_steer.engine.bank import BankShape, SteeringBank
from vllm_steer.engine.blocks import find_blocks, hook_blocks
from vllm_steer.engine.row_values import RowValues
from vllm_steer.errors import CompatibilityError, EngineError
from vllm_steer.testing.engine import Engine

WIDTH, TOKENS = 4, 5


class Block(nn.Module):
    """Returns what it was made for; holds as many experts as the model has blocks."""

    def __init__(self, output: object = None) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
        self.output = output

    def forward(self) -> object:
        return self.output


def model(**lists: nn.ModuleList) -> nn.Module:
    inner = nn.Module()
    for name, modules in lists.items():
        inner.add_module(name, modules)
    outer = nn.Module()
    outer.add_module("model", inner)
    return outer


def blocks(count: int = LAYERS) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


@pytest.mark.parametrize("name", ["layers", "h", "blocks"])
def test_the_outermost_list_of_the_right_length(name: str) -> None:
    wanted = blocks()
    found = find_blocks(model(**{name: wanted, "other": blocks(LAYERS + 1)}), LAYERS)
    assert found == list(wanted)


def test_a_second_list_of_the_same_blocks() -> None:
    wanted = blocks()
    assert find_blocks(model(layers=wanted, again=wanted[:]), LAYERS) == list(wanted)


def test_of_a_model_that_sees_images_the_blocks_of_its_language_model() -> None:
    """Its other tower has as many."""

    class SeesImages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = model(layers=blocks())
            self.language_model = model(layers=wanted)

        def get_language_model(self) -> nn.Module:
            return self.language_model

    wanted = blocks()
    assert find_blocks(SeesImages(), LAYERS) == list(wanted)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({}, r"0 lists of that length \(none\)"),
        ({"layers": LAYERS + 1}, r"0 lists of that length \(none\)"),
        ({"encoder": LAYERS, "decoder": LAYERS}, r"2 lists .*model\.encoder, model\.decoder"),
    ],
)
def test_no_list_or_two(lists: dict[str, int], message: str) -> None:
    with pytest.raises(CompatibilityError, match=message):
        find_blocks(model(**{name: blocks(count) for name, count in lists.items()}), LAYERS)


HIDDEN = torch.zeros(TOKENS, WIDTH)
ROW = torch.arange(1.0, WIDTH + 1)


def steered(output: object) -> object:
    """What a block that returns ``output`` returns with a vector on its second token."""
    bank = SteeringBank(BankShape((0,), 2, WIDTH, 2 * TOKENS), torch.float32, torch.device("cpu"))
    bank.write_row(1, replace(RowValues.zeros(1, 0, WIDTH), vectors=ROW[None].numpy()))
    bank.rows[1] = 1
    block = Block(output)
    hook_blocks([(0, block)], bank)
    return block()


@pytest.mark.parametrize("batch", [(), (1,)], ids=["tokens", "batch of one"])
@pytest.mark.parametrize("form", ["alone", "with residual", "with nothing", "tuple of one"])
def test_forms_of_block_output(form: str, batch: tuple[int, ...]) -> None:
    hidden, residual = HIDDEN.reshape(*batch, TOKENS, WIDTH), torch.ones(TOKENS, WIDTH)
    output = {
        "alone": hidden,
        "with residual": (hidden, residual),
        "with nothing": (hidden, None),
        "tuple of one": (hidden,),
    }[form]
    result = steered(output)
    changed = result[0] if isinstance(result, tuple) else result
    expected = HIDDEN.clone()
    expected[1] = ROW
    assert torch.equal(changed, expected.reshape(hidden.shape))
    if isinstance(output, tuple):
        assert result[1:] == output[1:]


@pytest.mark.parametrize(
    "output",
    [
        HIDDEN[:, None].expand(TOKENS, 2, WIDTH),
        torch.zeros(TOKENS, WIDTH + 1),
        (HIDDEN, None, HIDDEN),
        {"hidden": HIDDEN},
    ],
    ids=["several streams", "another width", "three values", "no tensor"],
)
def test_other_outputs_are_refused(output: object) -> None:
    with pytest.raises(CompatibilityError, match="Block does not return one vector of width 4"):
        steered(output)


@pytest.mark.engine
def test_a_model_of_unknown_structure_does_not_start(tmp_path: Path) -> None:
    """HRM-Text runs two stacks of blocks again and again: no list holds as many as it has layers."""
    write_checkpoint(Family("HRM-Text", "HrmTextConfig", {**COMMON, "head_dim": 32}), tmp_path)
    with pytest.raises(
        EngineError,
        match="CompatibilityError: cannot tell which modules of HrmTextForCausalLM are its 24 "
        "decoder blocks: 0 lists of that length .* this model cannot be steered",
    ):
        Engine(engine_arguments(tmp_path, "eager"), fork=True)
