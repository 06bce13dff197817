"""Sparse autoencoders as SAELens and Gemma Scope write them, to single features.

- SAELens writes a folder with ``cfg.json`` and ``sae_weights.safetensors``. Until its version 6 everything is at the top of
  the configuration (``hook_name``, before that ``hook_point``; ``activation_fn_str``); since then what concerns the model is
  in ``metadata``, and ``architecture`` says the activation (``SAE.save_model``, ``handle_pre_6_0_config``). Weights are
  rounded to the configuration's ``dtype`` when they are loaded.
- Gemma Scope writes ``params.npz`` with ``W_enc``, ``b_enc``, ``W_dec``, ``b_dec`` and ``threshold``; the hook point is in
  the path alone. Its input is not shifted by ``b_dec``.

W_enc is ``[hidden_size, features]`` and W_dec ``[features, hidden_size]``. A feature's activation is
r·h + bias where that is above the threshold, else 0; what does not have this form is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_steer.errors import ConversionError
from vllm_steer.offline.convert.sae_arrays import Array, Arrays, opened_arrays
from vllm_steer.offline.convert.sae_hooks import hook_of_path, layer_of
from vllm_steer.packs.pack import MAX_LENGTH, MIN_LENGTH, ModelIdentity
from vllm_steer.packs.strict_json import parse_json

CONFIG: Final = "cfg.json"
WEIGHTS: Final = "sae_weights.safetensors"
PARAMS: Final = "params.npz"
MAX_FEATURES: Final = 4096
_MAX_CONFIG_BYTES: Final = 2**20
_MAX_CONFIG_VALUES: Final = 10_000
_MOST: Final = 1e9
_DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_TOP_K: Final = "keeps only the largest activations, so that whether a feature is active depends on all the others"
_REASONS: Final = {
    "topk": _TOP_K,
    "batchtopk": f"{_TOP_K}; SAELens saves it for inference as jumprelu, which can be imported",
    "matryoshka_batchtopk": f"{_TOP_K}; SAELens saves it for inference as jumprelu, which can be imported",
    "gated": "decides by one projection whether a feature is active, and measures it by another",
    "transcoder": "writes at another place than it reads",
    "skip_transcoder": "writes at another place than it reads",
    "jumprelu_transcoder": "writes at another place than it reads",
}
_NORMALISATIONS: Final = {
    "constant_norm_rescale": "divides by the norm of each token",
    "layer_norm": "divides by the standard deviation of each token",
}


@dataclass(frozen=True)
class SaeOptions:
    """What the files of an autoencoder do not say.

    Attributes:
        hook: Hook point, such as ``blocks.20.hook_resid_post``, where the files name none.
        norm_scale: Factor of the input that ``expected_average_only_in`` trained with, SAELens's ``norm_scaling_factor``.
        centered: Whether it was trained on a stream without its mean, as TransformerLens gives it with
            ``center_writing_weights``.
        rms_norm: Whether the model's norms do not subtract the mean; TransformerLens then never centers the stream.
    """

    hook: str | None = None
    norm_scale: float | None = None
    centered: bool = False
    rms_norm: bool = False


@dataclass(frozen=True, eq=False)
class Features:
    """Some features of an autoencoder, with everything folded into four arrays.

    Attributes:
        format: ``saelens`` or ``gemma_scope``.
        sha256: Digest of its files.
        layer: Layer whose output it reads.
        hook: Hook point, as the files or options name it.
        model_name: Model that the files name, if any.
        ids: Their numbers.
        encoder: r, ``[features, hidden_size]``, float32.
        bias: ``[features]``, float64.
        threshold: ``[features]``, float64, at least 0; 0 for ReLU.
        decoder: ``[features, hidden_size]``, float32.
    """

    format: str
    sha256: str
    layer: int
    hook: str
    model_name: str | None
    ids: tuple[int, ...]
    encoder: NDArray[np.float32]
    bias: Array
    threshold: Array
    decoder: NDArray[np.float32]


@dataclass(frozen=True)
class _Kind:
    """How an autoencoder computes.

    Attributes:
        format: As in :class:`Features`.
        weights: File of the arrays.
        hook: Hook point.
        jumps: Whether it has thresholds.
        shifts: Whether b_dec is subtracted from the input.
        scales: Whether activations are multiplied by ``scaling_factor`` before they are decoded.
        dtype: What the weights are rounded to.
        norm_scale: Factor of the input.
        centered: Whether the mean of the input is subtracted.
        model_name: Model that the files name.
        stated: Width and number of features that the configuration states; None where it does not.
    """

    format: str
    weights: Path
    hook: str
    jumps: bool
    shifts: bool
    scales: bool
    dtype: torch.dtype
    norm_scale: float
    centered: bool
    model_name: str | None
    stated: tuple[object, object] = (None, None)


def read_features(
    path: Path, ids: Sequence[int] | None, model: ModelIdentity, options: SaeOptions
) -> Features:
    """Reads features of an autoencoder.

    Args:
        path: A folder of SAELens, or ``params.npz`` of Gemma Scope or its folder.
        ids: Numbers of the features, from 0; None for all.
        model: The model that it must fit.
        options: What the files do not say.

    Raises:
        ConversionError: It cannot be read, does not fit the model, or does not compute what ``op: "feature"`` does.
    """
    if options.centered and options.rms_norm:
        raise ConversionError(
            f"{path}: --centered is for models whose norms subtract the mean; this one has RMS norms"
        )
    if (path / CONFIG).is_file():
        kind = _saelens(path, options)
    elif (path if path.is_file() else path / PARAMS).is_file():
        kind = _gemma_scope(path if path.is_file() else path / PARAMS, options)
    else:
        raise ConversionError(
            f"{path}: is neither a folder of SAELens, with {CONFIG} and {WEIGHTS}, nor {PARAMS} of Gemma Scope"
        )
    layer = layer_of(path, kind.hook, model.num_layers)
    with opened_arrays(kind.weights) as arrays:
        names = _checked_names(kind, arrays)
        count = _checked_shapes(kind, names, arrays, model)
        chosen = tuple(range(count)) if ids is None else tuple(ids)
        _check_ids(path, chosen, count, all_of_them=ids is None)
        taken = {
            part: arrays.take(name, chosen, int(part == "W_enc"))
            for part, name in names.items()
            if part != "b_dec"
        }
        taken["b_dec"] = arrays.take(names["b_dec"], range(model.hidden_size), 0)
        factors = _factors(kind, names, arrays, count, chosen)
    digest = hashlib.sha256()
    for file in (path / CONFIG, kind.weights):
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return _folded(path, kind, layer, chosen, taken, factors, digest.hexdigest())


def _folded(
    path: Path,
    kind: _Kind,
    layer: int,
    ids: tuple[int, ...],
    taken: Mapping[str, Array],
    factors: Array,
    digest: str,
) -> Features:
    """Everything that is constant, folded into the arrays of a feature; exact in float64."""

    def rounded(name: str) -> Array:
        found: Array = torch.from_numpy(taken[name]).to(kind.dtype).double().numpy()
        return found

    with np.errstate(over="ignore", invalid="ignore"):
        encoder, decoder, bias = rounded("W_enc"), rounded("W_dec"), rounded("b_enc")
        if kind.shifts:
            bias = bias - encoder @ rounded("b_dec")
        encoder = encoder * kind.norm_scale
        if kind.centered:
            encoder = encoder - encoder.mean(axis=1, keepdims=True)
        decoder = decoder * factors[:, None] / kind.norm_scale
        threshold = rounded("threshold") if kind.jumps else np.zeros(len(ids))
        found = Features(
            kind.format,
            digest,
            layer,
            kind.hook,
            kind.model_name,
            ids,
            encoder.astype(np.float32),
            bias,
            # Below 0, ReLU is what is left of it.
            np.maximum(threshold, 0.0),
            decoder.astype(np.float32),
        )
    for name, values in (("bias", bias), ("threshold", threshold)):
        wrong = ~(np.abs(values) <= _MOST)
        if wrong.any():
            raise ConversionError(
                f"{path}: the {name} of feature {ids[int(wrong.argmax())]} is not a number within ±{_MOST:g}"
            )
    for name, vectors in (("W_enc", found.encoder), ("W_dec", found.decoder)):
        if not np.isfinite(vectors).all():
            at = ids[int((~np.isfinite(vectors)).any(axis=1).argmax())]
            raise ConversionError(f"{path}: {name} of feature {at} has NaN or Inf")
    return found


def check_alive(path: Path, features: Features) -> None:
    """Refuses features that cannot be served: without an encoder or a decoder.

    Raises:
        ConversionError: One has a vector of no length, or one whose square is no float32.
    """
    for name, vectors in (("W_enc", features.encoder), ("W_dec", features.decoder)):
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        wrong = (lengths < MIN_LENGTH) | (lengths > MAX_LENGTH)
        if wrong.any():
            at = int(wrong.argmax())
            raise ConversionError(
                f"{path}: {name} of feature {features.ids[at]} has length {lengths[at]:g}, so the feature is dead or the "
                f"file is damaged; leave it out"
            )


def _saelens(folder: Path, options: SaeOptions) -> _Kind:
    file = folder / CONFIG
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConversionError(f"{file}: larger than {_MAX_CONFIG_BYTES} bytes")
        config = parse_json(file.read_bytes(), _MAX_CONFIG_VALUES)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{file}: is no JSON object ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("metadata") or {}, dict):
        raise ConversionError(f"{file}: must be a JSON object, and so must its metadata")
    known = dict(config.get("metadata") or {}) | {k: v for k, v in config.items() if v is not None}
    fields = _Fields(file, known)
    architecture = fields.text("architecture", default="standard")
    if architecture not in ("standard", "jumprelu"):
        reason = _REASONS.get(architecture, "is not known to be exact")
        raise ConversionError(
            f"{file}: architecture {architecture[:80]!r} {reason}; standard and jumprelu can be imported"
        )
    activation = fields.text("activation_fn", "activation_fn_str", default="relu")
    if activation != "relu":
        reason = _TOP_K if "topk" in activation.lower() else "is no ReLU"
        raise ConversionError(f"{file}: activation_fn {activation[:80]!r} {reason}")
    if (shape := fields.text("reshape_activations", default="none")) != "none":
        raise ConversionError(
            f"{file}: reshape_activations {shape[:80]!r} is for the heads of an attention, which are not steered"
        )
    for name in (
        "hook_head_index",
        "hook_point_head_index",
        "hook_name_out",
        "hook_point_out",
        "d_out",
    ):
        if known.get(name) is not None:
            raise ConversionError(
                f"{file}: has {name}, so it does not read and write one and the same residual stream"
            )
    dtype = fields.text("dtype", default="float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ConversionError(f"{file}: dtype is {dtype[:80]!r}; it must be one of {[*_DTYPES]}")
    hook = fields.text("hook_name", "hook_point", default="")
    if not hook and options.hook is None:
        raise ConversionError(
            f"{file}: names no hook_name; say where it reads with --hook, such as blocks.20.hook_resid_post"
        )
    if hook and options.hook not in (None, hook):
        raise ConversionError(
            f"{file}: hook_name is {hook[:80]!r}, and --hook says {options.hook!r}"
        )
    loaded = known.get("model_from_pretrained_kwargs") or {}
    if not isinstance(loaded, dict):
        raise ConversionError(f"{file}: model_from_pretrained_kwargs must be an object")
    return _Kind(
        "saelens",
        folder / WEIGHTS,
        hook or str(options.hook),
        architecture == "jumprelu",
        fields.flag("apply_b_dec_to_input", default=True),
        fields.flag("finetuning_scaling_factor", default=False),
        _DTYPES[dtype],
        _norm_scale(file, known.get("normalize_activations"), options),
        options.centered or (loaded.get("center_writing_weights") is True and not options.rms_norm),
        fields.text("model_name", default="") or None,
        (known.get("d_in"), known.get("d_sae")),
    )


def _norm_scale(file: Path, normalisation: object, options: SaeOptions) -> float:
    if normalisation in (None, False, "none"):
        if options.norm_scale is not None:
            raise ConversionError(
                f"{file}: does not normalise activations, so --norm-scaling-factor has no place"
            )
        return 1.0
    if normalisation not in (True, "expected_average_only_in"):
        reason = _NORMALISATIONS.get(str(normalisation), "is not known to be a constant")
        raise ConversionError(
            f"{file}: normalize_activations {str(normalisation)[:80]!r} {reason}, which is not linear in the stream"
        )
    if options.norm_scale is None:
        raise ConversionError(
            f"{file}: normalize_activations is 'expected_average_only_in', whose constant the files do not hold; give it "
            f"with --norm-scaling-factor, or save the autoencoder after fold_activation_norm_scaling_factor"
        )
    return options.norm_scale


def _gemma_scope(file: Path, options: SaeOptions) -> _Kind:
    hook = hook_of_path(file)
    if hook is None and options.hook is None:
        raise ConversionError(
            f"{file}: neither the file nor its path (…/gemma-scope-2b-pt-res/layer_20/…) says where it reads; give "
            f"--hook, such as blocks.20.hook_resid_post"
        )
    if hook is not None and options.hook not in (None, hook):
        raise ConversionError(f"{file}: its path says {hook}, and --hook says {options.hook!r}")
    if options.norm_scale is not None:
        raise ConversionError(f"{file}: --norm-scaling-factor is for SAELens's files")
    return _Kind(
        "gemma_scope",
        file,
        options.hook or str(hook),
        jumps=True,
        shifts=False,
        scales=False,
        dtype=torch.float32,
        norm_scale=1.0,
        centered=options.centered,
        model_name=None,
    )


def _checked_names(kind: _Kind, arrays: Arrays) -> dict[str, str]:
    """Returns the name in the file of each array, and refuses any that would compute something else."""
    wanted = ["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if kind.jumps else [])]
    extra = ("scaling_factor", "finetuning_scaling_factor")
    # Gemma Scope has also written w_enc.
    held = {f"W_{name[2:]}" if name.startswith("w_") else name: name for name in arrays.shapes}
    missing = [name for name in wanted if name not in held]
    strange = [name for name in held if name not in (*wanted, *extra)]
    if missing or strange or len(held) < len(arrays.shapes):
        raise ConversionError(
            f"{kind.weights}: has arrays {sorted(arrays.shapes)[:9]}; an autoencoder of this kind has {wanted}"
        )
    return {name: held[name] for name in wanted}


def _checked_shapes(
    kind: _Kind, names: Mapping[str, str], arrays: Arrays, model: ModelIdentity
) -> int:
    """Returns the number of features."""
    shapes = {part: arrays.shapes[name] for part, name in names.items()}
    first = shapes["W_enc"]
    count = first[1] if len(first) == 2 else 0
    if len(first) == 2 and first[0] != model.hidden_size:
        raise ConversionError(
            f"{kind.weights}: reads {first[0]} numbers; the model's hidden size is {model.hidden_size}, so this is another "
            f"model's"
        )
    width = model.hidden_size
    wanted = {"W_enc": (width, count), "W_dec": (count, width), "b_dec": (width,)}
    wanted |= {part: (count,) for part in ("b_enc", "threshold") if part in shapes}
    if wrong := [part for part, shape in shapes.items() if shape != wanted[part] or not count]:
        raise ConversionError(
            f"{kind.weights}: {wrong[0]} is {list(shapes[wrong[0]])} and must be {list(wanted[wrong[0]])}"
        )
    for stated, size in zip(kind.stated, (width, count), strict=True):
        if stated is not None and stated != size:
            raise ConversionError(
                f"{kind.weights}: has {size} where its configuration states {str(stated)[:80]}; they belong to different "
                f"autoencoders"
            )
    return count


def _factors(
    kind: _Kind, names: Mapping[str, str], arrays: Arrays, count: int, ids: Sequence[int]
) -> Array:
    """Returns the factor of each feature's activation before it is decoded, as fine-tuning learns it."""
    held = [n for n in ("scaling_factor", "finetuning_scaling_factor") if n in arrays.shapes]
    if not held:
        return np.ones(len(ids))
    if len(held) > 1 or arrays.shapes[held[0]] != (count,):
        raise ConversionError(f"{kind.weights}: {held[0]} must be [{count}], and there may be one")
    found = arrays.take(held[0], range(count), 0)
    if not kind.scales and not np.allclose(found, 1.0):
        raise ConversionError(
            f"{kind.weights}: has {held[0]}, and finetuning_scaling_factor of its configuration is not true"
        )
    return found[list(ids)]


def _check_ids(path: Path, ids: Sequence[int], count: int, all_of_them: bool) -> None:
    if beyond := [number for number in ids if not 0 <= number < count]:
        raise ConversionError(
            f"{path}: has no feature {beyond[0]}; its features are 0 to {count - 1}"
        )
    if len(ids) > MAX_FEATURES and not all_of_them:
        raise ConversionError(f"{path}: {len(ids)} features are given; the limit is {MAX_FEATURES}")


class _Fields:
    """Fields of a configuration, of the type that they must have."""

    def __init__(self, file: Path, known: Mapping[str, Any]) -> None:
        self._file, self._known = file, known

    def text(self, *names: str, default: str) -> str:
        """Returns the first of some fields that is given."""
        name = next((name for name in names if self._known.get(name) is not None), None)
        found = default if name is None else self._known[name]
        if not isinstance(found, str):
            raise ConversionError(f"{self._file}: {name} must be text, not {str(found)[:80]!r}")
        return found

    def flag(self, name: str, *, default: bool) -> bool:
        """Returns a field that is true or false."""
        found = self._known.get(name, default)
        if not isinstance(found, bool):
            raise ConversionError(
                f"{self._file}: {name} must be true or false, not {str(found)[:80]!r}"
            )
        return found
