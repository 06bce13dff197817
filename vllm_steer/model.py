"""The shape of a served model, as packs record it, and the name of its dtype."""

from __future__ import annotations

from typing import Any

from vllm_steer.errors import CompatibilityError


def dtype_name(dtype: object) -> str:
    """Returns the name of a torch dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def model_shape(model_config: Any) -> dict[str, Any]:
    """Returns model type, hidden size and number of layers as packs record them.

    Args:
        model_config: ``VllmConfig.model_config``.

    Raises:
        CompatibilityError: The model does not say.
    """
    shape = {
        "model_type": model_config.hf_config.model_type,
        "hidden_size": model_config.get_hidden_size(),
        "num_layers": model_config.get_total_num_hidden_layers(),
    }
    if not shape["num_layers"] or not shape["hidden_size"]:
        raise CompatibilityError(
            f"the model's configuration gives no usable shape ({shape}); it cannot be steered"
        )
    return shape
