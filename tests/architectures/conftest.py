"""The option that keeps what the parity tests measured."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-parity",
        action="store_true",
        help="write the differences that the parity tests measure to tests/architectures/parity.json",
    )
