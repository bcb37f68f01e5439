"""What stored integers stand for, x = s (q - z), as arrays: one scale, one a channel, one a block, packed bits.

DequantizeLinear-25 of ONNX and MatMulNBits of onnxruntime say how scales are laid out. Everything here is computed as
onnxruntime computes it: the difference in integers, the product in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.quantized_linear import INTEGER_LIMITS
from graphopt.ir.rewrite import DeclinedError, constant, constant_tensor


@dataclass(frozen=True, eq=False)
class Parameters:
    """A constant scale and zero point.

    Attributes:
        scale: float32, () for one, [n] along `axis`, or of the rank of the integers where `block` is not 0.
        zero: of the shape of `scale`, in int32; None for float8, which has none.
        axis: along which scales differ, None for one scale; may count from the end.
        block: integers along `axis` that share a scale, 0 where scales are not blocked.
        integers: type of q.
        floats: type of x.
    """

    scale: np.ndarray
    zero: np.ndarray
    axis: int | None
    block: int
    integers: ir.DataType
    floats: ir.DataType

    def equals(self, other: Parameters) -> bool:
        """Whether the same integers stand for the same numbers."""
        return (
            self.axis == other.axis
            and self.block == other.block
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero, other.zero)
        )

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers that the smallest and the largest integer stand for, of the shape of `scale`; float32.

        Infinite where the type of the integers is none of `INTEGER_LIMITS` (int32, float8).
        """
        if self.integers not in INTEGER_LIMITS:
            return np.full(self.scale.shape, -np.inf, np.float32), np.full(self.scale.shape, np.inf, np.float32)
        low, high = INTEGER_LIMITS[self.integers]
        return self.scale * (low - self.zero), self.scale * (high - self.zero)

    def real(self, integers: np.ndarray) -> np.ndarray:
        """s (q - z) of the type `floats`, for integers of any shape that the scales fit.

        Example:
            >>> one = Parameters(np.float32(0.5), np.int32(1), None, 0, ir.DataType.INT8, ir.DataType.FLOAT)
            >>> one.real(np.array([1, 3], np.int8))
            array([0., 1.], dtype=float32)

        `check` has to be asked first.
        """
        scale = self._spread(np.asarray(self.scale, np.float32), integers.shape)
        if self.integers in INTEGER_LIMITS or self.integers == ir.DataType.INT32:
            zero = self._spread(np.asarray(self.zero, np.int32), integers.shape)
            centred = (integers.astype(np.int32) - zero).astype(np.float32)
        else:
            centred = integers.astype(np.float32)
        return np.asarray(centred * scale).astype(self.floats.numpy())

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `DeclinedError` where the scales do not fit integers of this shape."""
        if self.axis is None:
            return
        axis = self.axis + len(shape) if self.axis < 0 else self.axis
        if not 0 <= axis < len(shape):
            raise DeclinedError(f"its scales lie along axis {self.axis} of a tensor of rank {len(shape)}")
        if not self.block:
            if self.scale.shape != (shape[axis],):
                raise DeclinedError(f"it has scales {list(self.scale.shape)} for {shape[axis]} channels")
            return
        blocks = [-(-size // self.block) if position == axis else size for position, size in enumerate(shape)]
        if list(self.scale.shape) != blocks:
            raise DeclinedError(f"its scales {list(self.scale.shape)} are no blocks of {self.block} of {list(shape)}")

    def _spread(self, parameter: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A scale or zero point as it broadcasts against integers of this shape."""
        if self.axis is None:
            return parameter.reshape(())
        rank = len(shape)
        axis = self.axis + rank if self.axis < 0 else self.axis
        if self.block:
            spread = np.repeat(parameter, self.block, axis)
            return spread[(slice(None),) * axis + (slice(shape[axis]),)]
        return parameter.reshape([-1 if position == axis else 1 for position in range(rank)])


def read_parameters(
    scale: ir.Value | None,
    zero: ir.Value | None,
    integers: ir.DataType | None,
    *,
    axis: int = 1,
    block: int = 0,
    floats: ir.DataType | None = None,
) -> Parameters:
    """The parameters that two operands of a node hold.

    Args:
        scale: one number, a vector, or one number for each block.
        zero: of the shape of `scale`; None stands for 0.
        integers: type of q, None where the graph does not know it: then that of `zero`.
        axis: along which scales differ, where there are more than one.
        block: integers that share a scale, 0 where they are not in blocks.
        floats: type of x; None is that of the scale.

    Raises:
        DeclinedError: a scale or zero point is computed at run time, or the types are not known.
    """
    scales, stored = constant(scale), constant_tensor(scale)
    if scales is None or stored is None:
        raise DeclinedError("its scale is computed at run time", scale)
    zeros = None if zero is None else constant(zero)
    if zero is not None and zeros is None:
        raise DeclinedError("its zero point is computed at run time", zero)
    if integers is None and zero is not None:
        integers = zero.dtype
    if integers is None:
        raise DeclinedError("the type of its integers is not known")
    numbers = np.zeros(scales.shape, np.int32)
    if zeros is not None and (integers in INTEGER_LIMITS or integers == ir.DataType.INT32):
        numbers = np.broadcast_to(zeros.astype(np.int32), scales.shape) if zeros.size == 1 else zeros.astype(np.int32)
    if numbers.size != scales.size:
        raise DeclinedError("it has more zero points than scales, or fewer")
    single = scales.size == 1 and not block
    if scales.ndim > 1 and not single and not block:
        if max(scales.shape) != scales.size:
            raise DeclinedError("its scales differ along several axes")
        scales, numbers = scales.reshape(-1), numbers.reshape(-1)
    shape = () if single else scales.shape
    return Parameters(
        np.asarray(scales, np.float32).reshape(shape),
        numbers.reshape(shape),
        None if single else axis,
        block,
        integers,
        floats or stored.dtype,
    )


def derived(
    tensor: ir.TensorProtocol,
    function: Callable[[np.ndarray], np.ndarray],
    dtype: ir.DataType,
    shape: tuple[int, ...] | None = None,
) -> ir.TensorProtocol:
    """A tensor computed from another one; from a file that is mapped, only when it is read, and then not kept.

    Args:
        tensor: its source.
        function: of the array of the source; it must not raise.
        dtype: of the result.
        shape: of the result; None for that of the source.

    Example:
        >>> derived(ir.tensor([1, 2]), lambda array: array / 2.0, ir.DataType.DOUBLE).numpy()
        array([0.5, 1. ])
    """
    of_shape = tensor_shape(tensor) if shape is None else shape

    def made() -> ir.Tensor:
        return ir.Tensor(np.asarray(function(tensor.numpy()), order="C"), dtype=dtype)

    if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
        return ir.LazyTensor(made, dtype, ir.Shape(of_shape))
    return made()


def unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unsigned integers of 2, 4 or 8 bits from bytes, lowest bits first, along the last axis.

    Args:
        packed: uint8 [..., bytes].
        bits: width of an integer.
        count: how many integers a row holds; what the last byte holds beyond is left out.

    Example:
        >>> unpacked(np.array([[0x21, 0x03]], np.uint8), 4, 3)
        array([[1, 2, 3]], dtype=uint8)
    """
    if bits == 8:
        return packed[..., :count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    apart = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return apart.reshape(*packed.shape[:-1], -1)[..., :count]
