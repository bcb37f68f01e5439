"""Operands of attention: from which projections heads are cut, and where they are put side by side again."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt.ir.dimensions import dimensions, quotient
from graphopt.ir.rewrite import is_op, rank
from graphopt.ir.views import REPEATED, Atom, Axes, Part, View, apply, atoms, elements, start, views

_MOST_SIZE_NODES = 32
"""More nodes than this never compute the sizes of one Reshape."""


@dataclass(frozen=True)
class Operand:
    """q, k or v: the value to read, and its heads.

    Attributes:
        base: the value that the operator reads; [B, S, H D] when flat, else [B, H, S, D].
        flat: whether `base` is the 3-D form.
        permutation: Transpose that makes `base` [B, H, S, D]; None where it is in order already.
        heads: number of heads in `base`.
        scale: constant factor between `base` and the operand.
        nodes: the nodes between.
        part: which of how many equal blocks of the last axis of `base` it is, for packed projections.
    """

    base: ir.Value
    flat: bool
    permutation: tuple[int, ...] | None
    heads: int
    scale: float
    nodes: frozenset[ir.Node]
    part: Part | None = None


def read_operand(value: ir.Value, flat: bool, width_axis: int) -> Operand | None:
    """Where the operator can read q, k or v from, in the wanted form; None where it cannot.

    Args:
        value: the operand of the product, [B, H, S, D], or [B, H, D, S] for transposed keys.
        flat: whether the 3-D form is wanted.
        width_axis: axis of `value` that is the width of a head: 3, or 2 for transposed keys.
    """
    permuted: Operand | None = None
    for view in views(value):
        if len(view.axes) != 4 or rank(view.base) != (3 if flat else 4) or (view.part and not flat):
            continue
        batch, head, token, width = (view.axes[axis] for axis in (0, 1, 5 - width_axis, width_axis))
        own = [atom for atom in head if atom.origin[0] != REPEATED]
        block = () if view.part is None else (view.part.atom,)  # outermost: entries are blocks of the last axis
        wanted: Axes = (batch, token, (*block, *own, *width)) if flat else (batch, tuple(own), token, width)
        heads = elements(own)
        if not isinstance(heads, int) or tuple(own) != head[: len(own)]:
            continue
        permutation = _permutation(view, wanted)
        if permutation == tuple(range(len(wanted))):
            return Operand(view.base, flat, None, heads, view.scale, view.nodes, view.part)
        if permutation is not None and permuted is None:
            permuted = Operand(view.base, flat, permutation, heads, view.scale, view.nodes)
    return None if flat else permuted


def _permutation(view: View, wanted: Axes) -> tuple[int, ...] | None:
    """The axis of the base that each wanted axis is, None where one is not a whole axis of the base."""
    base = start(view.base)
    assert base is not None
    own_axis = [group[0].origin[0] if group else None for group in wanted]
    free = iter(axis for axis in range(len(base)) if axis not in own_axis)
    permutation = tuple(next(free, -1) if axis is None else axis for axis in own_axis)
    for axis, group in zip(permutation, wanted, strict=True):
        if axis < 0 or any(atom.origin[0] != axis for atom in group) or list(group) != sorted(group, key=_origin):
            return None
        size, whole = elements(group), elements(base[axis])
        if size is None or whole is None or quotient(size, whole) != 1:
            return None
    return permutation if len(set(permutation)) == len(permutation) else None


def _origin(atom: Atom) -> tuple[int, ...]:
    return atom.origin


def joined(output: ir.Value) -> tuple[ir.Value | None, frozenset[ir.Node]]:
    """Where the heads of `output` are put side by side again, and the nodes between.

    That is the value [B, S, H D], else the last one on the way that has the elements in this order and whose shape a
    Reshape can be told; None where there is neither.
    """
    axes, value, nodes = start(output), output, frozenset[ir.Node]()
    wanted = None if axes is None else _join(axes)
    found: tuple[ir.Value | None, frozenset[ir.Node]] = (None, nodes)
    while axes is not None and wanted is not None:
        consumer = _sole_reader(value)
        if consumer is None or not is_op(consumer, "Transpose", "Reshape", "Squeeze", "Unsqueeze"):
            break
        axes = apply(consumer, axes)
        value, nodes = consumer.outputs[0], nodes | {consumer}
        if axes is not None and _origins(axes) == _origins(wanted):
            return value, nodes
        if axes is not None and atoms(*axes) == atoms(*wanted) and reshape_target(output, value) is not None:
            found = value, nodes
    return found


def _sole_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads the elements of `value`, in the same graph; those that read its shape do not count."""
    readers = [use.node for use in value.uses() if not is_op(use.node, "Shape")]
    producer = value.producer()
    if len(readers) != 1 or value.is_graph_output() or producer is None or readers[0].graph is not producer.graph:
        return None
    return readers[0]


def reshape_target(output: ir.Value, result: ir.Value) -> list[int] | None:
    """What a Reshape of [B, S, H D] to the shape of `result` must be told, None where it cannot be constant."""
    heads, shape = dimensions(output), dimensions(result)
    if heads is None or shape is None or 0 in shape:
        return None
    batch_and_tokens = (heads[0], heads[2])
    target = [
        size if isinstance(size, int) else 0 if batch_and_tokens[axis : axis + 1] == (size,) else -1
        for axis, size in enumerate(shape)
    ]
    return target if target.count(-1) <= 1 else None


def with_sizes(nodes: frozenset[ir.Node], end: ir.Value) -> frozenset[ir.Node]:
    """`nodes`, and what computes sizes out of the shapes of their inner values.

    torchscript reads the batch size of the result off an inner value to write the Reshape that joins the heads. Where
    such a size is wanted elsewhere, too, the caller's check finds a reader outside.
    """
    found = set(nodes)
    waiting = [
        use.node
        for node in nodes
        for value in node.outputs
        if value is not end
        for use in value.uses()
        if is_op(use.node, "Shape")
    ]
    while waiting and len(found) < len(nodes) + _MOST_SIZE_NODES:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [use.node for value in node.outputs for use in value.uses()]
    return frozenset(found)


def _join(axes: Axes | None) -> Axes:
    assert axes is not None
    batch, head, token, width = axes
    return batch, token, (*head, *width)


def _origins(axes: Axes) -> list[list[tuple[int, ...]]]:
    return [[atom.origin for atom in axis] for axis in axes]
