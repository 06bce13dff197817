"""The shape of a served model, as packs record it, and the name of its dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, cast

from vllm_steer.errors import CompatibilityError

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig


class ModelShape(TypedDict):
    """Properties that a pack must match.

    Attributes:
        model_types: Hugging Face's names of the architecture; for a vision-language model, also of its
            language model.
        hidden_size: Width of the residual stream.
        num_layers: Decoder blocks.
    """

    model_types: tuple[str, ...]
    hidden_size: int
    num_layers: int


def dtype_name(dtype: object) -> str:
    """Returns the name of a torch dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def resolved_dtype(model_config: ModelConfig) -> torch.dtype:
    """Returns the dtype of a model; vLLM has replaced its name once the configuration is complete."""
    return cast("torch.dtype", model_config.dtype)


def model_shape(model_config: ModelConfig) -> ModelShape:
    """Returns model types, hidden size and number of layers, to compare with packs.

    A vision-language model also has the type of its language model, so a pack for either works with both.

    Args:
        model_config: ``VllmConfig.model_config``.

    Raises:
        CompatibilityError: The configuration does not give them.
    """
    types = (model_config.hf_text_config.model_type, model_config.hf_config.model_type)
    shape: ModelShape = {
        "model_types": tuple(dict.fromkeys(types)),
        "hidden_size": model_config.get_hidden_size(),
        "num_layers": model_config.get_total_num_hidden_layers(),
    }
    if not shape["num_layers"] or not shape["hidden_size"]:
        raise CompatibilityError(
            f"the model's configuration gives no usable shape ({shape}); it cannot be steered"
        )
    return shape
