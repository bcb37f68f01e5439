"""Rows of the ops between real and quantized numbers, and of arithmetic on quantized numbers.

Quantized convolutions and products stand with their families; here is what costs no MACs.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.ops.channels import quant as channels
from graphopt.ir.ops.families import MICROSOFT, broadcast, no_macs, unary
from graphopt.ir.ops.row import OpRow, Shape, Site

_CONCAT_OPERANDS = 128
"""QLinearConcat is variadic: the scales and zero points of this many operands are told from data."""


def binary_shape(site: Site) -> list[Shape]:
    """Broadcast of inputs 0 and 3 (A, A_scale, A_zero_point, B, ...)."""
    return [broadcast([site.input_shape(0), site.input_shape(3)])]


def where_shape(site: Site) -> list[Shape]:
    """Broadcast of the condition (0), X (1) and Y (4)."""
    return [broadcast(site.input_shape(index) for index in (0, 1, 4))]


def integer_product_shape(site: Site) -> list[Shape]:
    """Broadcast of inputs 0 and 2 (A, A_zero_point, B, B_zero_point)."""
    return [broadcast([site.input_shape(0), site.input_shape(2)])]


def concatenated_shape(site: Site) -> list[Shape]:
    """Operands stand at inputs 2, 5, 8, ...; their sizes along `axis` add up."""
    operands = [site.input_shape(index) for index in range(2, len(site.inputs), 3)]
    axis = site.attribute("axis") % len(operands[0])
    total = sum(shape[axis] for shape in operands)
    return [(*operands[0][:axis], total, *operands[0][axis + 1 :])]


def gathered_blocks_shape(site: Site) -> list[Shape]:
    """Gather on packed data: a uint8 byte holds 8 / bits numbers along the last axis."""
    data, indices = site.input_shape(0), site.input_shape(1)
    source = site.node.inputs[0]
    packed = 8 // int(site.attribute("bits", 4)) if source is not None and source.dtype == ir.DataType.UINT8 else 1
    unpacked = (*data[:-1], data[-1] * packed)
    axis = site.attribute("gather_axis", 0) % len(data)
    return [(*unpacked[:axis], *indices, *unpacked[axis + 1 :])]


ROWS: tuple[OpRow, ...] = (
    *unary("QuantizeLinear", "DequantizeLinear", quantization=(1, 2), channels=channels.quantization, torch="quant"),
    *unary("DynamicQuantizeLinear", channels=channels.dynamic_quantization, torch="quant"),
    *unary("QuantizeLinear", domain=MICROSOFT, quantization=(1, 2), element_type=2),
    *unary("DequantizeLinear", domain=MICROSOFT, quantization=(1, 2), element_type=1),
    *unary("QLinearAdd", "QLinearMul", domain=MICROSOFT, shape=binary_shape, quantization=(1, 2, 4, 5, 6, 7)),
    *unary("QLinearWhere", domain=MICROSOFT, shape=where_shape, quantization=(2, 3, 5, 6, 7, 8), element_type=1),
    *unary(
        "MulInteger", domain=MICROSOFT, shape=integer_product_shape, quantization=(1, 3), element_type=ir.DataType.INT32
    ),
    *unary("QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax", domain=MICROSOFT, quantization=(1, 2, 3, 4)),
    *unary(
        "QLinearConcat",
        domain=MICROSOFT,
        shape=concatenated_shape,
        element_type=1,
        quantization=tuple(index for index in range(2 + 3 * _CONCAT_OPERANDS) if index < 2 or index % 3 != 2),
    ),
    *unary("QOrderedGelu", domain=MICROSOFT, quantization=(1, 2)),
    *unary("QOrderedLayerNormalization", domain=MICROSOFT, quantization=(1, 4)),
    OpRow(
        "GatherBlockQuantized",
        domain=MICROSOFT,
        reads_all=False,
        cost=no_macs,
        shape=gathered_blocks_shape,
        quantization=(2, 3),
        element_type=2,
    ),
)
