"""The weights of a group with their roles, as matrices with one row a unit: what every criterion reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.criteria.contract import Knowledge
from graphopt.criteria.ownership import Owned, Ownership
from graphopt.criteria.roles import Role, is_linear, placing
from graphopt.criteria.weights import Weights
from graphopt.ir.channel_analysis import nodes_below, weight_sources
from graphopt.ir.channels import ChannelGroup
from graphopt.ir.linear import channel_vector
from graphopt.ir.rewrite import FLOATING, DeclinedError, is_op, sole_consumer

MAKERS = (Role.PRODUCER, Role.DEPTHWISE)
"""Roles of the weights that make a channel."""


@dataclass(frozen=True, eq=False)
class Member:
    """A weight of a group, as one node reads it.

    Attributes:
        role: what it does to the channels.
        node: the node that reads it; None where nothing in the main path does.
        operand: index of the input, -1 where `node` is None.
        value: the weight: an initializer, or computed from initializers alone.
        axis: the axis of `value` on which the channels are.
        owned: which coordinates of that axis, or of the regrouped one, each unit owns.
        groups: above 1 where the weight of a grouped convolution is regrouped by `arranged`.
    """

    role: Role
    node: ir.Node | None
    operand: int
    value: ir.Value
    axis: int
    owned: Owned
    groups: int = 1

    def arranged(self, array: np.ndarray) -> np.ndarray:
        """An array of the shape of the weight as [channels, rest]."""
        if (
            self.groups > 1
        ):  # [g · a, b, kernel] as [g · b, a, kernel]: from one layout of a grouped weight to the other
            blocks = array.reshape(self.groups, array.shape[0] // self.groups, *array.shape[1:]).swapaxes(1, 2)
            return blocks.reshape(self.groups * array.shape[1], -1)
        front = np.moveaxis(array, self.axis, 0)
        return front.reshape(front.shape[0], -1)

    def sums(self, array: np.ndarray) -> np.ndarray:
        """Float64 [units]: the sum of an array of the shape of the weight over what each unit owns."""
        return self.owned.sums(self.arranged(array).sum(axis=1))

    def matrix(self, array: np.ndarray) -> np.ndarray:
        """Float64 [units, elements a unit]: an array of the shape of the weight, one row a unit."""
        rows = self.owned.rows(self.arranged(array))
        return rows.reshape(rows.shape[0], -1)


@dataclass(frozen=True, eq=False)
class Following:
    """What scales and shifts the result of a linear operator, one number a channel, before anything else reads it.

    Attributes:
        factor: float64 [channels of the result].
        normalization: the first BatchNormalization on the way, or None.
        shifts: constants that are added before it, with the nodes that add them.
    """

    factor: np.ndarray
    normalization: ir.Node | None
    shifts: tuple[tuple[ir.Node, ir.Value], ...]


class Membership:
    """The members of the groups of one model.

    Attributes:
        weights: arrays of the model's weights.

    Example:
        >>> from graphopt.ir.channels import channel_groups
        >>> from graphopt.ir.load import load
        >>> model = load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) =>
        ...     (float[n,1] y) <float[2,3] a = {1,2,3,4,5,6}, float[3,1] b = {1,1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> groups = channel_groups(model)
        >>> membership = Membership(Knowledge(model, groups))
        >>> for member in membership.members(groups.named("mlp hidden of a")):
        ...     array = membership.weights.array(member.value)
        ...     print(member.role.value, member.value.name, member.matrix(array).tolist())
        producer a [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
        consumer b [[1.0], [1.0], [1.0]]
    """

    def __init__(self, knowledge: Knowledge) -> None:
        self.weights = Weights(knowledge.model)
        self._graph = knowledge.model.graph
        self._state = knowledge.groups.analysis.state
        self._analysis = knowledge.groups.analysis
        self._order = {node: number for number, node in enumerate(nodes_below(knowledge.model.graph))}
        self._ownerships: dict[str, Ownership] = {}
        self._members: dict[str, list[Member]] = {}

    def ownership(self, group: ChannelGroup) -> Ownership:
        """The coordinates that the units of a group own."""
        if group.name not in self._ownerships:
            self._ownerships[group.name] = Ownership(group)
        return self._ownerships[group.name]

    def is_weight(self, value: ir.Value | None) -> bool:
        """Whether a value is computed from initializers alone."""
        return value in self._state.weights

    def members(self, group: ChannelGroup) -> list[Member]:
        """The weights of a group, each as each of its readers has it, in the order of the graph.

        Quantization scales, zero points, index tables and masks with infinite entries are left out.
        """
        if group.name not in self._members:
            self._members[group.name] = self._find(group)
        return self._members[group.name]

    def makers(self, group: ChannelGroup) -> list[Member]:
        """The weights that make the channels, each once; where there are none, every float weight of the group."""
        members = self.members(group)
        made = [member for member in members if member.role in MAKERS]
        return _once(made or [member for member in members if member.role is not Role.STATISTIC])

    def of_role(self, group: ChannelGroup, *roles: Role) -> list[Member]:
        """The members with one of some roles, each weight once."""
        return _once(member for member in self.members(group) if member.role in roles)

    def readers(self, group: ChannelGroup) -> set[ir.Node]:
        """The nodes that sum over the channels of a group with a weight."""
        return {
            member.node for member in self.members(group) if member.role is Role.CONSUMER and member.node is not None
        }

    def biases(self, group: ChannelGroup, makers: Sequence[Member]) -> list[Member]:
        """The members of a group that are added to what some of its makers make, before anything normalises it."""
        nodes = {maker.node for maker in makers}
        added = {shift for maker in makers for shift in self.following(maker).shifts}
        shifts = self.of_role(group, Role.SHIFT)
        return [member for member in shifts if member.node in nodes or (member.node, member.value) in added]

    def following(self, member: Member) -> Following:
        """What stands right behind a linear operator: biases, BatchNormalization, constant scales."""
        channel = self._channel_axis(member)
        if member.node is None or channel is None:
            return Following(np.ones(1), None, ())
        value, axis, channels, rank = channel
        factor, normalization = np.ones(channels), None
        shifts: list[tuple[ir.Node, ir.Value]] = []
        while (node := sole_consumer(value)) is not None and len(node.outputs) >= 1:
            try:
                scale = self._scale(node, value, axis, channels, rank)
            except DeclinedError:
                break
            if scale is None:
                break
            factor = factor * scale
            if is_op(node, "BatchNormalization"):
                normalization = normalization or node
            elif normalization is None and is_op(node, "Add"):
                shifts.extend((node, other) for other in node.inputs if other is not None and other is not value)
            value = node.outputs[0]
        return Following(factor, normalization, tuple(shifts))

    def normalization_factor(self, node: ir.Node) -> np.ndarray:
        """gamma / sqrt(variance + epsilon) of a BatchNormalization with constant operands, float64 [channels]."""
        scale, variance = node.inputs[1], node.inputs[4]
        assert scale is not None
        assert variance is not None
        attribute = node.attributes.get("epsilon")
        epsilon = 1e-5 if attribute is None else attribute.as_float()
        deviation = np.sqrt(np.maximum(self.weights.array(variance) + epsilon, np.finfo(np.float64).tiny))
        return self.weights.array(scale) / deviation

    # Parts --------------------------------------------------------------------------------------------------

    def _find(self, group: ChannelGroup) -> list[Member]:
        ownership = self.ownership(group)
        found: list[Member] = []
        reached: set[ir.Value] = set()
        weights = [value for value in ownership.values if self.is_weight(value)]
        for value in weights:
            for node, index in self._reads(value):
                member = self._member(node, index, value, ownership)
                found.extend(member)
                if member:
                    reached |= weight_sources(value)
        for value in weights:
            if value.is_initializer() and value not in reached and self._is_number(value):
                for axis in ownership.axes(value):
                    found.append(Member(Role.OTHER, None, -1, value, axis, ownership.owned(value, axis)))
        return sorted(found, key=self._key)

    def _reads(self, value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
        """The nodes that compute something of the data with a weight."""
        for use in value.uses():
            row = self._analysis.row(use.node)
            if row is not None and use.idx in (*row.quantization, *row.structural):
                continue
            if not use.node.outputs or not all(self.is_weight(output) for output in use.node.outputs):
                yield use.node, use.idx

    def _member(self, node: ir.Node, index: int, value: ir.Value, ownership: Ownership) -> list[Member]:
        if not self._is_number(value) and not is_linear(node, index):
            return []
        members: list[Member] = []
        for axis in ownership.axes(value):
            place = placing(node, index, axis, ownership, self._state.weights)
            if place.role is Role.OTHER and not self.weights.is_finite(value):
                continue
            owned = ownership.owned(*place.along)
            members.append(Member(place.role, node, index, value, place.axis, owned, place.groups))
        return members

    def _is_number(self, value: ir.Value) -> bool:
        return self._analysis.dtype(value) in FLOATING

    def _key(self, member: Member) -> tuple[int, int, str, int]:
        last = len(self._order)
        at = last if member.node is None else self._order.get(member.node, last)
        return at, member.operand, member.value.name or "", member.axis

    def _channel_axis(self, member: Member) -> tuple[ir.Value, int, int, int] | None:
        """Result of the operator behind a member, its channel axis, its channels and its rank."""
        node = member.node
        if node is None or member.role not in MAKERS or node.op_type in ("LSTM", "GRU", "RNN", "Einsum"):
            return None
        tracks = self._state.tracks.get(node.outputs[0]) if is_linear(node, member.operand) else None
        if tracks is None or not tracks:
            return None
        axis = 1
        if node.op_type not in ("Conv", "ConvTranspose", "DeformConv"):
            axis = len(tracks) - 2 if member.operand == 0 and "MatMul" in node.op_type else len(tracks) - 1
        if not 0 <= axis < len(tracks) or not tracks[axis].axis.static:
            return None
        channels = tracks[axis].axis.size
        return (node.outputs[0], axis, channels, len(tracks)) if self._aligned(member, channels) else None

    def _aligned(self, member: Member, channels: int) -> bool:
        """Whether the first axis of the arranged weight is the channel axis of the result."""
        if member.groups > 1:
            return True
        return self._state.tracks[member.value][member.axis].axis.size == channels

    def _scale(self, node: ir.Node, value: ir.Value, axis: int, channels: int, rank: int) -> np.ndarray | None:
        """What a node multiplies each channel with; None where it does anything but scale and shift.

        Raises:
            DeclinedError: its constant varies along another axis.
        """
        if is_op(node, "BatchNormalization") and node.inputs[0] is value:
            constant = axis == 1 and all(self.is_weight(operand) for operand in node.inputs[1:])
            return self.normalization_factor(node) if constant else None
        others = [operand for operand in node.inputs if operand is not None and operand is not value]
        if not is_op(node, "Mul", "Div", "Add") or len(others) != 1 or not self.is_weight(others[0]):
            return None
        if not self._is_number(others[0]) or (is_op(node, "Div") and node.inputs[0] is not value):
            return None
        constant = channel_vector(self.weights.array(others[0]), axis, channels, rank)
        if is_op(node, "Add"):
            return np.ones(channels)
        if is_op(node, "Mul"):
            return constant
        return None if (constant == 0).any() else 1 / constant


def _once(members: Iterable[Member]) -> list[Member]:
    """Members without those that are the same axis of the same weight, read again by another node."""
    return list({(member.value, member.axis): member for member in reversed(list(members))}.values())[::-1]
