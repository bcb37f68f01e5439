"""Seeds and the small models that several rooms test with."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the user's cache or left in it; what tests start inherits the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, so that a failure repeats."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (third-party code under test may use the global generator)
