"""What people give that is malformed or unusual: read, or one message that says what to do; never a traceback."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import ViTConfig

from tests.offline.convert_cases import HIDDEN, config_folder, write_control_vector
from vllm_steer.cli import main
from vllm_steer.packs.pack import load_pack

ONES = np.ones(HIDDEN, np.float32)
VIT = json.dumps(ViTConfig().to_dict())
JSON = json.dumps({"1": [1.0] * HIDDEN})
BASE = ["--model", "model", "--name", "p", "--out", "p", "--residual-norms", "norms.json"]
Write = Callable[[Path], Any]


def vector(name: str = "v.safetensors", **tensors: torch.Tensor) -> Write:
    return lambda here: save_file(tensors or {"layer_1": torch.ones(HIDDEN)}, here / name)


def text(name: str, content: str | bytes) -> Write:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda here: (here / name).write_bytes(data)


def array(content: Any, name: str = "v_layer_1.npy") -> Write:
    return lambda here: np.save(here / name, content, allow_pickle=True)


def both(*writers: Write) -> Write:
    return lambda here: [write(here) for write in writers]


def cut(name: str, length: int) -> Write:
    def write(here: Path) -> None:
        vector(name)(here)
        (here / name).write_bytes((here / name).read_bytes()[:length])

    return write


def adapter(here: Path) -> None:
    """What PEFT saves."""
    (here / "adapter").mkdir()
    config = {"base_model_name_or_path": "some/base", "peft_type": "LORA"}
    (here / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(8, HIDDEN)}, here / "adapter" / "adapter_model.safetensors")


def config(folder: str, content: str) -> Write:
    def write(here: Path) -> None:
        (here / folder).mkdir(exist_ok=True)
        (here / folder / "config.json").write_text(content)

    return write


ONE_DEEP: Any = [1.0]
for _ in range(40):
    ONE_DEEP = {"a": ONE_DEEP}
VECTOR = ["a=v.safetensors"]
# What is there, the arguments, and what the message must say; None where it is read.
IMPORTS: dict[str, tuple[Write, list[str], str | None]] = {
    "an empty file": (text("v", b""), ["a=v"], "v: is empty; give"),
    "a directory": (lambda here: (here / "v").mkdir(), ["a=v"], "v: is a directory; give"),
    "no file": (lambda _: None, ["a=v.pt"], r"v.pt: cannot be read \(No such file.*; give"),
    "a link to itself": (lambda here: (here / "v").symlink_to("v"), ["a=v"], "symbolic links.*; give"),
    "a pipe": (lambda here: os.mkfifo(here / "v"), ["a=v"], "not a regular file; give"),
    "an address": (lambda _: None, ["a=https://example.org/v.gguf"], "No such file.*; give"),
    "no name": (vector(), ["=v.safetensors"], "must be NAME=FILE, such as"),
    "no file behind the name": (vector(), ["a="], "must be NAME=FILE, such as"),
    "a safetensors file that ends early": (cut("v.safetensors", 90), VECTOR, "not a readable safetensors.*save it again"),
    "a safetensors header without end": (
        text("v", struct.pack("<Q", 2**31) + b'{"a":' + bytes(50)), ["a=v"], "not a readable safetensors.*again"),
    "NaN": (array(np.full(HIDDEN, np.nan, np.float32)), ["a=v_layer_1.npy"], "NaN or Inf; every value must be finite"),
    "infinity in JSON": (text("v.json", json.dumps({"1": [float("inf")] * HIDDEN})), ["a=v.json"], "NaN or Inf"),
    "a float64 that float32 has not": (array(np.full(HIDDEN, 1e300)), ["a=v_layer_1.npy"], "must be finite"),
    "another width": (array(np.ones(7, np.float32)), ["a=v_layer_1.npy"], r"\[7\] values; the model's hidden size is 16"),
    "integers": (array(np.ones(HIDDEN, np.int64)), ["a=v_layer_1.npy"], 'dtype="float32"'),
    "integer tensors": (vector(layer_1=torch.ones(HIDDEN, dtype=torch.int8)), VECTOR, r"int8 .*save vector.float\(\)"),
    "float8": (vector(layer_1=torch.ones(HIDDEN).to(torch.float8_e4m3fn)), VECTOR, "times its scale"),
    "complex numbers": (array(np.ones(HIDDEN, np.complex64)), ["a=v_layer_1.npy"], 'dtype="float32"'),
    "bfloat16": (vector(layer_1=torch.ones(HIDDEN, dtype=torch.bfloat16)), VECTOR, None),
    "float64": (array(np.ones(HIDDEN)), ["a=v_layer_1.npy"], None),
    "big endian": (array(ONES.astype(">f4")), ["a=v_layer_1.npy"], None),
    "zeros": (array(ONES * 0), ["a=v_layer_1.npy"], "every vector is zero"),
    "Python objects": (array(np.array([{}], object)), ["a=v_layer_1.npy"], "never unpickled.*save only floats"),
    "an array that ends early": (
        both(array(ONES), lambda here: os.truncate(here / "v_layer_1.npy", 100)), ["a=v_layer_1.npy"], "save only floats"),
    "a table of text": (text("v.csv", "layer,value\n1,0.5\n"), ["a=v.csv"], "of no known format; give"),
    "a pickle": (text("v.pkl", pickle.dumps({1: ONES})), ["a=v.pkl"], "never opened.*torch.save"),
    "JSON in UTF-16": (text("v.json", JSON.encode("utf-16")), ["a=v.json"], "no known format; give"),
    "JSON with a byte order mark": (text("v.json", b"\xef\xbb\xbf" + JSON.encode()), ["a=v.json"], None),
    "JSON that ends early": (text("v.json", '{"1": [1.0,'), ["a=v.json"], 'write {"12": '),
    "rows of different lengths": (text("v.json", "[[1.0, 2.0], [3.0]]"), ["a=v.json"], "different lengths; write each"),
    "a key twice": (text("v.json", '{"1": [1.0], "1": [2.0]}'), ["a=v.json"], "a key occurs twice"),
    "JSON of depth": (text("v.json", "[" * 100_000), ["a=v.json"], "not readable as JSON.*write"),
    "objects of depth": (text("v.json", json.dumps(ONE_DEEP)), ["a=v.json"], "more than 6 deep"),
    "numbers beyond all floats": (text("v.json", f'{{"1": [{"9" * 400}]}}'), ["a=v.json"], "write each vector"),
    "a model's GGUF file": (
        lambda here: write_control_vector(here / "v.gguf", {"x": ONES}), ["a=v.gguf"], "a control vector has direction"),
    "an adapter for a vector": (adapter, ["a=adapter/adapter_model.safetensors"], "part of block 0.*give vectors"),
    "a configuration for a vector": (lambda _: None, ["a=model/config.json"], "holds no array.* must hold"),
    "a slash in the name": (vector(), ["a/b=v.safetensors"], "'a/b': a direction's name has"),
    "a line break in the name": (vector(), ["a\nb=v.safetensors"], "a direction's name has"),
    "the name of the pack a path": (vector(), [*VECTOR, "--name", "../p"], "letters, digits"),
    "the same file twice": (vector(), ["a=v.safetensors", "a=v.safetensors"], r"hold layers \[1\].*leave one out"),
    "a layer of the model that is not there": (vector(), [*VECTOR, "--layers", "9"], r"it has \[1\]: give some"),
    "a layer below 0": (array(ONES, "v.npy"), ["a=v.npy", "--layers", "-1"], "0 to 3"),
    "no scale": (vector(), [*VECTOR, "--scale", "0"], "greater than 0"),
    "an adapter for the model": (both(vector(), adapter), [*VECTOR, "--model", "adapter"], "adapter.*some/base"),
    "no model": (vector(), [*VECTOR, "--model", "./nowhere"], "--model: "),
    "a file for the model": (vector(), [*VECTOR, "--model", "v.safetensors"], "--model: .*directory"),
    "a configuration that is no JSON": (both(vector(), config("m", "{")), [*VECTOR, "--model", "m"], "--model: "),
    "a model of an unknown type": (
        both(vector(), config("m", '{"model_type": "unheard"}')), [*VECTOR, "--model", "m"], "--model: .*unheard"),
    "a model without text": (
        both(vector(), config("m", VIT)), [*VECTOR, "--model", "m"], "language model"),
    "norms of nothing": (both(vector(), text("norms.json", "{}")), VECTOR, "residual_norms lacks layers"),
    "norms below 0": (both(vector(), text("norms.json", '{"1": -1}')), VECTOR, "greater than 0"),
    "a directory without a pack for norms": (vector(), [*VECTOR, "--residual-norms", "model"], "a steering pack holds"),
    "a file where the pack goes": (both(vector(), text("p", b"")), VECTOR, "cannot be written .*; give a directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPORTS)
def test_convert_import(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, arguments, message = IMPORTS[case]
    monkeypatch.chdir(tmp_path)
    config_folder(tmp_path / "model", 4)
    (tmp_path / "norms.json").write_text(json.dumps(dict.fromkeys(range(4), 10.0)))
    write(tmp_path)
    status = main(["convert", "import", *BASE, *arguments])
    check(status, capsys.readouterr().err, message)
    if message is None:
        assert load_pack("p").directions["a"].layers == [1]


def check(status: int, shown: str, message: str | None) -> None:
    """One line, which says what to do, and a status that shells see."""
    assert "Traceback" not in shown
    said = [line for line in shown.splitlines() if line.startswith("vllm-steer: ")]
    if message is None:
        assert (status, said) == (0, []), shown
        return
    assert status == 1, shown
    assert len(said) == 1, shown
    assert re.search(message, said[0]), said[0]
    # Nothing after it that belonged to it.
    assert shown.rstrip().splitlines()[-1] == said[0]


STATEMENTS = "".join(
    f"{thing} is {kind}.\n"
    for thing in ("rain", "tea", "iron")
    for kind in ("good", "old", "rare", "red")
)
CONCEPTS = ["--concepts", "c.txt", "--prefix", "Speak like {concept}."]
PAIR = {"prompt": "Is it?", "positive": "Yes", "negative": "No"}


def remove(here: Path) -> None:
    (here / "c.txt").unlink()


def model(folder: str, change: Callable[[Path], Any]) -> Write:
    """A copy of the model, changed."""

    def write(here: Path) -> None:
        shutil.copytree(here / "model", here / folder)
        change(here / folder)

    return write


def halved(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def sharded(folder: Path) -> None:
    """Of whose two shards one is not there."""
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"},
    }
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edited(**fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | fields))

    return change


def template(content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "chat_template.jinja").write_text(content)


def without(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / name).unlink() for name in names]


OTHER = [*CONCEPTS, "--model", "m"]
SETTINGS = [*CONCEPTS, "--settings", "s.json"]
# What is there beside a model, two files of statements and concepts; the arguments; the message, None where it is learned.
EXTRACTS: dict[str, tuple[Write, list[str], str | None]] = {
    "an empty list": (text("c.txt", ""), CONCEPTS, "no concepts are given; .*one per line"),
    "a directory for a list": (both(remove, lambda h: (h / "c.txt").mkdir()), CONCEPTS, "Is a directory; give a text file"),
    "no list": (remove, CONCEPTS, "cannot read c.txt: No such file.*give a text file"),
    "a link to itself": (both(remove, lambda h: (h / "c.txt").symlink_to("c.txt")), CONCEPTS, "symbolic.*give a text file"),
    "Latin-1": (text("c.txt", "caf\u00e9\n".encode("latin-1")), CONCEPTS, "c.txt.*save it as UTF-8"),
    "UTF-16": (text("c.txt", "spiders\n".encode("utf-16")), CONCEPTS, "c.txt.*save it as UTF-8"),
    "a byte order mark": (text("c.txt", "\ufeffspiders\r\nheights\r\n".encode()), CONCEPTS, None),
    "a NUL": (text("c.txt", "spi\0ders\n"), CONCEPTS, "spi.*: a direction's name has"),
    "a class that is none": (lambda _: None, ["--concepts", "c.txt", "--class", "fear"], "did you mean 'fears'"),
    "a concept twice": (text("c.txt", "spiders\nspiders\n"), CONCEPTS, "spiders.*are given twice; each"),
    "a slash": (text("c.txt", "and/or\n"), CONCEPTS, "and/or.*name has"),
    "a colon": (text("c.txt", "a:b\n"), CONCEPTS, "a:b.*name has"),
    "a very long concept": (text("c.txt", "x" * 200), CONCEPTS, "x.*1 to 128 characters"),
    "braces": (text("c.txt", "{spiders}\n"), CONCEPTS, None),
    "no class": (lambda _: None, ["--concepts", "c.txt"], "--class, or --prefix"),
    "no place for the concept": (lambda _: None, ["--concepts", "c.txt", "--prefix", "Speak."], "must hold {concept}"),
    "no statements": (text("pos.txt", "\n \n"), CONCEPTS, "positive statements must be given"),
    "one statement": (both(text("pos.txt", "a.\n"), text("neg.txt", "b.\n")), CONCEPTS, "too few.*give more statements"),
    "fewer statements than asked for": (
        text("s.json", '{"positive_count": 99}'), SETTINGS, "positive_count is 99, but there are 12"),
    "settings that are no object": (text("s.json", "[]"), SETTINGS, "settings:"),
    "an unknown setting": (text("s.json", '{"layer": 1}'), SETTINGS, "settings.*layer"),
    "settings that are a directory": (lambda _: None, [*CONCEPTS, "--settings", "model"], "model: Is a directory; give"),
    "a block that is not there": (lambda _: None, [*CONCEPTS, "--layers", "9"], "the model has 0 to 2"),
    "a block below 0": (lambda _: None, [*CONCEPTS, "--layers", "-1"], "layers"),
    "a batch of nothing": (lambda _: None, [*CONCEPTS, "--batch-size", "0"], "batch_size.*greater"),
    "no workers": (lambda _: None, [*CONCEPTS, "--workers", "0"], "workers.*at least 1"),
    "a device that is not here": (lambda _: None, [*CONCEPTS, "--device", "cuda:77"], "no device 'cuda:77'.*give cpu"),
    "a device of fancy": (lambda _: None, [*CONCEPTS, "--device", "warp"], "no device 'warp'.*give cpu"),
    "a file where the pack goes": (text("p", ""), CONCEPTS, "cannot be written .*; give a directory"),
    "a prompt in bytes": (text("c.txt", b"\xff\xfe\x00"), ["--prompt", "a=c.txt"], "c.txt.*save it as UTF-8"),
    "an empty prompt": (text("c.txt", " \n"), ["--prompt", "a=c.txt"], "must hold the prompt"),
    "pairs that are no JSON": (text("c.txt", "yes no\n"), ["--pairs", "c.txt"], "prompt, positive and negative"),
    "pairs without an answer": (text("c.txt", '{"prompt": "a"}'), ["--pairs", "c.txt"], "prompt, positive and negative"),
    "no pairs": (text("c.txt", ""), ["--pairs", "c.txt"], "no answer pairs for .'c'"),
    "one pair": (text("c.txt", json.dumps(PAIR)), ["--pairs", "c.txt"], None),
    "a directory without lists": (lambda _: None, ["--lists", "model"], "must hold one of"),
    "a template that drops what is said": (
        both(model("m", template("{{ '<|im_start|>user ok' }}")), text("c.txt", json.dumps(PAIR | {"prompt": "user"}))),
        ["--pairs", "c.txt", "--model", "m"], "drops or alters what is said"),
    "an adapter alone": (adapter, [*CONCEPTS, "--model", "adapter"], "adapter.*some/base.*merge"),
    "no tokenizer": (model("m", without("tokenizer.json", "tokenizer_config.json")), OTHER, "tokenizer.json, beside"),
    "no weights": (model("m", without("model.safetensors")), OTHER, "cannot load a model.*no file named"),
    "weights that end early": (model("m", halved), OTHER, "cannot load a model.*fetch it again"),
    "a shard that is not there": (model("m", sharded), OTHER, "cannot load a model.*b.safetensors"),
    "weights of another shape": (model("m", edited(intermediate_size=50)), OTHER, "another shape, such as .*unquantised"),
    "a width in words": (model("m", edited(hidden_size="wide")), OTHER, "hidden_size"),
    "a model that sees alone": (
        model("m", lambda f: (f / "config.json").write_text(VIT)), OTHER, "no language model"),
    "a GGUF file for the model": (text("m.gguf", b"GGUF"), [*CONCEPTS, "--model", "m.gguf"], "vllm-steer model --gguf"),
    "an empty directory for the model": (lambda h: (h / "m").mkdir(), OTHER, "config.json that transformers reads"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXTRACTS)
def test_extract(
    case: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, arguments, message = EXTRACTS[case]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "c.txt").write_text("spiders\n")
    (tmp_path / "pos.txt").write_text(STATEMENTS)
    (tmp_path / "neg.txt").write_text(STATEMENTS.upper())
    write(tmp_path)
    method = "caa" if "--pairs" in arguments else "attention_guided"
    status = main(
        ["extract", "--model", "model", "--name", "p", "--out", "p", "--method", method, "--no-calibrate", "--device", "cpu",
         "--workers", "1", "--estimator", "mean_difference", "--permutations", "0",
         *(() if "--pairs" in arguments else ("--positive", "pos.txt", "--negative", "neg.txt")), *arguments]
    )  # fmt: skip
    check(status, capsys.readouterr().err, message)
    if message is None:
        assert "\ufeff" not in "".join(load_pack("p").directions)
