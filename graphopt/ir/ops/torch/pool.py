"""Pooling over windows and over everything, and its inverse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from graphopt.ir.ops.torch.operands import Numbers, numbers
from graphopt.ir.ops.torch.sliding import Window, overhang, pad, window, windows

_AVERAGE: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}
_MAXIMUM: dict[int, Callable[..., Any]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}


def average_pool(
    x: torch.Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """AveragePool 11+: [N, C, spatial...]; padding counts with `count_include_pad`, overhang of ceil_mode never."""
    described, ceil_mode = _window(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    if max(described.dilations) == 1 and _pads_natively(described):
        return _AVERAGE[x.ndim - 2](
            x, described.kernel, described.strides, described.begin, bool(ceil_mode), bool(count_include_pad)
        )
    # The mean of the padded windows, divided by the share of elements in each that count.
    end = overhang(x.shape[2:], described, ceil_mode)
    counted = x.new_ones(1, 1, *x.shape[2:])
    if count_include_pad:
        inside = [min(given, needed) for given, needed in zip(described.end, end, strict=True)]
        counted = pad(counted, described.begin, inside, value=1.0)
        beyond = [needed - given for needed, given in zip(end, inside, strict=True)]
        counted = pad(counted, [0] * len(beyond), beyond)
    else:
        counted = pad(counted, described.begin, end)
    return _mean(pad(x, described.begin, end), described) / _mean(counted, described)


def max_pool(
    x: torch.Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    outputs: int = 1,
) -> Any:
    """MaxPool 8+: [N, C, spatial...]; output 1 is where each maximum stands in X as a flat tensor."""
    if not x.dtype.is_floating_point:
        # 8-bit integers fit into float32, for which every device has kernels.
        attributes = (auto_pad, ceil_mode, dilations, kernel_shape, pads, storage_order, strides, outputs)
        result = _max_pool(x.to(torch.float32), *attributes)
        return result.to(x.dtype) if outputs == 1 else (result[0].to(x.dtype), result[1])
    return _max_pool(x, auto_pad, ceil_mode, dilations, kernel_shape, pads, storage_order, strides, outputs)


def lp_pool(
    x: torch.Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """LpPool 11+: the p-norm of every window of [N, C, spatial...]."""
    described, ceil_mode = _window(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    padded = pad(x, described.begin, overhang(x.shape[2:], described, ceil_mode))
    return torch.linalg.vector_norm(windows(padded, described), p, dim=_window_axes(described))


def global_average_pool(x: torch.Tensor) -> torch.Tensor:
    """GlobalAveragePool 1+: [N, C, spatial...] to [N, C, 1...]."""
    return x.mean(_spatial_axes(x), keepdim=True)


def global_max_pool(x: torch.Tensor) -> torch.Tensor:
    """GlobalMaxPool 1+: [N, C, spatial...] to [N, C, 1...]."""
    return x.amax(_spatial_axes(x), keepdim=True)


def global_lp_pool(x: torch.Tensor, *, p: int = 2) -> torch.Tensor:
    """GlobalLpPool 2+: [N, C, spatial...] to [N, C, 1...]."""
    return torch.linalg.vector_norm(x, p, dim=_spatial_axes(x), keepdim=True)


def max_unpool(
    x: torch.Tensor,
    i: torch.Tensor,
    output_shape: Numbers | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """MaxUnpool 11+: X put where I says in a flat tensor of the inferred shape, then zeros up to `output_shape`."""
    rank = len(kernel_shape)
    strides, pads = strides or [1] * rank, pads or [0] * (2 * rank)
    sizes = [
        (x.shape[axis + 2] - 1) * strides[axis] - pads[axis] - pads[axis + rank] + kernel_shape[axis]
        for axis in range(rank)
    ]
    inferred = [x.shape[0], x.shape[1], *sizes]
    flat = x.new_zeros(math.prod(inferred)).scatter(0, i.flatten(), x.flatten())
    result = flat.reshape(inferred)
    if output_shape is None:
        return result
    missing = [target - size for target, size in zip(numbers(output_shape), inferred, strict=True)]
    return pad(result, [0] * len(missing), missing)


def _window(
    x: torch.Tensor,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: int,
) -> tuple[Window, int]:
    """The window of the node and its ceil_mode, which changes nothing once the padding is the SAME."""
    described = window(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad)
    return described, 0 if auto_pad.startswith("SAME") else ceil_mode


def _pads_natively(described: Window) -> bool:
    """Whether torch's pooling takes the padding: the same on both sides, and at most half of the window."""
    return described.begin == described.end and all(
        2 * amount <= extent for amount, extent in zip(described.begin, described.extent, strict=True)
    )


def _mean(padded: torch.Tensor, described: Window) -> torch.Tensor:
    if max(described.dilations) == 1:
        return _AVERAGE[padded.ndim - 2](padded, described.kernel, described.strides)
    return windows(padded, described).mean(_window_axes(described))


def _max_pool(
    x: torch.Tensor,
    auto_pad: str,
    ceil_mode: int,
    dilations: Sequence[int] | None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None,
    storage_order: int,
    strides: Sequence[int] | None,
    outputs: int,
) -> Any:
    """`max_pool` of floats."""
    described, ceil_mode = _window(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    sizes, padded, padding = x.shape[2:], x, described.begin
    if not _pads_natively(described):
        padded = pad(x, described.begin, overhang(sizes, described, ceil_mode), value=-math.inf)
        padding, ceil_mode = [0] * len(padding), 0
    found = _MAXIMUM[x.ndim - 2](
        padded,
        described.kernel,
        described.strides,
        padding,
        described.dilations,
        ceil_mode=bool(ceil_mode),
        return_indices=outputs > 1,
    )
    if outputs == 1:
        return found
    values, indices = found
    shift = [begin - amount for begin, amount in zip(described.begin, padding, strict=True)]
    return values, _positions(indices, padded.shape[2:], shift, x.shape, storage_order)


def _positions(
    indices: torch.Tensor, padded: Sequence[int], shift: Sequence[int], shape: Sequence[int], storage_order: int
) -> torch.Tensor:
    """Indices into a padded image as indices into X; with `storage_order`, the first spatial axis runs fastest."""
    coordinates: list[torch.Tensor] = []
    for size, amount in zip(reversed(padded), reversed(shift), strict=True):
        coordinates.append(indices % size - amount)
        indices = indices // size
    sizes = list(reversed(shape[2:]))
    if storage_order:
        coordinates.reverse()
        sizes.reverse()
    result, step = torch.zeros_like(indices), 1
    for coordinate, size in zip(coordinates, sizes, strict=True):
        result, step = result + coordinate * step, step * size
    images = torch.arange(shape[0] * shape[1], device=indices.device)
    return result + images.reshape(shape[0], shape[1], *[1] * len(sizes)) * step


def _window_axes(described: Window) -> list[int]:
    return list(range(-len(described.kernel), 0))


def _spatial_axes(x: torch.Tensor) -> list[int]:
    return list(range(2, x.ndim))
