"""What a weight does to the channels of a group at the node that reads it: makes them, reads them, scales them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.criteria.ownership import Ownership
from graphopt.ir.ops.einsum import parse_equation

_CONVOLUTIONS = {("Conv", 1), ("DeformConv", 1), ("ConvInteger", 1), ("QLinearConv", 3)}
"""Operators and the index of weights [M, C / group, kernel]."""
_PRODUCTS = {
    *(("MatMul", 0), ("MatMul", 1), ("MatMulInteger", 0), ("MatMulInteger", 1)),
    *(("QLinearMatMul", 0), ("QLinearMatMul", 3), ("FusedMatMul", 0), ("FusedMatMul", 1)),
}
_TABLES = {"Gather", "GatherND", "GatherElements"}
_RECURRENT = {"LSTM", "GRU", "RNN"}
_SCALES = {
    *((name, 1) for name in ("BatchNormalization", "LayerNormalization", "RMSNormalization", "GroupNormalization")),
    *(("InstanceNormalization", 1), ("SimplifiedLayerNormalization", 1)),
    *(("SkipLayerNormalization", 2), ("SkipSimplifiedLayerNormalization", 2)),
    *(("Mul", 0), ("Mul", 1), ("Div", 1)),
}
_SHIFTS = {
    *((name, 2) for name in ("BatchNormalization", "LayerNormalization", "GroupNormalization")),
    *(("InstanceNormalization", 2), ("SkipLayerNormalization", 3), ("SkipLayerNormalization", 4)),
    *(("SkipSimplifiedLayerNormalization", 3), ("Conv", 2), ("ConvTranspose", 2), ("Gemm", 2), ("DeformConv", 3)),
    *(("QLinearConv", 8), ("LSTM", 3), ("GRU", 3), ("RNN", 3)),
    *(("Add", 0), ("Add", 1), ("Sub", 0), ("Sub", 1), ("Sum", 0), ("Sum", 1)),
}
_STATISTICS = {("BatchNormalization", 3), ("BatchNormalization", 4)}
_OF_THE_OPERATOR = {"Conv", "ConvTranspose", "Gemm", "DeformConv", "QLinearConv", *_RECURRENT}
"""Operators whose shift belongs to what they make, so that their data need not carry the channels."""


class Role(enum.Enum):
    """What a weight does to the channels on one of its axes."""

    PRODUCER = "producer"
    """A linear operator (or an embedding) makes the channels: they are on its output axis."""
    CONSUMER = "consumer"
    """A linear operator reads the channels: it sums over them."""
    DEPTHWISE = "depthwise"
    """A linear operator makes each channel of itself: depthwise convolutions, whole groups, batched products."""
    SCALE = "scale"
    """Multiplies channels one by one: the scale of a normalisation, a gate, LayerScale."""
    SHIFT = "shift"
    """Is added to channels one by one: biases."""
    STATISTIC = "statistic"
    """Mean and variance of BatchNormalization."""
    OTHER = "other"
    """Anything else that units own: slopes, states, tables."""


@dataclass(frozen=True)
class Placing:
    """Where the channels of a group are in a weight.

    Attributes:
        role: what the weight does to them.
        axis: the axis of the weight.
        groups: above 1 where the weight is to be regrouped, so that its first axis is that of `along`.
        along: the value and the axis that the first axis of the regrouped weight is aligned with.
    """

    role: Role
    axis: int
    groups: int
    along: tuple[ir.Value, int]


def placing(node: ir.Node, index: int, axis: int, ownership: Ownership, weights: set[ir.Value]) -> Placing:
    """The role that input `index` of a node, a weight, has for the channels on its axis `axis`."""
    value = node.inputs[index]
    assert value is not None
    shape = tuple(part.axis.size for part in ownership.group.analysed.analysis.state.tracks[value])
    plain = Placing(_vector_role(node, index, ownership, weights), axis, 1, (value, axis))
    sides = _sides(node, index, shape, ownership)
    if sides is None:
        return plain
    made, read = sides
    data = _data(node, index, ownership, weights)
    groups = _groups(node)
    if axis in made:
        within = groups > 1 and not any(other in ownership.axes(value) for other in read)
        if within and data:
            return Placing(Role.DEPTHWISE, axis, 1, (value, axis))
        if node.op_type == "ConvTranspose" and groups > 1 and 1 in ownership.axes(node.outputs[0]):
            return Placing(Role.PRODUCER, axis, groups, (node.outputs[0], 1))
        return Placing(Role.PRODUCER, axis, 1, (value, axis))
    if axis in read:
        if node.op_type == "ConvTranspose" and groups > 1 and not any(other in ownership.axes(value) for other in made):
            through = any(ownership.axes(output) for output in node.outputs)
            return Placing(Role.DEPTHWISE if through else Role.CONSUMER, axis, 1, (value, axis))
        if (node.op_type, index) in _CONVOLUTIONS and groups > 1 and data:
            return Placing(Role.CONSUMER, axis, groups, (data[0], 1))
        return Placing(Role.CONSUMER, axis, 1, (value, axis))
    return Placing(Role.DEPTHWISE if len(shape) > 1 else plain.role, axis, 1, (value, axis))


def is_linear(node: ir.Node, index: int) -> bool:
    """Whether input `index` is the weight of an operator that is linear in it, or a table that is looked up."""
    key = (node.op_type, index)
    recurrent = node.op_type in _RECURRENT and index in (1, 2)
    product = key in _CONVOLUTIONS | _PRODUCTS or key == ("ConvTranspose", 1) or node.op_type == "Einsum"
    return product or recurrent or (node.op_type == "Gemm" and index < 2) or (node.op_type in _TABLES and index == 0)


def _sides(
    node: ir.Node, index: int, shape: tuple[int, ...], ownership: Ownership
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Axes of a weight that make channels and axes that are summed over, None where the operator is not linear."""
    last = len(shape) - 1
    key = (node.op_type, index)
    if key in _CONVOLUTIONS:
        return (0,), (1,)
    if key == ("ConvTranspose", 1):
        return (1,), (0,)
    if node.op_type in _RECURRENT and index in (1, 2):
        return (1,), (2,)
    if node.op_type in _TABLES and index == 0:
        return tuple(range(last + 1)), ()
    if node.op_type == "Einsum":
        return _einsum_sides(node, index, ownership)
    if node.op_type != "Gemm" and key not in _PRODUCTS:
        return None
    if node.op_type == "Gemm" and index > 1:
        return None
    if last == 0:
        return (), (0,)
    second = node.op_type == "Gemm" and index == 1
    second = second or (node.op_type != "Gemm" and index in (1, 3))
    made, read = (last, last - 1) if second else (last - 1, last)
    swapped = node.attributes.get("transB" if second else "transA")
    return ((read,), (made,)) if swapped is not None and swapped.value else ((made,), (read,))


