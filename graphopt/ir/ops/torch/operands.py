"""What the torch functions of all families share: reading operands that say how, not what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Numbers = torch.Tensor | Sequence[Any] | int | float
"""A structural operand: numbers that were known when the model was lifted, or a tensor of a run-time value."""


def numbers(operand: Numbers) -> list[Any]:
    """A structural operand as a flat list of Python numbers. Waits for the device where it is a tensor there."""
    if isinstance(operand, torch.Tensor):
        return operand.reshape(-1).tolist()
    return list(operand) if isinstance(operand, Sequence) else [operand]


def number(operand: Numbers) -> Any:
    """A structural operand of one element as a Python number."""
    return numbers(operand)[0]
