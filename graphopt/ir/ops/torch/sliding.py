"""Sliding windows over spatial axes: the padding rules that convolutions and pools share, and windows as a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Window:
    """A sliding window as the attributes of a node describe it, one entry a spatial axis.

    Attributes:
        kernel: sizes of the window.
        strides: steps of the window.
        dilations: distances of neighbours in the window.
        begin: padding before the first element.
        end: padding behind the last element.
    """

    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    begin: Sequence[int]
    end: Sequence[int]

    @property
    def extent(self) -> list[int]:
        """Elements from the first to the last of the dilated window."""
        return [dilation * (size - 1) + 1 for size, dilation in zip(self.kernel, self.dilations, strict=True)]


def window(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: str,
) -> Window:
    """The window of a node over spatial axes of `sizes`, `auto_pad` resolved to explicit padding."""
    rank = len(kernel)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pads = pads or [0] * (2 * rank)
    if auto_pad == "NOTSET":
        return Window(kernel, strides, dilations, list(pads[:rank]), list(pads[rank:]))
    if auto_pad == "VALID":
        return Window(kernel, strides, dilations, [0] * rank, [0] * rank)
    # -(-a // b) is a / b rounded up, on symbolic sizes too.
    totals = [
        max((-(-size // stride) - 1) * stride + dilation * (length - 1) + 1 - size, 0)
        for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    return Window(kernel, strides, dilations, *split_padding(totals, auto_pad))


def split_padding(totals: Sequence[int], auto_pad: str) -> tuple[list[int], list[int]]:
    """Total padding of each axis as padding before and behind; SAME_UPPER puts the odd element behind.

    Example:
        >>> split_padding([3], "SAME_UPPER"), split_padding([3], "SAME_LOWER")
        (([1], [2]), ([2], [1]))
    """
    smaller, larger = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (smaller, larger) if auto_pad == "SAME_UPPER" else (larger, smaller)


def pad(data: torch.Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> torch.Tensor:
    """Data with its last axes padded by `value`, an entry of `begin` and `end` an axis; negative entries crop."""
    amounts = [amount for pair in zip(reversed(begin), reversed(end), strict=True) for amount in pair]
    return functional.pad(data, amounts, value=value)


def pooled_sizes(sizes: Sequence[int], described: Window, ceil_mode: int) -> list[int]:
    """Number of windows on each spatial axis; with `ceil_mode` the last one may hang over, but starts before `end`."""
    result: list[int] = []
    for size, extent, stride, begin, end in zip(
        sizes, described.extent, described.strides, described.begin, described.end, strict=True
    ):
        room = size + begin + end - extent
        count = (-(-room // stride) if ceil_mode else room // stride) + 1
        if ceil_mode and (count - 1) * stride >= size + begin:
            count -= 1
        result.append(count)
    return result


def overhang(sizes: Sequence[int], described: Window, ceil_mode: int) -> list[int]:
    """Elements from the end of the data to the end of the last window: the padding that fills it, negative to crop."""
    return [
        (count - 1) * stride + extent - size - begin
        for count, stride, extent, size, begin in zip(
            pooled_sizes(sizes, described, ceil_mode),
            described.strides,
            described.extent,
            sizes,
            described.begin,
            strict=True,
        )
    ]


def windows(data: torch.Tensor, described: Window) -> torch.Tensor:
    """Every window of padded data as a view: [N, C, counts..., kernel...]."""
    for axis, (extent, stride, dilation) in enumerate(
        zip(described.extent, described.strides, described.dilations, strict=True), start=2
    ):
        data = data.unfold(axis, extent, stride)[..., ::dilation]
    return data
