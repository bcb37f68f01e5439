"""What a `channels` rule sees: one node, the axes of its operands, and the means to relate them.

A rule says which positions of which axes are the same channel, and hands axes on to its results. What it does not
take up is frozen by the driver, so that a forgotten axis is safe. Knows no operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.axes import Axis, AxisStore, Reason, Sizes
from graphopt.ir.ops.row import Shape


@dataclass(frozen=True)
class Track:
    """One axis of one value.

    Attributes:
        axis: its channels.
        zero: whether the value is 0 at a channel whose weights are all 0. A contraction is exact where it is.
    """

    axis: Axis
    zero: bool = False

    def nonzero(self) -> Track:
        """The same channels, with something other than 0 where they are masked."""
        return dataclasses.replace(self, zero=False)


Tracks = tuple[Track, ...]


@dataclass
class ChannelState:
    """All that the rules have found out about a graph.

    Attributes:
        store: the axes.
        tracks: the axes of every value that has been reached.
        attributes: axes behind attributes of nodes (`group`, `hidden_size`, ...), by name.
        divisors: values that something is divided by, with an axis along which they are 0 once masked.
        weights: values that are computed from initializers alone, these included.
        carried: loop-carried values that are not 0 at masked channels after the first turn.
        roles: what an axis serves as, in the words of the field; the first reader is asked first.
    """

    store: AxisStore
    tracks: dict[ir.Value, Tracks] = field(default_factory=dict[ir.Value, Tracks])
    attributes: dict[ir.Node, dict[str, Axis]] = field(default_factory=dict[ir.Node, dict[str, Axis]])
    divisors: list[tuple[ir.Value, Axis, ir.Node]] = field(default_factory=list[tuple[ir.Value, Axis, ir.Node]])
    weights: set[ir.Value] = field(default_factory=set[ir.Value])
    carried: set[ir.Value] = field(default_factory=set[ir.Value])
    roles: list[tuple[Axis, str, ir.Node]] = field(default_factory=list[tuple[Axis, str, ir.Node]])


class ChannelSite:
    """One node under analysis.

    Attributes:
        node: the node.
        state: what is known so far; rules use the methods below.
    """

    def __init__(
        self,
        node: ir.Node,
        state: ChannelState,
        shapes: Callable[[ir.Value], tuple[Shape, ...] | None],
        constant: Callable[[ir.Value], np.ndarray | None],
        dtype: Callable[[ir.Value], ir.DataType | None],
        run: Callable[[ir.Graph], None],
    ) -> None:
        self.node, self.state, self.store = node, state, state.store
        self._shapes, self._constant, self._dtype, self._run = shapes, constant, dtype, run
        self.accounted: set[tuple[int, int]] = set()

    # Reading ------------------------------------------------------------------------------------------------

    def attribute(self, name: str, default: Any = None) -> Any:
        """The Python value of an attribute, or `default`."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def given(self, index: int) -> bool:
        """Whether the node has an input `index`."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def dtype(self, index: int) -> int | None:
        """Element type of input `index` as ONNX numbers it, None where it is not known."""
        value = self.node.inputs[index]
        found = None if value is None else self._dtype(value)
        return None if found is None else int(found)

    def is_weight(self, index: int) -> bool:
        """Whether input `index` is computed from initializers alone."""
        return self.node.inputs[index] in self.state.weights

    def rank(self, index: int) -> int:
        """Number of axes of input `index`."""
        return len(self._tracks(index))

    def shape(self, index: int) -> Shape:
        """Shape of input `index` in the first probe."""
        return tuple(track.axis.size for track in self._tracks(index))

    def take(self, index: int, axis: int) -> Track:
        """The axis `axis` of input `index`; from here on the rule answers for it."""
        tracks = self._tracks(index)
        axis %= len(tracks)
        self.accounted.add((index, axis))
        return tracks[axis]

    def take_all(self, index: int) -> list[Track]:
        """All axes of input `index`; the rule answers for them."""
        return [self.take(index, axis) for axis in range(self.rank(index))]

    def peek(self, index: int, axis: int) -> Axis:
        """The axis, to look at: the driver still freezes it unless it is taken."""
        return self._tracks(index)[axis].axis

    def constant(self, index: int) -> np.ndarray | None:
        """The value of a small input that is the same at every run, or None."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None else self._constant(value)

    def operand_length(self, index: int) -> int | None:
        """Number of elements of a vector operand, None where it is not known."""
        return self.shape(index)[0] if self.given(index) and self.rank(index) == 1 else None

    def integers(self, index: int) -> list[int] | None:
        """`constant` as a flat list of integers."""
        found = self.constant(index)
        return None if found is None else [int(entry) for entry in found.reshape(-1)]

    def output_sizes(self, index: int = 0) -> tuple[Sizes, ...] | None:
        """Sizes of each axis of output `index`, one a probe; None where its shape is unknown."""
        shapes = self._shapes(self.node.outputs[index])
        return None if shapes is None else tuple(zip(*shapes, strict=True))

    def _tracks(self, index: int) -> Tracks:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        found = None if value is None else self.state.tracks.get(value)
        if found is None:
            raise OpaqueError(f"input {index} has no known shape")
        return found

    # Saying -------------------------------------------------------------------------------------------------

    def unify(self, *axes: Axis | Track) -> Axis:
        """All of these have the same channels; axes of one element say nothing. Returns one that stands for all."""
        found = [axis.axis if isinstance(axis, Track) else axis for axis in axes]
        long = [axis for axis in found if not (axis.static and axis.size == 1)]
        if len({axis.sizes for axis in long}) > 1:
            if all(axis.static for axis in long):
                raise ContradictionError(f"axes of {' and '.join(str(axis.size) for axis in long)} elements meet")
            for axis in long:
                self.freeze(axis, "axes of different lengths meet")
            return long[0]
        for other in long[1:]:
            self.store.unify(long[0], other)
        return long[0] if long else found[0]

    def reason(self, text: str, *, channel: bool = True) -> Reason:
        """A reason with this node as the culprit."""
        return Reason(text, self.node, channel)

    def freeze(self, axis: Axis | Track, text: str, *, channel: bool = True) -> Axis:
        """No coordinate of the axis can go. Returns it."""
        found = axis.axis if isinstance(axis, Track) else axis
        self.store.freeze(found, self.reason(text, channel=channel))
        return found

    def freeze_rest(self, text: str, *, inputs: Iterable[int] | None = None) -> None:
        """Freeze every axis (of `inputs`, all by default) that was not taken; none of them is one of channels."""
        for index in range(len(self.node.inputs)) if inputs is None else inputs:
            if self.given(index):
                for axis in range(self.rank(index)):
                    if (index, axis) not in self.accounted:
                        self.freeze(self.take(index, axis), text, channel=False)

    def inexact(self, axis: Axis | Track, text: str) -> None:
        """Removing coordinates differs from masking them."""
        self.store.mark_inexact(axis.axis if isinstance(axis, Track) else axis, self.reason(text))

    def fixed(self, sizes: Sizes | int, text: str, *, channel: bool = False) -> Track:
        """An axis of a result that no channel runs along."""
        return Track(self.store.fix(sizes, self.reason(text, channel=channel)))

    def fresh(self, size: int, *, zero: bool = False) -> Track:
        """An axis of `size` new channels."""
        return Track(self.store.open(size), zero)

    def split(self, axis: Axis | Track, sizes: Sequence[int]) -> list[Axis]:
        """Cut an axis into axes of static `sizes`, outermost first; a size of -1 is what the others leave."""
        found = axis.axis if isinstance(axis, Track) else axis
        known = int(np.prod([size for size in sizes if size != -1]))
        wanted: list[Sizes] = [
            tuple(extent // known for extent in found.sizes) if size == -1 else (size,) * self.store.probes
            for size in sizes
        ]
        return self.store.regroup([found], wanted, self.reason("its pieces do not nest"))

    def product(self, *axes: Axis | Track) -> Axis:
        """The axis over all combinations, the last running fastest."""
        return self.store.product(axis.axis if isinstance(axis, Track) else axis for axis in axes)

    def repeats(self, count: int, text: str) -> Axis:
        """An axis of `count` positions that are no channels (gates, kernel windows), to multiply channels with."""
        return self.store.fix(count, self.reason(text, channel=False))

    def behind(self, name: str, axis: Axis) -> None:
        """The attribute `name` counts the coordinates of `axis`."""
        self.state.attributes.setdefault(self.node, {})[name] = axis

    def role(self, axis: Axis | Track, role: str) -> None:
        """What the axis serves as here: "heads", "head width", "groups"."""
        self.state.roles.append((axis.axis if isinstance(axis, Track) else axis, role, self.node))

    def emit(self, index: int, tracks: Iterable[Track]) -> None:
        """The axes of output `index`, as long as the shape that was inferred for it."""
        if index < len(self.node.outputs):
            self.state.tracks[self.node.outputs[index]] = tuple(tracks)

    def pass_on(self, index: int = 0, *, zero: bool = True, output: int = 0) -> None:
        """Output has all axes of input `index`; `zero` says whether the op maps 0 to 0."""
        tracks = self.take_all(index)
        self.emit(output, tracks if zero else (track.nonzero() for track in tracks))

    def divides_by(self, index: int, track: Track) -> None:
        """Input `index` is a divisor that is 0 along `track` once masked: 0 / 0, unless it is spared the mask."""
        value = self.node.inputs[index]
        if value is not None and track.zero and not self.store.is_fixed(track.axis):
            self.state.divisors.append((value, track.axis, self.node))

    # Subgraphs ----------------------------------------------------------------------------------------------

    def run(self, graph: ir.Graph) -> None:
        """Apply the rules to the nodes of a subgraph, whose inputs were given tracks with `bind`."""
        self._run(graph)

    def bind(self, value: ir.Value, tracks: Iterable[Track]) -> None:
        """The axes of an input of a subgraph."""
        self.state.tracks[value] = tuple(tracks)

    def tracks_of(self, value: ir.Value) -> Tracks | None:
        """The axes of a value in a subgraph, None where they are not known."""
        return self.state.tracks.get(value)


class OpaqueError(Exception):
    """A rule cannot account for the node; the driver freezes all that it touches, for this reason."""


class ContradictionError(Exception):
    """Axes of different static lengths meet: the model contradicts itself, where onnx has not looked."""


class RepairSite:
    """One node of the pruned graph that is being repaired: sizes and attributes follow the channels that stay.

    Attributes:
        node: the node to change.
        original: the node of the graph before.
    """

    def __init__(
        self,
        node: ir.Node,
        original: ir.Node,
        kept: Callable[[ir.Value], tuple[np.ndarray | None, ...] | None],
        attributes: Mapping[str, np.ndarray | None],
        constant: Callable[[ir.Value], np.ndarray | None],
        edit: OperandEditor,
    ) -> None:
        self.node, self.original = node, original
        self._kept, self._attributes, self._constant, self._edit = kept, attributes, constant, edit

    def attribute(self, name: str, default: Any = None) -> Any:
        """The Python value of an attribute, or `default`."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def kept_input(self, index: int, axis: int) -> np.ndarray | None:
        """Which coordinates of an axis stay, as booleans; None where all do."""
        value = self.original.inputs[index]
        return None if value is None else self._mask(value, axis)

    def kept_output(self, index: int, axis: int) -> np.ndarray | None:
        """Which coordinates of an axis stay, as booleans; None where all do."""
        return self._mask(self.original.outputs[index], axis)

    def _mask(self, value: ir.Value, axis: int) -> np.ndarray | None:
        masks = self._kept(value)
        return None if masks is None else masks[axis]

    def output_rank(self, index: int = 0) -> int:
        """Number of axes of an output."""
        return len(self._kept(self.original.outputs[index]) or ())

    def input_rank(self, index: int) -> int:
        """Number of axes of an input."""
        value = self.original.inputs[index]
        return 0 if value is None else len(self._kept(value) or ())

    def counted(self, attribute: str) -> int | None:
        """How many coordinates stay on the axis behind an attribute; None where all do."""
        mask = self._attributes.get(attribute)
        return None if mask is None else int(mask.sum())

    def constant(self, index: int) -> np.ndarray | None:
        """The value of an input before the removal, where it is the same at every run."""
        value = self.original.inputs[index] if index < len(self.original.inputs) else None
        return None if value is None else self._constant(value)

    def set_attribute(self, name: str, value: int | Sequence[int]) -> None:
        """Change an attribute."""
        self.node.attributes[name] = ir.convenience.convert_attribute(
            name, list(value) if isinstance(value, (list, tuple)) else value
        )

    def set_operand(self, index: int, array: np.ndarray) -> None:
        """Make an input this constant; other readers of the old one keep it."""
        self._edit.replace(self.node, index, array)

    def resize(self, index: int, element: int, axis: int, output: int = 0) -> None:
        """Element `element` of the size operand `index` follows axis `axis` of an output, also where it keeps all."""
        before = self._edit.length(self.original.outputs[output], axis)
        if before is not None:
            mask = self.kept_output(output, axis)
            after = before if mask is None else int(mask.sum())
            self._edit.resize(self.node, self.original, index, element, before, after)

    def copies(self, index: int, element: int, axis: int) -> None:
        """Element `element` of the target `index` is 0: the size of axis `axis` of input 0, whatever stays of that."""
        wanted, copied = self._count(self.original.outputs[0], axis), None
        if axis < self.input_rank(0) and (value := self.original.inputs[0]) is not None:
            copied = self._count(value, axis)
        if wanted is not None and wanted != copied:
            self._edit.write(self.node, index, element, wanted)

    def _count(self, value: ir.Value, axis: int) -> int | None:
        mask = self._mask(value, axis)
        return self._edit.length(value, axis) if mask is None else int(mask.sum())

    def first_element(self, index: int, element: int) -> int | None:
        """An element of a size operand in the first probe, None where it is not known."""
        value = self.original.inputs[index]
        return None if value is None else self._edit.element(value, element)

    def gather_first(self, axis: int, indices: np.ndarray) -> None:
        """The node reads these positions of its first input, in this order."""
        self._edit.gather_first(self.node, axis, indices)

    def operand_length(self, index: int) -> int | None:
        """Number of elements of a vector operand, None where it is not known."""
        value = self.original.inputs[index]
        return None if value is None else self._edit.length(value, 0)


class OperandEditor(Protocol):
    """How operands of one graph are changed; the driver of removals implements it."""

    def replace(self, node: ir.Node, index: int, array: np.ndarray) -> None:
        """Make input `index` of `node` this constant."""
        ...

    def resize(self, node: ir.Node, original: ir.Node, index: int, element: int, before: int, after: int) -> None:
        """One element of a size operand was computed for `before` coordinates, of which `after` stay."""
        ...

    def write(self, node: ir.Node, index: int, element: int, number: int) -> None:
        """Put a number into a size operand."""
        ...

    def element(self, value: ir.Value, element: int) -> int | None:
        """An element of a size operand in the first probe, before the removal."""
        ...

    def gather_first(self, node: ir.Node, axis: int, indices: np.ndarray) -> None:
        """Put a Gather before the first input of `node`."""
        ...

    def length(self, value: ir.Value, axis: int) -> int | None:
        """Number of coordinates of an axis before the removal."""
        ...
