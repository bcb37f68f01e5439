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
        bits: width of the integers, 16 at most. Those narrower than 8 bits are stored in 8, wider ones in 16, unless
            `storage` says otherwise.
            Weights have 7 where a kernel would saturate (`Quantize.weight_range`).
        signed: int8 or int16 rather than uint8 or uint16.
        axis: axis along which scales differ, None for one scale.
        scale: one float32 scale, or one for each position on `axis`; > 0. Empty where data is yet to tell it, and
            where a rule makes it from the weight (`Quantize(form="weights")`: there are too many to be listed).
        zero_point: one integer for each scale.
        source: where the range came from: "calibration", "batchnorm", "probes", "weights", "definition" or "training".
        block_size: how many neighbours along `axis` share a scale, for each position on the other axes; the last block
            of a row may be shorter. Scales and zero points are those of the tensor with `axis` ceil(size / block_size)
            long, in row-major order. 0: scales differ along `axis` alone.
        storage: ONNX element type of the stored integers in lower case ("int4", "uint4", "int2", ...), which may be
            wider than `bits`; signed weights then use all of their range, -2^(bits-1) included. Empty: 8 or 16 bits.
        rounding: "nearest", or "error-feedback" (each input makes up for what rounding did to those before it).
    """

    name: str
    role: str
    bits: int
    signed: bool
    axis: int | None
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    source: str
    block_size: int = 0
    storage: str = ""
    rounding: str = "nearest"

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 0 and the integers are signed."""
        return self.signed and not any(self.zero_point)

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer. Signed weights without `storage` leave out -2^(bits-1), for symmetry."""
        if self.signed:
            is_even = self.role == "weight" and not self.storage
            return -(2 ** (self.bits - 1)) + is_even, 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the integers, unpacked."""
        if self.bits > 8:
            return np.dtype(np.int16 if self.signed else np.uint16)
        return np.dtype(np.int8 if self.signed else np.uint8)

    def quantize(self, array: np.ndarray) -> np.ndarray:
        """The integers of an array of the tensor's shape, rounded half to even as ONNX QuantizeLinear does.

        Example:
            >>> plan = TensorPlan("w", "weight", 4, True, 1, (1, 2), (0, 0), "weights", block_size=2, storage="int4")
            >>> plan.quantize(np.array([[4.0, -8.0, 4.0]])).tolist()
            [[4, -8, 2]]
        """
        scale, zero = self.expanded(array.shape)
        low, high = self.limits
        return np.clip(np.rint(array.astype(np.float32) / scale) + zero, low, high).astype(self.dtype)

    def expanded(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point as float32 that broadcast against a tensor of this shape."""
        found = np.asarray(self.scale, np.float32), np.asarray(self.zero_point, np.float32)
        if self.axis is None or not self.block_size:
            along = [-1 if axis == self.axis else 1 for axis in range(len(shape))]
            return found[0].reshape(along), found[1].reshape(along)
        size = shape[self.axis]
        blocks = tuple(-(-n // self.block_size) if axis == self.axis else n for axis, n in enumerate(shape))
        kept = tuple(slice(size) if axis == self.axis else slice(None) for axis in range(len(shape)))
        scale, zero = (np.repeat(one.reshape(blocks), self.block_size, self.axis)[kept] for one in found)
        return scale, zero

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
