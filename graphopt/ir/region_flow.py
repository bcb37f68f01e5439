"""Who serves whom in a graph: dominators and post-dominators of its nodes, what lies between two values, what is dead.

A node serves an operand alone when every way from it to an output of the graph leads through that operand; those are
the nodes that the operand post-dominates, and they are dead once it is no longer read. A value is the only way into a
part of the graph when its node dominates that part. Constants, and nodes computed from constants, take no part in
paths: they go with the nodes that read them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cached_property

import networkx as nx
import onnx_ir as ir

from graphopt.ir.rewrite import is_op
from graphopt.ir.text import operands, topological

_SOURCE, _SINK = "source", "sink"
_LAYERS = frozenset(
    (
        *("Conv", "ConvTranspose", "DeformConv", "ConvInteger", "QLinearConv"),
        *("MatMul", "Gemm", "Einsum", "MatMulInteger", "QLinearMatMul"),
        *("RNN", "LSTM", "GRU"),
    )
)
_SIZES = ("Shape", "Size")
"""What reads no more of a value than how large it is: no path of data."""


class Flow:
    """The main graph of a model as paths.

    Attributes:
        model: the model; it must not change while this is in use.
        nodes: in topological order.
        position: where each lies.
        dynamic: values that depend on an input, or on chance.
        readers: the nodes of the main graph that read a value, also from within their bodies.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.nodes = topological(model.graph)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self._inputs = frozenset(model.graph.inputs)
        self.dynamic = set(self._inputs)
        self.readers: dict[ir.Value, list[ir.Node]] = {}
        for node in self.nodes:
            read = dict.fromkeys(operands(node))
            for value in read:
                self.readers.setdefault(value, []).append(node)
            if any(value in self.dynamic for value in read) or not (read or is_op(node, "Constant")):
                self.dynamic.update(node.outputs)
        self._ancestors: dict[ir.Value, frozenset[ir.Node]] = {}
        self._descendants: dict[ir.Value, frozenset[ir.Node]] = {}

    def in_order(self, nodes: Iterable[ir.Node]) -> tuple[ir.Node, ...]:
        """Nodes as the graph has them."""
        return tuple(sorted(nodes, key=self.position.__getitem__))

    def is_layer(self, node: ir.Node) -> bool:
        """Whether a node multiplies what it is given by weights."""
        return node.op_type in _LAYERS and any(
            value not in self.dynamic and len(value.shape or ()) > 1 for value in node.inputs if value is not None
        )

    def layers(self, nodes: Iterable[ir.Node]) -> int:
        """How many layers there are among these nodes."""
        return sum(map(self.is_layer, nodes))

    def run_time_operands(self, node: ir.Node) -> list[ir.Value]:
        """What a node reads that is not constant, each once."""
        return [value for value in dict.fromkeys(operands(node)) if value in self.dynamic and self._is_outer(value)]

    def entries(self, nodes: frozenset[ir.Node]) -> list[ir.Value]:
        """The run-time values that a part of the graph reads from outside, in the order of reading."""
        read = [value for node in self.in_order(nodes) for value in self.run_time_operands(node)]
        return [value for value in dict.fromkeys(read) if value.producer() not in nodes]

    def with_constants(self, nodes: Iterable[ir.Node]) -> frozenset[ir.Node]:
        """These nodes and those that compute constants for nothing else."""
        found = set(nodes)
        pending = list(found)
        while pending:
            for value in operands(pending.pop()):
                producer = value.producer()
                if value in self.dynamic or producer not in self.position or producer in found:
                    continue
                if all(reader in found for output in producer.outputs for reader in self.readers.get(output, ())):
                    found.add(producer)
                    pending.append(producer)
        return frozenset(found)

    def outside_reader(self, node: ir.Node, nodes: frozenset[ir.Node]) -> tuple[ir.Value, ir.Node | None] | None:
        """A result of `node` that more than `nodes` see, and who reads it: None for an output of the graph."""
        for output in node.outputs:
            if output.is_graph_output():
                return output, None
            for reader in self.readers.get(output, ()):
                if reader not in nodes:
                    return output, reader
        return None

    # Paths ------------------------------------------------------------------------------------------------

    def before(self, value: ir.Value) -> frozenset[ir.Node]:
        """The nodes that data goes through on its way to a value."""
        if value not in self._ancestors:
            found: set[ir.Node] = set()
            pending = [value]
            while pending:
                producer = pending.pop().producer()
                if producer in self.position and producer not in found and not is_op(producer, *_SIZES):
                    found.add(producer)
                    pending.extend(self.run_time_operands(producer))
            self._ancestors[value] = frozenset(found)
        return self._ancestors[value]

    def behind(self, value: ir.Value) -> frozenset[ir.Node]:
        """The nodes that data goes through on its way from a value."""
        if value not in self._descendants:
            found: set[ir.Node] = set()
            pending = [value]
            while pending:
                for reader in self.readers.get(pending.pop(), ()):
                    if reader not in found and not is_op(reader, *_SIZES):
                        found.add(reader)
                        pending.extend(reader.outputs)
            self._descendants[value] = frozenset(found)
        return self._descendants[value]

    def between(self, start: ir.Value, end: ir.Value) -> frozenset[ir.Node]:
        """The nodes on the ways from one value to another."""
        return self.behind(start) & self.before(end)

    # Dominators -------------------------------------------------------------------------------------------

    def serving(self, node: ir.Node, index: int) -> frozenset[ir.Node]:
        """The nodes that compute an operand of an Add and nothing else."""
        return self._below(self._post_children, (node, index))

    def served_by(self, node: ir.Node) -> frozenset[ir.Node]:
        """The nodes whose every way to an output leads through this one, itself among them."""
        return self._below(self._post_children, node) | {node}

    def led_by(self, start: ir.Value) -> frozenset[ir.Node]:
        """The nodes to which every way from the inputs leads through the producer of this value, or from this input."""
        producer = start.producer()
        return self._below(self._children, _SOURCE if producer is None else producer)

    def next_meeting(self, start: ir.Value) -> ir.Node | None:
        """The first node that every way from this value to an output leads through; None where there is none."""
        producer = start.producer()
        if producer is not None:
            return self._post_parent(producer)
        readers = [reader for reader in self.readers.get(start, ()) if reader in self._post_parents]
        if not readers or start.is_graph_output():
            return None
        chains = [self._post_chain(reader) for reader in readers]
        return next((node for node in chains[0] if all(node in chain for chain in chains[1:])), None)

    def _post_parent(self, node: ir.Node) -> ir.Node | None:
        above = self._post_parents.get(node)
        while isinstance(above, tuple):  # an operand of an Add, then the Add
            above = self._post_parents.get(above)
        return above if isinstance(above, ir.Node) else None

    def _post_chain(self, node: ir.Node) -> list[ir.Node]:
        chain = [node]
        while (above := self._post_parent(chain[-1])) is not None:
            chain.append(above)
        return chain

    @staticmethod
    def _below(children: dict[Hashable, list[Hashable]], start: Hashable) -> frozenset[ir.Node]:
        found: list[Hashable] = []
        pending = list(children.get(start, ()))
        while pending:
            vertex = pending.pop()
            found.append(vertex)
            pending.extend(children.get(vertex, ()))
        return frozenset(vertex for vertex in found if isinstance(vertex, ir.Node))

    @cached_property
    def _post_parents(self) -> dict[Hashable, Hashable]:
        """Immediate post-dominators; operands of an Add are vertices of their own."""
        graph: nx.DiGraph = nx.DiGraph()
        graph.add_node(_SINK)
        graph.add_edges_from((_SINK, value.producer()) for value in self.model.graph.outputs if self._is_inner(value))
        for node in self.nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and is_op(node, "Add") and self._is_inner(value):
                    graph.add_edge(node, (node, index))
                    graph.add_edge((node, index), value.producer())
            for value in operands(node):
                if not is_op(node, "Add") and self._is_inner(value):
                    graph.add_edge(node, value.producer())
        return _immediate_dominators(graph, _SINK)

    @cached_property
    def _post_children(self) -> dict[Hashable, list[Hashable]]:
        return _turned(self._post_parents)

    @cached_property
    def _children(self) -> dict[Hashable, list[Hashable]]:
        graph: nx.DiGraph = nx.DiGraph()
        graph.add_node(_SOURCE)
        for node in self.nodes:
            if not any(output in self.dynamic for output in node.outputs):
                continue
            read = self.run_time_operands(node)
            graph.add_edges_from((value.producer() or _SOURCE, node) for value in read)
            if not read:
                graph.add_edge(_SOURCE, node)
        return _turned(_immediate_dominators(graph, _SOURCE))

    def _is_inner(self, value: ir.Value) -> bool:
        return value.producer() in self.position

    def _is_outer(self, value: ir.Value) -> bool:
        """Whether a value belongs to the main graph, not to a body."""
        return value.producer() in self.position or value in self._inputs


def _immediate_dominators(graph: nx.DiGraph, start: str) -> dict[Hashable, Hashable]:
    """Without the start itself, which some versions of networkx let dominate itself."""
    found = nx.immediate_dominators(graph, start)
    return {vertex: above for vertex, above in found.items() if vertex != start}


def _turned(parents: dict[Hashable, Hashable]) -> dict[Hashable, list[Hashable]]:
    children: dict[Hashable, list[Hashable]] = {}
    for vertex, above in parents.items():
        children.setdefault(above, []).append(vertex)
    return children
