"""Autoencoders become packs that edit as they encode and decode, or are refused with the reason."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.offline.convert_cases import HIDDEN, config_folder, moods_pack
from tests.offline.sae_cases import (
    Autoencoder,
    autoencoder,
    gemma_scope_file,
    new_config,
    old_config,
    saelens_folder,
)
from vllm_steer.cli import main
from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.model import NormSource
from vllm_steer.offline.convert.sae import NamedFeature, import_sae
from vllm_steer.offline.convert.sae_files import SaeOptions
from vllm_steer.offline.train.directions import Target
from vllm_steer.packs.pack import SteeringPack, load_pack
from vllm_steer.verify.oracle_forms import apply_form

FEATURES, IDS = 40, (7, 0, 39)
POST = "blocks.1.hook_resid_post"


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    return config_folder(tmp_path / "model", 4)


@pytest.fixture
def sae() -> Autoencoder:
    return autoencoder(HIDDEN, FEATURES, jumps=False)


@pytest.fixture
def jumping() -> Autoencoder:
    return autoencoder(HIDDEN, FEATURES, jumps=True)


Import = Callable[..., SteeringPack]


@pytest.fixture
def imported(config_dir: Path, tmp_path: Path) -> Import:
    def run(path: Path, ids: tuple[int, ...] = IDS, **options: Any) -> SteeringPack:
        return import_sae(
            path,
            [NamedFeature(number, str(number), 5.0) for number in ids],
            Target("sae", tmp_path / "out"),
            config_dir,
            SaeOptions(**options),
            NormSource(moods_pack(tmp_path).path),
        )

    return run


def assert_edits_alike(pack: SteeringPack, sae: Autoencoder, layer: int, **edits: Any) -> None:
    """Each feature alone, by the formula of the operation, against encode, edit and decode."""
    hidden = edits.get(
        "hidden", torch.randn(300, HIDDEN, generator=torch.Generator().manual_seed(1))
    )
    given = edits.get("given", hidden)
    before = sae.encode(given)
    for number in IDS:
        record = pack.directions[str(number)]
        assert (record.layers, record.op, record.default_scale) == ([layer], "feature", 5.0)
        assert record.form is not None
        assert 0.1 < (before[:, number] > 0).float().mean() < 0.9
        vector, read = (
            torch.tensor(pack.vectors[name][0]) for name in (str(number), record.form.read)
        )
        choice = record.form.model_dump(exclude_none=True)
        for activation, scale in (("set", 5.0), ("set", 0.0), ("multiply", 3.0)):
            after = before.clone()
            after[:, number] = 3.0 * after[:, number] if activation == "multiply" else scale
            wanted = hidden + (sae.decode(after) - sae.decode(before)) * edits.get("factor", 1.0)
            found = apply_form(
                hidden, vector, scale, choice | {"activation": activation}, read=read
            )
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [old_config, new_config])
@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("jumps", [True, False])
def test_a_folder_of_saelens(imported: Import, tmp_path: Path, config, shifts, jumps) -> None:
    sae = autoencoder(HIDDEN, FEATURES, jumps, shifts)
    pack = imported(saelens_folder(tmp_path / "sae", sae, config(sae, POST)))
    assert_edits_alike(pack, sae, 1)
    assert list(pack.directions)[:2] == ["7", "7 encoder"]
    settings = pack.manifest.method.settings
    assert settings["files"]["format"] == "saelens"
    assert settings["files"]["hook"] == POST
    assert (pack.directions["7"].form.threshold is not None) == jumps


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("transposed", [False, True])
def test_params_of_gemma_scope(imported: Import, tmp_path: Path, save, transposed) -> None:
    sae = autoencoder(HIDDEN, FEATURES, jumps=True, shifts=False)
    file = gemma_scope_file(tmp_path, sae, 2)
    arrays = {name: value.numpy() for name, value in sae.state().items()}
    if transposed:
        # NumPy writes it as its transpose, and says so.
        arrays["W_enc"] = np.asfortranarray(arrays["W_enc"])
        arrays["W_dec"] = np.asfortranarray(arrays["W_dec"])
    save(file, **arrays)
    assert_edits_alike(imported(file), sae, 2)
    assert_edits_alike(imported(file.parent), sae, 2)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.3.hook_resid_post", 3),
        ("blocks.3.hook_resid_pre", 2),
        ("blocks.1.hook_resid_pre", 0),
        ("model.layers.2", 2),
        ("transformer.h.0", 0),
    ],
)
def test_hook_points_are_layers(imported: Import, sae, tmp_path, hook, layer) -> None:
    assert_edits_alike(
        imported(saelens_folder(tmp_path / "sae", sae, new_config(sae, hook))), sae, layer
    )


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.0.hook_resid_pre", "the embeddings, which no block returns"),
        ("blocks.1.hook_resid_mid", "steering acts on the residual stream after a block"),
        ("blocks.1.hook_mlp_out", "steering acts on"),
        ("blocks.1.attn.hook_z", "steering acts on"),
        ("hook_embed", "steering acts on"),
        ("model.layers.1.mlp", "steering acts on"),
        ("blocks.4.hook_resid_post", "the model has blocks 0 to 3"),
        ("blocks.99999.hook_resid_post", "steering acts on"),
        ("blocks.-1.hook_resid_post", "steering acts on"),
        ("blocks.１.hook_resid_post", "steering acts on"),
    ],
)
def test_other_places_are_refused(imported: Import, sae, tmp_path, hook, message) -> None:
    with pytest.raises(ConversionError, match=message):
        imported(saelens_folder(tmp_path / "sae", sae, new_config(sae, hook)))


def test_scaling_of_fine_tuning_is_in_the_decoder_alone(imported: Import, sae, tmp_path) -> None:
    factors = 1.0 + torch.rand(FEATURES)
    config = old_config(sae, POST, finetuning_scaling_factor=True)
    pack = imported(saelens_folder(tmp_path / "sae", sae, config, scaling_factor=factors))
    tuned = replace(sae, w_dec=factors[:, None] * sae.w_dec)
    assert_edits_alike(pack, tuned, 1)
    ones = torch.ones(FEATURES)
    plain = old_config(sae, POST)
    assert_edits_alike(
        imported(saelens_folder(tmp_path / "b", sae, plain, scaling_factor=ones)), sae, 1
    )
    with pytest.raises(
        ConversionError, match="scaling_factor, and finetuning_scaling_factor .*not true"
    ):
        imported(saelens_folder(tmp_path / "c", sae, plain, scaling_factor=factors))


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", True])
def test_a_constant_normalisation_is_folded(
    imported: Import, jumping, tmp_path, normalisation
) -> None:
    config = old_config(jumping, POST, normalize_activations=normalisation)
    folder = saelens_folder(tmp_path / "sae", jumping, config)
    with pytest.raises(ConversionError, match="--norm-scaling-factor"):
        imported(folder)
    hidden = 4.0 * torch.randn(300, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert_edits_alike(
        imported(folder, norm_scale=0.25),
        jumping,
        1,
        hidden=hidden,
        given=0.25 * hidden,
        factor=4.0,
    )


def test_weights_are_rounded_as_they_are_loaded(imported: Import, sae, tmp_path) -> None:
    config = new_config(sae, POST, dtype="bfloat16")
    pack = imported(saelens_folder(tmp_path / "sae", sae, config))
    rounded = Autoencoder(
        *(t.bfloat16().float() for t in (sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec))
    )
    assert_edits_alike(pack, rounded, 1)
    assert not np.array_equal(pack.vectors["7"][0], sae.w_dec[7].numpy())


def test_a_stream_without_its_mean(imported: Import, sae, tmp_path, config_dir) -> None:
    """What TransformerLens centers has the same directions, and is read without its mean."""
    loaded = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    centered = new_config(sae, POST)
    centered["metadata"] |= loaded
    hidden = torch.randn(300, HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5
    given = hidden - hidden.mean(1, keepdim=True)
    # RMS norms leave the mean in, so TransformerLens does, too.
    folder = saelens_folder(tmp_path / "sae", sae, centered)
    assert_edits_alike(imported(folder), sae, 1)
    plain = saelens_folder(tmp_path / "plain", sae, new_config(sae, POST))
    with pytest.raises(ConversionError, match="this one has RMS norms"):
        imported(plain, centered=True)
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": HIDDEN, "n_layer": 4, "n_head": 2,
        "vocab_size": 32,
    }  # fmt: skip
    (config_dir / "config.json").write_text(json.dumps(config))
    assert_edits_alike(imported(folder), sae, 1, hidden=hidden, given=given)
    assert_edits_alike(imported(plain, centered=True), sae, 1, hidden=hidden, given=given)
    assert_edits_alike(imported(plain), sae, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk", "k": 8}, "'topk' keeps only the largest activations"),
        ({"architecture": "batchtopk"}, "SAELens saves it for inference as jumprelu"),
        ({"architecture": "gated"}, "decides by one projection"),
        ({"architecture": "skip_transcoder"}, "writes at another place"),
        ({"architecture": "matching_pursuit"}, "is not known to be exact"),
        ({"architecture": 3}, "architecture must be text, not '3'"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 8}}, "only the largest"),
        ({"activation_fn": "tanh-relu"}, "'tanh-relu' is no ReLU"),
        ({"normalize_activations": "layer_norm"}, "standard deviation of each token"),
        ({"normalize_activations": "constant_norm_rescale"}, "norm of each token"),
        ({"normalize_activations": {}}, "not known to be a constant"),
        ({"reshape_activations": "hook_z"}, "heads of an attention"),
        ({"d_sae": 41}, "has 40 where its configuration states 41"),
        ({"d_in": "16"}, "has 16 where its configuration states 16"),
        ({"hook_head_index": 2}, "has hook_head_index"),
        ({"hook_name_out": "blocks.1.hook_mlp_out"}, "has hook_name_out"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input must be true or false"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"hook_name": None}, "names no hook_name; say where it reads with --hook"),
        ({"hook_name": ["blocks.1.hook_resid_post"]}, "hook_name must be text"),
        ({"metadata": [1]}, "and so must its metadata"),
        ({"model_from_pretrained_kwargs": [1]}, "must be an object"),
    ],
)
def test_what_is_not_exact_is_refused(imported: Import, sae, tmp_path, changes, message) -> None:
    with pytest.raises(ConversionError, match=message):
        imported(saelens_folder(tmp_path / "sae", sae, old_config(sae, POST, **changes)))


def test_where_it_reads_may_be_given(imported: Import, sae, tmp_path) -> None:
    folder = saelens_folder(tmp_path / "sae", sae, old_config(sae, POST, hook_name=None))
    assert_edits_alike(imported(folder, hook=POST), sae, 1)
    named = saelens_folder(tmp_path / "named", sae, old_config(sae, POST))
    with pytest.raises(ConversionError, match=r"hook_name is .* and --hook says"):
        imported(named, hook="blocks.2.hook_resid_post")
    jumps = autoencoder(HIDDEN, FEATURES, jumps=True, shifts=False)
    file = gemma_scope_file(tmp_path, jumps, 2).rename(tmp_path / "params.npz")
    with pytest.raises(ConversionError, match="neither the file nor its path"):
        imported(file)
    assert_edits_alike(imported(file, hook="blocks.3.hook_resid_post"), jumps, 3)


@pytest.mark.parametrize(
    "folder", ["gemma-scope-2b-pt-att", "gemma-scope-9b-pt-mlp", "gemma-scope-2b-pt-transcoders"]
)
def test_other_parts_of_gemma_scope(imported: Import, tmp_path, folder) -> None:
    sae = autoencoder(HIDDEN, FEATURES, jumps=True)
    file = gemma_scope_file(tmp_path, sae, 2)
    other = tmp_path / f"models--google--{folder}" / "snapshots" / "layer_2"
    other.mkdir(parents=True)
    with pytest.raises(ConversionError, match="is of Gemma Scope's"):
        imported(file.rename(other / "params.npz"))


def bad(name: str, value: Any) -> Callable[[Autoencoder], dict[str, torch.Tensor]]:
    return lambda sae: {name: value(sae)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (bad("b_gate", lambda s: s.b_enc), "has arrays .*'b_gate'.* of this kind has"),
        (bad("threshold", lambda s: s.b_enc), "has arrays .*'threshold'"),
        (bad("w_enc", lambda s: s.w_enc), "has arrays"),
        (bad("W_enc", lambda s: s.w_enc[1:]), "reads 15 numbers; the model's hidden size is 16"),
        (bad("W_enc", lambda s: s.b_enc), "W_enc is .* and must be"),
        (bad("W_dec", lambda s: s.w_dec.T), r"W_dec is \[16, 40\] and must be \[40, 16\]"),
        (bad("b_dec", lambda s: s.b_enc), "b_dec is"),
        (bad("b_enc", lambda s: s.b_enc[:-1]), "b_enc is"),
        (bad("b_enc", lambda s: s.b_enc.long()), "'b_enc' holds I64; an autoencoder has floats"),
        (bad("b_enc", lambda s: s.b_enc * torch.nan), "the bias of feature 7 is not a number"),
        (bad("b_enc", lambda s: s.b_enc + 1e10), "the bias of feature 7 is not a number within"),
        (bad("W_enc", lambda s: s.w_enc * torch.inf), "NaN or Inf|not a number"),
        (bad("W_enc", lambda s: s.w_enc.double() * 1e300), "NaN or Inf|not a number"),
        (
            bad("W_dec", lambda s: 0 * s.w_dec),
            "W_dec of feature 7 has length 0, so the feature is dead",
        ),
        (bad("W_enc", lambda s: 0 * s.w_enc), "W_enc of feature 7 has length 0"),
        (bad("scaling_factor", lambda s: s.b_dec), r"scaling_factor must be \[40\]"),
    ],
)
def test_arrays_that_do_not_fit(imported: Import, sae, tmp_path, more, message) -> None:
    folder = saelens_folder(tmp_path / "sae", sae, new_config(sae, POST), **more(sae))
    with pytest.raises(ConversionError, match=message):
        imported(folder)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def packed_zeros(file: Path) -> None:
    np.savez_compressed(file, W_enc=np.zeros((HIDDEN, 200_000), dtype=np.float32))


def objects(file: Path) -> None:
    np.savez(file, W_enc=np.array([{}, print], dtype=object))


def false_shape(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive, archive.open("W_enc.npy", "w") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (HIDDEN, 10**9)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(bytes(64))


def negative_shape(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive, archive.open("W_enc.npy", "w") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (-4, -4)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(bytes(64))


def unparsable(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            "W_enc.npy", b"\x93NUMPY\x01\x00" + (5000).to_bytes(2, "little") + 5000 * b"("
        )


def stranger(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../evil.py", "print()")


def twice(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("b_dec.npy", b"")


def locked(file: Path) -> None:
    """With the flag of an encrypted member."""
    data = bytearray(file.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 8] |= 1
        at = data.find(b"PK\x01\x02", at + 4)
    file.write_bytes(bytes(data))


def text(file: Path) -> None:
    file.write_text("not an archive")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "damage",
    [
        cut,
        packed_zeros,
        objects,
        false_shape,
        negative_shape,
        unparsable,
        stranger,
        twice,
        locked,
        text,
        lambda f: f.write_bytes(b""),
    ],
)
def test_damaged_and_hostile_archives(imported: Import, tmp_path, damage) -> None:
    sae = autoencoder(HIDDEN, FEATURES, jumps=True, shifts=False)
    file = gemma_scope_file(tmp_path, sae, 2)
    damage(file)
    with pytest.raises(ConversionError) as found:
        imported(file)
    assert str(file) in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON object"),
        (b"[]", "must be a JSON object"),
        (b"[" * 100_000, "is no JSON object"),
        (b'{"a": NaN}', "is no JSON object"),
        (b'{"dtype": "float32", "dtype": "float16"}', "given twice"),
        (b"\xff\xfe", "is no JSON object"),
        (b" " * (2**20 + 1), "larger than"),
    ],
)
def test_damaged_configurations(imported: Import, sae, tmp_path, content, message) -> None:
    folder = saelens_folder(tmp_path / "sae", sae, {})
    (folder / "cfg.json").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        imported(folder)


def test_damaged_weights_and_wrong_folders(imported: Import, sae, tmp_path) -> None:
    folder = saelens_folder(tmp_path / "sae", sae, new_config(sae, POST))
    cut(folder / "sae_weights.safetensors")
    with pytest.raises(ConversionError, match="not readable as safetensors"):
        imported(folder)
    (folder / "sae_weights.safetensors").unlink()
    os.mkfifo(folder / "sae_weights.safetensors")
    with pytest.raises(ConversionError, match="is not a regular file"):
        imported(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(ConversionError, match="sae_weights.safetensors"):
        imported(folder)
    with pytest.raises(ConversionError, match="is neither a folder of SAELens"):
        imported(tmp_path / "nowhere")
    save_file({"a": torch.ones(2)}, tmp_path / "params.safetensors")
    with pytest.raises(ConversionError, match="--hook"):
        imported(tmp_path / "params.safetensors")


def test_features_that_there_are_not(imported: Import, sae, tmp_path) -> None:
    folder = saelens_folder(tmp_path / "sae", sae, new_config(sae, POST))
    with pytest.raises(ConversionError, match="has no feature 40; its features are 0 to 39"):
        imported(folder, (3, 40))
    with pytest.raises(ConversionError, match="two features have the name '3'"):
        imported(folder, (3, 3))


def test_on_the_command_line(sae, config_dir, tmp_path, capsys) -> None:
    folder = saelens_folder(tmp_path / "sae", sae, new_config(sae, POST))
    norms = moods_pack(tmp_path).path
    out = tmp_path / "out"
    # fmt: off
    arguments = [
        "convert", "import-sae", str(folder), "--model", str(config_dir), "--name", "sae", "--out", str(out),
        "--residual-norms", str(norms), "--scale", "8",
    ]
    # fmt: on
    assert main([*arguments, "--features", "7", "weather=0"]) == 0
    said = capsys.readouterr()
    assert "feature" in said.out
    assert "trained on 'a model', at blocks.1.hook_resid_post" in said.err
    pack = load_pack(out)
    assert [*pack.directions] == ["7", "7 encoder", "weather", "weather encoder"]
    assert pack.directions["weather"].metrics == {"feature": 0}
    for wrong, message in {
        "weather=": "must be the number of a feature",
        "-1": "",
        "²": "must be the number",
        "a/b=3": "cannot be written",
        "=3": None,
    }.items():
        if message == "":
            continue
        assert main([*arguments, "--features", wrong]) == (0 if message is None else 1)
        if message:
            assert message in capsys.readouterr().err
    assert main([*arguments, "--features", "7", "--norm-scaling-factor", "0"]) == 1
    assert "must be a number above 0" in capsys.readouterr().err
