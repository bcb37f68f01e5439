"""Pass eliminate-identity: nodes that hand on their operand unchanged go, and so do detours of layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.identities import integer_operand, permutation, remove_no_op
from graphopt.ir.rewrite import Rewriter, constant, is_op, set_attributes
from graphopt.passes.contract import Context, Pass, Semantics

_SCALED = ("Mul", "Add", "Sub", "Div")
_MOVED = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Gather", "Identity", "Expand", "Slice")


@dataclass(frozen=True)
class EliminateIdentity(Pass):
    """Remove nodes whose result equals their operand, and shorten chains of Transpose and Reshape.

    Removed where provably without effect: Identity, Cast to the same type, Dropout at inference, Reshape,
    Expand and Slice that keep the shape, Transpose that keeps the order, Pad of nothing, Concat, Sum, Max,
    Min, Mean and Split of one, and arithmetic with a neutral scalar (x * 1, x / 1, x + 0, x - 0). Shortened::

        Transpose[p](Transpose[q](x))  =  Transpose[q[p]](x)
        Reshape[s](R(x))               =  Reshape[s](x)     R = Reshape, Flatten, Squeeze, Unsqueeze; no 0 in s

    The guard Where(IsNaN(p), 0, p) of p = Softmax(s), which torch exports with every attention, is for rows that a
    mask of minus infinity covers whole. It goes where s is a product of activations, scaled, with nothing but finite
    constants added: such rows have no NaN unless activations have overflowed before.

    A run-time dimension counts as unknown: a node stays where only its value could show that nothing happens.
    Output names are interface: an Identity from an input straight to an output stays.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2,3] x) => (float[N,2,3] y) {
          a = Identity (x)
          b = Transpose <perm = [0, 2, 1]> (a)
          c = Transpose <perm = [0, 2, 1]> (b)
          y = Relu (c)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,2,3] x) => (float[N,2,3] y) {
          y = Relu (x)
        }
    """

    name: ClassVar[str] = "eliminate-identity"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Remove and shorten until nothing is left to do."""
        Rewriter(model).until_stable(_simplify, "eliminate identity", context.missed)


def _simplify(rewriter: Rewriter, node: ir.Node) -> bool:
    if is_op(node, "Transpose") and _merge_transposes(rewriter, node):
        return True
    if is_op(node, "Reshape") and _skip_reshape(rewriter, node):
        return True
    if is_op(node, "Where") and _skip_guard(rewriter, node):
        return True
    return remove_no_op(rewriter, node)


# Guards -----------------------------------------------------------------------------------------------------


def _skip_guard(rewriter: Rewriter, node: ir.Node) -> bool:
    """Where(IsNaN(p), z, p) is p, where p is never NaN."""
    condition, guarded = node.inputs[0], node.inputs[2]
    test = None if condition is None else condition.producer()
    softmax = None if guarded is None else guarded.producer()
    if guarded is None or softmax is None or not is_op(test, "IsNaN") or not is_op(softmax, "Softmax"):
        return False
    if test is None or test.inputs[0] is not guarded or softmax.graph is not node.graph:
        return False
    shape = node.outputs[0].shape
    same = shape is not None and guarded.shape == shape  # what stands in for NaN may add axes
    return same and _is_product(softmax.inputs[0]) and rewriter.bypass(node.outputs[0], guarded)


def _is_product(value: ir.Value | None) -> bool:
    """Whether a value is a product of activations or a finite constant, or moved, scaled and added from such alone."""
    array, node = constant(value), None if value is None else value.producer()
    if array is not None:
        return bool(np.isfinite(array).all())
    if is_op(node, "MatMul", "Gemm", "Conv"):
        return True
    if node is None or not is_op(node, *_SCALED, *_MOVED):
        return False
    if is_op(node, "Div"):
        divisor = constant(node.inputs[1])
        return divisor is not None and bool(divisor.all()) and _is_product(node.inputs[0])
    return all(map(_is_product, node.inputs if is_op(node, *_SCALED) else node.inputs[:1]))


# Chains -----------------------------------------------------------------------------------------------------


def _merge_transposes(rewriter: Rewriter, node: ir.Node) -> bool:
    value = node.inputs[0]
    inner = None if value is None else value.producer()
    if inner is None or not is_op(inner, "Transpose") or inner.graph is not node.graph:
        return False
    outer_order, inner_order = permutation(node), permutation(inner)
    if outer_order is None or inner_order is None or inner.inputs[0] is None:
        return False
    set_attributes(node, perm=tuple(inner_order[axis] for axis in outer_order))
    rewriter.redirect(node, 0, inner.inputs[0])
    return True


def _skip_reshape(rewriter: Rewriter, node: ir.Node) -> bool:
    """Reshape reads what an earlier change of shape read: only the order of the elements counts."""
    value, target = node.inputs[0], integer_operand(node, 1)
    inner = None if value is None else value.producer()
    if inner is None or not is_op(inner, "Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        return False
    if inner.graph is not node.graph or inner.inputs[0] is None or target is None or 0 in target:
        return False
    rewriter.redirect(node, 0, inner.inputs[0])
    return True
