"""Torch functions of arithmetic, comparison, logic and bits. Operands broadcast as in torch."""

from __future__ import annotations

import functools
from typing import Any

import torch

from graphopt.ir.ops.torch import unsigned

abs_ = torch.abs
neg = torch.neg
sign = torch.sign
ceil = torch.ceil
floor = torch.floor
round_ = torch.round
sqrt = torch.sqrt
reciprocal = torch.reciprocal
exp = torch.exp
log = torch.log
sin = torch.sin
cos = torch.cos
tan = torch.tan
asin = torch.asin
acos = torch.acos
atan = torch.atan
sinh = torch.sinh
cosh = torch.cosh
asinh = torch.asinh
acosh = torch.acosh
atanh = torch.atanh
not_ = torch.logical_not
equal = torch.eq
add = unsigned.wrapping(torch.add)
sub = unsigned.wrapping(torch.sub)
mul = unsigned.wrapping(torch.mul)
bitwise_and = unsigned.wrapping(torch.bitwise_and)
bitwise_or = unsigned.wrapping(torch.bitwise_or)
bitwise_xor = unsigned.wrapping(torch.bitwise_xor)
bitwise_not = unsigned.wrapping(torch.bitwise_not)
greater = unsigned.comparing(torch.gt)
greater_or_equal = unsigned.comparing(torch.ge)
less = unsigned.comparing(torch.lt)
less_or_equal = unsigned.comparing(torch.le)
where = torch.where
and_ = torch.logical_and
or_ = torch.logical_or
xor = torch.logical_xor


def identity(value: Any) -> Any:
    """Identity 16+: a tensor, sequence or optional as it is."""
    return value


def is_na_n(x: torch.Tensor) -> torch.Tensor:
    """IsNaN 13+."""
    return torch.isnan(x)


def is_inf(x: torch.Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> torch.Tensor:
    """IsInf 10+."""
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if detect_positive:
        return torch.isinf(x) & (x.float() > 0)
    if detect_negative:
        return torch.isinf(x) & (x.float() < 0)
    return torch.zeros_like(x, dtype=torch.bool)


def div(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Div 14: integers are rounded towards zero."""
    if a.is_floating_point():
        return torch.div(a, b)
    if a.dtype in unsigned.SIGNED:
        return unsigned.quotient(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def mod(a: torch.Tensor, b: torch.Tensor, *, fmod: int = 0) -> torch.Tensor:
    """Mod 13+: the result has the sign of the divisor, or with `fmod` that of the dividend."""
    if a.dtype in unsigned.SIGNED:
        return unsigned.remainder(a, b)
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def pow_(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pow 15: the result has the type of the base."""
    base, exponent = (operand.long() if operand.dtype in unsigned.SIGNED else operand for operand in (x, y))
    if exponent.is_floating_point() and not base.is_floating_point():
        base = base.double()  # torch would compute in the type of the exponent, which may be float16
    return torch.pow(base, exponent).to(x.dtype)


def sum_(*values: torch.Tensor) -> torch.Tensor:
    """Sum 13 of any number of tensors."""
    return functools.reduce(torch.add, values)


def mean(*values: torch.Tensor) -> torch.Tensor:
    """Mean 13 of any number of tensors."""
    return sum_(*values) / len(values)


def max_(*values: torch.Tensor) -> torch.Tensor:
    """Max 13 of any number of tensors."""
    return unsigned.unordered(functools.reduce(torch.maximum, map(unsigned.ordered, values)), values[0].dtype)


def min_(*values: torch.Tensor) -> torch.Tensor:
    """Min 13 of any number of tensors."""
    return unsigned.unordered(functools.reduce(torch.minimum, map(unsigned.ordered, values)), values[0].dtype)


def clip(x: torch.Tensor, minimum: torch.Tensor | None = None, maximum: torch.Tensor | None = None) -> torch.Tensor:
    """Clip 13: `maximum` wins where the bounds cross."""
    if minimum is None and maximum is None:
        return x
    if x.dtype in unsigned.SIGNED:
        low, high = (None if bound is None else unsigned.ordered(bound) for bound in (minimum, maximum))
        return unsigned.unordered(torch.clamp(unsigned.ordered(x), low, high), x.dtype)
    return torch.clamp(x, minimum, maximum)


def bit_shift(x: torch.Tensor, y: torch.Tensor, *, direction: str) -> torch.Tensor:
    """BitShift 11+: torch, as ONNX, has nothing but sign bits left where y is negative or not below the width."""
    if direction == "LEFT":
        shift_left = torch.bitwise_left_shift
        return unsigned.modular(shift_left, x, y) if x.dtype in unsigned.SIGNED else shift_left(x, y)
    return unsigned.shift_right(x, y) if x.dtype in unsigned.SIGNED else torch.bitwise_right_shift(x, y)


def bias_add(x: torch.Tensor, bias: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """BiasAdd of com.microsoft: x, a bias for the last axis, and the residual."""
    return x + bias + skip
