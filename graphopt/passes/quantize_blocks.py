"""A weight as integers with one scale for each block of inputs, in bounded memory, and packed as ONNX stores it.

For a matrix [K, N] of K inputs, block b of output n is w[b B : (b + 1) B, n], and stands as w = s (q - z). The scale is
the one of least squared error: shrunk and stretched ranges are tried, and the best is refined once by its closed form

    s = sum of w (q - z) / sum of (q - z)^2

Measured on 4,096 x 256 normal weights, root mean square of what is left over that of the weights, 4 bits: whole range
in blocks of 32 0.092 (with a zero point 0.081), least squares 0.086 (0.077); in blocks of 128 0.112 (0.101) and 0.101
(0.095); one scale a channel 0.152 (0.140) and 0.109 (0.109). Student's t with 5 degrees of freedom, blocks of 32:
0.115 (0.093) and 0.110 (0.090). Hence least squares always, and a zero point unless one asks for none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

_CHUNK = 2**18
"""Elements that are worked on at a time."""
_SMALLEST = 1e-30
"""Below this a scale times an activation would no longer be a normal float32."""
_BITS_OF_BYTE = 8


@dataclass(frozen=True)
class Grid:
    """Which integers there are.

    Attributes:
        bits: width of the integers, 2 to 8.
        signed: with zero point 0, from -2^(bits-1) on; else from 0 on, with a zero point a block.
        block_size: how many inputs share a scale; 0 for all of them.
    """

    bits: int
    signed: bool
    block_size: int

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        half = 2 ** (self.bits - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)

    def blocks(self, inputs: int) -> int:
        """Number of blocks of so many inputs."""
        return -(-inputs // (self.block_size or max(inputs, 1)))


@dataclass(frozen=True)
class Blocks:
    """A matrix [K, N] as integers.

    Attributes:
        integers: q, int8 or uint8 [K, N].
        scale: s, [blocks, N] in the type in which it will be stored, > 0.
        zero_point: z, int8 or uint8 [blocks, N].
        block_size: inputs of a block, all but the last.
    """

    integers: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    block_size: int

    def matrix(self) -> np.ndarray:
        """s (q - z), float32 [K, N]."""
        inputs = len(self.integers)
        scale, zero = (
            np.repeat(one.astype(np.float32), self.block_size, 0)[:inputs] for one in (self.scale, self.zero_point)
        )
        return (self.integers.astype(np.float32) - zero) * scale


def block_scales(weight: np.ndarray, grid: Grid, scale_type: np.dtype, importance: np.ndarray | None = None) -> Blocks:
    """Scales and zero points of least squared error, with the integers nearest to the weight in them.

    Args:
        weight: [K, N] of any floating type and layout, finite; it is read in pieces of columns.
        grid: the integers.
        scale_type: NumPy dtype of the scales.
        importance: how much the error of each input counts, [K], >= 0; None counts all alike.

    Example:
        >>> found = block_scales(np.array([[-0.5], [0.0], [3.5]]), Grid(4, True, 2), np.dtype(np.float32))
        >>> found.integers.tolist(), found.scale.tolist()
        ([[-8], [0], [7]], [[0.0625], [0.5]])
    """
    inputs, outputs = weight.shape
    dtype = np.int8 if grid.signed else np.uint8
    size, count = grid.block_size or max(inputs, 1), grid.blocks(inputs)
    found = Blocks(
        np.empty((inputs, outputs), dtype),
        np.empty((count, outputs), scale_type),
        np.zeros((count, outputs), dtype),
        size,
    )
    counted = None if importance is None else _in_blocks(importance[:, None].astype(np.float32), size, count)
    for columns in chunks(inputs, outputs, _CHUNK):
        piece = _in_blocks(weight[:, columns].astype(np.float32), size, count)
        scale, zero = _least_squares(piece, grid, counted)
        stored = np.maximum(scale, _smallest(scale_type)).astype(scale_type)
        low, high = grid.limits
        integers = np.clip(np.rint(piece / stored.astype(np.float32)[:, None]) + zero[:, None], low, high)
        found.integers[:, columns] = integers.reshape(count * size, -1)[:inputs]
        found.scale[:, columns], found.zero_point[:, columns] = stored, zero
    return found


def chunks(inputs: int, outputs: int, elements: int) -> Iterator[slice]:
    """Slices of the outputs of a matrix [inputs, outputs] of at most so many elements, or of one output."""
    width = max(1, elements // max(inputs, 1))
    for begin in range(0, outputs, width):
        yield slice(begin, min(begin + width, outputs))


def pack(integers: np.ndarray, storage: ir.DataType) -> ir.TensorProtocol:
    """Integers as a tensor of an ONNX integer type; those of 2 and 4 bits take 2 and 4 bits, the first one lowest.

    Args:
        integers: int8 or uint8, within the limits of the type.
        storage: INT2, UINT2, INT4, UINT4, INT8 or UINT8.

    Example:
        >>> tensor = pack(np.array([[1, -1, 7]], np.int8), ir.DataType.INT4)
        >>> tensor.tobytes().hex(), tensor.numpy().tolist()
        ('f107', [[1, -1, 7]])
    """
    if storage.bitwidth == _BITS_OF_BYTE:
        return ir.Tensor(np.ascontiguousarray(integers), dtype=storage)
    return ir.PackedTensor(pack_bytes(integers.reshape(-1), storage.bitwidth), storage, shape=integers.shape)


def pack_bytes(integers: np.ndarray, bits: int) -> np.ndarray:
    """Integers of `bits` bits along the last axis as bytes, the first one lowest, the last byte filled with zeros.

    Example:
        >>> pack_bytes(np.array([[1, 2, 3]], np.uint8), 4).tolist()
        [[33, 3]]
    """
    each = _BITS_OF_BYTE // bits
    if integers.shape[-1] % each:
        missing = each - integers.shape[-1] % each
        integers = np.concatenate([integers, np.zeros((*integers.shape[:-1], missing), integers.dtype)], axis=-1)
    mask = np.uint8(2**bits - 1)
    packed = integers[..., 0::each].astype(np.uint8) & mask
    for position in range(1, each):
        packed |= (integers[..., position::each].astype(np.uint8) & mask) << np.uint8(bits * position)
    return packed


def _in_blocks(weight: np.ndarray, size: int, count: int) -> np.ndarray:
    """[K, n] as [count, size, n]; rows that are missing in the last block are zeros, which every grid has."""
    missing = count * size - len(weight)
    if missing:
        weight = np.concatenate([weight, np.zeros((missing, weight.shape[1]), weight.dtype)])
    return weight.reshape(count, size, -1)


def _shares(grid: Grid) -> np.ndarray:
    """Ranges that are tried, relative to the whole one."""
    if grid.bits > 5:
        return np.array([1.04, 1.02, 0.98, 0.95, 0.9])
    narrowest = 0.35 if grid.bits == 2 or not grid.block_size else 0.5
    return np.linspace(1.2, narrowest, 14)


def _least_squares(piece: np.ndarray, grid: Grid, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scale > 0 and zero point of each block of a piece [blocks, size, n]: float32 [blocks, n] each."""
    low, high = grid.limits
    least, most = piece.min(axis=1), piece.max(axis=1)
    if grid.signed:
        whole = np.maximum(most / high, least / low)
    else:
        least, most = np.minimum(least, 0.0), np.maximum(most, 0.0)
        whole = (most - least) / high
    silent = ~(whole > _SMALLEST)
    whole = np.where(silent, np.float32(1.0), whole)

    zero = np.zeros_like(whole) if grid.signed else np.clip(np.rint(-least / whole), low, high)

    def judged(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """q - z, and the squared error of each block."""
        centred = piece / scale[:, None]
        np.rint(centred, out=centred)
        np.clip(centred, low - zero[:, None], high - zero[:, None], out=centred)
        error = centred * scale[:, None]
        error -= piece
        np.square(error, out=error)
        if importance is not None:
            error *= importance
        return centred, error.sum(axis=1)

    best, (_, error_of_best) = whole, judged(whole)
    for share in _shares(grid):
        scale = whole * np.float32(share)
        _, error = judged(scale)
        best, error_of_best = np.where(error < error_of_best, scale, best), np.minimum(error, error_of_best)
    centred, _ = judged(best)
    counted = centred if importance is None else centred * importance
    above, below = (counted * piece).sum(axis=1), (counted * centred).sum(axis=1)
    refined = np.where((above > 0) & (below > 0), above / np.where(below > 0, below, 1.0), best)
    _, error = judged(refined)
    scale = np.where(error < error_of_best, refined, best)
    return np.where(silent, np.float32(1.0), scale), zero


def _smallest(scale_type: np.dtype) -> float:
    """The smallest scale of a type that is still exact to a rounding."""
    return max(_SMALLEST, float(ir.DataType.from_numpy(scale_type) == ir.DataType.FLOAT16) * 2.0**-14)
