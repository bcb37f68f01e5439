"""Integers of 16, 32 and 64 bits without sign: torch stores them, but has hardly any arithmetic for them.

The same bits as a signed integer have the same sums, differences and products; with the highest bit flipped as well
they have the same order. The functions here go by these two ways, so that they are exact up to 2**64 - 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""The signed dtype of the same width, by unsigned dtype."""

PLAIN = "plain"
"""Attribute of a function that differs from one of torch on wide unsigned integers only: that function of torch."""

_LARGEST = torch.iinfo(torch.int64).max


Function = Callable[..., torch.Tensor]


def wrapping(plain: Function) -> Function:
    """A function of torch that is right modulo 2**bits (sums, products, bits), for wide unsigned tensors too."""

    def function(*operands: torch.Tensor) -> torch.Tensor:
        return modular(plain, *operands) if operands[0].dtype in SIGNED else plain(*operands)

    return _extending(plain, function)


def comparing(plain: Function) -> Function:
    """A function of torch that depends on the order of its operands only, for wide unsigned tensors too."""

    def function(*operands: torch.Tensor) -> torch.Tensor:
        return plain(*map(ordered, operands))

    return _extending(plain, function)


def _extending(
    plain: Callable[..., torch.Tensor], function: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Named like what it extends, for the generated code, and remembering it: the lift calls that for other types."""
    function.__name__ = function.__qualname__ = f"wide_{plain.__name__}"
    setattr(function, PLAIN, plain)
    return function


def modular(function: Callable[..., torch.Tensor], *operands: torch.Tensor) -> torch.Tensor:
    """A function that is right modulo 2**bits (sums, products, bit operations), of wide unsigned tensors."""
    dtype = operands[0].dtype
    return function(*(operand.view(SIGNED[dtype]) for operand in operands)).view(dtype)


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Signed integers in the order of the elements of `x`; `x` itself where torch can compare its dtype."""
    if x.dtype not in SIGNED:
        return x
    signed = x.view(SIGNED[x.dtype])
    return torch.bitwise_xor(signed, torch.iinfo(signed.dtype).min)


def unordered(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The elements that `ordered` mapped to `x`, given their dtype."""
    return torch.bitwise_xor(x, torch.iinfo(x.dtype).min).view(dtype) if dtype in SIGNED else x


def quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b rounded down, of wide unsigned tensors."""
    if a.dtype != torch.uint64:
        return torch.div(a.long(), b.long(), rounding_mode="trunc").to(a.dtype)
    dividend, divisor = a.view(torch.int64), b.view(torch.int64)
    estimate = torch.div(_halved(dividend), divisor, rounding_mode="trunc") * 2  # right, or one too small
    rest = (dividend - estimate * divisor).view(torch.uint64)
    estimate = estimate + (ordered(rest) >= ordered(b))
    fits_once = ordered(a) >= ordered(b)  # all that there is to know of a divisor from 2**63 on
    return torch.where(divisor < 0, fits_once.long(), estimate).view(torch.uint64)


def remainder(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a modulo b, of wide unsigned tensors."""
    return modular(torch.sub, a, modular(torch.mul, quotient(a, b), b))


def shift_right(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The bits of `x` moved `y` positions to the right, zeros filled in, of wide unsigned tensors."""
    if x.dtype != torch.uint64:
        return torch.bitwise_right_shift(x.long(), y.long()).to(x.dtype)
    bits, amount = x.view(torch.int64), y.view(torch.int64)
    shifted = torch.bitwise_right_shift(_halved(bits), amount - 1)
    return torch.where(amount == 0, bits, shifted).view(torch.uint64)


def _halved(x: torch.Tensor) -> torch.Tensor:
    """Unsigned halves of int64 elements, which then fit into int64."""
    return torch.bitwise_and(torch.bitwise_right_shift(x, 1), _LARGEST)
