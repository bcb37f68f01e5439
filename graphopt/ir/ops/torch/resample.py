"""Torch functions of the other ops that sample images: GridSample, AffineGrid, Col2Im."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphopt.ir.ops.torch.operands import Numbers, numbers

_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}
"""Modes of GridSample 20 in the words of torch, which are also those of GridSample 16."""


def grid_sample(
    data: torch.Tensor,
    grid: torch.Tensor,
    *,
    mode: str = "linear",
    padding_mode: str = "zeros",
    align_corners: int = 0,
) -> torch.Tensor:
    """GridSample 16 to 22: [N, C, D1, ...] sampled at the points grid [N, G1, ..., r], given from -1 to 1."""
    dtype = torch.promote_types(data.dtype, grid.dtype)
    image, points = data.to(dtype), grid.to(dtype)
    if data.dim() == 3:  # torch knows images and volumes: a line is an image of one row
        image = image.unsqueeze(2)
        points = torch.stack((points[..., 0], torch.zeros_like(points[..., 0])), -1).unsqueeze(1)
    result = torch.nn.functional.grid_sample(
        image, points, _GRID_MODES.get(mode, mode), padding_mode, align_corners=bool(align_corners)
    )
    return (result.squeeze(2) if data.dim() == 3 else result).to(data.dtype)


def affine_grid(theta: torch.Tensor, size: Numbers, *, align_corners: int = 0) -> torch.Tensor:
    """AffineGrid 20: the points theta * (x, y, 1), or (x, y, z, 1), of an image [N, C, H, W] or [N, C, D, H, W]."""
    return torch.nn.functional.affine_grid(theta, numbers(size), align_corners=bool(align_corners))


def col2_im(
    data: torch.Tensor,
    image_shape: Numbers,
    block_shape: Numbers,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """Col2Im 18: blocks [N, C * elements of a block, blocks] added up in an image [N, C, ...] where they overlap."""
    image, block = numbers(image_shape), numbers(block_shape)
    rank = len(image)
    borders = list(pads or [0] * 2 * rank)
    before, after = borders[:rank], borders[rank:]
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    if rank == 2 and before == after:
        sizes = (tuple(size) for size in (image, block, spread, before, steps))
        return torch.nn.functional.fold(data, *sizes)
    padded = [size + low + high for size, low, high in zip(image, before, after, strict=True)]
    position = torch.zeros(1, 1, dtype=torch.int64, device=data.device)  # [elements of a block, blocks] in the end
    for size, extent, gap, step in zip(padded, block, spread, steps, strict=True):
        blocks = (size - gap * (extent - 1) - 1) // step + 1
        inside = torch.arange(extent, device=data.device).unsqueeze(1) * gap
        places = inside + torch.arange(blocks, device=data.device) * step
        position = (position[:, None, :, None] * size + places[None, :, None, :]).flatten(2).flatten(0, 1)
    columns = data.reshape(data.shape[0], data.shape[1] // math.prod(block), -1)
    flat = data.new_zeros(*columns.shape[:2], math.prod(padded)).index_add(2, position.reshape(-1), columns)
    inner = tuple(slice(low, low + size) for size, low in zip(image, before, strict=True))
    return flat.reshape(*columns.shape[:2], *padded)[(slice(None), slice(None), *inner)]
