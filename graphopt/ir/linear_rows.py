"""A linear operator as a product of matrices: the patches that it reads, the rows that it makes, and its adjoint.

    rows [R, M] = patches [G, R, K] · weight [G, M / G, K]^T

R counts samples and positions, K input channels of a group and kernel positions. Convolution is the same sum as in
ONNX: padding reads zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.ir.linear import Linear, spatial
from graphopt.ir.rewrite import DeclinedError, integers, is_op


@dataclass(frozen=True)
class LinearRows:
    """How arrays of one linear operator become matrices.

    Attributes:
        linear: the operator.
        strides, dilations, begins, ends: of the convolution, one entry a spatial axis; a ConvTranspose is the
            convolution with stride 1 of its input with zeros put between.
        spread: how far apart a ConvTranspose puts the elements of its input; None for other operators.

    Example:
        >>> import onnx_ir as ir
        >>> from graphopt.ir.linear import linear_at
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,1,4] x) => (float[n,1,3] y)
        ...     <float[1,1,2] w = {1, 2}> { y = Conv (x, w) }''')
        >>> rows = linear_rows(linear_at(model.graph[0]))
        >>> rows.patches(np.array([[[1, 2, 3, 4]]], np.float32)).tolist()
        [[[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]]
    """

    linear: Linear
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    begins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    spread: tuple[int, ...] | None = None

    @property
    def groups(self) -> int:
        """G."""
        return self.linear.groups

    @property
    def columns(self) -> int:
        """K: what one output sums over."""
        return self.linear.in_channels // self.groups * int(np.prod(self.linear.kernel, dtype=int))

    def weight(self) -> np.ndarray:
        """The weight as float64 [G, M / G, K]."""
        return self.by_group(self.linear.weight())

    def by_group(self, weight: np.ndarray) -> np.ndarray:
        """[M, C / G, *kernel] as [G, M / G, K]."""
        return weight.reshape(self.groups, -1, self.columns)

    def as_weight(self, matrix: np.ndarray) -> np.ndarray:
        """[G, M / G, K] as [M, C / G, *kernel]."""
        return matrix.reshape(self.linear.out_channels, self.linear.in_channels // self.groups, *self.linear.kernel)

    def patches(self, data: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """What each output sums over: [G, R, K] of the operand that is not the weight, in its own float type.

        Args:
            data: the operand.
            chosen: int64 indices of the rows that are wanted; None for all, in the order of `rows`.
        """
        if not self.linear.kernel:
            features = self._features(data)
            return (features if chosen is None else features[chosen])[None]
        windows = self._windows(self._padded(self._spread(data)))
        axes, groups = len(self.linear.kernel), self.groups
        if self.spread is not None:
            windows = np.flip(windows, axis=tuple(range(-axes, 0)))
        by_row = windows.transpose(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
        places = by_row.shape[: 1 + axes]
        if chosen is not None:
            by_row = by_row[np.unravel_index(chosen, places)]
        rows = int(np.prod(places)) if chosen is None else len(chosen)
        flat = by_row.reshape(rows, groups, self.columns)
        return np.ascontiguousarray(flat.transpose(1, 0, 2))

    def count(self, data: np.ndarray) -> int:
        """R: how many rows there are."""
        if not self.linear.kernel:
            return data.size // self.linear.in_channels
        return data.shape[0] * int(
            np.prod(self._windows(self._padded(self._spread(data))).shape[2 : -len(self.linear.kernel)])
        )

    def rows(self, result: np.ndarray) -> np.ndarray:
        """The result, or anything of its shape, as [R, M]."""
        return np.moveaxis(result, self.linear.out_axis, -1).reshape(-1, self.linear.out_channels)

    def result(self, rows: np.ndarray, like: np.ndarray) -> np.ndarray:
        """[R, M] as an array of the result's layout; `like` is an array of the result's other sizes."""
        moved = np.moveaxis(like, self.linear.out_axis, -1).shape[:-1]
        return np.ascontiguousarray(np.moveaxis(rows.reshape(*moved, -1), -1, self.linear.out_axis))

    def adjoint(self, patches: np.ndarray, like: np.ndarray) -> np.ndarray:
        """Adds [G, R, K] up where `patches` took it from: an array of the shape of `like`."""
        if not self.linear.kernel:
            return self._from_features(patches[0], like)
        if self.spread is not None:
            raise DeclinedError("the adjoint of ConvTranspose is not needed anywhere", self.linear.node)
        axes, groups = len(self.linear.kernel), self.groups
        padded = np.zeros(
            (*like.shape[:2], *(s + b + e for s, b, e in zip(like.shape[2:], self.begins, self.ends, strict=True))),
            patches.dtype,
        )
        samples = like.shape[0]
        positions = self._positions(padded.shape[2:])
        blocks = patches.reshape(groups, samples, *positions, -1, *self.linear.kernel)
        blocks = blocks.transpose(1, 0, 2 + axes, *range(2, 2 + axes), *range(3 + axes, 3 + 2 * axes))
        blocks = blocks.reshape(samples, -1, *positions, *self.linear.kernel)
        for offset in np.ndindex(*self.linear.kernel):
            place = tuple(
                slice(o * d, o * d + (p - 1) * s + 1, s)
                for o, d, p, s in zip(offset, self.dilations, positions, self.strides, strict=True)
            )
            padded[(slice(None), slice(None), *place)] += blocks[(..., *offset)]
        inner = tuple(slice(b, b + size) for b, size in zip(self.begins, like.shape[2:], strict=True))
        return padded[(slice(None), slice(None), *inner)]

    def _features(self, data: np.ndarray) -> np.ndarray:
        return np.moveaxis(data, self.linear.in_axis, -1).reshape(-1, self.linear.in_channels)

    def _from_features(self, rows: np.ndarray, like: np.ndarray) -> np.ndarray:
        moved = np.moveaxis(like, self.linear.in_axis, -1).shape
        return np.moveaxis(rows.reshape(moved), -1, self.linear.in_axis)

    def _spread(self, data: np.ndarray) -> np.ndarray:
        if self.spread is None:
            return data
        sizes = tuple((size - 1) * step + 1 for size, step in zip(data.shape[2:], self.spread, strict=True))
        wide = np.zeros((*data.shape[:2], *sizes), data.dtype)
        wide[(slice(None), slice(None), *(slice(None, None, step) for step in self.spread))] = data
        return wide

    def _padded(self, data: np.ndarray) -> np.ndarray:
        # a ConvTranspose crops where its padding is larger than its kernel: a negative width here
        width = [(0, 0), (0, 0), *((max(b, 0), max(e, 0)) for b, e in zip(self.begins, self.ends, strict=True))]
        crop = tuple(
            slice(max(-b, 0), size + min(e, 0))
            for b, e, size in zip(self.begins, self.ends, data.shape[2:], strict=True)
        )
        data = data[(slice(None), slice(None), *crop)]
        return np.pad(data, width) if any(before or after for before, after in width) else data

    def _positions(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            (size - (kernel - 1) * dilation - 1) // stride + 1
            for size, kernel, dilation, stride in zip(
                sizes, self.linear.kernel, self.dilations, self.strides, strict=True
            )
        )

    def _windows(self, data: np.ndarray) -> np.ndarray:
        """[N, C, *positions, *kernel], a view."""
        positions = self._positions(data.shape[2:])
        steps = data.strides[2:]
        return np.lib.stride_tricks.as_strided(
            data,
            (*data.shape[:2], *positions, *self.linear.kernel),
            (
                *data.strides[:2],
                *(step * stride for step, stride in zip(steps, self.strides, strict=True)),
                *(step * dilation for step, dilation in zip(steps, self.dilations, strict=True)),
            ),
            writeable=False,
        )


def linear_rows(linear: Linear) -> LinearRows:
    """How the arrays of `linear` become matrices.

    Raises:
        DeclinedError: its padding depends on the size of the input (`auto_pad`, `output_shape`).
    """
    node = linear.node
    if not linear.kernel:
        return LinearRows(linear)
    place = spatial(node, linear.kernel)
    if not is_op(node, "ConvTranspose"):
        return LinearRows(linear, place.strides, place.dilations, place.begins, place.ends)
    if "output_shape" in node.attributes:
        raise DeclinedError("its output_shape decides the padding", node)
    extra = integers(node, "output_padding") or (0,) * len(linear.kernel)
    reach = [dilation * (kernel - 1) for dilation, kernel in zip(place.dilations, linear.kernel, strict=True)]
    begins = tuple(r - b for r, b in zip(reach, place.begins, strict=True))
    ends = tuple(r - e + x for r, e, x in zip(reach, place.ends, extra, strict=True))
    ones = (1,) * len(linear.kernel)
    return LinearRows(linear, ones, place.dilations, begins, ends, place.strides)


def apply_rows(patches: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """[G, R, K] and [G, M / G, K] to [R, M], plus a bias [M]."""
    product = patches @ weight.astype(patches.dtype).transpose(0, 2, 1)
    return np.concatenate(list(product), axis=-1) + np.asarray(bias, patches.dtype)


def split_rows(rows: np.ndarray, groups: int) -> np.ndarray:
    """[R, M] as [G, R, M / G], a view."""
    return rows.reshape(rows.shape[0], groups, -1).transpose(1, 0, 2)
