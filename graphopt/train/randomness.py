"""Random numbers of a run: seeded, kept in checkpoints, and given back to the caller as they were."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators that data and modules draw from, as plain data and tensors.

    These are the global ones of torch (CPU, and the CUDA device where there is one), NumPy and Python.
    """
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  (what augmentations draw from)
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],  # pyright: ignore
        "python": [version, list(words), gauss],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue from what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None, None, None]:
    """Start all generators from a seed; at the end they are as they were before.

    Example:
        >>> with seeded(0, torch.device("cpu")):
        ...     first = torch.rand(1)
        >>> with seeded(0, torch.device("cpu")):
        ...     print(torch.equal(first, torch.rand(1)))
        True
    """
    before = random_state(device)
    try:
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield
    finally:
        set_random_state(before, device)


@contextmanager
def untouched(device: torch.device) -> Generator[None, None, None]:
    """What runs inside draws as it likes; afterwards the generators are as they were before."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)
