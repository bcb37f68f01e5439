"""Torch functions of the ops that rearrange, repeat, describe or make elements without computing on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from graphopt.ir.ops.torch import sizes
from graphopt.ir.ops.torch.dtypes import ElementType, torch_dtype
from graphopt.ir.ops.torch.operands import Numbers, number, numbers


def reshape(data: torch.Tensor, shape: Numbers, *, allowzero: int = 0) -> torch.Tensor:
    """Reshape 14+: a size of -1 takes what is left, one of 0 is that of the data unless `allowzero`."""
    wanted = numbers(shape)
    if not allowzero:
        wanted = [data.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return data.reshape(wanted)


def flatten(data: torch.Tensor, *, axis: int = 1) -> torch.Tensor:
    """Flatten 13+: [product of the sizes before `axis`, product of the others]."""
    return data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))


def squeeze(data: torch.Tensor, axes: Numbers | None = None) -> torch.Tensor:
    """Squeeze 13+: without the given axes of size 1, or without all of them."""
    return data.squeeze() if axes is None else data.squeeze(tuple(numbers(axes)))


def unsqueeze(data: torch.Tensor, axes: Numbers) -> torch.Tensor:
    """Unsqueeze 13+: with axes of size 1 at the given positions of the result."""
    positions = numbers(axes)
    rank = data.dim() + len(positions)
    for position in sorted(position % rank for position in positions):
        data = data.unsqueeze(position)
    return data


def transpose(data: torch.Tensor, *, perm: Sequence[int] | None = None) -> torch.Tensor:
    """Transpose 13+: axis i of the result is axis perm[i] of the data; without `perm` all are reversed."""
    return data.permute(tuple(reversed(range(data.dim()))) if perm is None else tuple(perm))


def concat(*inputs: torch.Tensor, axis: int) -> torch.Tensor:
    """Concat 13."""
    return torch.cat(inputs, axis)


def depth_to_space(data: torch.Tensor, *, blocksize: int, mode: str = "DCR") -> torch.Tensor:
    """DepthToSpace 13: [N, C, H, W] to [N, C / blocksize^2, H * blocksize, W * blocksize]."""
    if mode == "CRD":
        return torch.pixel_shuffle(data, blocksize)
    batch, channels, height, width = data.shape
    depth = channels // blocksize**2
    blocks = data.reshape(batch, blocksize, blocksize, depth, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, depth, height * blocksize, width * blocksize)


def space_to_depth(data: torch.Tensor, *, blocksize: int, mode: str = "DCR") -> torch.Tensor:
    """SpaceToDepth 13 and 28: [N, C, H, W] to [N, C * blocksize^2, H / blocksize, W / blocksize]."""
    if mode == "CRD":
        return torch.pixel_unshuffle(data, blocksize)
    batch, channels, height, width = data.shape
    rows, columns = height // blocksize, width // blocksize
    blocks = data.reshape(batch, channels, rows, blocksize, columns, blocksize)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * blocksize**2, rows, columns)


def split(
    data: torch.Tensor,
    split: Numbers | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    outputs: int = 1,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Split 13 and 18: parts of the given sizes, or of equal ones of which the last may be smaller."""
    if split is None:
        parts, total = num_outputs or outputs, data.shape[axis]
        part = (total + parts - 1) // parts
        lengths = [max(min(part, total - part * index), 0) for index in range(parts)]
    else:
        lengths = numbers(split)
    pieces = torch.split(data, lengths, axis)
    return pieces[0] if outputs == 1 else tuple(pieces)


def expand(data: torch.Tensor, shape: Numbers) -> torch.Tensor:
    """Expand 13: broadcast with a shape; a size of 1 in it keeps that of the data."""
    wanted = numbers(shape)
    new = len(wanted) - data.dim()  # axes that the data lacks; negative where the shape is the shorter one
    kept = [-1 if size == 1 and position >= new else size for position, size in enumerate(wanted)]
    return data.expand([-1] * -new + kept)


def tile(data: torch.Tensor, repeats: Numbers) -> torch.Tensor:
    """Tile 13: repeats[i] copies along axis i."""
    return data.repeat(numbers(repeats))


def trilu(data: torch.Tensor, k: Numbers | None = None, *, upper: int = 1) -> torch.Tensor:
    """Trilu 14: zeros below (`upper`) or above diagonal `k` of each matrix."""
    diagonal = 0 if k is None else number(k)
    return torch.triu(data, diagonal) if upper else torch.tril(data, diagonal)


def reverse_sequence(
    data: torch.Tensor, sequence_lens: Numbers, *, batch_axis: int = 1, time_axis: int = 0
) -> torch.Tensor:
    """ReverseSequence 10: the first sequence_lens[b] steps of batch element b in reverse."""
    moved = data.movedim((time_axis, batch_axis), (0, 1))
    steps, batch = moved.shape[:2]
    lengths = torch.as_tensor(sequence_lens, device=data.device)
    step = torch.arange(steps, device=data.device).unsqueeze(1)
    source = torch.where(step < lengths, lengths - 1 - step, step)
    reversed_steps = moved[source, torch.arange(batch, device=data.device)]
    return reversed_steps.movedim((0, 1), (time_axis, batch_axis))


def shape(data: torch.Tensor, *, start: int = 0, end: int | None = None) -> torch.Tensor:
    """Shape 15+: sizes of axes `start` up to `end`, int64."""
    return sizes.to_tensor(sizes.shape(data, start=start, end=end), ir.DataType.INT64, data)


def size(data: torch.Tensor) -> torch.Tensor:
    """Size 13+: number of elements, int64."""
    return sizes.to_tensor(sizes.size(data), ir.DataType.INT64, data)


def constant(
    *,
    value: Any = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
    element_type: ElementType,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Constant 13+ of numbers: the one attribute that is given."""
    forms = (value, value_float, value_floats, value_int, value_ints)
    given = next(form for form in forms if form is not None)
    return torch.tensor(given, dtype=torch_dtype(element_type), device=device)


def constant_of_shape(
    shape: Numbers,
    *,
    value: Sequence[Any] = (0.0,),
    element_type: ElementType = ir.DataType.FLOAT,
    device: torch.device | None = None,
) -> torch.Tensor:
    """ConstantOfShape 9+: a tensor of one value everywhere."""
    place = shape.device if isinstance(shape, torch.Tensor) else device
    return torch.full(numbers(shape), value[0], dtype=torch_dtype(element_type), device=place)


def _whole(value: Any) -> Any:
    """A whole float as an int, so that the length of a range stays symbolic where a bound is a size."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def eye_like(data: torch.Tensor, *, dtype: ElementType | None = None, k: int = 0) -> torch.Tensor:
    """EyeLike 9+: ones on diagonal `k` of a matrix with the shape of the data, zeros elsewhere."""
    rows, columns = (torch.arange(length, device=data.device) for length in data.shape)
    return (columns - rows.unsqueeze(1) == k).to(data.dtype if dtype is None else torch_dtype(dtype))


def range_(
    start: Numbers, limit: Numbers, delta: Numbers, *, element_type: ElementType, device: torch.device | None = None
) -> torch.Tensor:
    """Range 11: start, start + delta, ... before `limit`; nothing where `delta` leads away from it."""
    place = start.device if isinstance(start, torch.Tensor) else device
    dtype = torch_dtype(element_type)
    first, last, step = (_whole(number(operand)) for operand in (start, limit, delta))
    if (last - first) * step <= 0:
        return torch.empty(0, dtype=dtype, device=place)
    return torch.arange(first, last, step, dtype=dtype, device=place)
