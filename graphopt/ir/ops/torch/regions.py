"""Pooling of regions of interest: RoiAlign and MaxRoiPool."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphopt.ir.ops.torch.operands import number


def roi_align(
    x: torch.Tensor,
    rois: torch.Tensor,
    batch_indices: torch.Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> torch.Tensor:
    """RoiAlign 16+: [N, C, H, W] and regions [R, 4] to [R, C, output_height, output_width].

    Without a `sampling_ratio` the number of samples depends on the size of each region: the host waits for the largest.
    """
    half_pixel = coordinate_transformation_mode == "half_pixel"
    # Half precision is too coarse for positions in an image.
    precise = torch.float32 if rois.dtype in (torch.float16, torch.bfloat16) else rois.dtype
    corners = rois.to(precise) * spatial_scale - (0.5 if half_pixel else 0.0)
    begin, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    extent = extent if half_pixel else extent.clamp(min=1.0)
    columns, column_weights, has_column = _samples(begin[:, 0], extent[:, 0], output_width, sampling_ratio, x.shape[3])
    rows, row_weights, has_row = _samples(begin[:, 1], extent[:, 1], output_height, sampling_ratio, x.shape[2])
    # [regions, output rows, samples, neighbours, output columns, samples, neighbours, C]
    images = batch_indices.reshape(-1, 1, 1, 1, 1, 1, 1)
    corner_values = x.movedim(1, -1)[images, rows[..., None, None, None], columns[:, None, None, None]]
    weights = row_weights[..., None, None, None] * column_weights[:, None, None, None]
    weighted = corner_values * weights.unsqueeze(-1)
    counted = has_row[:, None, :, None, None, None, None, None] & has_column[:, None, None, None, None, :, None, None]
    samples = (has_row.sum(1) * has_column.sum(1)).reshape(-1, 1, 1, 1)
    if mode == "max":
        found = torch.where(counted, weighted, -math.inf).amax((2, 3, 5, 6))
        found = torch.where(samples > 0, found, 0)
    else:
        found = torch.where(counted, weighted, 0).sum((2, 3, 5, 6)) / samples.clamp(min=1)
    return found.movedim(-1, 1).to(x.dtype)


def max_roi_pool(
    x: torch.Tensor, rois: torch.Tensor, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0
) -> torch.Tensor:
    """MaxRoiPool 1+: [N, C, H, W] and regions [R, 5] (image, corners) to [R, C, pooled_shape]; 0 for empty bins."""
    corners = rois[:, 1:] * spatial_scale
    corners = (corners.sign() * (corners.abs() + 0.5).floor()).to(torch.int64)  # halves are rounded away from 0
    rows = _bins(corners[:, 1], corners[:, 3], pooled_shape[0], x.shape[2])
    columns = _bins(corners[:, 0], corners[:, 2], pooled_shape[1], x.shape[3])
    images = x[rois[:, 0].to(torch.int64)]
    # Bin by bin, so that memory holds no more than the images of all regions at once.
    by_column = torch.stack(
        [torch.where(columns[:, None, None, index], images, -math.inf).amax(-1) for index in range(pooled_shape[1])], -1
    )
    found = torch.stack(
        [torch.where(rows[:, None, index, :, None], by_column, -math.inf).amax(-2) for index in range(pooled_shape[0])],
        -2,
    )
    filled = rows.any(-1)[:, None, :, None] & columns.any(-1)[:, None, None, :]
    return torch.where(filled, found, 0)


def _samples(
    begin: torch.Tensor, extent: torch.Tensor, bins: int, sampling_ratio: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where an axis is sampled for regions that begin at `begin`.

    Returns:
        Indices of the two neighbours of each sample and their weights, [regions, bins, samples, 2]; and which samples
        a region has, [regions, samples].
    """
    width = extent / bins
    if sampling_ratio > 0:
        most, counts = sampling_ratio, torch.full_like(width, sampling_ratio)
    else:
        counts = width.detach().ceil()
        most = number(counts.max().clamp(min=1).to(torch.int64)) if counts.numel() else 1
    steps = torch.arange(most, dtype=width.dtype, device=width.device)
    shares = (steps + 0.5) / counts.clamp(min=1).unsqueeze(-1)
    positions = torch.arange(bins, dtype=width.dtype, device=width.device).unsqueeze(-1) + shares.unsqueeze(1)
    samples = begin.reshape(-1, 1, 1) + positions * width.reshape(-1, 1, 1)
    inside = (samples >= -1) & (samples <= size)
    samples = samples.clamp(0, size - 1)
    lower = samples.detach().floor()
    upper_weight = samples - lower
    low = lower.to(torch.int64)
    indices = torch.stack((low, (low + 1).clamp(max=size - 1)), -1)
    weights = torch.stack((1 - upper_weight, upper_weight), -1)
    return indices, torch.where(inside.unsqueeze(-1), weights, 0), steps < counts.unsqueeze(-1)


def _bins(first: torch.Tensor, last: torch.Tensor, bins: int, size: int) -> torch.Tensor:
    """Which positions of an axis each bin of each region covers: [regions, bins, size]."""
    length = (last - first + 1).clamp(min=1).unsqueeze(-1)
    index = torch.arange(bins, device=first.device)
    # Whole numbers throughout: the borders index * length / bins, rounded down and up.
    start = (index * length).div(bins, rounding_mode="floor") + first.unsqueeze(-1)
    stop = -(-(index + 1) * length).div(bins, rounding_mode="floor") + first.unsqueeze(-1)
    position = torch.arange(size, device=first.device)
    return (position >= start.unsqueeze(-1)) & (position < stop.unsqueeze(-1))
