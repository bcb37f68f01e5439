"""Where insertions go: the linear layers of a graph, and which axes of their weights mean what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.rewrite import integers, is_op, sole_consumer

_WEIGHT_INDEX = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1, 0), "MatMul": (1, 0)}
"""Inputs that may hold the weight, in the order of trying."""


@dataclass(frozen=True)
class LinearLayer:
    """A Conv, ConvTranspose, Gemm or MatMul with a stored weight, directly or through a Transpose or Cast.

    Attributes:
        node: the operator.
        weight: the initializer.
        data: the other operand.
        bias: the initializer that is added, [channels], or None.
        result: value after the bias.
        output_axis: axis of the stored weight that has the output channels; None where groups mix them with others.
        input_axis: axis of the stored weight that products are summed over (channels of one group).
        channel_axis: axis of the result that has the output channels, negative for MatMul.
        channels: number of output channels.
    """

    node: ir.Node
    weight: ir.Value
    data: ir.Value
    bias: ir.Value | None
    result: ir.Value
    output_axis: int | None
    input_axis: int
    channel_axis: int
    channels: int

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stored weight."""
        return stored_shape(self.weight)


def linear_layers(model: ir.Model) -> list[LinearLayer]:
    """Every linear layer of the main graph, in graph order.

    Raises:
        GraphoptError: `model` is no graph.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[1,2] x) => (float[1,2] y)
        ...     <float[2,2] w = {1, 0, 0, 1}> { t = Transpose<perm=[1, 0]>(w) h = MatMul(x, t) y = Relu(h) }''')
        >>> [(layer.weight.name, layer.output_axis) for layer in linear_layers(model)]
        [('w', 0)]
    """
    if not isinstance(model, ir.Model):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GraphoptError(f"a {type(model).__name__} is no graph", help="pass the onnx_ir.Model that is lifted")
    found = (_layer(node) for node in model.graph if node.domain == "" and node.op_type in _WEIGHT_INDEX)
    return [layer for layer in found if layer is not None]


def stored_shape(value: ir.Value) -> tuple[int, ...]:
    """Shape of an initializer."""
    assert value.const_value is not None
    return tensor_shape(value.const_value)


def is_edge(layer: LinearLayer, layers: Sequence[LinearLayer]) -> bool:
    """Whether no linear layer is before this one, or none behind.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[1,2] x) => (float[1,2] y)
        ...     <float[2,2] a = {1, 0, 0, 1}, float[2,2] b = {1, 0, 0, 1}, float[2,2] c = {1, 0, 0, 1}>
        ...     { h = MatMul(x, a) k = MatMul(h, b) y = MatMul(k, c) }''')
        >>> layers = linear_layers(model)
        >>> [is_edge(layer, layers) for layer in layers]
        [True, False, True]
    """
    others = {other.node for other in layers}
    return not _reaches(layer.data, others, forward=False) or not _reaches(layer.result, others, forward=True)


def _reaches(value: ir.Value, nodes: set[ir.Node], *, forward: bool) -> bool:
    """Whether the producers (or the consumers) of a value lead to one of the nodes."""
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop()
        producer = current.producer()
        found = list(current.consumers()) if forward else ([] if producer is None else [producer])
        for node in found:
            if node in nodes:
                return True
            further = node.outputs if forward else node.inputs
            fresh = [other for other in further if other is not None and other not in seen]
            seen.update(fresh)
            waiting += fresh
    return False


def _layer(node: ir.Node) -> LinearLayer | None:
    for index in _WEIGHT_INDEX[node.op_type]:
        operand, data = node.inputs[index], node.inputs[1 - index]
        source = _stored(operand)
        if source is None or data is None or _stored(data) is not None:
            continue
        weight, permutation = source
        if len(permutation) >= 2:
            return _view(node, index, weight, data, permutation)
    return None


def _stored(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...]] | None:
    """The float initializer behind a value, and which of its axes each axis of the value is."""
    if value is None:
        return None
    if value.is_initializer() and value.const_value is not None and not value.is_graph_input():
        if not value.const_value.dtype.is_floating_point():
            return None
        return value, tuple(range(len(stored_shape(value))))
    producer = value.producer()
    if producer is None or not is_op(producer, "Transpose", "Cast"):
        return None
    inner = _stored(producer.inputs[0])
    if inner is None or is_op(producer, "Cast"):
        return inner
    order = integers(producer, "perm") or tuple(reversed(range(len(inner[1]))))
    return inner[0], tuple(inner[1][axis] for axis in order)


def _view(
    node: ir.Node, index: int, weight: ir.Value, data: ir.Value, permutation: tuple[int, ...]
) -> LinearLayer | None:
    rank, channel_axis = len(permutation), 1
    output: int | None
    if is_op(node, "Conv"):
        output, summed = 0, 1
    elif is_op(node, "ConvTranspose"):
        group = node.attributes.get("group")
        output, summed = (1 if group is None or group.value == 1 else None), 0
    else:
        swapped = node.attributes.get("transB" if index == 1 else "transA")
        output, summed = (rank - 1, rank - 2) if index == 1 else (rank - 2, rank - 1)
        if swapped is not None and swapped.value:
            output, summed = summed, output
        channel_axis = index - 2 if is_op(node, "MatMul") else index
    shape = stored_shape(weight)
    groups = node.attributes.get("group")
    channels = shape[permutation[1]] * groups.value if output is None and groups else shape[permutation[output or 0]]
    bias, result = _bias(node, channel_axis, channels)
    return LinearLayer(
        node, weight, data, bias, result, None if output is None else permutation[output], permutation[summed],
        channel_axis, channels,
    )  # fmt: skip


def _bias(node: ir.Node, channel_axis: int, channels: int) -> tuple[ir.Value | None, ir.Value]:
    """The bias [channels] and the value after it: input 2, or the Add behind a MatMul."""
    if is_op(node, "Gemm") and channel_axis == 0:  # its bias lies along the other axis
        return None, node.outputs[0]
    if not is_op(node, "MatMul"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return (bias if bias is not None and bias.is_initializer() else None), node.outputs[0]
    add = sole_consumer(node.outputs[0])
    if add is not None and is_op(add, "Add") and channel_axis == -1:
        for operand in add.inputs:
            if operand is not None and operand.is_initializer() and stored_shape(operand) == (channels,):
                return operand, add.outputs[0]
    return None, node.outputs[0]
