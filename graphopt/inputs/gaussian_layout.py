"""How pooling and what rearranges axes carry Gaussian moments: one small rule an operator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from graphopt.inputs.gaussian_moments import (
    GRID,
    MOST_CHANNELS,
    Moments,
    Second,
    Taps,
    correlation_at,
    filtered_lags,
    independent,
    largest_of,
    mixed_lags,
    of_profile,
)
from graphopt.inputs.gaussian_site import Rule, Site
from graphopt.inputs.gaussian_space import (
    carried_axis,
    flattened,
    middle,
    permuted_lags,
    pooling_taps,
    reshaped_lags,
    zoomed,
)
from graphopt.ir.linear import channel_axis
from graphopt.ir.ops.row import Shape
from graphopt.ir.rewrite import constant_float64, integers

# Pooling ----------------------------------------------------------------------------------------------------


def _average_pool(site: Site) -> Moments | None:
    """The mean stays; the variance shrinks by the autocorrelation. Windows at the border count as whole ones."""
    data, taps = site.moments(), pooling_taps(site.node, site.result_shape)
    return None if data is None or data.axis != 1 or taps is None else _averaged(data, taps)


def _averaged(data: Moments, taps: Taps) -> Moments:
    pairs = np.moveaxis(taps.offsets[None] - taps.offsets[:, None], -1, 0)

    def second() -> Second:
        before = data.second
        share = max(float(correlation_at(before.lags, pairs).mean()), 0.0)
        power = np.full((len(taps.offsets),) * 2, 1.0)
        lags = filtered_lags(before.lags, taps.offsets, power, taps.strides, taps.sizes)
        covariance = None if before.covariance is None else before.covariance * share
        return Second(covariance, before.variance * share, lags)

    return Moments(data.axis, data.mean, second, [data])


def _max_pool(site: Site) -> Moments | None:
    """The largest of equally correlated Gaussian numbers, before a rising activation where there is one.

    max(f(x)) = f(max(x)) for rising f; the largest of a window is taken for Gaussian, with the mean and variance of
    the largest of as many numbers that share the mean correlation of the window.
    """
    data, taps = site.moments(), pooling_taps(site.node, site.result_shape)
    if data is None or data.axis != 1 or taps is None:
        return None
    root, values = data.profile()
    if (np.diff(values, axis=0) < -1e-9 * (1 + np.abs(values).max())).any():
        root, values = data, data.mean + np.sqrt(data.variance) * GRID[:, None]
    before = root.second
    pairs = np.moveaxis(taps.offsets[None] - taps.offsets[:, None], -1, 0)
    count = len(taps.offsets)
    share = (float(correlation_at(before.lags, pairs).sum()) - count) / max(count * (count - 1), 1)
    shift, variance = largest_of(count, float(np.clip(share, 0, 1)))
    lags = filtered_lags(before.lags, taps.offsets, np.ones((count, count)), taps.strides, taps.sizes)
    covariance = None if before.covariance is None else before.covariance * variance
    second = Second(covariance, before.variance * variance, lags)
    largest = Moments(1, root.mean + shift * np.sqrt(before.variance), lambda: second, (), second.variance)
    place = (shift + np.sqrt(variance) * GRID - GRID[0]) / (GRID[1] - GRID[0])
    low = np.clip(place.astype(np.int64), 0, len(GRID) - 2)
    part = (place - low).clip(0, 1)[:, None]
    return of_profile(1, largest, (1 - part) * values[low] + part * values[low + 1])


def _global_average(site: Site) -> Moments | None:
    shape = site.shape()
    return None if shape is None else _mean_over(site, tuple(range(2, len(shape))), keep=True)


def _reduce_mean(site: Site) -> Moments | None:
    shape, axes = site.shape(), site.integers(1)
    axes = axes if axes is not None else integers(site.node, "axes")
    if shape is None or axes is None:
        return None
    reduced = tuple(sorted(axis % len(shape) for axis in axes))
    return _mean_over(site, reduced, keep=bool(site.attribute("keepdims", 1)))


def _mean_over(site: Site, axes: tuple[int, ...], *, keep: bool) -> Moments | None:
    data, shape = site.moments(), site.shape()
    if data is None or shape is None or data.axis in axes or 0 in axes or not axes:
        return None
    spatial = [axis for axis in range(1, len(shape)) if axis != data.axis]
    grid = np.stack(
        np.meshgrid(*(np.arange(1 - shape[a], shape[a]) if a in axes else np.zeros(1) for a in spatial), indexing="ij")
    )
    share = np.ones(grid.shape[1:])
    for position, axis in enumerate(spatial):
        if axis in axes:
            share = share * (shape[axis] - np.abs(grid[position])) / shape[axis] ** 2
    gone = [position for position, axis in enumerate(spatial) if axis in axes]

    def second() -> Second:
        before = data.second
        factor = max(float((share * correlation_at(before.lags, grid)).sum()), 0.0)
        covariance = None if before.covariance is None else before.covariance * factor
        lags = None if before.lags is None or before.lags.ndim != len(spatial) else before.lags
        lags = None if lags is None else middle(lags, gone, keep=keep)
        return Second(covariance, before.variance * factor, lags)

    axis = data.axis if keep else data.axis - sum(reduced < data.axis for reduced in axes)
    return Moments(axis, data.mean, second, [data])


# Shapes -----------------------------------------------------------------------------------------------------


def _same(site: Site) -> Moments | None:
    data = site.moments()
    return None if data is None else data.moved(data.axis)


def _reshape(site: Site) -> Moments | None:
    data, before, after = site.moments(), site.shape(), site.result_shape
    if data is None or before is None or after is None:
        return None
    found = carried_axis(before, data.axis, after)
    if found is not None:
        return data.moved(found, reshaped_lags(before, data.axis, after, found))
    return flattened(data, before, after)


def _transpose(site: Site) -> Moments | None:
    data, shape = site.moments(), site.shape()
    if data is None or shape is None:
        return None
    order = integers(site.node, "perm") or tuple(reversed(range(len(shape))))
    axis = order.index(data.axis)
    return None if axis == 0 else data.moved(axis, permuted_lags(order, data.axis))


def _concat(site: Site) -> Moments | None:
    """Along the channels: parts are taken for independent. Along positions: the mixture of the parts."""
    found = [site.moments(index) for index in range(len(site.node.inputs))]
    shape, shapes = site.result_shape, [site.shape(index) for index in range(len(found))]
    parts = [moments for moments in found if moments is not None]
    if len(parts) < len(found) or shape is None or len({part.axis for part in parts}) != 1:
        return None
    axis = channel_axis(site.attribute("axis", 0), len(shape))
    if axis != parts[0].axis:
        return _mixture(parts, [0 if each is None else each[axis] for each in shapes])
    mean = np.concatenate([part.mean for part in parts])

    def second() -> Second:
        from scipy.linalg import block_diag

        seconds = [part.second for part in parts]
        variance = np.concatenate([each.variance for each in seconds])
        blocks = [each.covariance for each in seconds if each.covariance is not None]
        full = len(blocks) == len(seconds) and len(variance) <= MOST_CHANNELS
        lags = mixed_lags([each.lags for each in seconds], [float(each.variance.sum()) for each in seconds])
        return Second(np.asarray(block_diag(*blocks)) if full else None, variance, lags)

    return Moments(axis, mean, second, parts)


def _mixture(parts: Sequence[Moments], sizes: Sequence[int]) -> Moments | None:
    shares = np.array(sizes, np.float64) / max(sum(sizes), 1)
    mean = sum((share * part.mean for share, part in zip(shares, parts, strict=True)), np.zeros(parts[0].channels))

    def second() -> Second:
        full = all(part.covariance is not None for part in parts)
        variance, covariance = np.zeros(len(mean)), np.zeros((len(mean),) * 2) if full else None
        for share, part in zip(shares, parts, strict=True):
            apart = part.mean - mean
            variance = variance + share * (part.variance + apart**2)
            if covariance is not None and part.covariance is not None:
                covariance += share * (part.covariance + np.outer(apart, apart))
        return Second(covariance, variance, parts[int(np.argmax(shares))].lags)

    return Moments(parts[0].axis, mean, second, parts)


def select(data: Moments, indices: np.ndarray) -> Moments:
    """The moments of some channels: int64 indices."""

    def second() -> Second:
        before = data.second
        covariance = before.covariance
        if covariance is None and len(indices) <= MOST_CHANNELS:
            return independent(before.variance[indices], before.lags)
        chosen = None if covariance is None else covariance[np.ix_(indices, indices)]
        return Second(chosen, before.variance[indices], before.lags)

    return Moments(data.axis, data.mean[indices], second, [data])


def _split(site: Site) -> Sequence[Moments | None] | None:
    data, shape = site.moments(), site.shape()
    if data is None or shape is None:
        return None
    axis = channel_axis(site.attribute("axis", 0), len(shape))
    sizes = [None if (each := site.facts.shape(output)) is None else each[axis] for output in site.node.outputs]
    if axis != data.axis:
        return [data.moved(data.axis, same=False) for _ in sizes]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    ends = np.cumsum(known)
    return [select(data, np.arange(end - size, end)) for size, end in zip(known, ends, strict=True)]


def _slice(site: Site) -> Moments | None:
    """Positions left out change nothing; channels are chosen."""
    data, shape = site.moments(), site.shape()
    starts, ends, axes, steps = (site.integers(index) for index in range(1, 5))
    if data is None or shape is None or starts is None or ends is None:
        return None
    for position, axis in enumerate(axes or range(len(starts))):
        if axis % len(shape) == data.axis:
            step = 1 if steps is None else steps[position]
            begin, end = starts[position], ends[position]
            end = None if step < 0 and end < -shape[data.axis] else end
            return select(data, np.arange(data.channels)[begin:end:step])
    return data.moved(data.axis, same=False)


def _gather(site: Site) -> Moments | None:
    """Rows of a table, all taken for equally likely; or channels, or positions, of a computed value."""
    table, result = constant_float64(site.node.inputs[0]), site.result_shape
    axis = site.attribute("axis", 0)
    if table is not None:
        if axis != 0 or table.ndim != 2 or result is None or len(result) < 2:
            return None
        mean, centred = table.mean(axis=0), table - table.mean(axis=0)
        variance = centred.var(axis=0)
        return Moments(
            len(result) - 1,
            mean,
            lambda: Second(centred.T @ centred / len(table) if len(mean) <= MOST_CHANNELS else None, variance, None),
            (),
            variance,
        )
    data, shape, indices = site.moments(), site.shape(), site.facts.constant(site.node.inputs[1])
    if data is None or shape is None or indices is None or result is None:
        return None
    axis = channel_axis(axis, len(shape))
    if axis == data.axis:
        return select(data, indices.astype(np.int64) % data.channels) if indices.ndim == 1 else None
    moved = data.axis + (indices.ndim - 1 if axis < data.axis else 0)
    return data.moved(moved, reshaped_lags(shape, data.axis, result, moved), same=False)


def _pad(site: Site) -> Moments | None:
    """Zeros around: a mixture of the value and 0."""
    data, shape, result = site.moments(), site.shape(), site.result_shape
    mode = site.node.attributes.get("mode")
    if data is None or shape is None or result is None:
        return None
    if shape[data.axis] != result[data.axis]:
        return _pad_channels(site, data, shape, result)
    if mode is not None and mode.as_string() != "constant":
        return data.moved(data.axis, same=False)
    fill = site.constant(site.node.inputs[2]) if len(site.node.inputs) > 2 else None
    if (len(site.node.inputs) > 2 and site.node.inputs[2] is not None and fill is None) or (
        fill is not None and fill.any()
    ):
        return None
    share = math.prod(shape) / max(math.prod(result), 1)
    nothing = Moments(data.axis, np.zeros(data.channels), lambda: independent(np.zeros(data.channels)))
    found = _mixture([data, nothing], [round(share * 1e9), round((1 - share) * 1e9)])
    return None if found is None else found.moved(data.axis, lambda _: data.lags, same=False)


def _pad_channels(site: Site, data: Moments, shape: Shape, result: Shape) -> Moments | None:
    """More channels, which are 0 everywhere."""
    pads = site.integers(1)
    others = [axis for axis in range(len(shape)) if axis != data.axis]
    if pads is None or len(pads) != 2 * len(shape) or any(shape[axis] != result[axis] for axis in others):
        return None
    mode, before = site.node.attributes.get("mode"), pads[data.axis]
    fill = site.constant(site.node.inputs[2]) if len(site.node.inputs) > 2 else np.zeros(())
    if before < 0 or (mode is not None and mode.as_string() != "constant") or fill is None or fill.any():
        return None
    place = np.arange(before, before + data.channels)
    mean = np.zeros(result[data.axis])
    if place[-1] >= len(mean):
        return None
    mean[place] = data.mean

    def second() -> Second:
        found = data.second
        variance = np.zeros(len(mean))
        variance[place] = found.variance
        covariance = None
        if found.covariance is not None and len(mean) <= MOST_CHANNELS:
            covariance = np.zeros((len(mean),) * 2)
            covariance[np.ix_(place, place)] = found.covariance
        return Second(covariance, variance, found.lags)

    return Moments(data.axis, mean, second, [data])


def _resize(site: Site) -> Moments | None:
    """Enlarged or reduced maps: the moments stay (interpolation shrinks the variance, which is not followed)."""
    data, shape, result = site.moments(), site.shape(), site.result_shape
    if data is None or shape is None or result is None or shape[data.axis] != result[data.axis]:
        return None
    spatial = [axis for axis in range(1, len(shape)) if axis != data.axis]
    scale = [shape[axis] / max(result[axis], 1) for axis in spatial]
    return data.moved(data.axis, lambda lags: zoomed(lags, scale, [result[axis] for axis in spatial]), same=False)


LAYOUT_RULES: dict[str, Rule] = {
    **dict.fromkeys(("Identity", "Dropout", "Cast"), _same),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "AveragePool": _average_pool,
    "Concat": _concat,
    "Gather": _gather,
    "GlobalAveragePool": _global_average,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
"""By operator of the standard domain."""
