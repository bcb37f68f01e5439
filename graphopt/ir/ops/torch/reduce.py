"""Torch functions of the ops that reduce, scan or rank along axes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphopt.ir.ops.torch import unsigned
from graphopt.ir.ops.torch.operands import Numbers, number, numbers

_Reduction = Callable[[torch.Tensor, list[int], bool], torch.Tensor]
"""Takes a tensor, at least one axis, and whether to keep the axes."""


def reduce_sum(
    data: torch.Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    """ReduceSum 13."""
    return _reduce(_sum, data, axes, keepdims, noop_with_empty_axes)


def reduce_mean(
    data: torch.Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    """ReduceMean 18: of integers rounded towards zero."""
    return _reduce(_mean, data, axes, keepdims, noop_with_empty_axes)


def reduce_max(
    data: torch.Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    """ReduceMax 18+."""
    return _reduce(_max, data, axes, keepdims, noop_with_empty_axes)


def reduce_min(
    data: torch.Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    """ReduceMin 18+."""
    return _reduce(_min, data, axes, keepdims, noop_with_empty_axes)


def reduce_prod(
    data: torch.Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    """ReduceProd 18."""
    return _reduce(_prod, data, axes, keepdims, noop_with_empty_axes)


def reduce_l1(
    data: torch.Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    """ReduceL1 18: sum of magnitudes."""
    return _reduce(_l1, data, axes, keepdims, noop_with_empty_axes)


def reduce_l2(
    data: torch.Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    """ReduceL2 18: root of the sum of squares, with gradient 0 where all elements are 0."""
    return _reduce(_l2, data, axes, keepdims, noop_with_empty_axes)


def reduce_sum_square(
    data: torch.Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    """ReduceSumSquare 18."""
    return _reduce(_sum_square, data, axes, keepdims, noop_with_empty_axes)


def reduce_log_sum(
    data: torch.Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    """ReduceLogSum 18+."""
    return _reduce(_log_sum, data, axes, keepdims, noop_with_empty_axes)


def reduce_log_sum_exp(
    data: torch.Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> torch.Tensor:
    """ReduceLogSumExp 18+."""
    return _reduce(_log_sum_exp, data, axes, keepdims, noop_with_empty_axes)


def arg_max(data: torch.Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> torch.Tensor:
    """ArgMax 13: the first of equal ones, or the last. int64."""
    return _arg(torch.argmax, data, axis, bool(keepdims), bool(select_last_index))


def arg_min(data: torch.Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> torch.Tensor:
    """ArgMin 13: the first of equal ones, or the last. int64."""
    return _arg(torch.argmin, data, axis, bool(keepdims), bool(select_last_index))


def top_k(
    x: torch.Tensor,
    k: Numbers,
    *,
    axis: int = -1,
    largest: int = 1,
    sorted: int = 1,  # noqa: A002
) -> tuple[torch.Tensor, torch.Tensor]:
    """TopK 11+: values and int64 indices; of equal ones the lower index first, which `torch.topk` does not promise."""
    values, indices = torch.sort(unsigned.ordered(x), dim=axis, descending=bool(largest), stable=True)
    count = number(k)
    return unsigned.unordered(values.narrow(axis, 0, count), x.dtype), indices.narrow(axis, 0, count)


def cum_sum(x: torch.Tensor, axis: Numbers, *, exclusive: int = 0, reverse: int = 0) -> torch.Tensor:
    """CumSum 14."""
    return _scan(torch.cumsum, 0, x, number(axis), bool(exclusive), bool(reverse))


def cum_prod(x: torch.Tensor, axis: Numbers, *, exclusive: int = 0, reverse: int = 0) -> torch.Tensor:
    """CumProd 26."""
    return _scan(torch.cumprod, 1, x, number(axis), bool(exclusive), bool(reverse))


def det(x: torch.Tensor) -> torch.Tensor:
    """Det 11+ of the last two axes."""
    computed = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # torch has no elimination in these
    return torch.linalg.det(computed).to(x.dtype)


def _reduce(
    reduction: _Reduction, data: torch.Tensor, axes: Numbers | None, keepdims: int, noop_with_empty_axes: int
) -> torch.Tensor:
    """Apply a reduction to the axes, to all of them where none are given, or with `noop_with_empty_axes` to none."""
    dims = [] if axes is None else numbers(axes)
    if not dims and not noop_with_empty_axes:
        dims = list(range(data.ndim))
    if not dims:  # no axis to reduce: an axis of size 1, so that squares and logarithms are still taken
        return reduction(data.unsqueeze(-1), [-1], False)
    return reduction(data, dims, bool(keepdims))


def _sum(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    if x.dtype in unsigned.SIGNED:
        return _sum(x.view(unsigned.SIGNED[x.dtype]), dims, keepdim).view(x.dtype)
    return torch.sum(x, dims, keepdim=keepdim, dtype=x.dtype)


def _mean(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    if x.is_floating_point():
        return torch.mean(x, dims, keepdim=keepdim)
    total = torch.sum(x.long(), dims, keepdim=keepdim)
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    return torch.div(total, count, rounding_mode="trunc").to(x.dtype)


def _max(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    comparable = unsigned.ordered(x)
    if comparable.numel() == 0:
        return unsigned.unordered(_filled(comparable, dims, keepdim, lowest=True), x.dtype)
    return unsigned.unordered(torch.amax(comparable, dims, keepdim=keepdim), x.dtype)


def _min(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    comparable = unsigned.ordered(x)
    if comparable.numel() == 0:
        return unsigned.unordered(_filled(comparable, dims, keepdim, lowest=False), x.dtype)
    return unsigned.unordered(torch.amin(comparable, dims, keepdim=keepdim), x.dtype)


def _filled(x: torch.Tensor, dims: list[int], keepdim: bool, lowest: bool) -> torch.Tensor:
    """The extremum of nothing: what every element is not below (or not above)."""
    if x.dtype == torch.bool:
        value = not lowest
    elif x.is_floating_point():
        value = -torch.inf if lowest else torch.inf
    else:
        limits = torch.iinfo(x.dtype)
        value = limits.min if lowest else limits.max
    return torch.full_like(torch.sum(x, dims, keepdim=keepdim), value, dtype=x.dtype)


def _prod(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    if x.dtype in unsigned.SIGNED:
        return _prod(x.view(unsigned.SIGNED[x.dtype]), dims, keepdim).view(x.dtype)
    dtype = x.dtype
    for dim in dims:  # torch takes one axis at a time
        x = torch.prod(x, dim, keepdim=True, dtype=dtype)
    return x if keepdim else x.squeeze(dims)


def _l1(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    return _sum(x if x.dtype in unsigned.SIGNED else torch.abs(x), dims, keepdim)


def _l2(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    return torch.linalg.vector_norm(_floats(x), 2, dims, keepdim=keepdim).to(x.dtype)


def _sum_square(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    return _sum(torch.mul(x, x), dims, keepdim)


def _log_sum(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    return torch.log(torch.sum(_floats(x), dims, keepdim=keepdim)).to(x.dtype)


def _log_sum_exp(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    return torch.logsumexp(_floats(x), dims, keepdim=keepdim).to(x.dtype)


def _floats(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or in float64 where it has integers: roots and logarithms are rounded to integers at the end."""
    return x if x.is_floating_point() else x.double()


def _arg(
    search: Callable[..., torch.Tensor], data: torch.Tensor, axis: int, keepdim: bool, select_last: bool
) -> torch.Tensor:
    comparable = unsigned.ordered(data)
    if select_last:
        return data.shape[axis] - 1 - search(comparable.flip(axis), axis, keepdim)
    return search(comparable, axis, keepdim)


def _scan(
    scan: Callable[..., torch.Tensor], neutral: int, x: torch.Tensor, dim: int, exclusive: bool, reverse: bool
) -> torch.Tensor:
    if x.dtype in unsigned.SIGNED:
        signed = x.view(unsigned.SIGNED[x.dtype])
        return _scan(scan, neutral, signed, dim, exclusive, reverse).view(x.dtype)
    ahead = x.flip(dim) if reverse else x
    if exclusive:  # moved by one, so that no element has to be taken out of the result again
        first = torch.full_like(ahead.narrow(dim, 0, 1), neutral)
        ahead = torch.cat((first, ahead.narrow(dim, 0, x.shape[dim] - 1)), dim)
    result = scan(ahead, dim, dtype=x.dtype)
    return result.flip(dim) if reverse else result
