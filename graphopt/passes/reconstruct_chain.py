"""What a channel is made of: the folded filters and biases of everything that produces it, read off the graph.

From the input of a consumer the walk goes back to the nearest linear operators whose results are the channels of a
group, through BatchNormalization, activations, pooling, reshapes and sums. Of the folded filters v only the products
<v_i, v_j> are kept: all closed forms need no more, and a residual stream with many producers costs no more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.inputs.gaussian_rules import ELEMENTWISE
from graphopt.ir.affine import batchnorm_affine
from graphopt.ir.channels import ChannelGroup, ChannelGroups
from graphopt.ir.linear import Linear, channel_axis, channel_vector, linear_at
from graphopt.ir.rewrite import (
    DeclinedError,
    Rewriter,
    constant_float64,
    constant_tensor,
    discard_if_dead,
    integers,
    is_op,
    sole_consumer,
    to_tensor,
)

PASSING = (
    "Identity", "Dropout", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "AveragePool",
    "GlobalAveragePool", "MaxPool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax", "Slice", "Split",
    "Gather", "Pad", "Resize", "Upsample", "Expand", "Tile", "SpaceToDepth", "DepthToSpace",
)  # fmt: skip
"""Operators that do the same to every channel: what a channel is made of stays, up to its positions."""
_JOINING = ("Add", "Sub", "Sum", "Concat")
_MOST_COLUMNS = 16
"""Positions within a unit up to which each has a bias of its own; above, their mean counts."""


class Places:
    """Where the units of a group lie on the axes of values.

    Args:
        groups: of the model.
        removed: one boolean a label, as of `ChannelGroups.atoms`.
    """

    def __init__(self, groups: ChannelGroups, removed: np.ndarray) -> None:
        self.groups, self.removed = groups, removed
        self._found: dict[tuple[str, ir.Value, int], np.ndarray | None] = {}

    def rank(self, value: ir.Value) -> int | None:
        """Number of axes of a value."""
        tracks = self.groups.analysis.state.tracks.get(value)
        return None if tracks is None else len(tracks)

    def coordinates(self, group: ChannelGroup, value: ir.Value, axis: int) -> np.ndarray | None:
        """Coordinates of each unit along an axis, int64 [units, positions]; None where it has none there.

        Raises:
            DeclinedError: the units do not have the same number of them.
        """
        key = group.name, value, axis
        if key not in self._found:
            self._found[key] = self._look_up(group, value, axis)
        return self._found[key]

    def _look_up(self, group: ChannelGroup, value: ir.Value, axis: int) -> np.ndarray | None:
        units, atoms = group.analysed, group.origin.atoms
        leaves = [leaf for part in units.leaves(value, axis) if (leaf := units.leaf(part)) is not None]
        if not any(np.isin(atoms[:1], leaf.atoms).any() for leaf in leaves):
            return None
        owned = [units.owned((value, axis), int(atom)) for atom in atoms]
        if len({len(each) for each in owned}) != 1:
            raise DeclinedError("its units do not have equally many coordinates", value)
        return np.stack(owned)

    def place(self, group: ChannelGroup, value: ir.Value) -> tuple[int, np.ndarray] | None:
        """The axis that holds the group, and the coordinates on it; None where no axis does."""
        found = [
            (axis, coordinates)
            for axis in range(self.rank(value) or 0)
            if (coordinates := self.coordinates(group, value, axis)) is not None
        ]
        if len(found) > 1:
            raise DeclinedError("several axes of a value hold its channels", value)
        return found[0] if found else None

    def kept(self, value: ir.Value, axis: int) -> np.ndarray:
        """Which coordinates of an axis stay, one boolean each."""
        mask = self.groups.units.kept(value, axis, self.removed)
        size = self.groups.analysis.state.tracks[value][axis].axis.size
        return np.ones(size, bool) if mask is None else mask


# Linear operators -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """A linear operator with constant weight, a MatMul by a transposed weight included.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        linear: its view; of the MatMul with the weight as it is stored, where that is turned first.
        turned: the Transpose between the weight and the MatMul, or None.
    """

    node: ir.Node
    linear: Linear
    turned: ir.Node | None

    def weight(self) -> np.ndarray:
        """The weight, float64 [M, C / groups, *kernel]."""
        if self.turned is None:
            return self.linear.weight()
        stored = constant_float64(self.turned.inputs[0])
        assert stored is not None
        return stored

    def bias(self) -> np.ndarray:
        """The bias, float64 [M], that of an Add behind a MatMul included."""
        return self.linear.bias()

    @property
    def product(self) -> ir.Value:
        """The result of the node itself."""
        return self.node.outputs[0]

    @property
    def is_shared(self) -> bool:
        """Whether another node reads the same weight."""
        held = self.node.inputs[self.linear.weight_index] if self.turned is None else self.turned.inputs[0]
        others = self.turned is not None and len(self.turned.outputs[0].uses()) > 1
        return others or held is None or len(held.uses()) > 1

    def store(self, rewriter: Rewriter, weight: np.ndarray, bias: np.ndarray) -> None:
        """Write weight and bias back; in the axes that they are read in.

        Raises:
            DeclinedError: a number is not finite in the element type of the weight. Nothing has changed then.
        """
        if self.turned is None:
            self.linear.store(rewriter, weight, bias)
            return
        to_tensor(weight, self.linear.dtype)
        old = self.turned
        self.linear.store(rewriter, weight, bias)
        discard_if_dead(old)


def operator_at(node: ir.Node) -> Operator | None:
    """The linear operator of a node, None where it is none.

    Raises:
        DeclinedError: it is one whose weight or bias is no constant.
    """
    linear = linear_at(node)
    if linear is not None:
        return Operator(node, linear, None)
    turned = node.inputs[1].producer() if is_op(node, "MatMul") and node.inputs[1] is not None else None
    if turned is None or not is_op(turned, "Transpose"):
        return None
    stored = constant_float64(turned.inputs[0])
    if stored is None or stored.ndim != 2 or tuple(integers(turned, "perm") or (1, 0)) != (1, 0):
        return None
    tensor = constant_tensor(turned.inputs[0])
    assert tensor is not None
    channels = len(stored)
    bias_node = sole_consumer(node.outputs[0])
    held = bias_node.inputs if bias_node is not None and is_op(bias_node, "Add") else ()
    biases = [array for value in held if (array := constant_float64(value)) is not None]
    if len(biases) != 1 or biases[0].size != channels or biases[0].shape[-1] != channels:
        bias_node = None
    linear = Linear(node, bias_node, 0, 1, 1, channels, stored.shape[1], -1, -1, (), tensor.dtype)
    return Operator(node, linear, turned)


# Rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """What channels are made of, one row a unit.

    Attributes:
        gram: float64 [R, R], products <v_i, v_j> of the folded filters.
        columns: float64 [R, J], folded biases: one column for each place where an activation follows.
        gain: float64 [R], the size of what scales the raw filters (gamma / sigma); 1 where nothing does.
        shift: float64 [R, F], constant that a channel has beside a combination of others (a bias that no activation
            follows), one a position.
        sources: names of the linear operators.
        covariance: float64 [R, R] of the channels themselves, where it is known.
    """

    gram: np.ndarray
    columns: np.ndarray
    gain: np.ndarray
    shift: np.ndarray
    sources: frozenset[str] = frozenset()
    covariance: np.ndarray | None = None

    @classmethod
    def of_filters(cls, filters: np.ndarray, biases: np.ndarray, gain: np.ndarray | None = None) -> Rows:
        """Rows of folded filters v [R, F] and folded biases b [R], an activation following.

        Example:
            >>> Rows.of_filters(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([0.5, 1.0])).gram.tolist()
            [[1.0, 2.0], [2.0, 4.0]]
        """
        count = len(filters)
        flat = filters.reshape(count, -1)
        ones = np.ones(count) if gain is None else gain
        return cls(flat @ flat.T, biases.reshape(count, -1), ones, np.zeros((count, 1)))

    def scaled(self, gain: np.ndarray, shift: np.ndarray | float = 0.0) -> Rows:
        """gain * x + shift: [R, F] each, for as many positions as the shift of this has."""
        size = gain.mean(axis=1)
        return replace(
            self,
            gram=self.gram * np.outer(size, size),
            columns=self.columns * size[:, None],
            gain=self.gain * np.abs(size),
            shift=self.shift * gain + shift,
        )

    def activated(self) -> Rows:
        """Behind a nonlinear function of each channel: what was a shift now decides where it bends."""
        if not self.shift.any():
            return self
        pending = self.shift if self.shift.shape[1] <= _MOST_COLUMNS else self.shift.mean(axis=1, keepdims=True)
        if np.ptp(pending, axis=1).max() == 0:
            pending = pending[:, :1]
        return replace(self, columns=np.concatenate([self.columns, pending], axis=1), shift=np.zeros_like(self.shift))

    def normalised(self, gain: np.ndarray, shift: np.ndarray) -> Rows:
        """Behind a normalisation of each channel by itself: only the direction of the filter is left."""
        size = np.sqrt(np.diag(self.gram))
        inverse = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
        return replace(
            self, gram=self.gram * np.outer(inverse, inverse), shift=np.zeros_like(self.shift), gain=np.ones_like(size)
        ).scaled(gain, shift)

    def at(self, positions: int) -> Rows:
        """With another number of positions within a unit."""
        if self.shift.shape[1] == positions:
            return self
        return replace(self, shift=np.repeat(self.shift.mean(axis=1, keepdims=True), positions, axis=1))

    def __add__(self, other: Rows) -> Rows:
        gain = np.sqrt((self.gain**2 + other.gain**2) / 2)
        columns = np.concatenate([self.columns, other.columns], axis=1)
        return Rows(self.gram + other.gram, columns, gain, self.shift + other.shift, self.sources | other.sources)


class Tracer:
    """Rows of the channels of values, found by walking back.

    Args:
        places: of the reference model.
        rebuilt: weight [M, kept of C / groups, *kernel] and bias [M] of linear operators, all rows, with the columns
            that are left; filled by the caller in topological order. None where an operator could not be followed.
        bits: rows are doubled, the second half with weights rounded to so many bits; None leaves them single.
    """

    def __init__(
        self, places: Places, rebuilt: dict[ir.Node, tuple[np.ndarray, np.ndarray] | None], bits: int | None
    ) -> None:
        self.places, self.rebuilt, self.bits = places, rebuilt, bits
        self._memo: dict[tuple[str, ir.Value], Rows] = {}

    def rows(self, group: ChannelGroup, value: ir.Value) -> Rows:
        """What the channels of a group are made of at a value.

        Raises:
            DeclinedError: an operator on the way mixes them with others, or is not understood.
        """
        key = group.name, value
        if key not in self._memo:
            self._memo[key] = self._trace(group, value)
        return self._memo[key]

    def _trace(self, group: ChannelGroup, value: ir.Value) -> Rows:
        place = self.places.place(group, value)
        if place is None:
            raise DeclinedError("its channels are lost on the way", value)
        axis, coordinates = place
        node = value.producer()
        if node is None:
            return self._constant(value, axis, coordinates)
        operator = _computing(value)
        if operator is not None:
            return self._source(operator, value, coordinates)
        if is_op(node, "Gather") and constant_tensor(node.inputs[0]) is not None:
            assert node.inputs[0] is not None
            return self._constant(node.inputs[0], 1, coordinates)
        positions = coordinates.shape[1]
        if is_op(node, "BatchNormalization"):
            return self._affine(group, node, coordinates, *batchnorm_affine(node))
        if is_op(node, "LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization"):
            return self._normalisation(group, node, axis, coordinates)
        if is_op(node, *PASSING):
            return self._operand(group, node, 0).at(positions)
        if is_op(node, "Add", "Sub", "Mul", "Div") and self._constant_operand(node) is not None:
            return self._arithmetic(group, node, axis, coordinates)
        if is_op(node, *_JOINING):
            return self._joined(group, node, axis, positions)
        if is_op(node, "Mul", "Div", *ELEMENTWISE):
            return self._product(group, node).activated()
        if is_op(node, "MatMul", "Where"):
            return self._only(group, node).at(positions)
        raise DeclinedError(f"{node.op_type} is not understood as a function of single channels", node)

    # Where channels come from -------------------------------------------------------------------------------

    def _doubled(self, filters: np.ndarray, rounded: np.ndarray | None) -> np.ndarray:
        if self.bits is None:
            return filters
        return np.concatenate([filters, filters if rounded is None else rounded])

    def _tiled(self, array: np.ndarray) -> np.ndarray:
        return array if self.bits is None else np.concatenate([array, array])

    def _source(self, operator: Operator, value: ir.Value, coordinates: np.ndarray) -> Rows:
        found = self.rebuilt.get(operator.node)
        if found is None:
            raise DeclinedError("what computes its channels could not be followed", operator.node)
        weight, bias = found
        blocks = coordinates // (len(weight) // operator.linear.groups)
        if (blocks != blocks[:1]).any():
            raise DeclinedError("a depthwise convolution computes each channel from another input", operator.node)
        rounded = None if self.bits is None else quantized_rows(weight, self.bits)
        units = len(coordinates)
        filters = self._doubled(
            weight[coordinates].reshape(units, -1), None if rounded is None else rounded[coordinates].reshape(units, -1)
        )
        own = bias if value is operator.linear.result else np.zeros_like(bias)
        count = len(filters)
        return Rows(
            filters @ filters.T,
            np.zeros((count, 0)),
            np.ones(count),
            self._tiled(own[coordinates]),
            frozenset([operator.node.name or operator.product.name or ""]),
        )

    def _constant(self, value: ir.Value, axis: int, coordinates: np.ndarray) -> Rows:
        array = constant_float64(value)
        if array is None:
            raise DeclinedError("its channels come from an input or a computed value", value)
        filters = self._tiled(np.moveaxis(array, axis, 0)[coordinates].reshape(len(coordinates), -1))
        count = len(filters)
        shift = np.zeros((count, coordinates.shape[1]))
        return Rows(filters @ filters.T, np.zeros((count, 0)), np.ones(count), shift, frozenset([value.name or ""]))

    # What happens to them -----------------------------------------------------------------------------------

    def _operand(self, group: ChannelGroup, node: ir.Node, index: int) -> Rows:
        value = node.inputs[index]
        if value is None:
            raise DeclinedError("an operand is missing", node)
        return self.rows(group, value)

    def _affine(
        self, group: ChannelGroup, node: ir.Node, coordinates: np.ndarray, scale: np.ndarray, shift: np.ndarray
    ) -> Rows:
        rows = self._operand(group, node, 0).at(coordinates.shape[1])
        return rows.scaled(self._tiled(scale[coordinates]), self._tiled(shift[coordinates]))

    def _normalisation(self, group: ChannelGroup, node: ir.Node, axis: int, coordinates: np.ndarray) -> Rows:
        """By the whole position (the same number for all channels), or by the channel itself."""
        scale = constant_float64(node.inputs[1])
        bias = constant_float64(node.inputs[2]) if len(node.inputs) > 2 else None
        whole = is_op(node, "LayerNormalization", "RMSNormalization")
        channels = int(self.places.kept(node.outputs[0], axis).size)
        if (
            scale is None
            or scale.shape != (channels,)
            or (whole and axis != (self.places.rank(node.outputs[0]) or 0) - 1)
        ):
            raise DeclinedError(f"{node.op_type} normalises something else than its channels", node)
        shift = np.zeros_like(scale) if bias is None else bias
        if whole:
            return self._affine(group, node, coordinates, scale, shift)
        rows = self._operand(group, node, 0).at(coordinates.shape[1])
        return rows.normalised(self._tiled(scale[coordinates]), self._tiled(shift[coordinates]))

    def _constant_operand(self, node: ir.Node) -> tuple[int, np.ndarray] | None:
        for index, value in enumerate(node.inputs):
            array = constant_float64(value)
            if array is not None:
                return index, array
        return None

    def _arithmetic(self, group: ChannelGroup, node: ir.Node, axis: int, coordinates: np.ndarray) -> Rows:
        found = self._constant_operand(node)
        assert found is not None
        index, array = found
        rows = self._operand(group, node, 1 - index).at(coordinates.shape[1])
        channels, rank = int(self.places.kept(node.outputs[0], axis).size), self.places.rank(node.outputs[0])
        try:
            vector = channel_vector(array, axis, channels, rank)
        except DeclinedError:
            table = node.inputs[index]
            if table is None or not is_op(node, "Add") or (self.places.place(group, table)) is None:
                raise
            return rows + replace(self.rows(group, table).at(coordinates.shape[1]), shift=np.zeros_like(rows.shift))
        operand = self._tiled(vector[coordinates])
        ones = np.ones_like(operand)
        if is_op(node, "Add", "Sub"):
            sign = -1.0 if is_op(node, "Sub") else 1.0
            return rows.scaled(ones * (sign if index == 0 else 1.0), operand * (sign if index == 1 else 1.0))
        if is_op(node, "Div") and (index == 0 or not operand.all()):
            return rows.activated()
        return rows.scaled(1.0 / operand if is_op(node, "Div") else operand)

    def _carrying(self, group: ChannelGroup, node: ir.Node, *, constants: bool = False) -> list[tuple[int, ir.Value]]:
        """The operands that hold the channels; what all channels share does not tell them apart."""
        return [
            (index, value)
            for index, value in enumerate(node.inputs)
            if value is not None
            and (constants or constant_tensor(value) is None)
            and self.places.rank(value) is not None
            and self.places.place(group, value) is not None
        ]

    def _joined(self, group: ChannelGroup, node: ir.Node, axis: int, positions: int) -> Rows:
        operands = self._carrying(group, node, constants=True)
        parts = [self.rows(group, value) for _, value in operands]
        if is_op(node, "Concat"):
            rank, attribute = self.places.rank(node.outputs[0]) or 0, node.attributes["axis"].as_int()
            if channel_axis(attribute, rank) == axis:
                shift = np.concatenate([part.shift for part in parts], axis=1)
                parts = [replace(part, shift=np.zeros_like(shift)) for part in parts]
                return replace(_sum(parts), shift=shift).at(positions)
            return _sum([replace(part.at(positions), shift=part.at(positions).shift / len(parts)) for part in parts])
        signs = [-1.0 if is_op(node, "Sub") and index == 1 else 1.0 for index, _ in operands]
        signed = [replace(part, shift=sign * part.shift) for part, sign in zip(parts, signs, strict=True)]
        return _sum([part.at(positions) for part in signed])

    def _product(self, group: ChannelGroup, node: ir.Node) -> Rows:
        """A function of one value, or of several that come from the same operators (x * sigmoid(x))."""
        parts = [self.rows(group, value) for _, value in self._carrying(group, node)]
        if not parts:
            raise DeclinedError("its channels are lost on the way", node)
        widest = max(parts, key=lambda part: (len(part.sources), part.shift.any()))
        if any(not part.sources <= widest.sources for part in parts):
            raise DeclinedError(f"{node.op_type} combines channels of different operators", node)
        return widest

    def _only(self, group: ChannelGroup, node: ir.Node) -> Rows:
        """The one operand that holds the channels; a MatMul then does the same to each."""
        operands = self._carrying(group, node)
        if len(operands) != 1:
            raise DeclinedError(f"several operands of {node.op_type} hold its channels", node)
        return self.rows(group, operands[0][1])


def _computing(value: ir.Value) -> Operator | None:
    """The linear operator that computes a value: its node, or the Add with the bias of a MatMul."""
    node = value.producer()
    if is_op(node, "Add"):
        assert node is not None
        for operand in node.inputs:
            source = None if operand is None else operand.producer()
            operator = operator_at(source) if source is not None and is_op(source, "MatMul") else None
            if operator is not None and operator.linear.bias_node is node:
                return operator
    return None if node is None else operator_at(node)


def _sum(parts: Sequence[Rows]) -> Rows:
    total = parts[0]
    for part in parts[1:]:
        if part.sources <= total.sources:
            continue
        total = total + part if not total.sources <= part.sources else part
    return total


def quantized_rows(weight: np.ndarray, bits: int) -> np.ndarray:
    """Weights rounded symmetrically, one scale an output channel: step max |W| / (2^(bits - 1) - 1).

    Example:
        >>> quantized_rows(np.array([[1.0, 0.4], [0.0, 0.0]]), 2).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    flat = weight.reshape(len(weight), -1)
    step = np.abs(flat).max(axis=1, keepdims=True, initial=0.0) / (2.0 ** (bits - 1) - 1)
    safe = np.where(step > 0, step, 1.0)
    return (np.round(flat / safe) * step).reshape(weight.shape)
