"""Pass merge-common-subexpressions: what is computed twice is computed once."""

from __future__ import annotations

import struct
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.rewrite import FLOATING, DeclinedError, Rewriter, constant_tensor, is_op
from graphopt.passes.contract import Context, Pass, Semantics

_RANDOM = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
_COMMUTATIVE = ("Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
_STRUCTURE = 64
"""Integer constants up to this many elements (shapes, axes, sizes) are compared by content."""


@dataclass(frozen=True)
class MergeCommonSubexpressions(Pass):
    """Let one node stand for all nodes with the same operator, operands and attributes.

    Operands are the same when they are the same value; integer constants of up to 64 elements and single
    numbers also when they are equal, since exporters repeat shapes and axes for each use. Larger weights that
    happen to be equal are *not* the same (equality is not a tie), so the nodes that read them stay apart.
    Operands of commutative operators compare in any order. Random operators, operators of unknown domains and
    nodes with subgraphs stay.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[N,4] z) => (float[N,4] y) {
          a = Add (x, z)
          b = Add (z, x)
          y = Mul (a, b)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[N,4] z) => (float[N,4] y) {
          a = Add (x, z)
          y = Mul (a, a)
        }
    """

    name: ClassVar[str] = "merge-common-subexpressions"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Merge within each graph, in order: operands are merged before what reads them."""
        rewriter = Rewriter(model)
        for graph in model.graphs():
            first: dict[Hashable, ir.Node] = {}
            for node in graph:
                key = _key(node)
                if key is None:
                    continue
                earlier = first.setdefault(key, node)
                if earlier is node:
                    continue
                try:
                    _merge(rewriter, earlier, node)
                except DeclinedError as refusal:
                    context.missed("merge common subexpression", refusal.why, node)


def _merge(rewriter: Rewriter, earlier: ir.Node, node: ir.Node) -> None:
    if node.domain not in ("", "ai.onnx"):
        raise DeclinedError(f"operator {node.domain}::{node.op_type} is not known and may be random")
    if is_op(node, *_RANDOM):
        raise DeclinedError(f"{node.op_type} is random")
    pairs = list(zip(node.outputs, earlier.outputs, strict=True))
    if any(old.is_graph_output() and new.is_graph_output() for old, new in pairs):
        raise DeclinedError("both results are graph outputs")
    for old, new in pairs:
        rewriter.bypass(old, new)


def _key(node: ir.Node) -> Hashable | None:
    attributes: list[Hashable] = []
    for name, attribute in sorted(node.attributes.items()):
        content = _attribute_content(attribute)
        if content is None:
            return None
        attributes.append((name, content))
    operands = [_operand(value) for value in node.inputs]
    if is_op(node, *_COMMUTATIVE):
        operands.sort(key=repr)
    present = tuple(bool(output.name) for output in node.outputs)
    return (node.op_identifier(), tuple(operands), tuple(attributes), present)


def _operand(value: ir.Value | None) -> Hashable:
    if value is None:
        return None
    tensor = constant_tensor(value)
    if tensor is not None and tensor.size <= (1 if tensor.dtype in FLOATING else _STRUCTURE):
        shape = tensor_shape(tensor)
        if tensor.dtype == ir.DataType.STRING:
            return ("constant", tuple(tensor.numpy().reshape(-1).tolist()), shape)
        return ("constant", int(tensor.dtype), shape, tensor.tobytes())
    return ("value", id(value))


def _attribute_content(attribute: ir.Attr) -> Hashable | None:
    """What makes two attributes equal, None where that is not decided (subgraphs, large tensors)."""
    kind, value = attribute.type, attribute.value
    if attribute.is_ref():
        return None
    if kind in (ir.AttributeType.INT, ir.AttributeType.STRING):
        return (kind, value)
    if kind in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return (kind, tuple(value))
    if kind == ir.AttributeType.FLOAT:
        return (kind, struct.pack("<f", value))
    if kind == ir.AttributeType.FLOATS:
        return (kind, struct.pack(f"<{len(value)}f", *value))
    if kind == ir.AttributeType.TENSOR and value.size <= _STRUCTURE and value.dtype != ir.DataType.STRING:
        return (kind, int(value.dtype), tuple(int(dim) for dim in value.shape), value.tobytes())
    return None
