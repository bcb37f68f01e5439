"""Which int8 kernels of onnxruntime give wrong sums on this machine: measured with extreme values, not guessed.

x86 without VNNI multiplies uint8 by int8 with `pmaddubsw`, which adds two neighbouring products in 16 bits and
saturates: 2 * 255 * 127 = 64770 becomes 32767. Weights of 7 bits are safe with every uint8: 2 * 255 * 63 = 32130.

Measured on onnxruntime 1.31.1, an EPYC with AVX2 alone: QLinearConv, QLinearMatMul, QGemm and MatMulInteger (also
fused to DynamicQuantizeMatMul) are wrong from a magnitude of 65 on, for one row and many, with and without a zero
point. A depthwise convolution with one output a group has a kernel of its own, which is exact. Percent right of
4,000 CIFAR-10 images, float, 8 and 7 bits: ResNet-20 87.25, 86.10, 87.18; ResNet-56 89.18, 87.90, 89.13; 8 and 7
bits equally fast. uint8 weights are exact there too, but slower (MatMulInteger of 512: 141 against 188 GOP/s).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_ir as ir

from graphopt.ir.rewrite import is_op
from graphopt.ir.session import open_session
from graphopt.passes.quantize_placement import attribute, is_depthwise

SAFE_BITS = 7
"""Widest weights whose products with two uint8 fit in 16 bits together."""


@dataclass(frozen=True)
class _Kernel:
    """One kernel as ONNX text.

    Attributes:
        operator: the node.
        output: element type of its result.
        shapes: (data, weight); one for each code path that may differ (one row and many, taps, channels).
    """

    operator: str
    output: str
    shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


_MATRICES = (((1, 32), (32, 16)), ((16, 32), (32, 16)), ((4, 6), (6, 5)))
_IMAGES = (((1, 16, 6, 6), (16, 16, 1, 1)), ((1, 16, 6, 6), (16, 16, 3, 3)), ((1, 3, 6, 6), (8, 3, 3, 3)))
_DEPTHWISE = (((1, 16, 6, 6), (16, 1, 3, 3)), ((1, 16, 6, 6), (16, 1, 5, 5)))
_QUANTIZED = "x, one, zero, w, scales, zeros"
_KERNELS = {
    "QLinearConv": _Kernel(f"QLinearConv ({_QUANTIZED}, y_scale, y_zero)", "uint8", _IMAGES),
    "depthwise QLinearConv": _Kernel(f"QLinearConv <group = 16> ({_QUANTIZED}, y_scale, y_zero)", "uint8", _DEPTHWISE),
    "QLinearMatMul": _Kernel(f"QLinearMatMul ({_QUANTIZED}, y_scale, y_zero)", "uint8", _MATRICES),
    "QGemm": _Kernel(f"com.microsoft.QGemm ({_QUANTIZED})", "float", _MATRICES),
    "MatMulInteger": _Kernel("MatMulInteger (x, w, zero)", "int32", _MATRICES),
}


@cache
def saturating_kernels(target: str = "cpu", bits: int = 8) -> frozenset[str]:
    """Kernels that are wrong for some uint8 data and signed weights of `bits` bits, compared with exact integers.

    Measured once a process, in some milliseconds.

    Args:
        target: "cpu", "cuda" or "openvino", the onnxruntime provider.
        bits: width of the weights; all of them have the largest magnitude of that width.

    Example:
        >>> sorted(saturating_kernels("cpu", SAFE_BITS))
        []
    """
    return frozenset(
        name
        for name, kernel in _KERNELS.items()
        if not all(_is_exact(kernel, *shapes, target, bits) for shapes in kernel.shapes)
    )


def kernels_of(node: ir.Node, form: str) -> frozenset[str]:
    """The kernels of `saturating_kernels` that may run a linear operator placed as `form`."""
    if form == "dynamic":
        return frozenset({"MatMulInteger"})
    if is_op(node, "Conv"):
        weight = node.inputs[1]
        one_each = weight is not None and weight.shape is not None and weight.shape[0] == attribute(node, "group", 1)
        return frozenset({"depthwise QLinearConv" if one_each and is_depthwise(node) else "QLinearConv"})
    # Which of them onnxruntime fuses to depends on the bias and on whether the result is quantized.
    return frozenset({"QLinearMatMul", "QGemm", "MatMulInteger"})


def _is_exact(
    kernel: _Kernel, data_shape: tuple[int, ...], weight_shape: tuple[int, ...], target: str, bits: int
) -> bool:
    """Whether the kernel is right on data of 255 and the largest weights, positive and negative by output channel."""
    axis = 0 if len(weight_shape) == 4 else 1
    channels, signs = weight_shape[axis], np.resize([1, -1], weight_shape[axis])
    largest = 2 ** (bits - 1) - 1
    weight = np.moveaxis(np.full(weight_shape, largest), axis, -1) * signs
    weight = np.moveaxis(weight, -1, axis)
    sums = 255 * weight.sum(axis=tuple(i for i in range(weight.ndim) if i != axis))
    initializers = {
        f"int8{list(weight_shape)} w": weight.ravel(),
        "float one": [1.0], "uint8 zero": [0],
        f"float[{channels}] scales": [1.0] * channels, f"int8[{channels}] zeros": [0] * channels,
        "float y_scale": [abs(sums[0]) / 127], "uint8 y_zero": [128],
    }  # fmt: skip
    stored = ", ".join(f"{name} = {{{', '.join(map(str, values))}}}" for name, values in initializers.items())
    result = ["a", channels, *"bc"[: len(data_shape) - 2]]
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        saturation (uint8{list(data_shape)} x) => ({kernel.output}[{", ".join(map(str, result))}] y) <{stored}>
        {{ y = {kernel.operator} }}"""
    )
    found = open_session(model, target=target).run_feeds({"x": np.full(data_shape, 255, np.uint8)})[0]
    expected = 128 + 127 * signs if kernel.output == "uint8" else sums
    return bool(np.all(np.moveaxis(found, 1, -1) == expected))
