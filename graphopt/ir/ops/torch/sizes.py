"""Shape arithmetic on the host: the ops between `Shape` and the operands that say sizes, without tensors.

A value here is what `Shape` and `Size` lead to: a scalar is an int or bool, a vector a flat list of them; elements may
be `torch.SymInt` and `torch.SymBool`, so that a compiled or exported module keeps its sizes symbolic. Tensors in their
place would make the device wait for the host at every reshape, and break the graph under `torch.compile`.

A function has the signature of the torch function of the same op (`row.TorchRule`), with host values for tensors.
Sizes are exact integers: nothing wraps around at 32 or 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from graphopt.ir.ops.torch.dtypes import ElementType, torch_dtype

Scalar = int | bool | torch.SymInt | torch.SymBool
HostValue = Scalar | list[Any]
"""A scalar, or a vector as a flat list of scalars."""


def to_tensor(
    value: HostValue, element_type: ElementType, like: torch.Tensor | torch.device | None = None
) -> torch.Tensor:
    """A host value as a tensor of an ONNX element type: [] for a scalar, [n] for a vector; on the device of `like`."""
    device = like.device if isinstance(like, torch.Tensor) else like
    dtype = torch_dtype(element_type)
    if isinstance(value, list):
        return torch.tensor(value, dtype=dtype, device=device)
    filler: Any = value
    return torch.full((), filler, dtype=dtype, device=device)  # filled on the device, nothing is copied


def shape(data: torch.Tensor, *, start: int = 0, end: int | None = None) -> HostValue:
    """Shape 15+: the sizes of a tensor, from axis `start` up to `end`."""
    return list(data.shape[start:end])


def size(data: torch.Tensor) -> HostValue:
    """Size 13+: number of elements of a tensor."""
    return math.prod(data.shape)


def identity(value: HostValue) -> HostValue:
    """Identity 13+."""
    return value


def cast(value: HostValue, *, to: ElementType, saturate: int = 1, round_mode: str = "up") -> HostValue:
    """Cast 13+ to an integer type or bool; a size that becomes a float stays a whole number here."""
    if to == ir.DataType.BOOL:
        return _combine(lambda element: element != 0, value)
    return _combine(lambda x: (1 if x else 0) if isinstance(x, bool | torch.SymBool) else x, value)


def gather(data: list[Any], indices: HostValue, *, axis: int = 0) -> HostValue:
    """Gather 13: elements of a vector; a scalar index gives a scalar."""
    return [data[index] for index in indices] if isinstance(indices, list) else data[int(indices)]


def slice_(
    data: list[Any],
    starts: HostValue,
    ends: HostValue,
    axes: HostValue | None = None,
    steps: HostValue | None = None,
) -> HostValue:
    """Slice 13 of a vector: ends beyond it are cut off as Python does."""
    step = 1 if steps is None else _only(steps)
    return data[max(_only(starts), -len(data)) : _only(ends) : step]


def concat(*values: HostValue, axis: int = 0) -> HostValue:
    """Concat 13 of vectors."""
    return [element for value in values for element in _vector(value)]


def squeeze(data: HostValue, axes: HostValue | None = None) -> HostValue:
    """Squeeze 13+: a vector of one element as a scalar."""
    nothing = isinstance(axes, list) and not axes
    return data[0] if isinstance(data, list) and len(data) == 1 and not nothing else data


def unsqueeze(data: Scalar, axes: HostValue) -> HostValue:
    """Unsqueeze 13+: a scalar as a vector of one element."""
    return [data] if _vector(axes) else data


def reshape(data: HostValue, shape: HostValue, *, allowzero: int = 0) -> HostValue:
    """Reshape 14+ to a vector or to a scalar."""
    return _vector(data) if _vector(shape) else _only(data)


def expand(data: HostValue, shape: HostValue) -> HostValue:
    """Expand 13 to a vector."""
    sizes, elements = _vector(shape), _vector(data)
    if not sizes:
        return data
    return elements * sizes[0] if len(elements) == 1 else elements


def add(a: HostValue, b: HostValue) -> HostValue:
    """Add 14."""
    return _combine(lambda x, y: x + y, a, b)


def sub(a: HostValue, b: HostValue) -> HostValue:
    """Sub 14."""
    return _combine(lambda x, y: x - y, a, b)


def mul(a: HostValue, b: HostValue) -> HostValue:
    """Mul 14."""
    return _combine(lambda x, y: x * y, a, b)


def div(a: HostValue, b: HostValue) -> HostValue:
    """Div 14 of integers: rounds towards zero."""
    return _combine(_quotient, a, b)


def mod(a: HostValue, b: HostValue, *, fmod: int = 0) -> HostValue:
    """Mod 13: the sign of the divisor, or with `fmod` that of the dividend."""
    return _combine((lambda x, y: x - y * _quotient(x, y)) if fmod else (lambda x, y: x % y), a, b)


def neg(value: HostValue) -> HostValue:
    """Neg 13."""
    return _combine(lambda x: -x, value)


def abs_(value: HostValue) -> HostValue:
    """Abs 13."""
    return _combine(abs, value)


def min_(*values: HostValue) -> HostValue:
    """Min 13."""
    return _combine(_smallest, *values)


def max_(*values: HostValue) -> HostValue:
    """Max 13."""
    return _combine(_largest, *values)


def sum_(*values: HostValue) -> HostValue:
    """Sum 13."""
    return _combine(_total, *values)


def reduce_prod(
    data: HostValue, axes: HostValue | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> HostValue:
    """ReduceProd 18 of a vector."""
    return _reduce(math.prod, data, axes, keepdims, noop_with_empty_axes)


def reduce_sum(
    data: HostValue, axes: HostValue | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> HostValue:
    """ReduceSum 13 of a vector."""
    return _reduce(lambda elements: _total(*elements), data, axes, keepdims, noop_with_empty_axes)


def reduce_min(
    data: HostValue, axes: HostValue | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> HostValue:
    """ReduceMin 18+ of a vector."""
    return _reduce(lambda elements: _smallest(*elements), data, axes, keepdims, noop_with_empty_axes)


def reduce_max(
    data: HostValue, axes: HostValue | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> HostValue:
    """ReduceMax 18+ of a vector."""
    return _reduce(lambda elements: _largest(*elements), data, axes, keepdims, noop_with_empty_axes)


def equal(a: HostValue, b: HostValue) -> HostValue:
    """Equal 13+."""
    return _combine(lambda x, y: x == y, a, b)


def greater(a: HostValue, b: HostValue) -> HostValue:
    """Greater 13."""
    return _combine(lambda x, y: x > y, a, b)


def less(a: HostValue, b: HostValue) -> HostValue:
    """Less 13."""
    return _combine(lambda x, y: x < y, a, b)


def greater_or_equal(a: HostValue, b: HostValue) -> HostValue:
    """GreaterOrEqual 16."""
    return _combine(lambda x, y: x >= y, a, b)


def less_or_equal(a: HostValue, b: HostValue) -> HostValue:
    """LessOrEqual 16."""
    return _combine(lambda x, y: x <= y, a, b)


def not_(value: HostValue) -> HostValue:
    """Not 1."""
    return _combine(lambda x: not x, value)


def and_(a: HostValue, b: HostValue) -> HostValue:
    """And 7."""
    return _combine(lambda x, y: x and y, a, b)


def or_(a: HostValue, b: HostValue) -> HostValue:
    """Or 7."""
    return _combine(lambda x, y: x or y, a, b)


def where(condition: HostValue, x: HostValue, y: HostValue) -> HostValue:
    """Where 16."""
    return _combine(lambda chosen, first, second: first if chosen else second, condition, x, y)


def range_(start: Scalar, limit: Scalar, delta: Scalar) -> HostValue:
    """Range 11. Fixes symbolic sizes: a Range that data is computed with (positions) is better made as a tensor."""
    return list(range(int(start), int(limit), int(delta)))


def constant_of_shape(shape: HostValue, *, value: Sequence[Any] = (0,)) -> HostValue:
    """ConstantOfShape 9+ of rank 0 or 1. Fixes symbolic sizes, as `range_` does."""
    sizes = _vector(shape)
    return [value[0]] * sizes[0] if sizes else value[0]


def scatter_elements(
    data: list[Any], indices: HostValue, updates: HostValue, *, axis: int = 0, reduction: str = "none"
) -> HostValue:
    """ScatterElements 18 into a vector."""
    result = list(data)
    for index, update in zip(_vector(indices), _vector(updates), strict=True):
        result[index] = _REDUCTIONS[reduction](result[index], update)
    return result


def scatter_nd(data: list[Any], indices: HostValue, updates: HostValue, *, reduction: str = "none") -> HostValue:
    """ScatterND 18 into a vector: indices of shape [n, 1], flat."""
    return scatter_elements(data, indices, updates, reduction=reduction)


HOST: dict[str, Callable[..., HostValue]] = {
    "Shape": shape,
    "Size": size,
    "Identity": identity,
    "Cast": cast,
    "Gather": gather,
    "Slice": slice_,
    "Concat": concat,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Reshape": reshape,
    "Expand": expand,
    "Add": add,
    "Sub": sub,
    "Mul": mul,
    "Div": div,
    "Mod": mod,
    "Neg": neg,
    "Abs": abs_,
    "Min": min_,
    "Max": max_,
    "Sum": sum_,
    "ReduceProd": reduce_prod,
    "ReduceSum": reduce_sum,
    "ReduceMin": reduce_min,
    "ReduceMax": reduce_max,
    "Equal": equal,
    "Greater": greater,
    "Less": less,
    "GreaterOrEqual": greater_or_equal,
    "LessOrEqual": less_or_equal,
    "Not": not_,
    "And": and_,
    "Or": or_,
    "Where": where,
    "Range": range_,
    "ConstantOfShape": constant_of_shape,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
}
"""The host function of each operator that occurs in shape arithmetic."""


def _vector(value: HostValue) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _only(value: HostValue) -> Any:
    return value[0] if isinstance(value, list) else value


def _combine(function: Callable[..., Any], *operands: HostValue) -> HostValue:
    """Apply a function element by element, under the broadcasting of scalars and vectors."""
    lengths = [len(operand) for operand in operands if isinstance(operand, list)]
    if not lengths:
        return function(*operands)
    length = next((length for length in lengths if length != 1), 1)
    columns = [vector * length if len(vector) == 1 else vector for vector in map(_vector, operands)]
    return [function(*elements) for elements in zip(*columns, strict=True)]


def _reduce(
    function: Callable[[list[Any]], Any], data: HostValue, axes: HostValue | None, keepdims: int, noop: int
) -> HostValue:
    if noop and (axes is None or (isinstance(axes, list) and not axes)):
        return data
    result = function(_vector(data))
    return [result] if keepdims and isinstance(data, list) else result


def _quotient(a: Any, b: Any) -> Any:
    """Integer division towards zero. Sizes are known to be positive, so that this asks nothing of symbolic ones."""
    return -(-a // b) if (a < 0) != (b < 0) else a // b


def _total(*elements: Any) -> Any:
    return sum(elements)


def _smallest(*elements: Any) -> Any:
    result = elements[0]
    for element in elements[1:]:
        result = torch.sym_min(result, element)
    return result


def _largest(*elements: Any) -> Any:
    result = elements[0]
    for element in elements[1:]:
        result = torch.sym_max(result, element)
    return result


_REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda old, new: new,
    "add": lambda old, new: old + new,
    "mul": lambda old, new: old * new,
    "min": _smallest,
    "max": _largest,
}
