"""Model Runner V2 on CPU."""

from __future__ import annotations

import os
import types


def prepare_model_runner() -> None:
    """Pretends a backend where this process is to run Model Runner V2 in Triton's interpreter."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and "TRITON_INTERPRET" in os.environ:
        pretend_triton_backend()


def pretend_triton_backend() -> None:
    """Lets Model Runner V2 run on CPU: Triton's interpreter needs no backend, vLLM asks for one."""
    from triton.backends import backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
    import vllm.triton_utils  # noqa: F401

    del backends["cpu"]
