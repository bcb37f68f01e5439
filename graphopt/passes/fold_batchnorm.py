"""Pass fold-batchnorm: inference BatchNormalization disappears into the linear operator beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.affine import absorb_before, absorb_behind, batchnorm_affine
from graphopt.ir.rewrite import DeclinedError, Rewriter, constant_float64, is_op
from graphopt.ir.statistics import BATCHNORM_STATISTICS
from graphopt.passes.contract import Context, Pass, Semantics


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul before it, or else behind it.

    With statistics fixed, BatchNormalization is one multiplication and one addition a channel::

        s = gamma / sqrt(var + epsilon)        t = beta - mean * s

        behind a linear op:     s (W x + b) + t  =  (s W) x + (s b + t)
        before linear ops:      W (s x + t) + b  =  (W s) x + (b + W t)

    (Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.2.) The second form needs
    every reader to be linear, and W t to be the same at every position: no padding, or t = 0. Weights that
    other nodes share are copied. The sum is formed in float64.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2,5,5] x, float[3,2,3,3] w_conv, float[3] w_gamma, float[3] w_beta, float[3] w_mean,
           float[3] w_var) => (float[N,3,5,5] y) {
          c = Conv <pads = [1, 1, 1, 1]> (x, w_conv)
          y = BatchNormalization (c, w_gamma, w_beta, w_mean, w_var)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2,5,5] x, float[3,2,3,3] w_conv, float[3] w_conv_bias) => (float[N,3,5,5] y) {
          y = Conv <pads = [1, 1, 1, 1]> (x, w_conv, w_conv_bias)
        }
    """

    name: ClassVar[str] = "fold-batchnorm"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Fold every BatchNormalization that folds; a remark for each that does not."""
        Rewriter(model).until_stable(_fold, "fold BatchNormalization", context.missed)


def _fold(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "BatchNormalization"):
        return False
    data = node.inputs[0]
    assert data is not None
    parameters = batchnorm_affine(node)
    gamma, beta = (np.asarray(constant_float64(value)) for value in node.inputs[1:3])
    node.outputs[0].meta[BATCHNORM_STATISTICS] = (beta, np.abs(gamma))

    def affine(channels: int, axis: int, rank: int | None) -> tuple[np.ndarray, np.ndarray]:
        if axis != 1 or channels != parameters[0].size:
            raise DeclinedError("its channels are not those of the linear operator beside it")
        return parameters

    try:
        folded = absorb_behind(rewriter, node, data, affine)
        reason = DeclinedError("no linear operator is beside it")
    except DeclinedError as refusal:
        folded, reason = False, refusal
    if folded or absorb_before(rewriter, node, data, affine):
        return True
    raise reason
