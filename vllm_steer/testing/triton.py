"""Model Runner V2 on CPU."""

from __future__ import annotations

import types


def pretend_triton_backend() -> None:
    """Lets Model Runner V2 run on CPU: Triton's interpreter needs no backend, vLLM asks for one."""
    from triton.backends import backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
    import vllm.triton_utils  # noqa: F401

    del backends["cpu"]
