"""Pass dequantize: a quantized model back to float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.passes.contract import Context, Pass, Semantics
from graphopt.passes.dequantize_model import dequantize_model


@dataclass(frozen=True)
class Dequantize(Pass):
    """Turn every quantized form back into float: what was rounded stays rounded, what rounds at run time is gone.

    An integer q stands for x = s (q - z). Constants (weights, biases, tables; one scale, one a channel, one a block; 2
    to 32 bits) become the floats that they stand for. Between quantizers, operators on integers become the float
    operators on what the integers stand for:

        s_y (q_y - z_y) = s_x s_w sum (q_x - z_x) q_w + s_x s_w q_b    becomes    y = sum x w + b

    The rounding of activations goes, so outputs move by at most what rounding did, and the model is what it was before
    it was quantized, up to the rounding of its weights. The saturation of a quantizer may stand for a Relu or Clip
    that a quantizing tool left out; it comes back where the range of the quantizer ends at zero and what stands before
    it may be negative: Clip where the other end is a whole number (Relu6), else Relu.

    Read are QuantizeLinear and DequantizeLinear in all their forms, QLinearConv and all QLinear operators of
    onnxruntime, MatMulInteger and ConvInteger with the scaling behind them, DynamicQuantizeLinear, QGemm,
    DynamicQuantizeMatMul, MatMulIntegerToFloat, DynamicQuantizeLSTM, MatMulNBits, GatherBlockQuantized, rows picked
    from tables of integers (packed in bytes, too), and moves of integers. What cannot be undone stays as it is, with a
    remark: integers that the model takes as inputs or gives as outputs, scales that are computed at run time, channels
    last, attention on integers.

    Options:
        keep_ranges: keep the saturation of every quantizer of activations as a Clip: nearer to the quantized model
            on inputs beyond its ranges, at the cost of an operator each.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2] x) => (float[N,1] y)
          <int8[2,1] q = {3, -2}, float s = {0.5}, float x_s = {0.0001}, uint16 x_z = {32768}> {
          x_q = QuantizeLinear (x, x_s, x_z)
          x_d = DequantizeLinear (x_q, x_s, x_z)
          w = DequantizeLinear (q, s)
          y = MatMul (x_d, w)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2] x, float[2,1] q_1) => (float[N,1] y) {
          y = MatMul (x, q_1)
        }
    """

    name: ClassVar[str] = "dequantize"
    semantics: ClassVar[Semantics] = Semantics.LOSSY

    keep_ranges: bool = False

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Dequantize what can be; the remarks list what stays."""
        dequantize_model(model, context.missed, keep_ranges=self.keep_ranges)
