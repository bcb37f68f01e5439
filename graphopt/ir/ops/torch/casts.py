"""Torch functions of the type conversions."""

from __future__ import annotations

import onnx_ir as ir
import torch

from graphopt.ir.ops.torch.dtypes import ElementType, integer_range, torch_dtype
from graphopt.ir.ops.torch.operands import Numbers

_NARROW = {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2}
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
_LARGEST_E8M0, _NAN_E8M0 = 254, 255


def cast(x: torch.Tensor, *, to: ElementType, saturate: int = 1, round_mode: str = "up") -> torch.Tensor:
    """Cast 13+: floats are truncated to integers, integers lose their high bits, float8 types saturate."""
    if x.dtype in _FLOAT8 or x.dtype == torch.float8_e8m0fnu:
        x = x.float()  # exact, and torch converts this to everything
    if to in _NARROW:
        return _to_narrow(x, to)
    dtype = torch_dtype(to)
    if dtype == torch.float8_e8m0fnu:
        return _to_float8_e8m0(x, bool(saturate), round_mode)
    if dtype in _FLOAT8:
        return _to_float8(x, dtype, bool(saturate))
    return x.to(dtype)


def cast_like(
    x: torch.Tensor,
    target_type: torch.Tensor | Numbers,
    *,
    saturate: int = 1,
    round_mode: str = "up",
    element_type: ElementType | None = None,
) -> torch.Tensor:
    """CastLike 15+: Cast to the type of the second input, which is also that of the output (`element_type`)."""
    if element_type is None:
        assert isinstance(target_type, torch.Tensor)
        element_type = target_type.dtype
    return cast(x, to=element_type, saturate=saturate, round_mode=round_mode)


def bit_cast(x: torch.Tensor, *, to: ElementType) -> torch.Tensor:
    """BitCast 26: the same bits as another type of the same width."""
    return _to_narrow(x, to) if to in _NARROW else x.view(torch_dtype(to))


def _to_narrow(x: torch.Tensor, to: int | torch.dtype) -> torch.Tensor:
    """The low bits of integers as a type of 4 or 2 bits, held in one of 8."""
    assert isinstance(to, int)
    smallest, largest = integer_range(to)
    mask = largest - smallest
    low_bits = torch.bitwise_and(x.long(), mask)
    return (torch.bitwise_and(low_bits - smallest, mask) + smallest).to(torch_dtype(to))


def _to_float8(x: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    x = x if x.is_floating_point() else x.float()
    limit = torch.finfo(dtype).max
    if saturate:
        return torch.clamp(x, -limit, limit).to(dtype)
    if dtype == torch.float8_e4m3fn:
        # Without infinities, overflow is NaN; some versions of torch saturate. 464 still rounds to 448.
        x = torch.where(torch.abs(x) > 464.0, torch.nan, x)
    return x.to(dtype)


def _to_float8_e8m0(x: torch.Tensor, saturate: bool, round_mode: str) -> torch.Tensor:
    """The nearest power of two, stored as its exponent plus 127."""
    x = x.float()
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2 ** exponent, mantissa from 0.5 on and below 1
    if round_mode == "up":
        exponent = exponent - (mantissa == 0.5).int()
    elif round_mode == "nearest":
        exponent = exponent - (mantissa < 0.75).int()
    else:
        exponent = exponent - 1
    biased = torch.where(x == 0, -1, torch.where(torch.isinf(x), _NAN_E8M0, exponent + 127))
    if saturate:
        biased = torch.clamp(biased, 0, _LARGEST_E8M0)
    else:
        biased = torch.where((biased < 0) | (biased > _LARGEST_E8M0), _NAN_E8M0, biased)
    biased = torch.where(torch.isnan(x), _NAN_E8M0, biased)
    return biased.to(torch.uint8).view(torch.float8_e8m0fnu)
