"""Rows of the matrix products: MatMul, Gemm, Einsum, their quantized and fused forms.

A product costs output elements x length of the contracted axis; a bias, `alpha` and `beta` cost nothing.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from graphopt.ir.ops.channels import linear as channels
from graphopt.ir.ops.einsum import einsum_macs
from graphopt.ir.ops.families import MICROSOFT, broadcast, elements
from graphopt.ir.ops.row import CostRule, OpRow, Shape, ShapeRule, Site, TorchFunction


def matmul_macs(site: Site) -> int:
    """Output elements x last axis of A, numpy's `matmul` (1-D and batched operands included)."""
    return elements(site.output_shape()) * site.input_shape(0)[-1]


def gemm_macs(site: Site) -> int:
    """Output elements x contracted axis of A (axis 0 with transA, else 1)."""
    return elements(site.output_shape()) * site.input_shape(0)[0 if site.attribute("transA", 0) else 1]


def fused_matmul_macs(site: Site) -> int:
    """Output elements x contracted axis of A, after transBatchA and transA."""
    return elements(site.output_shape()) * _oriented(site, 0, "A")[-1]


def fixed_weight_macs(site: Site) -> int:
    """Elements of A x attribute N: B holds K x N packed numbers."""
    return elements(site.input_shape(0)) * int(site.attribute("N"))


def matmul_shape(site: Site, right: int = 1) -> list[Shape]:
    """Shape of numpy's `matmul`."""
    return [_product(site.input_shape(0), site.input_shape(right))]


def gemm_shape(site: Site, right: int = 1) -> list[Shape]:
    """[M, N] of A' @ B', each transposed by its attribute."""
    rows = site.input_shape(0)[1 if site.attribute("transA", 0) else 0]
    columns = site.input_shape(right)[0 if site.attribute("transB", 0) else 1]
    return [(rows, columns)]


def fused_matmul_shape(site: Site) -> list[Shape]:
    """Shape of `matmul` on the operands as the four transpose attributes orient them."""
    return [_product(_oriented(site, 0, "A"), _oriented(site, 1, "B"))]


def fixed_weight_shape(site: Site) -> list[Shape]:
    """A with its last axis replaced by attribute N."""
    return [(*site.input_shape(0)[:-1], int(site.attribute("N")))]


def _product(left: Shape, right: Shape) -> Shape:
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    return (*broadcast([left[:-2], right[:-2]]), *rows, *columns)


def _oriented(site: Site, index: int, letter: str) -> Shape:
    """Operand of FusedMatMul as [batch..., rows, columns].

    transBatch says that axis 0 holds the rows and the batch axes follow it; trans then swaps the last two.
    """
    shape = site.input_shape(index)
    if site.attribute(f"transBatch{letter}", 0) and len(shape) > 2:
        shape = (*shape[1:-1], shape[0], shape[-1])
    if site.attribute(f"trans{letter}", 0) and len(shape) > 1:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return shape


def _products(
    *names: str,
    cost: CostRule = matmul_macs,
    shape: ShapeRule = matmul_shape,
    quantization: tuple[int, ...] = (),
    structural: tuple[int, ...] = (),
    element_type: int | ir.DataType = 0,
    torch: str = "",
) -> tuple[OpRow, ...]:
    """Rows of onnxruntime's own products, for which `onnx.shape_inference` has no schema."""
    return tuple(
        OpRow(
            name,
            domain=MICROSOFT,
            structural=structural,
            cost=cost,
            shape=shape,
            quantization=quantization,
            element_type=element_type,
            torch=TorchFunction(torch, name) if torch else None,
        )
        for name in names
    )


ROWS: tuple[OpRow, ...] = (
    OpRow("MatMul", cost=matmul_macs, channels=channels.matmul, torch=TorchFunction("linear", "MatMul")),
    OpRow("Gemm", cost=gemm_macs, channels=channels.gemm, torch=TorchFunction("linear", "Gemm")),
    OpRow("Einsum", cost=einsum_macs, channels=channels.einsum, torch=TorchFunction("linear", "Einsum")),
    OpRow(
        "MatMulInteger",
        cost=matmul_macs,
        quantization=(2, 3),
        channels=channels.integer_matmul,
        torch=TorchFunction("linear", "MatMulInteger"),
    ),
    OpRow(
        "QLinearMatMul",
        cost=matmul_macs,
        quantization=(1, 2, 4, 5, 6, 7),
        channels=channels.quantized_matmul,
        torch=TorchFunction("linear", "QLinearMatMul"),
    ),
    *_products("GemmFastGelu"),
    *_products("MatMulInteger16", element_type=ir.DataType.INT32),
    *_products("DynamicQuantizeMatMul", quantization=(2, 3)),
    *_products("MatMulIntegerToFloat", quantization=(2, 3, 4, 5), element_type=2),
    *_products("QOrderedMatMul", shape=partial(matmul_shape, right=2), quantization=(1, 3, 4, 7)),
    *_products("FusedMatMul", cost=fused_matmul_macs, shape=fused_matmul_shape, torch="linear"),
    *_products("FusedMatMulActivation", "TransposeMatMul", cost=fused_matmul_macs, shape=fused_matmul_shape),
    *_products("FusedGemm", cost=gemm_macs, shape=gemm_shape, torch="linear"),
    *_products(
        "QGemm", cost=gemm_macs, shape=partial(gemm_shape, right=3), quantization=(1, 2, 4, 5, 7, 8), element_type=8
    ),
    # Input 4 maps a row of the weight to its block.
    *_products(
        "MatMulNBits",
        cost=fixed_weight_macs,
        shape=fixed_weight_shape,
        quantization=(2, 3),
        structural=(4,),
    ),
    *_products("MatMulBnb4", cost=fixed_weight_macs, shape=fixed_weight_shape, quantization=(2,)),
)
