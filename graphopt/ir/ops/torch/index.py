"""Torch functions of the ops that pick elements or put them by index: Gather, Scatter, OneHot, Unique and their kin.

Negative indices count from the end; they are wrapped by arithmetic, so that the host never waits for an index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphopt.ir.ops.torch.operands import Numbers, number

_REDUCTIONS = {"mul": "prod", "min": "amin", "max": "amax"}
"""Reductions of the scatter ops in the words of torch."""


def _wrapped(indices: torch.Tensor, size: int) -> torch.Tensor:
    """Indices with the negative ones counted from the end of an axis of `size`, int64."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def _linear(indices: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Index tuples [..., k] into axes of the given k sizes as positions [...] in those axes flattened."""
    position = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for component, size in zip(indices.unbind(-1), sizes, strict=True):
        position = position * size + _wrapped(component, size)
    return position


def gather(data: torch.Tensor, indices: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
    """Gather 13: positions `indices` of `axis`, whose place the axes of the indices take."""
    axis %= data.dim()
    wrapped = _wrapped(indices, data.shape[axis])
    if data.dim() == 2 and axis == 0 and data.is_floating_point():
        return torch.nn.functional.embedding(wrapped, data)
    picked = data.index_select(axis, wrapped.reshape(-1))
    return picked.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])


def gather_elements(data: torch.Tensor, indices: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
    """GatherElements 13: like `torch.gather`, with negative indices."""
    return torch.gather(data, axis, _wrapped(indices, data.shape[axis]))


def gather_nd(data: torch.Tensor, indices: torch.Tensor, *, batch_dims: int = 0) -> torch.Tensor:
    """GatherND 13: each tuple indices[..., :] picks one slice of the data, within its batch element."""
    batch, end = data.shape[:batch_dims], batch_dims + indices.shape[-1]
    picked, kept = data.shape[batch_dims:end], data.shape[end:]
    position = _linear(indices, picked).reshape(math.prod(batch), -1)
    first = torch.arange(math.prod(batch), device=data.device).unsqueeze(1) * math.prod(picked)
    rows = data.reshape(math.prod(batch) * math.prod(picked), *kept)
    return rows.index_select(0, (first + position).reshape(-1)).reshape(indices.shape[:-1] + kept)


def scatter_elements(
    data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, *, axis: int = 0, reduction: str = "none"
) -> torch.Tensor:
    """ScatterElements 11 to 18: the data with updates[i, j, ...] at position indices[i, j, ...] of `axis`."""
    wrapped = _wrapped(indices, data.shape[axis])
    if reduction == "none":
        return torch.scatter(data, axis, wrapped, updates)
    if reduction == "add":
        return torch.scatter_add(data, axis, wrapped, updates)
    return torch.scatter_reduce(data, axis, wrapped, updates, _REDUCTIONS[reduction])


def scatter(data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
    """Scatter 9, the older name of ScatterElements."""
    return scatter_elements(data, indices, updates, axis=axis)


def scatter_nd(
    data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, *, reduction: str = "none"
) -> torch.Tensor:
    """ScatterND 11 to 18: the data with the slice updates[...] at the place that the tuple indices[..., :] says."""
    depth = indices.shape[-1]
    position = _linear(indices, data.shape[:depth]).reshape(-1)
    rows = data.reshape(math.prod(data.shape[:depth]), math.prod(data.shape[depth:]))
    slices = updates.reshape(position.shape[0], rows.shape[1])
    if reduction == "none":
        result = rows.index_copy(0, position, slices)
    elif reduction == "add":
        result = rows.index_add(0, position, slices)
    else:
        places = position.unsqueeze(1).expand_as(slices)
        result = torch.scatter_reduce(rows, 0, places, slices, _REDUCTIONS[reduction])
    return result.reshape(data.shape)


def tensor_scatter(
    past_cache: torch.Tensor,
    update: torch.Tensor,
    write_indices: Numbers | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> torch.Tensor:
    """TensorScatter 24: the cache with batch element b of the update at `write_indices[b]` of `axis`."""
    axis %= update.dim()
    position = torch.arange(update.shape[axis], device=update.device)
    if write_indices is not None:
        position = position + torch.as_tensor(write_indices, device=update.device).reshape(-1, 1)
    if mode == "circular":
        position = position % past_cache.shape[axis]
    sizes = [1] * update.dim()
    sizes[0], sizes[axis] = -1, update.shape[axis]
    return torch.scatter(past_cache, axis, position.reshape(sizes).expand_as(update), update)


def one_hot(indices: torch.Tensor, depth: Numbers, values: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    """OneHot 11: values[1] where a new axis of size `depth` has the index, values[0] elsewhere."""
    length = number(depth)
    length = int(length) if isinstance(length, float) else length
    axis %= indices.dim() + 1
    positions = torch.arange(length, device=indices.device)
    positions = positions.reshape([-1] + [1] * (indices.dim() - axis))
    hit = _wrapped(indices, length).unsqueeze(axis) == positions
    return torch.where(hit, values[1], values[0])


def compress(data: torch.Tensor, condition: torch.Tensor, *, axis: int | None = None) -> torch.Tensor:
    """Compress 11: the positions of `axis` (of the flat data without it) whose condition is true."""
    kept = condition.nonzero().reshape(-1)
    return data.reshape(-1).index_select(0, kept) if axis is None else data.index_select(axis, kept)


def non_zero(data: torch.Tensor) -> torch.Tensor:
    """NonZero 13: [rank, n], the indices of the elements that are not zero, in row-major order."""
    return data.nonzero().t()


def unique(
    data: torch.Tensor,
    *,
    axis: int | None = None,
    sorted: int = 1,  # noqa: A002  (the name of the attribute)
    outputs: int = 1,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Unique 11: the distinct slices, where each stands first, which one each slice is, and how often it occurs."""
    items, along = (data.reshape(-1), 0) if axis is None else (data, axis)
    _, inverse, counts = torch.unique(items, return_inverse=True, return_counts=True, dim=along)
    positions = torch.arange(items.shape[along], device=data.device)
    first = torch.full_like(counts, items.shape[along]).scatter_reduce(0, inverse, positions, "amin")
    if not sorted:  # in the order of first occurrence
        order = first.argsort()
        first, counts = first[order], counts[order]
        inverse = order.argsort()[inverse]
    result = (items.index_select(along, first), first, inverse, counts)
    return result[0] if outputs == 1 else result[:outputs]