def _einsum_sides(node: ir.Node, index: int, ownership: Ownership) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    tracks = ownership.group.analysed.analysis.state.tracks
    shapes: list[tuple[int, ...]] = []
    for value in node.inputs:
        if value is None or value not in tracks:
            return None
        shapes.append(tuple(track.axis.size for track in tracks[value]))
    terms, output = parse_equation(node.attributes["equation"].as_string(), shapes)
    others = {letter for position, term in enumerate(terms) if position != index for letter in term}
    made = tuple(axis for axis, letter in enumerate(terms[index]) if letter in output and letter not in others)
    read = tuple(axis for axis, letter in enumerate(terms[index]) if letter not in output)
    return made, read


def _vector_role(node: ir.Node, index: int, ownership: Ownership, weights: set[ir.Value]) -> Role:
    """The role of a weight of an operator that is not linear."""
    key = (node.op_type, index)
    if key in _STATISTICS:
        return Role.STATISTIC
    carried = bool(_data(node, index, ownership, weights))
    if key in _SHIFTS and (carried or node.op_type in _OF_THE_OPERATOR):
        return Role.SHIFT
    if carried:
        return Role.SCALE if key in _SCALES else Role.OTHER
    passes = any(ownership.axes(output) for output in node.outputs)
    return Role.PRODUCER if passes else Role.OTHER


def _data(node: ir.Node, index: int, ownership: Ownership, weights: set[ir.Value]) -> list[ir.Value]:
    """The computed operands of a node that carry the channels."""
    return [
        value
        for position, value in enumerate(node.inputs)
        if position != index and value is not None and value not in weights and ownership.axes(value)
    ]


def _groups(node: ir.Node) -> int:
    attribute = node.attributes.get("group")
    return 1 if attribute is None else int(attribute.value)
