"""The shape of a served model, as packs record it, and the name of its dtype."""

from __future__ import annotations

from typing import Any

from vllm_steer.errors import CompatibilityError


def dtype_name(dtype: object) -> str:
    """Returns the name of a torch dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def model_shape(model_config: Any) -> dict[str, Any]:
    """Returns model types, hidden size and number of layers, to compare with what packs record.

    A model that sees images has the type of the language model in it, too, so that a pack of either serves both.

    Args:
        model_config: ``VllmConfig.model_config``.

    Raises:
        CompatibilityError: The model does not say.
    """
    types = (model_config.hf_text_config.model_type, model_config.hf_config.model_type)
    shape = {
        "model_types": tuple(dict.fromkeys(types)),
        "hidden_size": model_config.get_hidden_size(),
        "num_layers": model_config.get_total_num_hidden_layers(),
    }
    if not shape["num_layers"] or not shape["hidden_size"]:
        raise CompatibilityError(
            f"the model's configuration gives no usable shape ({shape}); it cannot be steered"
        )
    return shape
