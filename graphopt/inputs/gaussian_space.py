"""Where operators read in space, and what happens to the spatial axes: the geometry behind Gaussian moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.inputs.gaussian_moments import MOST_CHANNELS, Moments, Second, Taps, correlation_at, lag_grid
from graphopt.ir.linear import Linear
from graphopt.ir.ops.row import Shape
from graphopt.ir.rewrite import integers, is_op

_MOST_TAPS_AN_AXIS = 16
"""Wide pooling windows are represented by as many evenly spread positions on each axis."""
Lags = Callable[["np.ndarray | None"], "np.ndarray | None"]
"""From the autocorrelation before a node to the one behind it."""


def spatial_axes(rank: int, channels: int) -> list[int]:
    """All axes but the first (samples) and the channel axis."""
    return [axis for axis in range(1, rank) if axis != channels]


def linear_taps(linear: Linear, shape: Shape, result: Shape) -> Taps:
    """Taps of a linear operator, the share of positions at which they hit the border included."""
    if not linear.kernel:
        return Taps(np.zeros((1, 0), np.int64), np.ones((1, 1)), (), ())
    node, count = linear.node, len(linear.kernel)
    strides = integers(node, "strides") or (1,) * count
    dilations = integers(node, "dilations") or (1,) * count
    reached = np.ones((1, 1))
    offsets: list[np.ndarray] = []
    for axis, (kernel, stride, dilation) in enumerate(zip(linear.kernel, strides, dilations, strict=True)):
        size, produced = shape[axis + 2], result[axis + 2]
        begin = _begin(node, axis, kernel, stride, dilation, size, produced)
        position, tap = np.arange(produced)[:, None], np.arange(kernel)[None]
        if is_op(node, "ConvTranspose"):
            read = position + begin - tap * dilation
            inside = (read % stride == 0) & (read >= 0) & (read < size * stride)
            offsets.append(-np.arange(kernel) * dilation // stride)
        else:
            read = position * stride - begin + tap * dilation
            inside = (read >= 0) & (read < size)
            offsets.append(np.arange(kernel) * dilation)
        hits = inside.astype(np.float64)
        reached = np.kron(reached, hits.T @ hits / max(produced, 1))
    places = np.stack(np.meshgrid(*offsets, indexing="ij"), axis=-1).reshape(-1, count)
    return Taps(places.astype(np.int64), reached, tuple(strides), tuple(result[2:]))


def _begin(node: ir.Node, axis: int, kernel: int, stride: int, dilation: int, size: int, produced: int) -> int:
    """Padding before an axis."""
    attribute = node.attributes.get("auto_pad")
    mode = "NOTSET" if attribute is None else attribute.as_string()
    extent = (kernel - 1) * dilation + 1
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        transposed = is_op(node, "ConvTranspose")
        total = (size - 1) * stride + extent - produced if transposed else (produced - 1) * stride + extent - size
        return (max(total, 0) + (mode == "SAME_LOWER")) // 2
    pads = integers(node, "pads") if mode == "NOTSET" else None
    return pads[axis] if pads else 0


def pooling_taps(node: ir.Node, result: Shape | None) -> Taps | None:
    """Taps of a pooling window away from the border."""
    kernel = integers(node, "kernel_shape")
    if kernel is None or result is None or len(result) != len(kernel) + 2:
        return None
    strides = integers(node, "strides") or (1,) * len(kernel)
    dilations = integers(node, "dilations") or (1,) * len(kernel)
    along = [
        np.unique(np.linspace(0, size - 1, min(size, _MOST_TAPS_AN_AXIS)).astype(np.int64)) * dilation
        for size, dilation in zip(kernel, dilations, strict=True)
    ]
    places = np.stack(np.meshgrid(*along, indexing="ij"), axis=-1).reshape(-1, len(kernel))
    return Taps(places, np.ones((len(places),) * 2), tuple(strides), tuple(result[2:]))


def carried_axis(before: Shape, axis: int, after: Shape) -> int | None:
    """The axis that holds the same coordinates, unchanged, after a reshape; None where they were cut or merged."""
    outside = math.prod(before[:axis])
    for position, size in enumerate(after):
        if position and size == before[axis] and math.prod(after[:position]) == outside:
            return position
    return None


def flattened(data: Moments, before: Shape, after: Shape) -> Moments | None:
    """Channels merged with positions behind or before them: each position becomes a channel of its own."""
    channels, axis = before[data.axis], data.axis
    for position, size in enumerate(after):
        inner, outside = before[axis + 1 :], math.prod(after[:position])
        if position and size == channels * math.prod(inner) and outside == math.prod(before[:axis]):
            return _with_positions(data, inner, position, first=True)
        outer = before[1:axis]
        if position and size == channels * math.prod(outer) and not math.prod(inner) > 1 and outside == before[0]:
            return _with_positions(data, outer, position, first=False)
    return None


def _with_positions(data: Moments, sizes: Sequence[int], axis: int, *, first: bool) -> Moments:
    """Channels x positions (`first`) or positions x channels as one axis."""
    count = math.prod(sizes)

    def second() -> Second:
        before = data.second
        variance = np.repeat(before.variance, count) if first else np.tile(before.variance, count)
        if before.covariance is None or len(variance) > MOST_CHANNELS:
            return Second(None, variance, None)
        places = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij")).reshape(len(sizes), count)
        near = correlation_at(before.lags, places[:, :, None] - places[:, None])
        pair = (before.covariance, near) if first else (near, before.covariance)
        return Second(np.kron(*pair), variance, None)

    mean = np.repeat(data.mean, count) if first else np.tile(data.mean, count)
    return Moments(axis, mean, second, [data])


def reshaped_lags(before: Shape, axis: int, after: Shape, carried: int) -> Lags:
    """Spatial axes regrouped: kept where their sizes are, along the last one where they are merged, else unknown."""
    old = [before[a] for a in spatial_axes(len(before), axis)]
    new = [after[a] for a in spatial_axes(len(after), carried)]

    def change(lags: np.ndarray | None) -> np.ndarray | None:
        if lags is None or lags.ndim != len(old):
            return None
        real = [position for position, size in enumerate(old) if size != 1]
        found = middle(lags, [position for position in range(len(old)) if position not in real])
        wanted = [size for size in new if size != 1]
        if wanted != [old[position] for position in real]:
            if len(wanted) != 1 or not real:
                return None
            found = middle(found, range(found.ndim - 1))
        lengths = iter(found.shape)
        return found.reshape([1 if size == 1 else next(lengths) for size in new])

    return change


def middle(lags: np.ndarray, axes: Sequence[int], *, keep: bool = False) -> np.ndarray:
    """Lag 0 along some axes."""
    center = [slice(size // 2, size // 2 + 1) if axis in axes else slice(None) for axis, size in enumerate(lags.shape)]
    found = lags[tuple(center)]
    return found if keep else found.reshape([size for axis, size in enumerate(found.shape) if axis not in axes])


def permuted_lags(order: Sequence[int], axis: int) -> Lags:
    """Spatial axes in another order; unknown where the samples are no longer on the first axis."""
    old = spatial_axes(len(order), axis)
    moved = [old.index(source) for source in order[1:] if source in old] if order[0] == 0 else None

    def change(lags: np.ndarray | None) -> np.ndarray | None:
        return None if lags is None or moved is None or lags.ndim != len(moved) else lags.transpose(moved)

    return change


def zoomed(lags: np.ndarray | None, scale: Sequence[float], sizes: Sequence[int]) -> np.ndarray | None:
    """Autocorrelation of an enlarged or reduced map: `scale` is the step before for a step behind."""
    if lags is None or lags.ndim != len(sizes):
        return None
    grid = lag_grid(sizes)
    return correlation_at(lags, np.rint(grid * np.reshape(scale, (-1,) + (1,) * len(sizes))))
