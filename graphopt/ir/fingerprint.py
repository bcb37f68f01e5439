"""Whether two states of a graph are the same, cheaply: by identity of objects, not by reading weights."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import onnx_ir as ir


@dataclass(frozen=True)
class Fingerprint:
    """One state of a graph. Equal fingerprints of one model mean that nothing changed in between."""

    state: Hashable
    alive: tuple[object, ...] = field(compare=False, repr=False)
    """Keeps the objects compared by identity alive, so that no new object takes the place of an old one."""


def fingerprint(model: ir.Model) -> Fingerprint:
    """A value that changes whenever the graph does: nodes, their operands and attributes, weights, interface.

    Tensors and attributes are compared by object identity, so this costs one walk over the nodes whatever the
    size of the weights. It is meant for two states of one model in one process, not for storage.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) { y = Relu(x) }')
        >>> before = fingerprint(model)
        >>> fingerprint(model) == before
        True
        >>> model.graph.outputs[0].name = "z"
        >>> fingerprint(model) == before
        False
    """
    alive: list[object] = []

    def identity(thing: object) -> int | None:
        if thing is None:
            return None
        alive.append(thing)
        return id(thing)

    def node_state(node: ir.Node) -> Hashable:
        return (
            (node.domain, node.op_type, node.overload),
            tuple(identity(value) for value in node.inputs),
            tuple((identity(value), value.name) for value in node.outputs),
            tuple((name, identity(attribute)) for name, attribute in node.attributes.items()),
        )

    def graph_state(graph: ir.Graph) -> Hashable:
        return (
            tuple((identity(value), value.name) for value in graph.inputs),
            tuple((identity(value), value.name) for value in graph.outputs),
            tuple(node_state(node) for node in graph),
            tuple((name, identity(value.const_value)) for name, value in graph.initializers.items()),
        )

    state = (
        tuple(sorted(model.opset_imports.items())),
        tuple(graph_state(graph) for graph in model.graphs()),
    )
    return Fingerprint(state, tuple(alive))
