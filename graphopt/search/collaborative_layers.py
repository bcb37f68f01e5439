"""The layers that pruning and decomposition compete for: which units they read and make, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.criteria.contract import Knowledge
from graphopt.criteria.members import Membership
from graphopt.criteria.ownership import Owned
from graphopt.ir.linear import LINEAR_OPS, channel_axis, linear_at
from graphopt.ir.linear_rows import LinearRows, linear_rows
from graphopt.ir.rewrite import DeclinedError, is_op
from graphopt.search.contract import Candidate
from graphopt.search.costs import CostModel


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear operator that mixes channels.

    Attributes:
        name: of the node.
        rows: how its arrays become matrices; `rows.linear` is the view of the node.
        reads: candidates whose units are input channels, with the coordinates of each unit among the C input channels.
        makes: the same for the N output channels.
        places: how often one inference applies the weight: MACs over elements of the weight.
        rankable: whether it may become a product of two layers. Grouped operators, transposed convolutions and
            operators that read several candidates are only pruned.
    """

    name: str
    rows: LinearRows
    reads: tuple[tuple[str, Owned], ...]
    makes: tuple[tuple[str, Owned], ...]
    places: float
    rankable: bool

    @property
    def node(self) -> ir.Node:
        """The operator."""
        return self.rows.linear.node

    @property
    def inputs(self) -> int:
        """C."""
        return self.rows.linear.in_channels

    @property
    def outputs(self) -> int:
        """N."""
        return self.rows.linear.out_channels

    @property
    def taps(self) -> int:
        """T, positions of the kernel."""
        return self.rows.columns * self.rows.groups // self.inputs

    @property
    def full_rank(self) -> int:
        """R = min(N, C T): number of rank-one terms of the weight as [N, C T]."""
        return min(self.outputs, self.inputs * self.taps)

    def weight(self) -> np.ndarray:
        """Float64 [N, C, T]; what a grouped operator does not read is 0."""
        return self.expanded(self.rows.linear.weight())

    def expanded(self, array: np.ndarray) -> np.ndarray:
        """An array [N, C / groups, *kernel], as the weight is, as [N, C, T]."""
        linear = self.rows.linear
        weight = array.reshape(self.outputs, self.inputs // linear.groups, self.taps)
        if linear.groups == 1:
            return weight
        whole = np.zeros((linear.groups, self.outputs // linear.groups, linear.groups, *weight.shape[1:]))
        index = np.arange(linear.groups)
        whole[index, :, index] = weight.reshape(linear.groups, -1, *weight.shape[1:])
        return whole.reshape(self.outputs, self.inputs, self.taps)

    def compact(self, weight: np.ndarray) -> np.ndarray:
        """What `expanded` is given, of what it returns."""
        linear = self.rows.linear
        blocks = weight.reshape(linear.groups, self.outputs // linear.groups, linear.groups, -1, self.taps)
        index = np.arange(linear.groups)
        return blocks[index, :, index].reshape(self.outputs, self.inputs // linear.groups, *linear.kernel)

    def units(self) -> np.ndarray:
        """Channels of each unit of `reads`, one candidate after the other: int64 [units, most channels], -1 is none."""
        blocks = [channels_of(owned, self.inputs) for _, owned in self.reads]
        width = max((block.shape[1] for block in blocks), default=1)
        padded = [np.pad(block, ((0, 0), (0, width - block.shape[1])), constant_values=-1) for block in blocks]
        return np.concatenate(padded) if padded else np.zeros((0, 1), np.int64)

    def kept_inputs(self, removed: Mapping[str, int]) -> int:
        """C without what that many units of the candidates (by name) take along."""
        return max(1, self.inputs - _gone(self.reads, removed))

    def kept_outputs(self, removed: Mapping[str, int]) -> int:
        """N without what that many units of the candidates (by name) take along."""
        return max(1, self.outputs - _gone(self.makes, removed))


LayerCost = Callable[[Layer, int, int, "int | None"], float]
"""`cost(layer, inputs kept, outputs kept, rank)`, rank None for one dense layer."""


def channels_of(owned: Owned, channels: int) -> np.ndarray:
    """Channels of each unit, int64 [units, most channels of a unit], -1 where a unit has fewer.

    Example:
        >>> channels_of(Owned(np.array([0, 2, 1]), np.array([0, 0, 1]), 2), 3).tolist()
        [[0, 2], [1, -1]]
    """
    return owned.rows(np.arange(1, channels + 1)[:, None])[..., 0] - 1


def _gone(sides: Sequence[tuple[str, Owned]], removed: Mapping[str, int]) -> int:
    return sum(removed.get(name, 0) * len(owned.coordinates) // max(owned.count, 1) for name, owned in sides)


def macs(layer: Layer, inputs: int, outputs: int, rank: int | None) -> float:
    """Multiply-accumulates of a layer: N C T places, or r (C T + N) places as r filters and a 1 x 1 behind.

    Args:
        layer: the layer.
        inputs: how many of the C input channels are left.
        outputs: how many of the N output channels are left.
        rank: r, None for one dense layer.
    """
    if rank is None:
        return layer.places * outputs * inputs * layer.taps / layer.rows.groups
    return layer.places * rank * (inputs * layer.taps + outputs)


def find_layers(
    knowledge: Knowledge, candidates: Sequence[Candidate], costs: CostModel, dense: Container[str] = ()
) -> list[Layer]:
    """The layers of the main graph that read units of a candidate or can be decomposed, in graph order.

    Layers without a constant weight of a form that can be worked with are left out; so are depthwise operators, through
    which units live on.

    Args:
        knowledge: the model.
        candidates: groups that may lose units.
        costs: of the same model; MACs of layers come from it.
        dense: names of operators that are not to be decomposed.
    """
    membership = Membership(knowledge)
    found: list[Layer] = []
    for node in knowledge.model.graph:
        if not is_op(node, *LINEAR_OPS):
            continue
        try:
            layer = _layer(node, knowledge, membership, candidates, costs)
        except DeclinedError:
            continue
        if layer is not None and layer.name in dense:
            layer = replace(layer, rankable=False)
        if layer is not None and (layer.reads or layer.rankable):
            found.append(layer)
    return found


def _layer(
    node: ir.Node, knowledge: Knowledge, membership: Membership, candidates: Sequence[Candidate], costs: CostModel
) -> Layer | None:
    linear = linear_at(node)
    if linear is None or linear.in_channels // linear.groups < 2 or membership.is_weight(linear.data):
        return None
    if not np.isfinite(linear.weight()).all():
        raise DeclinedError("its weight is not finite", node)
    tracks = knowledge.groups.analysis.state.tracks
    sides: list[tuple[tuple[str, Owned], ...]] = []
    for value, axis, channels in (
        (linear.data, linear.in_axis, linear.in_channels),
        (node.outputs[0], linear.out_axis, linear.out_channels),
    ):
        pairs: list[tuple[str, Owned]] = []
        if value in tracks:
            front = channel_axis(axis, len(tracks[value]))
            for candidate in candidates:
                ownership = membership.ownership(candidate.group)
                if front in ownership.axes(value):
                    pairs.append((candidate.name, ownership.owned(value, front, channels)))
        sides.append(tuple(pairs))
    elements = linear.out_channels * linear.in_channels // linear.groups * max(int(np.prod(linear.kernel)), 1)
    rankable = linear.groups == 1 and not is_op(node, "ConvTranspose") and len(sides[0]) <= 1 and costs.macs(node) > 0
    return Layer(node.name or "", linear_rows(linear), sides[0], sides[1], costs.macs(node) / elements, rankable)


class Costing:
    """What the model costs with units gone and layers decomposed.

    MACs by default: those of the layers by the formula, with the low-rank form only where it is cheaper; everything
    else (depthwise operators, products of two computed values) by `CostModel`. With a cost of one's own, for instance
    a table of latencies, it is the sum over the layers and `fixed`.
    """

    def __init__(
        self, layers: Sequence[Layer], model: CostModel, layer_cost: LayerCost | None = None, fixed: float = 0.0
    ) -> None:
        self.layers = tuple(layers)
        self._model, self._cost, self._fixed = model, layer_cost, fixed
        self._known: dict[tuple[str, int, int, int | None], float] = {}

    def layer(self, layer: Layer, removed: Mapping[str, int], rank: int | None = None) -> float:
        """The cost of one layer; dense where the rank saves nothing."""
        inputs, outputs = layer.kept_inputs(removed), layer.kept_outputs(removed)
        dense = self.at(layer, inputs, outputs, None)
        return dense if rank is None else min(dense, self.at(layer, inputs, outputs, rank))

    def saves(self, layer: Layer, removed: Mapping[str, int], rank: int) -> bool:
        """Whether the low-rank form is cheaper than the dense one."""
        inputs, outputs = layer.kept_inputs(removed), layer.kept_outputs(removed)
        return self.at(layer, inputs, outputs, rank) < self.at(layer, inputs, outputs, None)

    def at(self, layer: Layer, inputs: int, outputs: int, rank: int | None) -> float:
        """The cost of a layer at these sizes."""
        key = (layer.name, inputs, outputs, rank)
        if key not in self._known:
            self._known[key] = float((self._cost or macs)(layer, inputs, outputs, rank))
        return self._known[key]

    def others(self, removed: Mapping[str, int]) -> float:
        """The cost of what is no layer."""
        if self._cost is not None:
            return self._fixed
        dense = sum(self.layer(layer, removed) for layer in self.layers)
        return self._model.estimate(removed).macs - dense

    def total(self, removed: Mapping[str, int], ranks: Mapping[str, int | None]) -> float:
        """The cost of the model.

        Args:
            removed: how many units of each candidate are gone, by name.
            ranks: name of a layer to its rank; None, or not there: dense.
        """
        layers = sum(self.layer(layer, removed, ranks.get(layer.name)) for layer in self.layers)
        return layers + self.others(removed)
