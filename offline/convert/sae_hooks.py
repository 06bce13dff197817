"""Where a sparse autoencoder reads and writes, as its tool names it, to a layer of a pack."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from vllm_steer.errors import ConversionError

_STREAM: Final = re.compile(r"blocks\.(?P<block>0|[1-9][0-9]{0,3})\.hook_resid_(?P<end>pre|post)")
# A decoder block of Hugging Face as a whole, whose output is hooked.
_MODULE: Final = re.compile(
    r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.(?P<block>0|[1-9][0-9]{0,3})", re.IGNORECASE
)
_SCOPE_LAYER: Final = re.compile(r"layer_(0|[1-9][0-9]{0,3})")
_SCOPE: Final = re.compile(r"gemma-scope-[0-9a-z-]*-(?P<site>res|att|mlp|transcoders)(?:-|$)")
_SITES: Final = "the residual stream after a block: blocks.K.hook_resid_post, or blocks.K.hook_resid_pre from K = 1 on"


def layer_of(file: Path, hook: str, num_layers: int) -> int:
    """Returns the layer whose output a hook point is.

    What is before block k is the output of block k - 1.

    Args:
        file: The autoencoder, for messages.
        hook: Name of the hook point, of TransformerLens or of a module of Hugging Face.
        num_layers: Decoder blocks of the model.

    Raises:
        ConversionError: It is no output of a block of the model.
    """
    if found := _STREAM.fullmatch(hook):
        layer = int(found["block"]) - (found["end"] == "pre")
        if layer < 0:
            raise ConversionError(
                f"{file}: is of {hook}, the embeddings, which no block returns; steering acts on {_SITES}"
            )
    elif found := _MODULE.fullmatch(hook):
        layer = int(found["block"])
    else:
        raise ConversionError(f"{file}: is of {hook[:80]!r}; steering acts on {_SITES}")
    if layer >= num_layers:
        raise ConversionError(
            f"{file}: is of {hook}; the model has blocks 0 to {num_layers - 1}, so this is another model's"
        )
    return layer


def hook_of_path(file: Path) -> str | None:
    """Returns the hook point that the folders of Gemma Scope name, such as ``gemma-scope-2b-pt-res/layer_20``.

    Args:
        file: A ``params.npz`` or its folder; None is returned where its path does not say enough.

    Raises:
        ConversionError: It is an autoencoder of another place, or a transcoder.
    """
    parts = file.absolute().parts
    sites = {found["site"] for part in parts if (found := _SCOPE.search(part))}
    if "embedding" in parts or sites - {"res"}:
        where = ", ".join(sorted(sites - {"res"})) or "embedding"
        raise ConversionError(f"{file}: is of Gemma Scope's {where}; steering acts on {_SITES}")
    layers = [found[1] for part in parts if (found := _SCOPE_LAYER.fullmatch(part))]
    return f"blocks.{layers[-1]}.hook_resid_post" if sites and layers else None
