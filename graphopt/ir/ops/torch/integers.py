"""Products of quantized operands: exact accumulation, and quantization of the result."""

from __future__ import annotations

import torch


def accumulated(quantized: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """Quantized data less its zero point, in the type that products are taken in.

    float64 holds every sum of products of 8-bit numbers exactly, and unlike int32 it has fast products everywhere.
    """
    data = quantized.to(torch.float64)
    return data if zero_point is None else data - zero_point.to(torch.float64)


def requantized(products: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """saturate(round(products * scale) + zero point) in the type of the zero point; float8 is not rounded first."""
    scaled = products.to(torch.float32) * scale.to(torch.float32)
    if zero_point.dtype.is_floating_point:
        limit = torch.finfo(zero_point.dtype).max
        return (scaled + zero_point.to(torch.float32)).clamp(-limit, limit).to(zero_point.dtype)
    limits = torch.iinfo(zero_point.dtype)
    return (scaled.round() + zero_point).clamp(limits.min, limits.max).to(zero_point.dtype)
