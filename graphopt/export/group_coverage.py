"""How much of a model lies on channels that can be removed, and what keeps the rest.

An element of a weight is prunable where a unit that is not frozen owns one of its coordinates; a multiply-accumulate
where such a unit owns one of the indices that it runs over. Both are counted by sizes, and no element is looked at:
of a weight [8, 6] with 3 removable rows and 2 removable columns, 5 * 4 elements cannot go. The MACs that cannot go
are what the cost rule of the operator says at the sizes that are left, so that grouped convolutions, products of
activations and recurrences, where an index occurs in several operands, count as they do in `graphopt.ir.cost`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.ir.channels import ChannelGroups
from graphopt.ir.cost import cost, numbers_per_element
from graphopt.ir.ops.axes import Axis, Reason
from graphopt.ir.ops.row import OpRow, Shape, Site

_SCALAR = Reason("a single number", channel=False)
_NO_CHANNELS = Reason("its positions are no channels", channel=False)
_Kept = Mapping["frozenset[Reason] | None", int]
"""Number of coordinates for each set of reasons that keep them; None is what can go."""


@dataclass(frozen=True)
class Coverage:
    """How much of something is prunable.

    Attributes:
        total: all of it.
        prunable: what lies on a channel that can be removed.
    """

    total: int
    prunable: int

    @property
    def share(self) -> float:
        """Prunable over total, 1 where there is nothing."""
        return self.prunable / self.total if self.total else 1.0


class Counts:
    """What of one model is prunable.

    Attributes:
        parameters: elements of each weight (see `graphopt.ir.cost`).
        prunable: elements of each weight that lie on a removable coordinate.
        kept: elements that do not, of each weight, by the set of reasons that keep them.
        macs: multiply-accumulates of each node, and how many of them are prunable.
        unknown: nodes whose MACs are not known.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        self._units, self._analysis = groups.units, groups.analysis
        found = groups.units.groups
        free = [group.atoms for group in found if group.frozen is None]
        self._free = self._units.chosen(np.concatenate(free) if free else [])
        self._reasons = list(dict.fromkeys(group.frozen for group in found if group.frozen is not None))
        self._reason_of = np.full(len(self._free), -1)
        for group in found:
            if group.frozen is not None:
                self._reason_of[group.atoms] = self._reasons.index(group.frozen)
        self._staying: dict[int, int] = {}
        self._kept: dict[int, _Kept] = {}
        self.parameters: dict[ir.Value, int] = {}
        self.prunable: dict[ir.Value, int] = {}
        self.kept: dict[ir.Value, dict[frozenset[Reason], int]] = {}
        self._count_parameters()
        self.macs: dict[ir.Node, Coverage] = {}
        self.unknown: list[ir.Node] = []
        self._count_macs()

    # Weights ------------------------------------------------------------------------------------------------

    def _count_parameters(self) -> None:
        for value in self._analysis.model.graph.initializers.values():
            numbers = numbers_per_element(value, self._analysis.row)
            if not numbers or value.const_value is None:
                continue
            kept = {reasons: count * numbers for reasons, count in self._kept_elements(value).items()}
            self.parameters[value] = value.const_value.size * numbers
            self.prunable[value] = self.parameters[value] - sum(kept.values())
            if kept:
                self.kept[value] = kept

    def _kept_elements(self, value: ir.Value) -> dict[frozenset[Reason], int]:
        """Elements without a removable coordinate, by why.

        Where several reasons meet, operators count before the interface, which nothing can change, and channels
        before axes that are none.
        """
        combined: dict[frozenset[Reason], int] = {frozenset(): 1}
        for axis in range(len(self._analysis.state.tracks[value])):
            for part in self._units.leaves(value, axis):
                longer: Counter[frozenset[Reason]] = Counter()
                for reasons, count in combined.items():
                    for others, size in self._kept_coordinates(part).items():
                        if others is not None:
                            longer[reasons | others] += count * size
                combined = longer
        found: Counter[frozenset[Reason]] = Counter()
        for reasons, count in combined.items():
            channels = frozenset(reason for reason in reasons if reason.channel)
            operators = frozenset(reason for reason in channels if reason.node is not None)
            found[operators or channels or reasons or frozenset([_SCALAR])] += count
        return found

    def _kept_coordinates(self, part: Axis) -> _Kept:
        """Coordinates of a part of an axis, by why they stay."""
        if id(part) not in self._kept:
            self._kept[id(part)] = self._find_kept(part)
        return self._kept[id(part)]

    def _find_kept(self, part: Axis) -> _Kept:
        leaf = self._units.leaf(part)
        if leaf is None:
            return {frozenset([part.fixed or _NO_CHANNELS]): part.size}
        goes = ~leaf.kept(self._free)
        found: Counter[frozenset[Reason] | None] = Counter()
        if goes.any():
            found[None] = int(goes.sum())
        indices = self._reason_of[leaf.atoms]
        present = np.unique(indices[~goes[leaf.coordinates]])
        held = np.zeros((len(present), leaf.size), bool)
        for row, index in enumerate(present):
            held[row, leaf.coordinates[indices == index]] = True
        patterns, counts = np.unique(held[:, ~goes], axis=1, return_counts=True)
        for pattern, count in zip(patterns.T, counts, strict=True):
            reasons = {self._reason(part, int(index)) for index in present[pattern]}
            found[frozenset(reasons)] += int(count)
        return found

    def _reason(self, part: Axis, index: int) -> Reason:
        if index >= 0:
            return self._reasons[index]
        return part.fixed or _NO_CHANNELS

    # Work ---------------------------------------------------------------------------------------------------

    def _count_macs(self) -> None:
        facts = self._analysis.facts[0]
        for entry in cost(self._analysis.model, table=self._analysis.table, facts=facts).nodes:
            row = self._analysis.row(entry.node)
            if not entry.known:
                self.unknown.append(entry.node)
            if not entry.macs or row is None or row.cost is None:
                continue
            whole, staying = row.cost(self._site(entry.node, row, False)), row.cost(self._site(entry.node, row, True))
            self.macs[entry.node] = Coverage(entry.macs, entry.macs - entry.macs * staying // whole)

    def _site(self, node: ir.Node, row: OpRow, staying: bool) -> Site:
        """What the cost rule reads, with the coordinates that cannot go or with all."""
        facts = self._analysis.facts[0]

        def shape(value: ir.Value | None) -> Shape | None:
            tracks = self._analysis.state.tracks.get(value) if staying and value is not None else None
            if tracks is None or value is None:
                return facts.shape(value)
            return tuple(self._left(track.axis) for track in tracks)

        return Site(
            self._with_attributes(node) if staying else node,
            tuple(shape(value) for value in node.inputs),
            tuple(shape(value) for value in node.outputs),
            tuple(
                facts.constant(value) if index in row.structural else None for index, value in enumerate(node.inputs)
            ),
        )

    def _with_attributes(self, node: ir.Node) -> ir.Node:
        """A node like this one that says how many heads are left. It reads nothing, so that the model stays as it is.

        None left count as one: a rule may divide by their number, and the product is 0 either way.
        """
        counted = self._analysis.state.attributes.get(node)
        if not counted:
            return node
        attributes = dict(node.attributes)
        for name, axis in counted.items():
            attributes[name] = ir.AttrInt64(name, max(self._left(axis), 1))
        inputs = [None if value is None else ir.Value(name=value.name) for value in node.inputs]
        return ir.Node(node.domain, node.op_type, inputs, attributes.values(), num_outputs=len(node.outputs))

    def _left(self, axis: Axis) -> int:
        """Coordinates of an axis that no removable unit owns."""
        return math.prod(self._left_of_part(part) for part in self._analysis.store.leaves(axis))

    def _left_of_part(self, part: Axis) -> int:
        if id(part) not in self._staying:
            leaf = self._units.leaf(part)
            self._staying[id(part)] = part.size if leaf is None else int(leaf.kept(self._free).sum())
        return self._staying[id(part)]
