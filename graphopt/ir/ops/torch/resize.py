"""Resize: one axis after another, each position of the result a weighted mean of a few neighbours.

Torch's own interpolation takes over wherever it computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from graphopt.ir.ops.torch.operands import Numbers, numbers


@dataclass(frozen=True)
class _Axis:
    """How one axis is resized.

    Attributes:
        index: which axis.
        length: its size before.
        resized: its size after.
        scale: factor between the two; `length * scale` may be a fraction above `resized`.
        exact: whether the scale says no more than the two sizes do, to the precision of float32.
        region: start and end of what is sampled, relative to the axis (tf_crop_and_resize).
    """

    index: int
    length: Any
    resized: Any
    scale: Any
    exact: bool
    region: tuple[Any, Any]


@dataclass(frozen=True)
class _Sampling:
    """The attributes that say where and how samples are taken."""

    mode: str
    coordinates: str
    nearest_mode: str
    cubic_coefficient: float
    antialias: bool
    exclude_outside: bool
    extrapolation_value: float


def resize(
    data: torch.Tensor,
    roi: Numbers | None = None,
    scales: Numbers | None = None,
    sizes: Numbers | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    antialias: int = 0,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    axes: Sequence[int] | None = None,
) -> torch.Tensor:
    """Resize 11 to 19: the data sampled anew along `axes`, by `scales` or to `sizes`."""
    sampling = _Sampling(
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        cubic_coeff_a,
        bool(antialias),
        bool(exclude_outside),
        extrapolation_value,
    )
    places = list(range(data.dim())) if axes is None else [axis % data.dim() for axis in axes]
    regions = _regions(roi, len(places)) if sampling.coordinates == "tf_crop_and_resize" else [(0.0, 1.0)] * len(places)
    lengths = [data.shape[axis] for axis in places]
    targets = _targets(lengths, scales, sizes, keep_aspect_ratio_policy)
    resized = [
        _Axis(index, length, *target, region)
        for index, length, target, region in zip(places, lengths, targets, regions, strict=True)
        if not (target.exact and target.size == length and region == (0.0, 1.0))
    ]
    if _torch_nearest(data, resized, sampling):
        return torch.nn.functional.interpolate(data, size=_spatial_sizes(data, resized), mode="nearest")
    if _torch_smooth(data, resized, sampling):
        mode = "bicubic" if mode == "cubic" else {3: "linear", 4: "bilinear", 5: "trilinear"}[data.dim()]
        corners = sampling.coordinates == "align_corners"
        return torch.nn.functional.interpolate(
            data, size=_spatial_sizes(data, resized), mode=mode, align_corners=corners
        )
    return _separable(data, resized, sampling)


def upsample(data: torch.Tensor, scales: Numbers, *, mode: str = "nearest") -> torch.Tensor:
    """Upsample 9: the older form of Resize."""
    return resize(data, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


def _regions(roi: Numbers | None, count: int) -> list[tuple[Any, Any]]:
    """Start and end of each axis: `roi` has all starts, then all ends."""
    bounds = [] if roi is None else numbers(roi)
    return list(zip(bounds[:count], bounds[count:], strict=True)) if bounds else [(0.0, 1.0)] * count


class _Target(NamedTuple):
    """Size after, scale and exactness of one axis: see `_Axis`."""

    size: Any
    scale: Any
    exact: bool


def _targets(lengths: Sequence[Any], scales: Numbers | None, sizes: Numbers | None, policy: str) -> list[_Target]:
    """What becomes of each axis. Absent operands may also come as empty ones."""
    factors = [] if scales is None else numbers(scales)
    if factors:
        return [_scaled(length, factor) for length, factor in zip(lengths, factors, strict=True)]
    wanted = [] if sizes is None else numbers(sizes)
    ratios = [size / length for size, length in zip(wanted, lengths, strict=True)]
    if policy == "stretch":
        return [_Target(size, ratio, True) for size, ratio in zip(wanted, ratios, strict=True)]
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    resized = [(length, math.floor(ratio * length + 0.5)) for length in lengths]
    return [_Target(size, ratio, _agree(length * ratio, size)) for length, size in resized]


def _scaled(length: Any, factor: float) -> _Target:
    """An axis made `factor` times as long, rounded down."""
    if factor == int(factor):
        return _Target(length * int(factor), factor, True)
    # ONNX multiplies in float32: 10 * 0.7 is 7, though the float32 next to 0.7 is a little less.
    product = length * factor
    spread = product * (2**29 + 1)  # Dekker's split leaves the 24 bits that a float32 has
    size = math.floor(spread - (spread - product))
    return _Target(size, factor, _agree(product, size))


def _agree(width: Any, size: Any) -> bool:
    """Whether two widths are the same to the precision of float32."""
    return abs(width - size) <= size * 2**-23


def _spatial_sizes(data: torch.Tensor, resized: Sequence[_Axis]) -> list[Any]:
    sizes = list(data.shape)
    for axis in resized:
        sizes[axis.index] = axis.resized
    return sizes[2:]


def _spatial(data: torch.Tensor, resized: Sequence[_Axis]) -> bool:
    """Whether `torch.nn.functional.interpolate` knows these axes."""
    return 3 <= data.dim() <= 5 and all(axis.index >= 2 and axis.exact for axis in resized)


_LARGEST_FACTOR = 8
"""Torch multiplies positions by 1 / factor in float32: up to here no position is rounded over an integer."""


def _torch_nearest(data: torch.Tensor, resized: Sequence[_Axis], sampling: _Sampling) -> bool:
    """Whether each element is just repeated: then floor(position / factor) is the nearest by all these rules."""
    rule = (sampling.coordinates, sampling.nearest_mode)
    return (
        sampling.mode == "nearest"
        and (
            rule == ("asymmetric", "floor")
            or (rule[0].startswith(("half_pixel", "pytorch_half_pixel")) and rule[1].startswith("round"))
        )
        and data.is_floating_point()
        and _spatial(data, resized)
        and all(axis.resized % axis.length == 0 for axis in resized)
        and all(axis.scale == axis.resized // axis.length <= _LARGEST_FACTOR for axis in resized)
    )


def _torch_smooth(data: torch.Tensor, resized: Sequence[_Axis], sampling: _Sampling) -> bool:
    """Whether torch has this linear or cubic interpolation. At a size of 1 its half pixels are not those of ONNX."""
    return (
        (
            sampling.mode == "linear"
            or (sampling.mode == "cubic" and data.dim() == 4 and sampling.cubic_coefficient == -0.75)
        )
        and sampling.coordinates in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners")
        and not sampling.antialias
        and not sampling.exclude_outside
        and data.is_floating_point()
        and _spatial(data, resized)
        and all(axis.resized > 1 for axis in resized)
    )


def _separable(data: torch.Tensor, resized: Sequence[_Axis], sampling: _Sampling) -> torch.Tensor:
    """The resized data, axis by axis. Weighted means are taken in float32 at least."""
    if sampling.mode == "nearest":
        result = data
    else:
        precise = data.dtype if data.is_floating_point() else torch.float32
        result = data.to(torch.promote_types(precise, torch.float32))
    for axis in resized:
        position = _positions(axis, sampling.coordinates, data.device)
        if sampling.mode == "nearest":
            nearest = _ROUNDINGS[sampling.nearest_mode](position).to(torch.int64)
            result = result.index_select(axis.index, nearest.clamp(0, axis.length - 1))
        else:
            result = _weighted_mean(result, axis, position, sampling)
        if sampling.coordinates == "tf_crop_and_resize":
            outside = (position < 0) | (position > axis.length - 1)
            result = result.masked_fill(_along(outside, axis.index, data.dim()), sampling.extrapolation_value)
    if result.is_floating_point() and not data.is_floating_point():  # cubics swing beyond the range of the data
        limits = torch.iinfo(data.dtype)
        result = result.clamp(limits.min, limits.max)
    return result.to(data.dtype)


def _along(vector: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """A vector in a shape that broadcasts along an axis of a tensor of `rank` axes."""
    return vector.reshape([-1] + [1] * (rank - 1 - axis))


def _positions(axis: _Axis, coordinates: str, device: torch.device) -> torch.Tensor:
    """Where each position of the result lies in the data (`x_original`).

    In float32, as runtimes compute it: where a position is next to an integer, the last bit decides what is nearest.
    """
    position = torch.arange(axis.resized, dtype=torch.float32, device=device)
    scale = torch.full_like(position, axis.scale)  # by a plain number, cuda would multiply with the reciprocal
    width, last = axis.length * axis.scale, axis.length - 1
    # The cases of ONNX take the width before it is cut to an integer here; onnxruntime takes the integer.
    if coordinates == "align_corners":
        return torch.zeros_like(position) if width == 1 else position * last / torch.full_like(position, width - 1)
    if coordinates == "tf_crop_and_resize":
        start, end = axis.region
        if axis.resized == 1:
            return torch.full_like(position, (start + end) / 2 * last)
        return start * last + position * (end - start) * last / torch.full_like(position, axis.resized - 1)
    if coordinates == "asymmetric":
        return position / scale
    if coordinates == "pytorch_half_pixel" and axis.resized == 1:
        return torch.zeros_like(position)
    half_pixel = (position + 0.5) / scale - 0.5
    if coordinates == "half_pixel_symmetric":
        return half_pixel + axis.length / 2 * (1 - axis.resized / width)
    return half_pixel


_ROUNDINGS: dict[str, Any] = {
    "round_prefer_floor": lambda position: (position - 0.5).ceil(),
    "round_prefer_ceil": lambda position: (position + 0.5).floor(),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _weighted_mean(data: torch.Tensor, axis: _Axis, position: torch.Tensor, sampling: _Sampling) -> torch.Tensor:
    """The data at fractional positions of an axis: neighbours outside count as the element at the border."""
    reach = 1 if sampling.mode == "linear" else 2
    # Antialiasing stretches the filter over all the elements that one element of the result stands for.
    shrink = min(axis.scale, 1.0) if sampling.antialias else 1.0
    left = position.ceil() - 1
    first = math.floor(-reach / shrink) + 1
    offsets = torch.arange(first, 2 - first, device=data.device)
    distance = ((offsets - (position - left).unsqueeze(1)) * shrink).abs()
    weights = _linear(distance) if sampling.mode == "linear" else _cubic(distance, sampling.cubic_coefficient)
    neighbours = left.to(torch.int64).unsqueeze(1) + offsets
    if sampling.antialias:
        weights = weights / weights.sum(1, keepdim=True)
    if sampling.exclude_outside:
        weights = weights * ((neighbours >= 0) & (neighbours < axis.length))
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
    neighbours, weights = neighbours.clamp(0, axis.length - 1), weights.to(data.dtype)
    terms = [
        data.index_select(axis.index, neighbour) * _along(weight, axis.index, data.dim())
        for neighbour, weight in zip(neighbours.unbind(1), weights.unbind(1), strict=True)
    ]
    return sum(terms[1:], terms[0])


def _linear(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance).clamp(min=0)


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' kernel: one cubic up to a distance of 1, another up to 2, nothing beyond."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
