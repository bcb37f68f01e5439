"""The weights of a model as float64 arrays, also those that the graph computes from initializers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphopt.errors import GraphoptError
from graphopt.ir.ops.channels.quant import zero_point_of
from graphopt.ir.rewrite import integers, is_op
from graphopt.ir.session import open_session


class Weights:
    """Arrays of initializers, and of what is computed from initializers alone (a transposed, a dequantized weight).

    What onnxruntime had to compute is kept; initializers are converted anew at each call, so that no second copy of
    a large model stays in memory.

    Example:
        >>> from graphopt.ir.load import load
        >>> model = load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[1,2] x) =>
        ...     (float[1,1] y) <float[1,2] w = {1, 2}> { t = Transpose<perm=[1, 0]>(w) y = MatMul(x, t) }'''))
        >>> matmul = model.graph[-1]
        >>> Weights(model).array(matmul.inputs[1]).tolist()
        [[1.0], [2.0]]
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._computed: dict[ir.Value, np.ndarray] = {}

    def array(self, value: ir.Value) -> np.ndarray:
        """The weight, float64; integer codes are given as their distance from the zero point.

        Raises:
            GraphoptError: it holds NaN or infinity.
        """
        found = self._array(value)
        if not np.isfinite(found).all():
            raise GraphoptError(
                "a weight holds NaN or infinity, so that channels cannot be compared",
                where=value.name,
                help="export the model again, from a training that did not diverge",
            )
        return found

    def is_finite(self, value: ir.Value) -> bool:
        """Whether all entries are; masks of minus infinity are not."""
        return bool(np.isfinite(self._array(value)).all())

    def _array(self, value: ir.Value) -> np.ndarray:
        tensor = value.const_value
        if tensor is not None:
            stored = tensor.numpy()
            array = stored.astype(np.float64)
            return array if tensor.dtype.is_floating_point() else array - zero_point_of(value, stored)
        producer = value.producer()
        if is_op(producer, "Transpose"):
            assert producer is not None
            assert producer.inputs[0] is not None
            return self._array(producer.inputs[0]).transpose(integers(producer, "perm"))
        if value not in self._computed:
            self._computed[value] = self._run(value)
        return self._computed[value].astype(np.float64)

    def _run(self, value: ir.Value) -> np.ndarray:
        """Let onnxruntime compute it from the initializers."""
        shell = self.model.clone()
        values = {output.name: output for node in shell.graph for output in node.outputs}
        shell.graph.inputs.clear()
        shell.graph.outputs.clear()
        shell.graph.outputs.append(values[value.name])
        RemoveUnusedNodesPass()(shell)
        return np.asarray(open_session(shell, optimized=False).run(None, {})[0])
