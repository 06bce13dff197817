"""Probes measured through the real engine on the demo model, held against Hugging Face with hooks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.offline.answers_cases import ENGINE, QUESTIONS, greedy
from vllm_steer.cli import main
from vllm_steer.errors import EvaluationError
from vllm_steer.offline.demo import demo_model_path
from vllm_steer.offline.demo.concepts import prefix
from vllm_steer.offline.models.loading import load_config, load_model
from vllm_steer.offline.probe.run import STORE, ProbeTexts, halved, measured, probe_pack
from vllm_steer.offline.probe.settings import ProbeSettings
from vllm_steer.offline.probe.texts import read_texts, rendered
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.testing.engine import ForkedLLM
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3
TOKENS = 8
LAYERS = (1, 3)


@pytest.fixture(scope="module", autouse=True)
def _forked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.LLM", ForkedLLM)
        yield


@pytest.fixture
def fears(packs: list[SteeringPack], tmp_path: Path) -> SteeringPack:
    shutil.copytree(packs[0].path, tmp_path / "fears")
    return load_pack(tmp_path / "fears")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Questions with the prefix of spiders, and others without."""
    positive, negative = tmp_path / "positive.txt", tmp_path / "negative.txt"
    positive.write_text("\n".join(f"{prefix('spiders')}  {q}" for q in QUESTIONS[:12]))
    negative.write_text("\n".join(QUESTIONS[20:48]))
    return positive, negative


def test_scores_are_those_of_the_hooks_and_the_pack_has_the_probe(
    fears: SteeringPack, texts: tuple[Path, Path]
) -> None:
    given = ProbeTexts(*map(read_texts, texts))
    settings = ProbeSettings(rates=(0.1,), layers=LAYERS, max_tokens=TOKENS, seed=1)
    pack, scores = probe_pack(
        fears, demo_model_path(), given, settings, ["spiders", "heights"], ENGINE
    )
    assert list(scores) == ["spiders", "heights"]
    assert not (fears.path / STORE).exists()
    reference = Reference(demo_model_path(), [fears])
    tokenizer = load_config(demo_model_path())[1]
    model = load_model(demo_model_path(), "float32", "cpu")
    every = [*given.positive, *given.negative]
    for number in (0, 5, 13, 30):
        prompt = rendered(tokenizer, every[number])
        answer = greedy(model, prompt, TOKENS)
        for name, found in scores.items():
            reads = [{"name": f"fears/{name}", "layers": [layer]} for layer in LAYERS]
            expected = reference.read(prompt, answer, {"read": reads})[:, len(prompt) : -1].max(1)
            both = np.concatenate([found.positive, found.negative], axis=1)
            assert np.abs(both[:, number] - expected).max() < TOLERANCE
    probe = load_pack(fears.path).directions["spiders"].probe
    assert probe is not None
    told = probe.model_dump(include={"model", "dtype", "chat_template_sha256"}) | {
        f"{kind}s{end}": getattr(probe, f"{kind}s{end}")
        for kind in ("positive", "negative")
        for end in ("", "_sha256")
    }
    assert probe == measured(halved(scores["spiders"], 1), settings, told)
    assert (probe.model, probe.dtype) == (demo_model_path().name, "float32")
    assert probe.chat_template_sha256 == fears.manifest.model.chat_template_sha256
    assert (probe.positives, probe.negatives) == (12, 28)
    # This model takes a concept on from its prefix, and nothing else.
    best = probe.at(probe.layer)
    assert best is not None
    assert best.auroc > 0.95
    assert pack.digests == fears.digests


def test_the_command_reads_conversations_and_draws(
    fears: SteeringPack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(text: str) -> str:
        return json.dumps({"messages": [{"role": "user", "content": text}]})

    positive, negative = tmp_path / "positive.jsonl", tmp_path / "negative.jsonl"
    positive.write_text("\n".join(line(f"{prefix('spiders')}  {q}") for q in QUESTIONS[:10]))
    negative.write_text("\n".join(map(line, QUESTIONS[20:40])))
    files = [
        f"--{kind}={tmp_path / name}"
        for kind, name in (
            ("positive", "positive.jsonl"),
            ("negative", "negative.jsonl"),
            ("json", "probe.json"),
            ("plot", "probe.png"),
        )
    ]
    options = ["--fpr", "0.2", "0.1", "--score", "mean", "--tokens", "prompt"]
    command = ["probe", str(fears.path), "--model", str(demo_model_path()), *files, *options]
    assert main([*command, "--direction", "spiders", "--engine", json.dumps(ENGINE)]) == 0
    probe = load_pack(fears.path).directions["spiders"].probe
    assert probe is not None
    assert (probe.score, probe.tokens, probe.max_tokens) == ("mean", "prompt", None)
    assert [each.layer for each in probe.layers] == fears.directions["spiders"].layers
    assert probe.rates == [0.1, 0.2]
    report = json.loads((tmp_path / "probe.json").read_text())
    assert report["directions"] == {"spiders": probe.model_dump()}
    assert imread(tmp_path / "probe.png").shape[0] > 100
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:2] == ["spiders", str(probe.layer)]
    assert "0.2" in shown[2].split()


@pytest.mark.parametrize(
    ("directions", "settings", "message"),
    [
        (["snakes"], {}, "--direction: pack 'fears' has no direction 'snakes'"),
        (None, {"layers": (1, 77)}, r"--layers: direction 'spiders' has no vector for .* \[77\]"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_an_engine_starts(
    directions: list[str] | None,
    settings: dict[str, tuple[int, ...]],
    message: str,
    fears: SteeringPack,
    texts: tuple[Path, Path],
) -> None:
    given = ProbeTexts(*map(read_texts, texts))
    with pytest.raises(EvaluationError, match=message):
        probe_pack(fears, "no model", given, ProbeSettings(rates=(0.1,), **settings), directions)


def test_an_answered_conversation_has_no_answer_to_generate(
    fears: SteeringPack, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    said = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Yes."}]}
        for q in QUESTIONS[:10]
    ]
    file = tmp_path / "answered.jsonl"
    file.write_text("\n".join(map(json.dumps, said)))
    given = ProbeTexts(read_texts(file), read_texts(texts[1]))
    with pytest.raises(EvaluationError, match="line 1: the conversation ends with an answer"):
        probe_pack(fears, "no model", given, ProbeSettings(rates=(0.1,)))
