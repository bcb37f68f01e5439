"""Element types of ONNX as torch dtypes, and the ranges of the integer types that torch lacks."""

from __future__ import annotations

import onnx_ir as ir
import torch

_DTYPES: dict[int, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    # Types that torch lacks are held one element a byte.
    ir.DataType.INT4: torch.int8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.UINT2: torch.uint8,
}

_NARROW_RANGES: dict[int, tuple[int, int]] = {
    ir.DataType.INT4: (-8, 7),
    ir.DataType.INT2: (-2, 1),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.UINT2: (0, 3),
}


ElementType = int | torch.dtype
"""An ONNX element type as a number (`onnx_ir.DataType`), or the dtype that stands in for it (`row.TorchRule`)."""


def torch_dtype(element_type: ElementType) -> torch.dtype:
    """The dtype that holds an ONNX element type. Raises `KeyError` where torch has none (strings, float4e2m1)."""
    return element_type if isinstance(element_type, torch.dtype) else _DTYPES[element_type]


def integer_range(element_type: int) -> tuple[int, int]:
    """Smallest and largest value of an ONNX integer type.

    Example:
        >>> integer_range(ir.DataType.INT4)
        (-8, 7)
    """
    if element_type in _NARROW_RANGES:
        return _NARROW_RANGES[element_type]
    limits = torch.iinfo(torch_dtype(element_type))
    return limits.min, limits.max


def following(now: torch.dtype, reference: torch.dtype, own: torch.dtype) -> torch.dtype:
    """The dtype of a float that is not of the model's main type: its own, until the module is cast to another one.

    Args:
        now: the main dtype of the module.
        reference: the main dtype of the ONNX model.
        own: what the operator says.
    """
    return own if now == reference else now
