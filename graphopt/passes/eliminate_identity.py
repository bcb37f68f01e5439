"""Pass eliminate-identity: nodes that hand on their operand unchanged go, and so do detours of layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.rewrite import (
    DeclinedError,
    Rewriter,
    constant,
    integers,
    is_op,
    known_dim,
    rank,
    set_attributes,
)
from graphopt.passes.contract import Context, Pass, Semantics

_UNBOUNDED = 2**31 - 1
"""Ends from here on mean "to the end" in Slice: exporters write the largest int32 or int64."""


@dataclass(frozen=True)
class EliminateIdentity(Pass):
    """Remove nodes whose result equals their operand, and shorten chains of Transpose and Reshape.

    Removed where provably without effect: Identity, Cast to the same type, Dropout at inference, Reshape,
    Expand and Slice that keep the shape, Transpose that keeps the order, Pad of nothing, Concat, Sum, Max,
    Min, Mean and Split of one, and arithmetic with a neutral scalar (x * 1, x / 1, x + 0, x - 0). Shortened::

        Transpose[p](Transpose[q](x))  =  Transpose[q[p]](x)
        Reshape[s](R(x))               =  Reshape[s](x)     R = Reshape, Flatten, Squeeze, Unsqueeze; no 0 in s

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
    if node.domain not in ("", "ai.onnx") or not node.inputs or not node.outputs:
        return False
    if is_op(node, "Transpose") and _merge_transposes(rewriter, node):
        return True
    if is_op(node, "Reshape") and _skip_reshape(rewriter, node):
        return True
    find = _OPERAND_KEPT.get(node.op_type)
    kept = None if find is None else find(node)
    if kept is None:
        return False
    if not rewriter.bypass(node.outputs[0], kept):
        raise DeclinedError("its result is a graph output, whose name its operand cannot take")
    return True


# One function an operator: the operand that the result equals, or None -------------------------------------


def _first(node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _only_one(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _cast(node: ir.Node) -> ir.Value | None:
    value = node.inputs[0]
    target = node.attributes["to"].as_int()
    return value if value is not None and value.dtype is not None and int(value.dtype) == target else None


def _dropout(node: ir.Node) -> ir.Value | None:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise DeclinedError("the mask of Dropout is read")
    training = _operand(node, 2)
    if training is None:
        return node.inputs[0]
    switch = constant(training)
    if switch is None or bool(switch.reshape(-1)[0]):
        raise DeclinedError("Dropout is in training mode, or may be")
    return node.inputs[0]


def _split(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if len(node.outputs) == 1 else None


def _transpose(node: ir.Node) -> ir.Value | None:
    order = _permutation(node)
    return node.inputs[0] if order is not None and order == tuple(range(len(order))) else None


def _reshape(node: ir.Node) -> ir.Value | None:
    """A no-op where each entry keeps its dimension, at most one of them by being -1."""
    value, target = node.inputs[0], _integer_operand(node, 1)
    if value is None or target is None or rank(value) != len(target):
        return None
    allow_zero = node.attributes.get("allowzero")
    zero_copies = allow_zero is None or not allow_zero.as_int()
    changed = [
        entry
        for axis, entry in enumerate(target)
        if not (entry == 0 and zero_copies) and entry != known_dim(value, axis)
    ]
    return value if not changed or changed == [-1] else None


def _expand(node: ir.Node) -> ir.Value | None:
    value, target = node.inputs[0], _integer_operand(node, 1)
    if value is None or target is None:
        return None
    of_rank = rank(value)
    if of_rank is None or len(target) > of_rank:
        return None
    kept = all(entry in (1, known_dim(value, axis - len(target))) for axis, entry in enumerate(target))
    return value if kept else None


def _pad(node: ir.Node) -> ir.Value | None:
    amounts = integers(node, "pads")
    amounts = _integer_operand(node, 1) if amounts is None else amounts
    return node.inputs[0] if amounts is not None and not any(amounts) else None


def _slice(node: ir.Node) -> ir.Value | None:
    value = node.inputs[0]
    starts, ends = _integer_operand(node, 1), _integer_operand(node, 2)
    if value is None or starts is None or ends is None:
        return None
    axes = range(len(starts)) if _operand(node, 3) is None else _integer_operand(node, 3)
    steps = (1,) * len(starts) if _operand(node, 4) is None else _integer_operand(node, 4)
    if axes is None or steps is None:
        return None
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = known_dim(value, axis)
        to_end = end >= _UNBOUNDED or (size is not None and end >= size)
        if start != 0 or step != 1 or not to_end:
            return None
    return value


def _neutral(element: float, *, either_side: bool) -> Callable[[ir.Node], ir.Value | None]:
    def find(node: ir.Node) -> ir.Value | None:
        left, right = node.inputs
        pairs = [(left, right), (right, left)] if either_side else [(left, right)]
        for value, number in pairs:
            array = constant(number)
            if value is None or array is None or array.size != 1 or constant(value) is not None:
                continue
            of_rank = rank(value)
            adds_no_axis = array.ndim == 0 or (of_rank is not None and array.ndim <= of_rank)
            if adds_no_axis and float(array.reshape(-1)[0]) == element:
                return value
        return None

    return find


_OPERAND_KEPT: Mapping[str, Callable[[ir.Node], ir.Value | None]] = {
    "Identity": _first,
    "Cast": _cast,
    "Dropout": _dropout,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "Pad": _pad,
    "Slice": _slice,
    "Concat": _only_one,
    "Sum": _only_one,
    "Max": _only_one,
    "Min": _only_one,
    "Mean": _only_one,
    "Split": _split,
    "Mul": _neutral(1.0, either_side=True),
    "Div": _neutral(1.0, either_side=False),
    "Add": _neutral(0.0, either_side=True),
    "Sub": _neutral(0.0, either_side=False),
}


# Chains -----------------------------------------------------------------------------------------------------


def _merge_transposes(rewriter: Rewriter, node: ir.Node) -> bool:
    value = node.inputs[0]
    inner = None if value is None else value.producer()
    if inner is None or not is_op(inner, "Transpose") or inner.graph is not node.graph:
        return False
    outer_order, inner_order = _permutation(node), _permutation(inner)
    if outer_order is None or inner_order is None or inner.inputs[0] is None:
        return False
    set_attributes(node, perm=tuple(inner_order[axis] for axis in outer_order))
    rewriter.redirect(node, 0, inner.inputs[0])
    return True


def _skip_reshape(rewriter: Rewriter, node: ir.Node) -> bool:
    """Reshape reads what an earlier change of shape read: only the order of the elements counts."""
    value, target = node.inputs[0], _integer_operand(node, 1)
    inner = None if value is None else value.producer()
    if inner is None or not is_op(inner, "Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        return False
    if inner.graph is not node.graph or inner.inputs[0] is None or target is None or 0 in target:
        return False
    rewriter.redirect(node, 0, inner.inputs[0])
    return True


def _permutation(node: ir.Node) -> tuple[int, ...] | None:
    order = integers(node, "perm")
    if order is not None:
        return order
    of_rank = None if node.inputs[0] is None else rank(node.inputs[0])
    return None if of_rank is None else tuple(reversed(range(of_rank)))


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _integer_operand(node: ir.Node, index: int) -> Sequence[int] | None:
    array = constant(_operand(node, index))
    return None if array is None else [int(entry) for entry in np.asarray(array).reshape(-1)]
