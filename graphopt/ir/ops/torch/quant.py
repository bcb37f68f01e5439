"""Torch functions between real and quantized numbers."""

from __future__ import annotations

import onnx_ir as ir
import torch

from graphopt.ir.ops.torch.dtypes import integer_range, torch_dtype


def quantize_linear(
    x: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero_point: torch.Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    element_type: int = ir.DataType.UINT8,
) -> torch.Tensor:
    """QuantizeLinear 10 to 25: saturate(round(x / scale) + zero point), ties to even; float8 is not rounded first."""
    scale = _aligned(y_scale, x, axis, block_size)
    division = torch_dtype(precision) if precision else y_scale.dtype
    quotient = x.to(division) / scale.to(division)
    # Sums with the zero point need more digits than float16 has.
    quotient = quotient.to(torch.promote_types(division, torch.float32))
    dtype = torch_dtype(element_type)
    if dtype.is_floating_point:
        limit = torch.finfo(dtype).max
        return (quotient.clamp(-limit, limit) if saturate else quotient).to(dtype)
    rounded = quotient.round()
    if y_zero_point is not None:
        rounded = rounded + _aligned(y_zero_point, x, axis, block_size).to(rounded.dtype)
    return rounded.clamp(*integer_range(element_type)).to(dtype)


def dequantize_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> torch.Tensor:
    """DequantizeLinear 10 to 25: (x - zero point) * scale."""
    result = torch_dtype(output_dtype) if output_dtype else x_scale.dtype
    precise = torch.promote_types(result, torch.float32)
    offset = x.to(precise)
    if x_zero_point is not None:
        offset = offset - _aligned(x_zero_point, x, axis, block_size).to(precise)
    return (offset * _aligned(x_scale, x, axis, block_size).to(precise)).to(result)


def dynamic_quantize_linear(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DynamicQuantizeLinear 11: uint8 data with the scale and zero point of its range, which is made to hold 0."""
    lowest, highest = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = torch.where(highest == lowest, 1.0, highest - lowest) / 255
    zero_point = (-lowest / scale).clamp(0, 255).round()
    quantized = ((x / scale).round() + zero_point).clamp(0, 255)
    return quantized.to(torch.uint8), scale, zero_point.to(torch.uint8)


def _aligned(parameter: torch.Tensor, data: torch.Tensor, axis: int, block_size: int) -> torch.Tensor:
    """Scales or zero points in a shape that broadcasts with the data: one for all, one a channel or one a block."""
    if block_size:
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, data.shape[axis])
    if parameter.dim() == 1 and parameter.shape[0] == 1:
        return parameter.reshape(())
    if parameter.dim() == 1 and data.dim() > 1:
        return parameter.reshape([-1] + [1] * (data.dim() - 1 - axis % data.dim()))
    return parameter
