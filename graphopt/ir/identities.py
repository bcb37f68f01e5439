"""Nodes that hand on one of their operands unchanged: which they are, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir.rewrite import DeclinedError, Rewriter, constant, integers, known_dim, rank

_UNBOUNDED = 2**31 - 1
"""Ends from here on mean "to the end" in Slice: exporters write the largest int32 or int64."""


def remove_no_op(rewriter: Rewriter, node: ir.Node) -> bool:
    """Let readers of a no-op read its operand. A rule for `Rewriter.until_stable`.

    Raises:
        DeclinedError: nothing happens in the node, but its result is a graph output that must keep its name, or
            it is a Dropout that may be active.
    """
    kept = kept_operand(node)
    if kept is None:
        return False
    if not rewriter.bypass(node.outputs[0], kept):
        raise DeclinedError("its result is a graph output, whose name its operand cannot take")
    return True


def kept_operand(node: ir.Node) -> ir.Value | None:
    """The operand that output 0 of the node provably equals, or None."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or not node.outputs:
        return None
    find = _OPERAND_KEPT.get(node.op_type)
    return None if find is None else find(node)


def permutation(node: ir.Node) -> tuple[int, ...] | None:
    """Order of axes of a Transpose, the default written out; None where that needs a rank that is unknown."""
    order = integers(node, "perm")
    if order is not None:
        return order
    of_rank = None if node.inputs[0] is None else rank(node.inputs[0])
    return None if of_rank is None else tuple(reversed(range(of_rank)))


def integer_operand(node: ir.Node, index: int) -> Sequence[int] | None:
    """A constant integer operand as a flat list, None where it is absent or computed."""
    array = constant(_operand(node, index))
    return None if array is None else [int(entry) for entry in np.asarray(array).reshape(-1)]


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
    order = permutation(node)
    return node.inputs[0] if order is not None and order == tuple(range(len(order))) else None


def _reshape(node: ir.Node) -> ir.Value | None:
    """A no-op where each entry keeps its dimension, at most one of them by being -1."""
    value, target = node.inputs[0], integer_operand(node, 1)
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
    value, target = node.inputs[0], integer_operand(node, 1)
    if value is None or target is None:
        return None
    of_rank = rank(value)
    if of_rank is None or len(target) > of_rank:
        return None
    kept = all(entry in (1, known_dim(value, axis - len(target))) for axis, entry in enumerate(target))
    return value if kept else None


def _pad(node: ir.Node) -> ir.Value | None:
    amounts = integers(node, "pads")
    amounts = integer_operand(node, 1) if amounts is None else amounts
    return node.inputs[0] if amounts is not None and not any(amounts) else None


def _slice(node: ir.Node) -> ir.Value | None:
    value = node.inputs[0]
    starts, ends = integer_operand(node, 1), integer_operand(node, 2)
    if value is None or starts is None or ends is None:
        return None
    axes = range(len(starts)) if _operand(node, 3) is None else integer_operand(node, 3)
    steps = (1,) * len(starts) if _operand(node, 4) is None else integer_operand(node, 4)
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
            if value is None or array is None or array.size == 0 or constant(value) is not None:
                continue
            if _broadcasts_to(array.shape, value) and bool((array == element).all()):
                return value
        return None

    return find


def _broadcasts_to(shape: Sequence[int], value: ir.Value) -> bool:
    """Whether a constant of this shape leaves the shape of the value beside it as it is.

    Not a vector: that is the bias of a layer, which kernels add for nothing, and a network before training is full of
    zero ones.
    """
    if len(shape) == 1 < shape[0]:
        return False
    of_rank = rank(value)
    if shape and (of_rank is None or len(shape) > of_rank):
        return False
    return all(size in (1, known_dim(value, axis - len(shape))) for axis, size in enumerate(shape))


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


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
