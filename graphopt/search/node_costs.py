"""What the nodes of a model cost with units gone: counted, and as every search of this room wants it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from graphopt.ir.cost import storage_bytes
from graphopt.ir.linear import linear_at
from graphopt.ir.rewrite import DeclinedError, is_op
from graphopt.ir.text import subgraphs
from graphopt.search.collaborative_layers import Costing, Layer
from graphopt.search.costs import CostModel
from graphopt.search.integers import Border
from graphopt.search.joint import NodeCosts
from graphopt.search.layer_forms import LayerForm, LayerForms, low_rank_form

COUNTED = ("macs", "params", "bytes")
_QUANTIZER_BYTES = 9
"""Of each channel of a weight: its scale and zero point, and the scale of its bias."""


class CountedCosts:
    """A `graphopt.search.joint.NodeCosts` of what `graphopt.search.costs` counts.

    Weights that several nodes read count at the first of them. What the whole model costs is the sum over `places` and
    `fixed`, exactly; with units gone it is exact but for what removal rewrites, on integers but for quantizers of
    activations and what folding BatchNormalization saves.

    Attributes:
        places: see `NodeCosts`.
        fixed: see `NodeCosts`.
    """

    def __init__(self, costs: CostModel, kind: str, forms: LayerForms) -> None:
        """Prepare the counts.

        Args:
            costs: of the model.
            kind: one of `COUNTED`.
            forms: of the layers.
        """
        self._costs, self._kind, self._forms = costs, kind, forms
        self._layers = {layer.name: layer for layer in forms.layers}
        self._nodes: dict[str, ir.Node] = {}
        self._weights: dict[str, tuple[int, ...]] = {}
        """Indices of the inputs of a node that are weights and that no node before it reads."""
        self._rounded: dict[str, int | None] = {}
        """Index of the input of a node that is stored as integers on integers, None where none is."""
        self._known: dict[tuple[object, ...], float] = {}
        self.places: dict[str, tuple[str, ...]] = {}
        seen: set[ir.Value] = set()
        for name, node in _named(costs.groups.analysis.model.graph):
            self._nodes[name] = node
            self._rounded[name] = _rounded(node)
            own = [index for index, value in enumerate(node.inputs) if value is not None and value.is_initializer()]
            self._weights[name] = tuple(index for index in own if node.inputs[index] not in seen)
            seen.update(value for value in node.inputs if value is not None and value.is_initializer())
            if self.at(name, {}):
                self.places[name] = costs.groups_around(node)
        self.fixed = costs.whole.get(kind) - sum(self.at(name, {}) for name in self.places)

    def at(
        self, node: str, removed: Mapping[str, int], form: LayerForm | None = None, *, integer: bool = False
    ) -> float:
        """See `NodeCosts`."""
        around = self.places.get(node, ())
        key = (node, form, integer, *(removed.get(name, 0) for name in around))
        if key not in self._known:
            self._known[key] = self._counted(node, removed, form, integer)
        return self._known[key]

    def conversion(self, border: Border, removed: Mapping[str, int], *, to_integers: bool) -> float:
        """See `NodeCosts`; what is counted here does not change with it."""
        return 0.0

    def _counted(self, node: str, removed: Mapping[str, int], form: LayerForm | None, integer: bool) -> float:
        if self._kind == "macs":
            dense = form is None
            return float(
                self._costs.macs_without(self._nodes[node], removed) if dense else self._forms.macs(node, removed, form)
            )
        operator = self._nodes[node]
        inputs, _ = self._costs.shapes(operator, removed)
        total = 0.0
        for index in self._weights[node]:
            value, shape = operator.inputs[index], inputs[index]
            if value is None or value.dtype is None or shape is None:
                continue
            elements = math.prod(shape)
            layer = self._layers.get(node)
            if form is not None and layer is not None and index == layer.rows.linear.weight_index:
                elements = self._forms.parameters(node, removed, form)
            if self._kind == "params":
                total += elements
            elif integer and index == self._rounded[node]:
                total += elements + _QUANTIZER_BYTES * _channels(operator, shape)
            else:
                total += storage_bytes(elements, value.dtype)
        return total


def _rounded(node: ir.Node) -> int | None:
    """Index of the weight of a product, or of the table that rows are picked from."""
    try:
        linear = linear_at(node)
    except DeclinedError:
        return None
    if linear is not None:
        return linear.weight_index
    return 0 if is_op(node, "Gather") else None


def _channels(node: ir.Node, shape: Sequence[int]) -> int:
    """How many scales a weight has."""
    if is_op(node, "Conv") or (is_op(node, "Gemm") and "transB" in node.attributes):
        return shape[0]
    return shape[-1]


def _named(graph: ir.Graph, prefix: str = "") -> Iterator[tuple[str, ir.Node]]:
    """All nodes of a graph and of the bodies in it, with names that no two share."""
    for node in graph:
        name = f"{prefix}{node.name or ''}"
        yield name, node
        for body, inner in subgraphs(node):
            yield from _named(inner, f"{name}/{body}/")


class NodeCosting(Costing):
    """Any `NodeCosts`, latencies among them, as the cost that the searches of Collaborative Compression ask for."""

    def __init__(self, layers: Sequence[Layer], model: CostModel, costs: NodeCosts) -> None:
        """Take over the costs.

        Args:
            layers: of the collaborative search.
            model: counts of the same model.
            costs: of its nodes.
        """
        super().__init__(layers, model)
        self._costs = costs
        names = {layer.name for layer in layers}
        self._beside = [node for node in costs.places if node not in names]

    def layer(self, layer: Layer, removed: Mapping[str, int], rank: int | None = None) -> float:
        """See `Costing`."""
        dense = self._costs.at(layer.name, removed)
        if rank is None:
            return dense
        return min(dense, self._costs.at(layer.name, removed, LayerForm(low_rank_form(layer), rank)))

    def saves(self, layer: Layer, removed: Mapping[str, int], rank: int) -> bool:
        """See `Costing`."""
        return self.layer(layer, removed, rank) < self._costs.at(layer.name, removed)

    def others(self, removed: Mapping[str, int]) -> float:
        """See `Costing`."""
        return self._costs.fixed + sum(self._costs.at(node, removed) for node in self._beside)
