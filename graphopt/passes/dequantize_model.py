"""A quantized graph as the float graph that it stands for: `dequantize_model`, used by two passes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphopt.ir.rewrite import DeclinedError, Missed
from graphopt.passes.dequantize_builder import MOVES, Builder
from graphopt.passes.dequantize_linear import LINEAR_RULES
from graphopt.passes.dequantize_moves import MOVE_RULES

QUANTIZED_OPERATORS = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv",
    "QLinearMatMul", "QGemm", "QAttention", "QEmbedLayerNormalization", "QMoE", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "MulInteger",
    "ReduceSumInteger",
})  # fmt: skip
"""Operators that read or write quantized numbers, besides those whose names begin with QLinear or QOrdered."""


def is_quantized(node: ir.Node) -> bool:
    """Whether an operator reads or writes quantized numbers by its own definition."""
    return node.domain in ("", "ai.onnx", "com.microsoft") and (
        node.op_type in QUANTIZED_OPERATORS or node.op_type.startswith(("QLinear", "QOrdered"))
    )


def quantized_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The operators of all graphs of a model that read or write quantized numbers."""
    return (node for node in model.graph.all_nodes() if is_quantized(node))


def dequantize_model(model: ir.Model, missed: Missed, *, keep_ranges: bool = False) -> None:
    """Rewrite a quantized model in place as float; what cannot be undone stays as it is.

    Args:
        model: the model.
        missed: called with what stays quantized, why, and where.
        keep_ranges: whether the saturation of every quantizer is kept, as a Clip.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ... g (float[n, 2] x) => (float[n, 1] y) <int8[2, 1] q = {3, -2}, float s = {0.5}>
        ... { w = DequantizeLinear (q, s) y = MatMul (x, w) }''')
        >>> dequantize_model(model, print)
        >>> [node.op_type for node in model.graph], model.graph[0].inputs[1].const_value.numpy().tolist()
        (['MatMul'], [[1.5], [-1.0]])
    """
    if not any(True for _ in quantized_nodes(model)):
        return
    builder = Builder(model, keep_ranges=keep_ranges)
    reasons: dict[ir.Node, DeclinedError] = {}
    for graph in tuple(model.graphs()):
        for node in tuple(graph):
            if node.graph is not graph:
                continue
            domain = "" if node.domain == "ai.onnx" else node.domain
            rule = LINEAR_RULES.get((domain, node.op_type)) or MOVE_RULES.get((domain, node.op_type))
            if rule is None:
                continue
            try:
                rule(builder, node)
            except DeclinedError as refusal:
                reasons[node] = refusal
    builder.finish()
    for node in model.graph.all_nodes():
        refusal = reasons.get(node)
        if refusal is not None and (is_quantized(node) or node.op_type in MOVES):
            missed(f"dequantize {node.op_type}", refusal.why, node)
        elif is_quantized(node):
            missed(f"dequantize {node.op_type}", _why_left(node), node)


def _why_left(node: ir.Node) -> str:
    if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
        readers = {user.op_type for value in node.outputs for user in value.consumers()}
        readers |= {"a graph output"} if any(value.is_graph_output() for value in node.outputs) else set()
        return f"its integers are read by {', '.join(sorted(readers)) or 'nothing'}"
    if node.op_type == "DequantizeLinear":
        return "its integers come from outside"
    return "there is no rule for this operator"
