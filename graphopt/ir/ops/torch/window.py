"""Torch functions of the ops that cut tensors or put a border around them: Slice, Pad, CenterCropPad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.ir.ops.torch.operands import Numbers, numbers


def slice_(
    data: torch.Tensor, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None
) -> torch.Tensor:
    """Slice 13: ends beyond an axis are cut off; a negative step walks backwards."""
    first, last = numbers(starts), numbers(ends)
    places = range(len(first)) if axes is None else numbers(axes)
    strides = [1] * len(first) if steps is None else numbers(steps)
    window = [slice(None)] * data.dim()
    for start, end, axis, step in zip(first, last, places, strides, strict=True):
        if step < 0:
            # Position i is at -1 - i in the axis turned round. A start before the axis stands for its first element.
            data = data.flip(axis)
            start, end, step = -1 - max(start, -data.shape[axis]), -1 - end, -step
        window[axis] = slice(start, end, step)
    return data[tuple(window)]


def pad(
    data: torch.Tensor,
    pads: Numbers,
    constant_value: torch.Tensor | float | None = None,
    axes: Numbers | None = None,
    *,
    mode: str = "constant",
) -> torch.Tensor:
    """Pad 18+: a border around each axis; a negative one cuts off.

    `pads` holds what comes before each of the axes, then what comes after each of them.
    """
    widths = numbers(pads)
    before, after = [0] * data.dim(), [0] * data.dim()
    places = range(data.dim()) if axes is None else numbers(axes)
    for index, axis in enumerate(places):
        before[axis], after[axis] = widths[index], widths[index + len(widths) // 2]
    if mode != "constant":
        return _pad_with_data(data, before, after, mode)
    if isinstance(constant_value, torch.Tensor):
        return _pad_with_tensor(data, before, after, constant_value)
    return torch.nn.functional.pad(data, _innermost_first(before, after), value=constant_value)


def _innermost_first(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Pads in the order of torch: those of the last axis come first, and of outer axes that have none are left out."""
    pairs = list(zip(before, after, strict=True))
    while len(pairs) > 1 and pairs[0] == (0, 0):
        pairs.pop(0)
    return [width for pair in reversed(pairs) for width in pair]


def _pad_with_tensor(
    data: torch.Tensor, before: Sequence[int], after: Sequence[int], border: torch.Tensor
) -> torch.Tensor:
    """A border whose value waits on the device: `torch.nn.functional.pad` would have to fetch it."""
    widths = list(zip(before, after, strict=True))
    total = [size + low + high for size, (low, high) in zip(data.shape, widths, strict=True)]
    result = border.to(data.dtype).reshape(()).expand(total).clone()
    inner = tuple(slice(max(low, 0), size - max(high, 0)) for size, (low, high) in zip(total, widths, strict=True))
    result[inner] = _cropped(data, before, after)
    return result


def _cropped(data: torch.Tensor, before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
    """The data without what negative pads cut off."""
    sizes = zip(data.shape, before, after, strict=True)
    return data[tuple(slice(max(-low, 0), size - max(-high, 0)) for size, low, high in sizes)]


_TORCH_MODES = {"reflect": "reflect", "edge": "replicate"}


def _pad_with_data(data: torch.Tensor, before: Sequence[int], after: Sequence[int], mode: str) -> torch.Tensor:
    """A border of the data's own elements: `edge` repeats the last one, `reflect` mirrors, `wrap` starts anew."""
    if _torch_pads(data, before, after, mode):
        return torch.nn.functional.pad(data, _innermost_first(before[2:], after[2:]), mode=_TORCH_MODES[mode])
    data = _cropped(data, before, after)
    for axis, (low, high) in enumerate(zip(before, after, strict=True)):
        low, high = max(low, 0), max(high, 0)
        if (low, high) != (0, 0):
            positions = torch.arange(-low, data.shape[axis] + high, device=data.device)
            data = data.index_select(axis, _SOURCES[mode](positions, data.shape[axis]))
    return data


def _torch_pads(data: torch.Tensor, before: Sequence[int], after: Sequence[int], mode: str) -> bool:
    """Whether torch has this border: around the spatial axes of floats, and a mirrored one once at most."""
    widths = [*before, *after]
    return (
        mode in _TORCH_MODES
        and data.is_floating_point()
        and 3 <= data.dim() <= 5
        and all(width == 0 for width in (*before[:2], *after[:2]))
        and all(width >= 0 for width in widths)
        and (
            mode == "edge" or all(width < size for width, size in zip(widths, (*data.shape, *data.shape), strict=True))
        )
    )


def _reflected(positions: torch.Tensor, size: int) -> torch.Tensor:
    period = max(2 * (size - 1), 1)
    inside = positions % period
    return torch.minimum(inside, period - inside) if size > 1 else torch.zeros_like(positions)


_SOURCES: dict[str, Any] = {
    "edge": lambda positions, size: positions.clamp(0, size - 1),
    "reflect": _reflected,
    "wrap": lambda positions, size: positions % size,
}


def center_crop_pad(data: torch.Tensor, shape: Numbers, *, axes: Sequence[int] | None = None) -> torch.Tensor:
    """CenterCropPad 18: the middle of each axis, or the axis in the middle of zeros."""
    wanted = numbers(shape)
    before, after = [0] * data.dim(), [0] * data.dim()
    for axis, length in zip(range(data.dim()) if axes is None else axes, wanted, strict=True):
        missing = length - data.shape[axis]
        # An odd element is cut off, or added, at the end.
        before[axis] = missing // 2 if missing >= 0 else -(-missing // 2)
        after[axis] = missing - before[axis]
    return torch.nn.functional.pad(data, _innermost_first(before, after))
