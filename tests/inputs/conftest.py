"""A cache of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of caches, empty at first."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAPHOPT_CACHE", str(folder))
    return folder
