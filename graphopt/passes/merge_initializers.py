"""Pass merge-initializers: equal weights are stored once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.rewrite import is_op
from graphopt.passes.contract import Context, Pass, Semantics


@dataclass(frozen=True)
class MergeInitializers(Pass):
    """Let initializers of equal element type, shape and bytes share one copy.

    Must run last. Equality is not a tie: two biases that are both zero are still two parameters, and a later
    pass that cuts, quantizes or trains one of them must not change the other. Once nothing of the kind
    follows, sharing is only storage. Comparison is by content digest (SHA-256), one tensor in memory at a time.
    Integers and scales of weights that are quantized alone stay apart: onnxruntime fuses none with another reader.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3] x) => (float[N,3] y) <float[3] a = {1, 2, 3}, float[3] b = {1, 2, 3}> {
          s = Add (x, a)
          y = Mul (s, b)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3] x) => (float[N,3] y) <float[3] a = {1, 2, 3}> {
          s = Add (x, a)
          y = Mul (s, a)
        }
    """

    name: ClassVar[str] = "merge-initializers"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = (
        "eliminate-dead-code",
        "fold-constants",
        "prune-channels",
        "fold-reconstruction",
        "fold-batchnorm",
        "fold-affine",
        "fuse-pad",
        "merge-linear",
        "merge-branches",
        "quantize",
    )

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Merge within each graph, and into the main graph from its subgraphs."""
        shared: dict[tuple[object, ...], ir.Value] = {}
        for graph in model.graphs():
            local = shared if graph is model.graph else dict(shared)
            for value in tuple(graph.initializers.values()):
                key = _content(value)
                if key is None or value.is_graph_input() or _is_weight_alone(value):
                    continue
                first = local.setdefault(key, value)
                if first is value:
                    continue
                if value.is_graph_output():
                    context.missed("merge initializer", "it is a graph output", value)
                    continue
                value.replace_all_uses_with(first)
                assert value.name is not None
                del graph.initializers[value.name]


def _is_weight_alone(value: ir.Value) -> bool:
    """Whether a value is part of a weight that is integers while its product reads floats: shared, it is not fused."""
    for node in value.consumers():
        for product in node.outputs[0].consumers() if is_op(node, "DequantizeLinear") else ():
            source = product.inputs[0].producer() if product.inputs[0] is not None else None
            if is_op(product, "MatMul", "Gemm") and not is_op(source, "DequantizeLinear"):
                return True
    return False


def _content(value: ir.Value) -> tuple[object, ...] | None:
    tensor = value.const_value
    if tensor is None:
        return None
    shape = tensor_shape(tensor)
    if tensor.dtype == ir.DataType.STRING:
        return (tensor.dtype, shape, tuple(tensor.numpy().reshape(-1).tolist()))
    return (tensor.dtype, shape, hashlib.sha256(tensor.tobytes()).digest())
