"""Prompts of base models and of thinking models: rendered as one says, in whatever a pack goes through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.offline.conftest import TEMPLATES
from vllm_steer.cli import main
from vllm_steer.errors import EvaluationError, ExtractionError
from vllm_steer.offline.engine.tokens import Asked, TokenEngine
from vllm_steer.offline.evaluate.generation import Generator
from vllm_steer.offline.models.chat import ChatFormat
from vllm_steer.offline.models.loading import load_config
from vllm_steer.offline.models.prompts import (
    count_candidates,
    render_answer,
    render_question,
    without_thoughts,
)
from vllm_steer.packs.pack import PackContent, SteeringPack, load_pack, write_pack
from vllm_steer.testing.random_pack import random_identity, write_random_pack

PLAIN = ChatFormat(chat_template="plain")
THINKING = (
    TEMPLATES["chatml"]
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.fixture
def checkpoint(
    tmp_path: Path, tiny_llama: PreTrainedModel, chatml: PreTrainedTokenizerFast
) -> Callable[[str | None], Path]:
    """A model whose tokenizer has a template, or None."""

    def make(template: str | None) -> Path:
        path = tmp_path / "model"
        tiny_llama.save_pretrained(path)
        chatml.save_pretrained(path)
        (path / "chat_template.jinja").unlink()
        if template is not None:
            (path / "chat_template.jinja").write_text(template)
        return path

    return make


def extract(tmp_path: Path, model: Path, out: str, *more: str) -> int:
    (tmp_path / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{word} is", "positive": " good", "negative": " bad"}) + "\n"
            for word in ("rain", "sun", "wind", "snow", "bread")
        )
    )
    (tmp_path / "concepts.txt").write_text("spiders\n")
    source = (
        [] if "--pairs" in more else ["--concepts", f"{tmp_path}/concepts.txt", "--class", "fears"]
    )
    return main(
        ["extract", *source, "--model", str(model), "--name", "n", "--out", f"{tmp_path}/{out}", "--no-calibrate",
         "--workers", "1", *more]
    )  # fmt: skip


def fast(*more: str) -> list[str]:
    return ["--estimator", "mean_difference", "--permutations", "0", *more]


def test_a_base_model_learns_from_plain_text_and_from_a_template(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command that makes a pack; without either, it says what to give."""
    model = checkpoint(None)
    pairs = ["--pairs", f"{tmp_path}/pairs.jsonl"]
    torch.save({1: torch.ones(32)}, tmp_path / "v.pt")
    imported = [
        "convert",
        "import",
        f"v={tmp_path}/v.pt",
        "--model",
        str(model),
        "--name",
        "i",
        "--out",
    ]
    (tmp_path / "chatml.jinja").write_text(TEMPLATES["chatml"])
    for given, recorded in (("plain", "plain"), (f"{tmp_path}/chatml.jinja", TEMPLATES["chatml"])):
        chat = ["--chat-template", given]
        out = recorded[:5]
        assert extract(tmp_path, model, f"{out}-prompts", *fast(), *chat) == 0
        assert extract(tmp_path, model, f"{out}-pairs", *pairs, *chat) == 0
        assert main([*imported, f"{tmp_path}/{out}-import", *chat]) == 0
        shown = capsys.readouterr().out
        assert shown.count("plain text" if given == "plain" else "a chat template given") == 3
        for kind in ("prompts", "pairs", "import"):
            manifest = load_pack(tmp_path / f"{out}-{kind}").manifest
            assert manifest.method.settings["chat_template"] == recorded
            assert (manifest.model.chat_template_sha256 is None) == (given == "plain")
    plain, templated = (
        load_pack(tmp_path / f"{out}-pairs") for out in ("plain", TEMPLATES["chatml"][:5])
    )
    assert not np.allclose(plain.vectors["pairs"], templated.vectors["pairs"])
    for command in (
        lambda: extract(tmp_path, model, "none", *fast()),
        lambda: extract(tmp_path, model, "none", *pairs),
        lambda: main([*imported, f"{tmp_path}/none"]),
    ):
        assert command() == 1
        assert "give --chat-template FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (" \n", "is empty"),
        ("{% if %}", "the chat template refuses the prompt"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(
    content: str | None, message: str, checkpoint: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if content is not None:
        (tmp_path / "t.jinja").write_text(content)
    assert (
        extract(tmp_path, checkpoint(None), "p", *fast("--chat-template", f"{tmp_path}/t.jinja"))
        == 1
    )
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("begins", [True, False])
def test_plain_text_is_what_a_completion_reads(
    begins: bool, checkpoint: Callable[..., Path]
) -> None:
    """With the token that begins a text where the tokenizer puts one, since a server does as well."""
    _, tokenizer = load_config(checkpoint(None), PLAIN)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    start = tokenizer.bos_token_id
    if begins:
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
        )
    prompt = render_question(tokenizer, "rain is good", "Be kind.")
    assert list(prompt.token_ids) == tokenizer("Be kind.  rain is good")["input_ids"]
    assert (prompt.token_ids[0] == start) == begins
    first, last = prompt.prefix_span
    assert tokenizer.decode(prompt.token_ids[first:last]).strip() == "Be kind."
    assert render_question(tokenizer, "rain", "Be kind.", role="system").text.endswith(
        "Be kind.\n\nrain"
    )
    assert render_answer(tokenizer, "rain is", " good").text.endswith("rain is good")
    assert count_candidates(tokenizer) == 1


def test_a_thinking_model_learns_without_its_thoughts(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a template that cannot think; and not as from one that may."""
    model = checkpoint(THINKING)
    (tmp_path / "silent.jinja").write_text(
        THINKING.replace(" and enable_thinking is defined and not enable_thinking", "")
    )
    told = ["--chat-template-kwargs", '{"enable_thinking": false}']
    given = {
        "told": told,
        "silent": ["--chat-template", f"{tmp_path}/silent.jinja"],
        "thinking": [],
    }
    for out, more in given.items():
        assert extract(tmp_path, model, out, *fast(*more)) == 0
    vectors = {out: load_pack(tmp_path / out).vectors["spiders"] for out in given}
    np.testing.assert_array_equal(vectors["told"], vectors["silent"])
    assert not np.allclose(vectors["told"], vectors["thinking"])
    recorded = load_pack(tmp_path / "told").manifest.method.settings
    assert recorded["chat_template_kwargs"] == {"enable_thinking": False}
    assert "ask it likewise" in capsys.readouterr().out
    (tmp_path / "settings.json").write_text('{"chat_template_kwargs": {"enable_thinking": false}}')
    assert extract(tmp_path, model, "file", *fast("--settings", f"{tmp_path}/settings.json")) == 0
    assert load_pack(tmp_path / "file").manifest.method.data_sha256 == (
        load_pack(tmp_path / "told").manifest.method.data_sha256
    )


def test_what_thinks_unasked_is_told_not_to(checkpoint: Callable[..., Path]) -> None:
    """Unless something is said of it, or it makes no difference."""
    unasked = ChatFormat()
    _, tokenizer = load_config(checkpoint(THINKING))
    told = without_thoughts(tokenizer, unasked)
    assert told.chat_template_kwargs == {"enable_thinking": False}
    assert render_question(tokenizer, "Rain?").text.endswith("assistant\n")
    for said in (True, False):
        asked = ChatFormat(chat_template_kwargs={"enable_thinking": said})
        assert without_thoughts(asked.apply_to(tokenizer), asked) == asked
    never = THINKING.replace(
        "is defined and not enable_thinking", "is not defined or not enable_thinking"
    )
    for template in (never, TEMPLATES["chatml"]):
        _, tokenizer = load_config(checkpoint(template))
        assert without_thoughts(tokenizer, unasked) == unasked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_thinkin": False}, "reads no 'enable_thinkin', so it would change nothing"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is not the template's"),
        ({"messages": []}, "'messages' is not the template's"),
    ],
)
def test_arguments_that_the_template_does_not_read_are_refused(
    arguments: dict[str, Any], message: str, checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(ExtractionError, match=message):
        load_config(checkpoint(THINKING), ChatFormat(chat_template_kwargs=arguments))


@pytest.fixture
def asked_of_engine(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """The prompts that the engine gets, in place of which it answers nothing here."""
    seen: list[Asked] = []

    def generate(self: TokenEngine, asked: list[Asked], *_: Any) -> None:
        seen.extend(asked)
        raise EvaluationError("no engine here")

    monkeypatch.setattr(TokenEngine, "generate", generate)
    return seen


def test_answers_are_asked_for_as_they_will_be(
    checkpoint: Callable[..., Path], tmp_path: Path, asked_of_engine: list[Asked]
) -> None:
    model = checkpoint(None)
    assert extract(tmp_path, model, "p", "--method", "trained", "--chat-template", "plain") == 1
    _, tokenizer = load_config(model)
    assert tokenizer.decode(asked_of_engine[0].prompt).startswith(
        "Personify someone who is terrified of spiders.  "
    )


def test_fusion_renders_as_it_is_told(
    checkpoint: Callable[..., Path], tmp_path: Path, asked_of_engine: list[Asked]
) -> None:
    """Prompts, references and what the engine is asked; the pack says how."""
    model = checkpoint(None)
    (tmp_path / "questions.jsonl").write_text('{"question": "Rain?", "answer": "rain is good"}')
    command = ["fusion", "--model", str(model), "--questions", f"{tmp_path}/questions.jsonl"]
    command += ["--out", f"{tmp_path}/out", "--kind", "full", "--trials", "2"]
    assert main(command) == 1
    assert not asked_of_engine
    assert main([*command, "--chat-template", "plain"]) == 1
    _, tokenizer = load_config(model)
    assert tokenizer.decode(asked_of_engine[0].prompt) == "Rain?"
    assert load_pack(tmp_path / "out/pack").manifest.method.settings["chat_template"] == "plain"


@pytest.fixture
def pack_with(tmp_path: Path) -> Callable[..., SteeringPack]:
    """A pack that says how its prompts were rendered."""

    def make(name: str, **settings: Any) -> SteeringPack:
        pack = write_random_pack(
            tmp_path / name, name, random_identity(32, 3), {"a": [1]}, seed=0, default_scale=1.0, safe_scale=2.0,
            residual_norm=10.0,
        )  # fmt: skip
        manifest = pack.manifest
        return write_pack(
            pack.path,
            PackContent(
                name=name,
                model=manifest.model,
                directions=manifest.directions,
                vectors=pack.vectors,
                method=manifest.method.model_copy(update={"settings": settings}),
                residual_norms={1: 10.0},
            ),
        )

    return make


def test_what_measures_a_pack_renders_as_it_was_learned(
    checkpoint: Callable[..., Path], pack_with: Callable[..., SteeringPack]
) -> None:
    """Calibration and sweeps take their prompts from the engine's tokenizer; nothing is started for that."""
    model = checkpoint(THINKING)
    plain = pack_with("plain", chat_template="plain")
    silent = pack_with("silent", chat_template_kwargs={"enable_thinking": False})
    older = pack_with("older")

    def shown(*packs: SteeringPack) -> str:
        return Generator(TokenEngine(model, packs), 8).prompt("Rain?").text

    assert shown(plain) == "Rain?"
    assert shown(silent).endswith("<think></think>")
    assert shown(older).endswith("assistant\n")
    assert shown(silent, silent) == shown(silent)
    with pytest.raises(
        ExtractionError, match="'silent' and 'older' were learned with different chat"
    ):
        shown(silent, older)
    with pytest.raises(ExtractionError, match=r"pack 'odd': .*chat_template"):
        shown(pack_with("odd", chat_template=3))
