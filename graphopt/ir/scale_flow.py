"""Positive factors on their way through a graph, node by node: what shares one, and what has to be scaled with it.

A rule gives the outputs of a node their labels (`graphopt.ir.scale_labels`) and unifies or fixes those of its inputs,
so that any factors that respect the labels leave every result the same but for its own factor. Constants that have to
be scaled with them are noted as `ScaledConstant`, weights as `ScaledLinear`. Knows no operator: the rules are in
`graphopt.ir.scale_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.ir.linear import LINEAR_OPS, Linear
from graphopt.ir.rewrite import FLOATING, DeclinedError, constant_tensor, is_op, rank
from graphopt.ir.scale_labels import ScaleLabels

MOST_MADE = 2**20
"""Elements up to which a constant may grow, or have factors of its own."""


@dataclass(frozen=True, eq=False)
class ScaledLinear:
    """A weight that takes its factors up: W'[m, c] = W[m, c] * factor of out m / factor of in c.

    Attributes:
        linear: the operator.
        ins: labels int64 [in channels].
        outs: labels int64 [out channels].
    """

    linear: Linear
    ins: np.ndarray
    outs: np.ndarray


@dataclass(frozen=True, eq=False)
class ScaledConstant:
    """An operand that takes factors up: c' = c * factor of outs / factor of ins.

    Attributes:
        node: who reads it.
        index: of the operand.
        outs: labels that broadcast against it, and may make it larger.
        ins: labels of what it is multiplied with; None where it is not.
    """

    node: ir.Node
    index: int
    outs: np.ndarray
    ins: np.ndarray | None = None


Rule = Callable[["ScaleFlow", ir.Node], None]
"""Labels the outputs of a node, or raises `DeclinedError` where no factor passes."""


@dataclass
class ScaleFlow:
    """The rules, applied to a main graph node by node.

    Attributes:
        rules: by operator of the standard domain; what has none keeps what it reads and makes as it is.
        labels: of each value of it.
        linears, constants: what is scaled, in graph order.
        refused: linear operators that cannot be, and why.
    """

    rules: Mapping[str, Rule]
    labels: ScaleLabels = field(default_factory=ScaleLabels)
    linears: list[ScaledLinear] = field(default_factory=list[ScaledLinear])
    constants: list[ScaledConstant] = field(default_factory=list[ScaledConstant])
    refused: list[tuple[ir.Node, str]] = field(default_factory=list["tuple[ir.Node, str]"])

    def run(self, graph: ir.Graph) -> None:
        """Label every value."""
        for value in graph.inputs:
            self._settle(value, "it is a graph input", value.name or "")
        for node in graph:
            self.visit(node)
        kept = {value for node, _ in self.refused for value in node.inputs}
        for one in self.linears:
            if one.linear.node.inputs[one.linear.weight_index] in kept:
                for labels in (one.ins, one.outs):
                    self.labels.fix(
                        labels, "its weight is read by an operator that passes no factor on", node_name(one.linear.node)
                    )
        for value in graph.outputs:
            if value in self.labels:
                self.labels.fix(self.labels[value], "it is a graph output", value.name or "")

    def visit(self, node: ir.Node) -> None:
        """Label the outputs of one node."""
        rule = self.rules.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        why = f"{node.op_type} does not pass a factor on"
        noted = len(self.linears), len(self.constants)
        try:
            if rule is None:
                raise DeclinedError(why)
            if any(value.shape is None for value in node.outputs[:1]):
                raise DeclinedError("the rank of its result is unknown")
            rule(self, node)
        except DeclinedError as refusal:
            why = refusal.why
            del self.linears[noted[0] :], self.constants[noted[1] :]
            if is_op(node, *LINEAR_OPS):
                self.refused.append((node, why))
            self.fix_inputs(node, why)
            self.labels[node.outputs[0]] = self._alone(node.outputs[0], why, node_name(node))
        for value in node.outputs[1:]:
            if value not in self.labels:
                self._settle(value, f"{node.op_type} does not pass a factor on", node_name(node))

    def fix_inputs(self, node: ir.Node, why: str, operands: Sequence[ir.Value | None] | None = None) -> None:
        """Keep the factor of what a node reads, values that its subgraphs capture included, at 1."""
        read = list(node.inputs if operands is None else operands)
        if operands is None:
            read += [value for graph in _subgraphs(node) for inner in graph.all_nodes() for value in inner.inputs]
            read += [value for graph in _subgraphs(node) for value in graph.outputs]
        for value in read:
            if value is not None and value in self.labels:
                self.labels.fix(self.labels[value], why, node_name(node))

    def of(self, node: ir.Node, index: int = 0) -> np.ndarray:
        """The labels of an operand that is computed."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or value not in self.labels:
            raise DeclinedError(f"an operand of {node.op_type} is constant")
        if value.shape is None:
            raise DeclinedError("the rank of its operand is unknown")
        return self.labels[value]

    def give(self, node: ir.Node, labels: np.ndarray, index: int = 0) -> None:
        """Label an output."""
        self.labels[node.outputs[index]] = labels

    def operands(self, node: ir.Node) -> tuple[list[tuple[int, np.ndarray]], list[int]]:
        """Computed operands with their labels padded to the rank of the result, and indices of the constant ones."""
        of_rank = rank(node.outputs[0])
        assert of_rank is not None
        computed: list[tuple[int, np.ndarray]] = []
        constants: list[int] = []
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if value in self.labels:
                computed.append((index, padded(self.of(node, index), of_rank)))
            elif constant_tensor(value) is None:
                raise DeclinedError("an operand comes from outside of the graph")
            else:
                constants.append(index)
        return computed, constants

    def scale(self, node: ir.Node, index: int, outs: np.ndarray, ins: np.ndarray | None = None) -> None:
        """Let a constant operand take factors up. Raises `DeclinedError` where it is no floating-point constant."""
        tensor = constant_tensor(node.inputs[index])
        if tensor is None or tensor.dtype not in FLOATING:
            raise DeclinedError(f"operand {index} of {node.op_type} is no floating-point constant")
        self.constants.append(ScaledConstant(node, index, outs, ins))

    def _settle(self, value: ir.Value, why: str, where: str) -> None:
        self.labels[value] = self._alone(value, why, where)

    def _alone(self, value: ir.Value, why: str, where: str) -> np.ndarray:
        """A fixed label for the whole of a value."""
        labels = self.labels.fresh((1,) * (rank(value) or 0))
        self.labels.fix(labels, why, where)
        return labels


def node_name(node: ir.Node) -> str:
    """The name that a remark knows a node by."""
    return node.name or node.outputs[0].name or node.op_type


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs += attribute.as_graphs()
    return graphs


def padded(labels: np.ndarray, of_rank: int) -> np.ndarray:
    """Labels with axes of 1 in front, `of_rank` in all, as broadcasting has it."""
    return labels.reshape((1,) * (of_rank - labels.ndim) + labels.shape)


def number(node: ir.Node, name: str, default: int) -> int:
    """An INT attribute, or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
