"""Where a damaged graph is repaired: the linear operators that read damaged values, and what each should make.

An operator is given its target as far behind itself as one number a channel leads: through BatchNormalization,
per-channel constants, quantizers, and one addition of another branch, whose own error it then takes up. A Relu or Clip
at the end says which part of the target does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.ir.affine import batchnorm_affine
from graphopt.ir.linear import Linear, channel_axis, channel_vector, linear_producing
from graphopt.ir.match import clip_bounds
from graphopt.ir.origin import Origin
from graphopt.ir.rewrite import DeclinedError, constant_float64, is_op, sole_consumer

# fmt: off
ELEMENTWISE = frozenset({
    "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Mish",
    "Swish", "Tanh", "Gelu", "Elu", "Selu", "Celu", "Softplus", "Softsign",
    "ThresholdedRelu", "Erf", "Exp", "Log", "Sqrt", "Pow", "Abs", "Neg",
    "Add", "Sub", "Mul", "Div", "Max", "Min", "BatchNormalization",
})
# fmt: on
"""Operators that treat each element by itself where all but one of their operands are constants."""
_LONGEST_PATH = 16


@dataclass(frozen=True)
class Tail:
    """A value behind a linear operator: `scale` · result + `shift` (+ `other`).

    Attributes:
        value: in the damaged graph; its namesake in the origin is what it should be.
        scale, shift: float64 [M].
        other: what is added, of the same shape, or None.
        low, high: outside of these the value does not matter, since what reads it cuts it off.
    """

    value: ir.Value
    scale: np.ndarray
    shift: np.ndarray
    other: ir.Value | None = None
    low: float = -np.inf
    high: float = np.inf


@dataclass(frozen=True)
class Path:
    """The way from a linear operator to the next, one element at a time.

    Attributes:
        producer: the operator that makes the channels.
        nodes: what lies between, in graph order.
        start: the producer's result.
        end: what the next operator reads.
    """

    producer: Linear
    nodes: tuple[ir.Node, ...]
    start: ir.Value
    end: ir.Value


def tails(linear: Linear, origin: Origin) -> Iterator[Tail]:
    """The values behind `linear` that the origin knows, the farthest first."""
    known = {value.name: value for node in origin.model.graph for value in node.outputs}
    ones = np.ones(linear.out_channels)
    found = [Tail(linear.result, ones, 0 * ones)]
    while (following := _next(found[-1], linear)) is not None:
        found.append(following)
    return (bounded(tail) for tail in reversed(found) if tail.value.name in known)


def bounded(tail: Tail) -> Tail:
    """The tail with the bounds outside of which its only reader does not look."""
    consumer = sole_consumer(tail.value)
    if is_op(consumer, "Relu"):
        return replace(tail, low=0.0)
    if consumer is not None and is_op(consumer, "Clip") and consumer.inputs[0] is tail.value:
        low, high = clip_bounds(consumer) or (None, None)
        return replace(tail, low=-np.inf if low is None else low, high=np.inf if high is None else high)
    if is_op(consumer, "QuantizeLinear"):
        return _quantizer_bounds(tail, consumer)
    return tail


def path_to(data: ir.Value) -> Path | None:
    """The path that ends in `data`, None where there is none or something else reads a value on it."""
    nodes: set[ir.Node] = set()
    sources: dict[ir.Value, Linear] = {}
    waiting = [data]
    while waiting:
        value = waiting.pop()
        linear = _linear_making(value)
        if linear is not None:
            sources[value] = linear
            continue
        node = value.producer()
        if node is None or node.domain or node.op_type not in ELEMENTWISE or len(nodes) > _LONGEST_PATH:
            return None
        if node not in nodes:
            nodes.add(node)
            waiting += [operand for operand in _computed(node) if operand is not value]
    if len(sources) != 1:
        return None
    ((start, linear),) = sources.items()
    inside = [*(value for node in nodes for value in node.outputs if value is not data), start]
    if any(use.node not in nodes for value in inside if value is not data for use in value.uses()):
        return None
    if any(value.is_graph_output() for value in (*inside, data)) or len(data.uses()) != 1:
        return None
    graph = linear.node.graph
    assert graph is not None
    return Path(linear, tuple(node for node in graph if node in nodes), start, data)


def damaged_values(model: ir.Model, origin: Origin) -> set[ir.Value]:
    """The values of the main graph that may differ from their namesakes in the origin."""
    before = {name: value for graph in origin.model.graphs() for name, value in graph.initializers.items()}
    damaged = {
        value
        for graph in model.graphs()
        for name, value in graph.initializers.items()
        if name not in before or before[name].const_value is not value.const_value
    }
    for node in model.graph:
        if any(value in damaged for value in (*node.inputs, *(value for value, _ in read_inside(node)))):
            damaged.update(node.outputs)
    return damaged


def read_inside(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Node]]:
    """What the subgraphs of a node read, captured values included, each with its reader; the node for their outputs."""
    for attribute in node.attributes.values():
        graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
        graphs = list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else graphs
        for graph in graphs:
            for reader in graph.all_nodes():
                yield from ((value, reader) for value in reader.inputs if value is not None)
            yield from ((value, node) for value in graph.outputs)


def target_rows(tail: Tail, wanted: np.ndarray, other: np.ndarray | None, now: np.ndarray | None = None) -> np.ndarray:
    """What the operator itself should make for the tail to be right: float32 [R, M].

    Args:
        tail: the value that is to be right.
        wanted: the origin's value of the tail [R, M], of the channels that are left.
        other: the other branch in the damaged graph [R, M], where the tail has one.
        now: what the operator makes now [R, M]; then what is wanted outside of the bounds is what is there already.
    """
    scale = np.where(np.abs(tail.scale) > 0, tail.scale, 1.0).astype(np.float32)
    shift = tail.shift.astype(np.float32)
    offset = shift if other is None else other + shift
    target = wanted
    if now is not None:
        value = now * scale + offset
        target = np.where(target <= tail.low, np.minimum(value, tail.low), target)
        target = np.where(target >= tail.high, np.maximum(value, tail.high), target)
    return ((target - offset) / scale).astype(np.float32)


def _next(tail: Tail, linear: Linear) -> Tail | None:
    """The tail one operator further on."""
    node = sole_consumer(tail.value)
    if node is None or node.domain or tail.value.is_graph_output():
        return None
    result = node.outputs[0]
    if is_op(node, "QuantizeLinear"):
        inner = sole_consumer(result)
        if inner is None or not is_op(inner, "DequantizeLinear"):
            return None
        return replace(tail, value=inner.outputs[0])
    try:
        affine = _affine(node, tail, linear)
    except DeclinedError:
        return None
    if affine is not None:
        scale, shift = affine
        if tail.other is not None and not (scale == 1).all():
            return None
        return replace(tail, value=result, scale=tail.scale * scale, shift=tail.shift * scale + shift)
    if not is_op(node, "Add") or tail.other is not None:
        return None
    other = next((value for value in node.inputs if value is not tail.value), None)
    if other is None or not _same_sizes(other, result):
        return None
    if tail.value.shape is not None and not _same_sizes(tail.value, result):
        return None
    return replace(tail, value=result, other=other)


def _same_sizes(value: ir.Value, result: ir.Value) -> bool:
    """Whether two values have the same shape as far as is known: neither is broadcast against the other."""
    if value.shape is None or result.shape is None or len(value.shape) != len(result.shape):
        return False
    pairs = zip(value.shape, result.shape, strict=True)
    return not any(a != b and (1 in (a, b) or (isinstance(a, int) and isinstance(b, int))) for a, b in pairs)


def _affine(node: ir.Node, tail: Tail, linear: Linear) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift of a BatchNormalization or of an operation with one constant a channel; None for others."""
    if is_op(node, "BatchNormalization"):
        return batchnorm_affine(node) if node.inputs[0] is tail.value else None
    if not is_op(node, "Add", "Sub", "Mul", "Div"):
        return None
    first = node.inputs[0] is tail.value
    array = constant_float64(node.inputs[1 if first else 0])
    if array is None:
        return None
    rank = linear.rank
    axis = linear.out_axis if rank is None else channel_axis(linear.out_axis, rank)
    vector = channel_vector(array, axis, linear.out_channels, rank)
    ones = np.ones(linear.out_channels)
    rules: dict[str, Callable[[], tuple[np.ndarray, np.ndarray] | None]] = {
        "Add": lambda: (ones, vector),
        "Sub": lambda: (ones, -vector) if first else (-ones, vector),
        "Mul": lambda: (vector, 0 * ones),
        "Div": lambda: (1 / vector, 0 * ones) if first and vector.all() else None,
    }
    return rules[node.op_type]()


def _quantizer_bounds(tail: Tail, node: ir.Node | None) -> Tail:
    assert node is not None
    scale, zero = (constant_float64(value) for value in node.inputs[1:3]) if len(node.inputs) > 2 else (None, None)
    if scale is None or zero is None or scale.size != 1:
        return tail
    kind = node.inputs[2]
    limits = np.iinfo(kind.dtype.numpy()) if kind is not None and kind.dtype is not None else None
    if limits is None:
        return tail
    low, high = ((limit - float(zero.reshape(()))) * float(scale.reshape(())) for limit in (limits.min, limits.max))
    return replace(tail, low=low, high=high)


def _linear_making(value: ir.Value) -> Linear | None:
    try:
        return linear_producing(value)
    except DeclinedError:
        return None


def _computed(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and not value.is_initializer()]
