"""The criterion of paths: what goes through a channel from the weights that make it to the weights that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.criteria.contract import Criterion, Knowledge, combined
from graphopt.criteria.members import MAKERS, Member, Membership
from graphopt.criteria.ownership import Ownership
from graphopt.criteria.roles import Role
from graphopt.ir.channels import ChannelGroup
from graphopt.ir.rewrite import is_op


@dataclass(frozen=True)
class CoupledPath(Criterion):
    """Mass of all paths through a channel (Narshana et al. 2023, "DFPC: Data flow driven pruning of coupled channels").

    For every producer W and every consumer U that reads what W made, and every path of the channel between them, the
    sum of |U| |s| |W| over all weights at the channel, where s is what scales the channel on the way: gamma / sigma of
    BatchNormalization, the scale of other normalisations, constant factors, the kernel of a depthwise convolution.
    All pairs and paths are summed in one walk over the graph: the mass that has reached a value is what its operands
    carried, added up, times the scale. Activations count as the identity, products of two activations as their sum.

    Where nothing reads the channels by a weight (queries and keys, which meet each other), the mass at their end is
    the score; where nothing makes them, the mass of the consumers; where they are read in subgraphs alone, the mass of
    the producers. Comparable within a group; between groups roughly,
    as the scale of a layer and of the next one cancel.

    Example:
        >>> import graphopt
        >>> model = graphopt.load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) =>
        ...     (float[n,1] y) <float[2,2] a = {1,2,3,4}, float[2,1] b = {10,-1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> groups = graphopt.channel_groups(model)
        >>> CoupledPath().scores(Knowledge(model, groups), [groups.named("mlp hidden of a")])
        {'mlp hidden of a': array([40.,  6.])}
    """

    name: ClassVar[str] = "coupled-path"
    needs: ClassVar[str] = "weights"

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        membership = Membership(knowledge)
        nodes = {node: number for number, node in enumerate(knowledge.model.graph)}
        return {group.name: _Walk(membership, group).scores(nodes) for group in groups}


class _Walk:
    """One walk over the graph: the mass that has reached each value, float64 [units, coordinates a unit or 1]."""

    def __init__(self, membership: Membership, group: ChannelGroup) -> None:
        self.membership, self.group = membership, group
        self.ownership: Ownership = membership.ownership(group)
        self.masses: dict[ir.Value, np.ndarray] = {}
        self.score = np.zeros(group.units)
        self.arrived = False
        self.ended = np.zeros(group.units)
        self.members: dict[ir.Node, list[Member]] = {}
        for member in membership.members(group):
            if member.node is not None:
                self.members.setdefault(member.node, []).append(member)
        self.producers = any(self._has(node, Role.PRODUCER) for node in self.members)

    def scores(self, nodes: dict[ir.Node, int]) -> np.ndarray:
        """The score of each unit; `nodes` has the position of every node of the main graph."""
        carrying = {
            node
            for value in self.ownership.values
            for node in (value.producer(), *(use.node for use in value.uses()))
            if node is not None and node in nodes
        }
        for node in sorted(carrying, key=lambda node: nodes[node]):
            self._visit(node)
        if self.arrived:
            return self.score if self.score.any() else self.ended
        makers = self.membership.makers(self.group)  # read in subgraphs, or not at all
        return combined([self._mass(member).sum(axis=1) for member in makers], "sum")

    def _has(self, node: ir.Node, role: Role) -> bool:
        return any(member.role is role for member in self.members.get(node, ()))

    def _visit(self, node: ir.Node) -> None:
        if node.outputs and all(self.membership.is_weight(value) for value in node.outputs):
            return
        results = [value for value in node.outputs if self.ownership.axes(value)]
        arriving = self._arriving(node)
        made = self._sum([self._mass(member) for member in self.members.get(node, ()) if member.role is Role.PRODUCER])
        consumed = [self._mass(member) for member in self.members.get(node, ()) if member.role is Role.CONSUMER]
        if made is None and not consumed and arriving is not None:
            made = self._scaled(node, arriving)
            if not results:
                self.arrived = True
                self.ended = self.ended + made.sum(axis=1)
        if made is not None:
            self.masses.update((value, made) for value in results)
        # A recurrence reads what it makes itself.
        source = arriving if arriving is not None else made
        for mass in consumed:
            if source is None:
                source = np.zeros((1, 1)) if self.producers else np.ones((1, 1))
            self.arrived = True
            self.score = self.score + _product(source, mass).sum(axis=1)

    def _arriving(self, node: ir.Node) -> np.ndarray | None:
        """What the computed operands carry, None where they carry nothing."""
        found = [self.masses[value] for value in node.inputs if value is not None and value in self.masses]
        return self._sum(found)

    def _scaled(self, node: ir.Node, mass: np.ndarray) -> np.ndarray:
        for member in self.members.get(node, ()):
            if member.role in (Role.SCALE, *MAKERS):
                mass = _product(mass, self._mass(member))
        return mass

    def _mass(self, member: Member) -> np.ndarray:
        """Sum of the absolute weights at each coordinate: [units, coordinates a unit]."""
        node = member.node
        if node is not None and self._is_constant_normalization(node) and member.role is Role.SCALE:
            return member.owned.rows(np.abs(self.membership.normalization_factor(node)))
        array = np.abs(self.membership.weights.array(member.value))
        if node is not None and is_op(node, "Div") and member.role is Role.SCALE:
            array = 1 / np.maximum(array, np.finfo(np.float32).tiny)
            return member.owned.rows(member.arranged(array).mean(axis=1))
        arranged = member.arranged(array)
        # A factor that varies along other axes (a pixel, a position) counts with its mean; a kernel with its sum.
        reduced = arranged.mean(axis=1) if member.role is Role.SCALE else arranged.sum(axis=1)
        return member.owned.rows(reduced)

    def _is_constant_normalization(self, node: ir.Node) -> bool:
        constant = all(self.membership.is_weight(value) for value in node.inputs[1:])
        return is_op(node, "BatchNormalization") and constant

    def _sum(self, masses: Sequence[np.ndarray]) -> np.ndarray | None:
        if not masses:
            return None
        total = masses[0]
        for mass in masses[1:]:
            total = np.add(*_aligned(total, mass))
        return total


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.multiply(*_aligned(a, b))


def _aligned(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two masses coordinate by coordinate; the mean over coordinates where they have different ones."""
    if 1 in (a.shape[1], b.shape[1]) or a.shape[1] == b.shape[1]:
        return a, b
    return (a.mean(axis=1, keepdims=True), b) if a.shape[1] < b.shape[1] else (a, b.mean(axis=1, keepdims=True))
