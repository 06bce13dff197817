"""Features chosen by examples: figures of each preset against plain PyTorch on the model's hidden states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.offline.sae_cases import Autoencoder, autoencoder, new_config, saelens_folder
from vllm_steer.cli import main
from vllm_steer.packs.pack import load_pack

LAYER, FEATURES = 3, 64
TOPICS = ("the sea", "a red house", "my old dog", "the market", "rain", "a long road", "bread")


@pytest.fixture(scope="module")
def loaded(model: Path) -> tuple[Any, Any]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return loaded, AutoTokenizer.from_pretrained(model)


@torch.no_grad()
def states(loaded: tuple[Any, Any], ids: Sequence[int]) -> torch.Tensor:
    """Output of the block, ``[tokens, width]``; hidden states begin with the embeddings."""
    found = loaded[0](torch.tensor([list(ids)]), output_hidden_states=True)
    return found.hidden_states[LAYER + 1][0]


def prompt(loaded: tuple[Any, Any], text: str) -> list[int]:
    found: list[int] = loaded[1].apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return found


@pytest.fixture(scope="module")
def sae(loaded: tuple[Any, Any]) -> Autoencoder:
    hidden = states(loaded, prompt(loaded, "Tell me about the sea."))
    size = hidden.square().mean().sqrt().item()
    return autoencoder(hidden.shape[1], FEATURES, jumps=True, size=size)


def select(
    folder: Path, model: Path, sae: Autoencoder, preset: str, lines: Sequence[Any], *more: str
) -> int:
    """Runs the command; its pack is ``out``, its report ``report.json``."""
    source = saelens_folder(folder / "sae", sae, new_config(sae, f"blocks.{LAYER}.hook_resid_post"))
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    norms = folder / "norms.json"
    norms.write_text(json.dumps(dict.fromkeys(range(40), 10.0)))
    # fmt: off
    return main([
        "convert", "select-features", str(source), "--preset", preset, "--data", str(folder / "data.jsonl"),
        "--model", str(model), "--name", "chosen", "--out", str(folder / "out"), "--report", str(folder / "report.json"),
        "--residual-norms", str(norms), "--dtype", "float32", "--batch-size", "3", *more,
    ])
    # fmt: on


def assert_chosen(
    folder: Path, score: np.ndarray, scale: np.ndarray, count: int, positions: str
) -> None:
    """The report and the pack hold the features of the highest scores, with their activations as scales."""
    report = json.loads((folder / "report.json").read_text())
    ids = [each["feature"] for each in report["features"]]
    assert ids == np.argsort(-score, kind="stable")[:count].tolist()
    np.testing.assert_allclose([e["score"] for e in report["features"]], score[ids], rtol=1e-3)
    np.testing.assert_allclose([e["scale"] for e in report["features"]], scale[ids], rtol=1e-3)
    pack = load_pack(folder / "out")
    assert [name for name in pack.directions if "encoder" not in name] == [str(i) for i in ids]
    for number in ids:
        record = pack.directions[str(number)]
        assert (record.op, record.layers, record.positions) == ("feature", [LAYER], positions)
        assert record.default_scale == pytest.approx(scale[number], rel=1e-3)


def test_contrast(loaded, sae, model, tmp_path, capsys) -> None:
    lines = [
        {
            "prompt": f"Tell me about {t}.",
            "prefixed": f"You are afraid of spiders. Tell me about {t}.",
        }
        for t in TOPICS
    ]
    assert select(tmp_path, model, sae, "contrast", lines, "--count", "4") == 0
    shown, plain = (
        torch.stack(
            [sae.encode(states(loaded, prompt(loaded, line[key])))[1:].mean(0) for line in lines]
        )
        for key in ("prefixed", "prompt")
    )
    away = (shown - plain).double()
    mean = away.mean(0)
    error = away.std(0) / len(lines) ** 0.5
    score = torch.where(mean > 0, mean / (error + 0.05 * mean.abs().max()), -torch.inf)
    scale = shown.double().sum(0) / (shown > 0).sum(0)
    assert_chosen(tmp_path, score.numpy(), scale.numpy(), 4, "all")
    said = capsys.readouterr()
    assert "arXiv 2511.00029" in said.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert str(report["features"][0]["feature"]) in said.out


def test_corrsteer(loaded, sae, model, tmp_path) -> None:
    lines = [
        {"prompt": f"Tell me about {t}.", "answer": answer, "score": score}
        for number, t in enumerate(TOPICS)
        for answer, score in (("It is wonderful and I love it.", 1.0), ("No" * (number + 1), 0.0))
    ]
    assert select(tmp_path, model, sae, "corrsteer", lines, "--count", "5") == 0
    peaks = []
    for line in lines:
        start = prompt(loaded, line["prompt"])
        answer = loaded[1](line["answer"], add_special_tokens=False)["input_ids"]
        peaks.append(sae.encode(states(loaded, start + answer))[len(start) :].amax(0))
    found = torch.stack(peaks).double().numpy()
    scores = np.array([line["score"] for line in lines])
    with np.errstate(invalid="ignore", divide="ignore"):
        score = np.array([np.corrcoef(column, scores)[0, 1] for column in found.T])
    score = np.where(score > 0, score, -np.inf)
    assert_chosen(tmp_path, score, found[scores > 0].mean(0), 5, "generated")


def test_langfir_takes_what_noise_does_not_awaken(loaded, sae, model, tmp_path, capsys) -> None:
    """Planted: one feature of all texts, one of all texts and noise, one of some texts."""
    texts = [f"Once upon a time there was {topic}." for topic in TOPICS]
    ids = [loaded[1](text)["input_ids"] for text in texts]
    random = np.random.default_rng(5)
    noise = torch.cat(
        [states(loaded, random.integers(5, len(loaded[1]), 30).tolist())[1:] for _ in range(20)]
    )
    every = [states(loaded, tokens)[1:] for tokens in ids]
    center = noise.mean(0)
    w = every[0][2] - center
    reads = [((hidden - center) @ w).max().item() for hidden in every]
    most = ((noise - center) @ w).max().item()
    assert min(reads) > most
    w_enc = torch.zeros(len(w), 3)
    b_enc = torch.tensor([0.0, 1.0, 0.0])
    w_enc[:, 0] = w
    b_enc[0] = -(center @ w) - (min(reads) + most) / 2
    w_enc[:, 1] = 1e-6 * w
    only = every[0][-1] - center
    w_enc[:, 2] = only
    b_enc[2] = -(center @ only) - 0.99 * (only @ only)
    planted = Autoencoder(w_enc, b_enc, torch.eye(3, len(w)), torch.zeros(len(w)))
    lines = [{"text": text} for text in texts]
    assert select(tmp_path, model, planted, "langfir", lines) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["feature"] for each in report["features"]] == [0]
    assert report["features"][0]["active"] == 1.0
    assert "LangFIR" in report["departs"]
    b_enc[0] = 1e9
    out = tmp_path / "second"
    out.mkdir()
    assert select(out, model, planted, "langfir", lines) == 1
    assert "no feature does what the preset looks for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "lines", "message"),
    [
        ("contrast", [{"prompt": "a", "prefixed": "b"}], "has 1 examples"),
        (
            "contrast",
            [{"prompt": "a"}, {"prompt": "b"}],
            "line 1: must be a JSON object with prompt, prefixed",
        ),
        ("langfir", [{"text": ""}, {"text": "a"}], "line 1"),
        ("langfir", [{"text": "a word " * 9000}, {"text": "a"}], "example 1 has "),
        ("corrsteer", [{"prompt": "a", "answer": "b", "score": "good"}] * 2, "line 1"),
        (
            "corrsteer",
            [{"prompt": str(k), "answer": "b", "score": 1.0} for k in range(3)],
            "the file has only one kind",
        ),
    ],
)
def test_examples_that_do_not_fit(sae, model, tmp_path, capsys, preset, lines, message) -> None:
    assert select(tmp_path, model, sae, preset, lines) == 1
    assert message in capsys.readouterr().err


def test_counts_that_do_not_fit(sae, model, tmp_path, capsys) -> None:
    lines = [{"prompt": "a", "prefixed": "b"}, {"prompt": "c", "prefixed": "d"}]
    assert select(tmp_path, model, sae, "contrast", lines, "--count", "0") == 1
    assert "--count must be 1 to 4096" in capsys.readouterr().err
    assert (
        select(
            tmp_path, model, sae, "contrast", lines, "--report", str(tmp_path / "data.jsonl" / "r")
        )
        == 1
    )
    assert "data.jsonl/r cannot be written" in capsys.readouterr().err
