"""Deformable convolution: a convolution whose samples are moved by offsets from the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from graphopt.errors import GraphoptError


def deform_conv(
    x: torch.Tensor,
    w: torch.Tensor,
    offset: torch.Tensor,
    b: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """DeformConv 19+: [N, C, spatial...] by filters [M, C / group, kernel...], 2 or 3 spatial axes."""
    rank, counts = w.ndim - 2, offset.shape[2:]
    if rank not in (2, 3):
        raise GraphoptError(f"no deformable convolution over {rank} spatial axes", help="2 and 3 axes can be lifted")
    strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * (2 * rank)
    taps = w.shape[2:].numel()
    # Half precision is too coarse for positions in an image.
    precise = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    moved = offset.to(precise).reshape(x.shape[0] * offset_group, taps, rank, *counts)
    axes: list[torch.Tensor] = []
    for axis in reversed(range(rank)):  # grid_sample wants x before y
        positions = moved[:, :, axis] + _regular(axis, w, counts, strides, dilations, pads, moved)
        # Counted as grid_sample does without aligned corners: -1 and 1 are the outer borders of the elements.
        axes.append((2 * positions + 1) / x.shape[axis + 2] - 1)
    grid = torch.stack(axes, -1).flatten(1, 2)
    images = x.to(precise).reshape(x.shape[0] * offset_group, -1, *x.shape[2:])
    sampled = functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    sampled = sampled.reshape(x.shape[0], offset_group, -1, taps, counts.numel())
    if mask is not None:
        sampled = sampled * mask.reshape(x.shape[0], offset_group, 1, taps, counts.numel())
    columns = sampled.to(x.dtype).reshape(x.shape[0], group, -1, counts.numel())
    result = torch.matmul(w.reshape(group, w.shape[0] // group, -1), columns)
    result = result.reshape(x.shape[0], w.shape[0], *counts)
    return result if b is None else result + b.reshape(-1, *[1] * rank)


def _regular(
    axis: int,
    w: torch.Tensor,
    counts: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    like: torch.Tensor,
) -> torch.Tensor:
    """Positions on one axis before they are moved: [taps, counts...]."""
    rank = len(counts)
    starts = torch.arange(counts[axis], dtype=like.dtype, device=like.device) * strides[axis] - pads[axis]
    steps = torch.arange(w.shape[axis + 2], dtype=like.dtype, device=like.device) * dilations[axis]
    steps = steps.reshape([-1 if index == axis else 1 for index in range(rank)]).expand(w.shape[2:])
    along = starts.reshape([-1 if index == axis else 1 for index in range(rank)])
    return steps.reshape(-1, *[1] * rank) + along
