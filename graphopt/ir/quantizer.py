"""How one tensor becomes integers: shared by the pass that quantizes and by training that prepares for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor becomes integers: q = saturate(round(x / scale) + zero_point).

    Attributes:
        name: value or initializer in the float model.
        role: "activation", "weight" (of a linear operator) or "constant" (operand of an elementwise operator).
        bits: width of the integers; those narrower than 8 bits are stored in 8. Weights have 7 where a kernel
            would saturate (`Quantize.weight_range`).
        signed: int8 rather than uint8.
        axis: axis along which scales differ, None for one scale.
        scale: one float32 scale, or one for each position on `axis`; > 0. Empty where data is yet to tell it.
        zero_point: one integer for each scale.
        source: where the range came from: "calibration", "batchnorm", "probes", "weights", "definition" or "training".
    """

    name: str
    role: str
    bits: int
    signed: bool
    axis: int | None
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    source: str

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 0 and the integers are signed."""
        return self.signed and not any(self.zero_point)

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer. Signed ones leave out -2^(bits-1), so that they are symmetric."""
        if self.signed:
            return -(2 ** (self.bits - 1)) + 1, 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the stored integers."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    def quantize(self, array: np.ndarray) -> np.ndarray:
        """The integers of an array of the tensor's shape, rounded half to even as ONNX QuantizeLinear does."""
        scale, zero = np.asarray(self.scale, np.float32), np.asarray(self.zero_point, np.float32)
        shape = [1] * array.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        low, high = self.limits
        rounded = np.rint(array.astype(np.float32) / scale.reshape(shape)) + zero.reshape(shape)
        return np.clip(rounded, low, high).astype(self.dtype)

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The real numbers that the smallest and the largest integer stand for, one of each for each scale."""
        scale, zero = np.asarray(self.scale, np.float32), np.asarray(self.zero_point, np.float32)
        low, high = self.limits
        return (low - zero) * scale, (high - zero) * scale

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorPlan:
        """The plan that `dataclasses.asdict` made, also after a round trip through text.

        Raises:
            KeyError, TypeError, ValueError: the data is no such plan.
        """
        fields = dict(data)
        scale, zero_point = tuple(map(float, fields.pop("scale"))), tuple(map(int, fields.pop("zero_point")))
        return cls(**fields, scale=scale, zero_point=zero_point)
