"""Sparse autoencoders, and their files by the calls that SAELens and Gemma Scope's authors make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """Standard or JumpReLU, written from the formula of ``SAE.encode`` and ``SAE.decode``."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    shifts: bool = True

    def encode(self, x: Tensor) -> Tensor:
        before = (x - self.b_dec * self.shifts) @ self.w_enc + self.b_enc
        if self.threshold is None:
            return torch.relu(before)
        return torch.relu(before) * (before > self.threshold)

    def decode(self, activations: Tensor) -> Tensor:
        return activations @ self.w_dec + self.b_dec

    def state(self) -> dict[str, Tensor]:
        found = {
            "W_enc": self.w_enc,
            "b_enc": self.b_enc,
            "W_dec": self.w_dec,
            "b_dec": self.b_dec,
        }
        return found if self.threshold is None else found | {"threshold": self.threshold}


def autoencoder(
    width: int, features: int, jumps: bool, shifts: bool = True, seed: int = 0, size: float = 1.0
) -> Autoencoder:
    """A random one, some of whose features are active on streams of about ``size`` in each dimension."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    w_enc = normal(width, features) / width**0.5
    w_dec = torch.nn.functional.normalize(normal(features, width), dim=1)
    threshold = size * (0.3 + 0.5 * torch.rand(features, generator=random)) if jumps else None
    return Autoencoder(
        w_enc, 0.1 * size * normal(features), w_dec, 0.1 * size * normal(width), threshold, shifts
    )


def old_config(sae: Autoencoder, hook: str, **changes: Any) -> dict[str, Any]:
    """What ``SAEConfig.to_dict`` of SAELens 5 writes."""
    width, features = sae.w_enc.shape
    return {
        "architecture": "standard" if sae.threshold is None else "jumprelu",
        "d_in": width,
        "d_sae": features,
        "dtype": "torch.float32",
        "device": "cpu",
        "model_name": "a model",
        "hook_name": hook,
        "hook_layer": 3,
        "hook_head_index": None,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": sae.shifts,
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": "5.9.1",
        "prepend_bos": True,
        "dataset_path": "a dataset",
        "dataset_trust_remote_code": True,
        "context_size": 128,
        "normalize_activations": "none",
        "neuronpedia_id": None,
        "model_from_pretrained_kwargs": {},
        "seqpos_slice": [None],
    } | changes


def new_config(sae: Autoencoder, hook: str, **changes: Any) -> dict[str, Any]:
    """What ``SAEConfig.to_dict`` of SAELens 6 writes."""
    width, features = sae.w_enc.shape
    return {
        "d_in": width,
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.shifts,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.18.0",
            "sae_lens_training_version": "6.18.0",
            "dataset_path": "a dataset",
            "hook_name": hook,
            "model_name": "a model",
            "model_class_name": "HookedTransformer",
            "hook_head_index": None,
            "context_size": 128,
            "seqpos_slice": [None],
            "model_from_pretrained_kwargs": {},
            "prepend_bos": True,
            "exclude_special_tokens": False,
        },
        "architecture": "standard" if sae.threshold is None else "jumprelu",
    } | changes


def saelens_folder(
    folder: Path, sae: Autoencoder, config: Mapping[str, Any], **more: Tensor
) -> Path:
    """As ``SAE.save_model``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous().clone() for name, value in (sae.state() | more).items()},
        folder / "sae_weights.safetensors",
    )
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def gemma_scope_file(root: Path, sae: Autoencoder, layer: int) -> Path:
    """``params.npz`` below the folders of a repository of Gemma Scope."""
    folder = root / "gemma-scope-2b-pt-res" / f"layer_{layer}" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in sae.state().items()})
    return folder / "params.npz"
