"""Pass fold-constants: what depends on constants only is computed now."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript.optimizer._constant_folding import FoldConstantsPass, Replacement

from graphopt.ir.identities import remove_no_op
from graphopt.ir.rewrite import (
    Rewriter,
    constant_tensor,
    discard_if_dead,
    discard_if_unread,
    is_op,
    known_dim,
    static_shape,
)
from graphopt.passes.contract import Context, Pass, Semantics

_KEEP = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
"""Folding these would undo a quantization: the int8 weight is what is to be stored."""
_SMALL = 4096
"""Elements up to which a result may be larger than its operands."""
_LOG = logging.getLogger("onnxscript.optimizer._constant_folding")


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate nodes whose operands are all constant and store the results as initializers.

    onnxscript's folder does the work (reference evaluator, shape arithmetic, constant conditions of If).
    Three limits are ours. A result is stored only where it is at most `growth` times as large as its operands
    together, or small (4096 elements): Expand, ConstantOfShape, Tile or an outer sum of large constants stay.
    The size is known before anything is computed, so memory is bounded. QuantizeLinear and DequantizeLinear are
    never folded, since the quantized weight is what is to be stored. What hands a constant on unchanged (Identity) is
    passed over, not folded: a copy would no longer be tied to the constant. A Split of a constant, as of the packed
    weights of torch's cross-attention, becomes its parts.

    Options:
        growth: elements of a result over elements of all operands. 4 lets a relative position bias (a table
            gathered by an index, 2.5 times as large in Swin) be stored.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[4,4] w_a, float[4,4] w_b) => (float[N,4] y) {
          sum = Add (w_a, w_b)
          turned = Transpose <perm = [1, 0]> (sum)
          y = MatMul (x, turned)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x, float[4,4] turned) => (float[N,4] y) {
          y = MatMul (x, turned)
        }
    """

    growth: float = 4.0

    name: ClassVar[str] = "fold-constants"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Fold, then keep all constants as initializers."""
        Rewriter(model).until_stable(_hand_on, "pass over", lambda what, why, where: None)
        folder = _Folder(
            shape_inference=True,
            input_size_limit=sys.maxsize,
            output_size_limit=sys.maxsize,
            should_fold=lambda node: _reason_to_keep(node, self.growth) is None,
        )
        declared = [(value.type, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]
        with _silenced(_LOG):
            folder(model)
            while _part_splits(model):
                folder(model)
        interface = (*model.graph.inputs, *model.graph.outputs)
        for value, (type_, shape) in zip(interface, declared, strict=True):
            value.type, value.shape = type_, shape  # the folder infers shapes, but the interface is the user's
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        for graph in model.graphs():
            for value in tuple(graph.initializers.values()):
                discard_if_unread(value)
            for node in graph:
                if _operands_are_constant(node):
                    why = _reason_to_keep(node, self.growth) or "the reference evaluator cannot compute it"
                    context.missed("fold constant", why, node)


def _hand_on(rewriter: Rewriter, node: ir.Node) -> bool:
    return _operands_are_constant(node) and remove_no_op(rewriter, node)


def _part_splits(model: ir.Model) -> bool:
    """Write Splits of constants as Slices, since the folder evaluates nodes of one result; whether there was any."""
    rewriter, found = Rewriter(model), False
    for node in [node for graph in model.graphs() for node in graph]:
        if not is_op(node, "Split") or not _operands_are_constant(node) or node.inputs[0] is None:
            continue
        axis = node.attributes.get_int("axis", 0)
        sizes = [size for size in (known_dim(value, axis) for value in node.outputs) if size is not None]
        if len(sizes) < len(node.outputs) or node.graph is None or node.inputs[0].dtype == ir.DataType.STRING:
            continue
        ends = np.cumsum(sizes)
        for value, end, size in zip(node.outputs, ends, sizes, strict=True):
            if not value.uses() and not value.is_graph_output():
                continue
            parts = {"start": end - size, "end": end, "axis": axis}
            bounds = [
                rewriter.initializer(node.graph, f"{value.name}_{part}", ir.tensor([int(number)], ir.DataType.INT64))
                for part, number in parts.items()
            ]
            slice_ = rewriter.insert(node, "Slice", [node.inputs[0], *bounds], like=value, suffix="part")
            rewriter.supersede(value, slice_.outputs[0])
        discard_if_dead(node)
        found = True
    return found


class _Folder(FoldConstantsPass):
    """onnxscript's folder, which leaves a node alone where one of its rules for that operator raises."""

    def process_node(self, node: ir.Node, is_function: bool) -> Replacement | None:
        """Evaluate or rewrite one node. Rules of onnxscript fail on legal inputs (a scalar `split`, say)."""
        try:
            return super().process_node(node, is_function)
        except RuntimeError:
            return None


@contextlib.contextmanager
def _silenced(log: logging.Logger) -> Generator[None]:
    """Without the warnings of the folder: what it cannot evaluate becomes a remark of ours."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _operands_are_constant(node: ir.Node) -> bool:
    operands = [value for value in node.inputs if value is not None]
    return bool(operands) and all(constant_tensor(value) is not None for value in operands)


def _reason_to_keep(node: ir.Node, growth: float) -> str | None:
    """Why a node with constant operands must not be evaluated, None where it may be."""
    if node.domain not in ("", "ai.onnx"):
        return f"operator {node.domain}::{node.op_type} is not known"
    if is_op(node, *_KEEP):
        return "it holds a quantized weight"
    if len(node.outputs) != 1:
        return "it has several results"
    if any(value.dtype == ir.DataType.STRING for value in (*node.inputs, *node.outputs) if value is not None):
        return "it computes with strings"
    shape = static_shape(node.outputs[0])
    if shape is None:
        return "the size of its result is not known beforehand"
    operands = sum(value.const_value.size for value in node.inputs if value is not None and value.const_value)
    if math.prod(shape) > max(_SMALL, growth * operands):
        return f"its result has {math.prod(shape)} elements, its operands {operands}"
    return None
