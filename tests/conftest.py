"""Seeds and the small models that several rooms test with."""

from __future__ import annotations

import random

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, so that a failure repeats."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (third-party code under test may use the global generator)
