"""`pytest --accept`: write what the passes print now into the golden case files, for review as a diff."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite the golden files under tests/passes/cases")
