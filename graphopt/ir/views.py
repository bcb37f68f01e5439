"""Which axis of a value is which part of an earlier value's axes, through any chain of Reshape, Transpose and kin.

An axis is a list of atoms: pieces of the axes of the value where the chain starts. Transpose moves atoms, Reshape
cuts and joins them, Expand adds one that repeats. Two chains that spell the same rearrangement differently (two
Reshapes around a Transpose, a four-dimensional Transpose) end in the same atoms, so that matching needs no list of
spellings. Axes of one element have no atom: they carry nothing. Taking one entry of an axis (packed projections) ends
in an axis of one element, too, and in a note of which entry it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.ir.dimensions import Dimension, dimensions, product, quotient
from graphopt.ir.identities import integer_operand
from graphopt.ir.match import scalar
from graphopt.ir.rewrite import constant, integers, is_op

REPEATED = -1
"""First number of the origin of an atom that Expand added."""


@dataclass(frozen=True)
class Atom:
    """A piece of an axis.

    Attributes:
        origin: index of the axis at the start of the chain, then which piece of it, and of that piece ...:
            sorted by origin, the atoms are in the order of the start's memory.
        size: number of elements.
    """

    origin: tuple[int, ...]
    size: Dimension


Axes = tuple[tuple[Atom, ...], ...]
"""The atoms of each axis, outermost first."""


@dataclass(frozen=True)
class Part:
    """One entry of an axis.

    Attributes:
        atom: the axis, whole.
        index: which entry, from 0.
    """

    atom: Atom
    index: int


@dataclass(frozen=True)
class View:
    """A value as a rearrangement of `base`, or of a part of it, times a number.

    Attributes:
        base: where the chain starts.
        axes: the axes of the viewed value in atoms of `base`.
        scale: product of the constants multiplied on the way.
        nodes: the nodes between.
        part: the entry of an axis of `base` that was taken; None where all of `base` is there.
    """

    base: ir.Value
    axes: Axes
    scale: float
    nodes: frozenset[ir.Node]
    part: Part | None = None


def views(value: ir.Value) -> Iterator[View]:
    """`value` as a view of each value on its chain, the farthest first and of itself last.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[2,5,12] x)
        ...     => (float[2,3,5,4] y) <int64[4] shape = {2,5,3,4}, float[2,5,3,4] a>
        ...     { a = Reshape(x, shape) y = Transpose<perm=[0,2,1,3]>(a) }''')
        >>> farthest = next(views(model.graph.outputs[0]))
        >>> farthest.base.name, [[atom.size for atom in axis] for axis in farthest.axes]
        ('x', [[2], [3], [5], [4]])
    """
    chain: list[tuple[ir.Value, ir.Value]] = []
    current = value
    while (data := _viewed(current)) is not None:
        chain.append((current, data))
        current = data
    for length in range(len(chain), -1, -1):
        view = _follow(chain[length - 1][1] if length else value, reversed(chain[:length]))
        if view is not None:
            yield view


def _follow(base: ir.Value, steps: Iterable[tuple[ir.Value, ir.Value]]) -> View | None:
    """The view of `base` that the steps make, each a result and the value that it rearranges."""
    axes, scale, part, nodes = start(base), 1.0, None, set[ir.Node]()
    for result, data in steps:
        node = result.producer()
        if axes is None or node is None:
            return None
        nodes.add(node)
        entry = _entry_taken(result)
        if entry is None:
            axes = apply(node, axes)
            scale *= _factor(node, data)
            continue
        axis, index = entry[0] % len(axes), entry[1]
        taken = axes[axis]
        if part is not None or len(taken) != 1 or not _has_entry(taken[0], index):
            return None
        part = Part(taken[0], index)
        axes = (*axes[:axis], *(() if node.op_type == "Gather" else ((),)), *axes[axis + 1 :])
    return None if axes is None else View(base, axes, scale, frozenset(nodes), part)


def _has_entry(atom: Atom, index: int) -> bool:
    return isinstance(atom.size, int) and index < atom.size


def start(value: ir.Value) -> Axes | None:
    """Every axis of `value` as one atom, None where its shape is not known."""
    shape = dimensions(value)
    if shape is None:
        return None
    return tuple(() if size == 1 else (Atom((axis,), size),) for axis, size in enumerate(shape))


def apply(node: ir.Node, axes: Axes) -> Axes | None:
    """The axes of a node's result from those of its data input; None where they cannot be told."""
    if is_op(node, "Transpose"):
        permutation = integers(node, "perm") or tuple(reversed(range(len(axes))))
        return tuple(axes[axis] for axis in permutation)
    shape = dimensions(node.outputs[0])
    if shape is None:
        return None
    if is_op(node, "Reshape", "Unsqueeze", "Squeeze", "Flatten"):
        return _regroup([atom for axis in axes for atom in axis], shape)
    if is_op(node, "Expand"):
        return _expand(axes, shape)
    return axes if is_op(node, "Mul", "Div") and len(shape) == len(axes) else None


def atoms(*axes: Sequence[Atom]) -> list[Atom]:
    """The atoms of several axes, one after the other."""
    return [atom for axis in axes for atom in axis]


def elements(axis: Sequence[Atom]) -> Dimension | None:
    """Number of elements of an axis; None where it is a product of symbols that have no algebra."""
    return product(atom.size for atom in axis)


def _viewed(value: ir.Value) -> ir.Value | None:
    """The value that `value` is a rearrangement, a multiple or an entry of; None where it is something else."""
    node = value.producer()
    if node is None:
        return None
    if is_op(node, "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Expand") or _entry_taken(value):
        return node.inputs[0]
    if not is_op(node, "Mul", "Div"):
        return None
    first, second = node.inputs
    if scalar(second) is not None:
        return first
    return second if node.op_type == "Mul" and scalar(first) is not None else None


def _entry_taken(value: ir.Value) -> tuple[int, int] | None:
    """Axis and index where `value` is one entry of an axis of its producer's data, else None."""
    node = value.producer()
    if node is None or not is_op(node, "Gather", "Split", "Slice"):
        return None
    attribute = node.attributes.get("axis")
    axes: Sequence[int] | None = [0 if attribute is None else attribute.as_int()]
    index: int | None = None
    if node.op_type == "Gather":
        array = constant(node.inputs[1])
        index = int(array) if array is not None and array.ndim == 0 else None
    elif node.op_type == "Split":
        index = value.index() if set(integer_operand(node, 1) or ()) == {1} else None
    else:
        starts, ends, axes, steps = (integer_operand(node, operand) for operand in range(1, 5))
        if starts and ends and len(starts) == 1 and ends[0] == starts[0] + 1 and steps in (None, [1]):
            index = starts[0]
    return (axes[0], index) if axes and index is not None and index >= 0 else None


def _factor(node: ir.Node, data: ir.Value) -> float:
    if not is_op(node, "Mul", "Div"):
        return 1.0
    number = scalar(node.inputs[1] if node.inputs[0] is data else node.inputs[0])
    assert number is not None
    return number if node.op_type == "Mul" else 1.0 / number if number else math.nan


def _regroup(flat: list[Atom], shape: Sequence[Dimension]) -> Axes | None:
    """Cut and join atoms, in order, so that the axes have the sizes of `shape`."""
    remaining = list(reversed(flat))
    axes: list[tuple[Atom, ...]] = []
    for size in shape:
        axis: list[Atom] = []
        missing: Dimension = size
        while missing != 1:
            if not remaining:
                return None
            atom = remaining.pop()
            left = quotient(missing, atom.size)
            if left is None:  # the axis ends within the atom, or does not come out at all
                rest = quotient(atom.size, missing)
                if rest is None:
                    return None
                remaining.append(Atom((*atom.origin, 1), rest))
                atom, left = Atom((*atom.origin, 0), missing), 1
            axis.append(atom)
            missing = left
        axes.append(tuple(axis))
    return None if remaining else tuple(axes)


def _expand(axes: Axes, shape: Sequence[Dimension]) -> Axes | None:
    if len(shape) < len(axes):
        return None
    padded = ((),) * (len(shape) - len(axes)) + axes
    return tuple(
        axis if axis or size == 1 else (Atom((REPEATED, index), size),)
        for index, (axis, size) in enumerate(zip(padded, shape, strict=True))
    )
