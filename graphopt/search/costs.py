"""What a model costs once units are gone, without removing them: exact counts from label arithmetic, in microseconds.

Removing units shortens axes, and which axes a unit occurs on is known from the channel analysis. So every weight
and every linear operator is a *term*: a function of how many coordinates stay on the axes around it. A change of
one group evaluates the terms around that group only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.ir.channel_units import Leaf
from graphopt.ir.channels import ChannelGroup, ChannelGroups
from graphopt.ir.cost import ModelCost, NodeCost, cost, numbers_per_element, storage_bytes
from graphopt.ir.ops.row import CostRule, Shape, Site
from graphopt.ir.propagate import Facts, propagate


@dataclass(frozen=True)
class Costs:
    """What one inference costs.

    Attributes:
        macs: multiply-accumulates.
        params: parameters, each once.
        bytes: storage of the weights.

    Example:
        >>> (Costs(10, 6, 24) - Costs(4, 2, 8)).macs
        6
    """

    macs: int = 0
    params: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, counted: ModelCost) -> Costs:
        """The totals of a counted model."""
        return cls(counted.macs, counted.parameters, counted.weight_bytes)

    def get(self, kind: str) -> int:
        """The figure called "macs", "params" or "bytes"."""
        return {"macs": self.macs, "params": self.params, "bytes": self.bytes}[kind]

    def __add__(self, other: Costs) -> Costs:
        return Costs(self.macs + other.macs, self.params + other.params, self.bytes + other.bytes)

    def __sub__(self, other: Costs) -> Costs:
        return Costs(self.macs - other.macs, self.params - other.params, self.bytes - other.bytes)


@dataclass(frozen=True)
class _Extent:
    """Length of one axis of a value: `size` while all stays, in proportion to what stays of its parts else."""

    size: int
    parts: tuple[tuple[int, int], ...] = ()
    """Index and length of each part that can shrink."""

    def kept(self, staying: _Staying) -> int:
        size = self.size
        for index, length in self.parts:
            size = size * staying[index] // length
        return size


_Operands = tuple["tuple[_Extent, ...] | None", ...]
Shapes = tuple["Shape | None", ...]
"""One shape a value, None where it is not known."""


@dataclass
class _Term:
    """A weight or a linear operator, and the figures it gave before."""

    parts: tuple[int, ...]
    count: Callable[[_Staying], Costs]
    known: dict[tuple[int, ...], Costs] = field(default_factory=dict[tuple[int, ...], Costs])

    def costs(self, staying: _Staying) -> Costs:
        key = tuple(staying[part] for part in self.parts)
        if key not in self.known:
            self.known[key] = self.count(staying)
        return self.known[key]


@dataclass(frozen=True)
class _Weight:
    """Parameters and storage of an initializer."""

    extents: tuple[_Extent, ...]
    numbers: int
    dtype: ir.DataType

    def __call__(self, staying: _Staying) -> Costs:
        elements = math.prod(extent.kept(staying) for extent in self.extents)
        return Costs(0, elements * self.numbers, storage_bytes(elements, self.dtype))


@dataclass(frozen=True)
class _Linear:
    """MACs of a node: the cost rule of its op row on shortened shapes."""

    node: ir.Node
    rule: CostRule
    runs: int
    constants: tuple[np.ndarray | None, ...]
    inputs: tuple[tuple[_Extent, ...] | None, ...]
    outputs: tuple[tuple[_Extent, ...] | None, ...]

    def __call__(self, staying: _Staying) -> Costs:
        inputs, outputs = (tuple(_shape(value, staying) for value in side) for side in (self.inputs, self.outputs))
        return Costs(self.runs * self.rule(Site(self.node, inputs, outputs, self.constants)))


def _shape(extents: tuple[_Extent, ...] | None, staying: _Staying, block: int = 1) -> Shape | None:
    if extents is None:
        return None
    kept = [(extent, extent.kept(staying)) for extent in extents]
    return tuple(-(-size // block) * block if extent.parts else size for extent, size in kept)


@dataclass
class _Part:
    """An axis without parts: its length, and how many coordinates each unit of a group owns on it."""

    leaf: Leaf
    per_unit: dict[str, int]
    shared: dict[tuple[str, ...], int]
    """Where coordinates go with any of several groups: these groups to the number of such coordinates."""

    def staying(self, removed: Mapping[str, int], units: Mapping[str, int]) -> int:
        if not self.shared:
            return max(1, self.leaf.size - sum(count * removed.get(name, 0) for name, count in self.per_unit.items()))
        expected = 0.0
        for names, count in self.shared.items():
            expected += count * math.prod(1 - removed.get(name, 0) / units[name] for name in names)
        return max(1, round(expected))


class CostModel:
    """MACs, parameters and bytes of a model as a function of how many units of each group are gone.

    Exact, but where coordinates belong to several groups at once (then the expectation for units chosen at random)
    and where removal rewrites an operator. What it says is checked against the pruned graph at the end.

    Attributes:
        whole: costs of the model as it is.
        counted: the same, node by node.

    Example:
        >>> import graphopt, onnx.parser
        >>> model = graphopt.load(onnx.parser.parse_model('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[1,2] x) => (float[1,2] y) <float[2,3] a = {1,2,3,4,5,6}, float[3,2] b = {1,1,1,1,1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> costs = CostModel(model, graphopt.channel_groups(model))
        >>> costs.whole, costs.estimate({"mlp hidden of a": 1})
        (Costs(macs=12, params=12, bytes=48), Costs(macs=8, params=8, bytes=32))
    """

    def __init__(self, model: ir.Model, groups: ChannelGroups, sizes: Mapping[str, int] | None = None) -> None:
        """Prepare the terms.

        Args:
            model: canonical; it is not changed, and must not change while this is in use.
            groups: `channel_groups(model)`.
            sizes: elements of the symbolic dimensions; MACs depend on them.
        """
        self.groups = groups
        self._facts = facts = propagate(model, sizes, table=groups.analysis.table)
        self.counted = cost(model, sizes, table=groups.analysis.table, facts=facts)
        self.whole = Costs.of(self.counted)
        self._units = {group.name: group.units for group in groups}
        self._parts: dict[int, _Part] = {}
        self._terms: list[_Term] = []
        self._known_sides: dict[ir.Node, tuple[_Operands, _Operands]] = {}
        self._group_of = self._groups_of_atoms()
        self._collect(model, facts)
        self._terms_of_part: dict[int, list[int]] = {}
        for index, term in enumerate(self._terms):
            for part in term.parts:
                self._terms_of_part.setdefault(part, []).append(index)
        self._parts_of: dict[str, list[int]] = {}
        for index, part in self._parts.items():
            for name in part.per_unit:
                self._parts_of.setdefault(name, []).append(index)

    def estimate(self, removed: Mapping[str, int]) -> Costs:
        """Costs with that many units of each group (by name) gone."""
        return self.whole + self._change({}, removed, self._touched(removed))

    def change(self, removed: Mapping[str, int], name: str, count: int) -> Costs:
        """What the costs change by when `count` units of one group are gone instead of what `removed` says."""
        return self._change(removed, {**removed, name: count}, self._touched([name]))

    def remaining(self, removed: Mapping[str, int], kind: str) -> float:
        """Share of the costs of a kind that is left; 1 where there were none."""
        whole = self.whole.get(kind)
        return self.estimate(removed).get(kind) / whole if whole else 1.0

    @property
    def linear_nodes(self) -> tuple[ir.Node, ...]:
        """The nodes that multiply, in graph order."""
        return tuple(self._macs)

    def macs(self, node: ir.Node) -> int:
        """MACs of a node in the model as it is, over all its runs."""
        return self._macs.get(node, 0)

    def macs_without(self, node: ir.Node, removed: Mapping[str, int], block: int = 1) -> int:
        """MACs of a node of the main graph, over all its runs, with that many units of each group gone.

        Args:
            node: the node.
            removed: units by name of the group.
            block: as for `shapes`.
        """
        row = self.groups.analysis.row(node)
        if not self.macs(node) or row is None or row.cost is None:
            return 0
        if node not in self._constants:
            self._constants[node] = tuple(
                self._facts.constant(value) if index in row.structural else None
                for index, value in enumerate(node.inputs)
            )
        inputs, outputs = self.shapes(node, removed, block)
        return self._runs.get(node, 1) * row.cost(Site(node, inputs, outputs, self._constants[node]))

    def groups_around(self, node: ir.Node) -> tuple[str, ...]:
        """Names of the groups whose units are coordinates of what a node reads or makes."""
        inputs, outputs = self._sides(node)
        parts = {part for side in (*inputs, *outputs) if side is not None for part in _parts_of(side)}
        return tuple(dict.fromkeys(name for part in sorted(parts) for name in self._parts[part].per_unit))

    def shapes(self, node: ir.Node, removed: Mapping[str, int], block: int = 1) -> tuple[Shapes, Shapes]:
        """Shapes of what a node reads and makes with that many units of each group gone.

        Args:
            node: of the main graph.
            removed: units by name of the group.
            block: axes that units can be cut from are rounded up to a multiple of this.

        Returns:
            One shape an input and one an output, None where it is not known or there is no value.
        """
        staying = _Staying(self._parts, removed, self._units)
        inputs, outputs = (tuple(_shape(value, staying, block) for value in side) for side in self._sides(node))
        return inputs, outputs

    def _touched(self, names: Iterable[str]) -> list[int]:
        parts = {part for name in names for part in self._parts_of.get(name, ())}
        return sorted({term for part in parts for term in self._terms_of_part.get(part, ())})

    def _change(self, before: Mapping[str, int], after: Mapping[str, int], touched: Sequence[int]) -> Costs:
        old, new = (_Staying(self._parts, removed, self._units) for removed in (before, after))
        total = Costs()
        for index in touched:
            total = total + self._terms[index].costs(new) - self._terms[index].costs(old)
        return total

    # Building -----------------------------------------------------------------------------------------------

    def _groups_of_atoms(self) -> np.ndarray:
        """Index of the prunable group that owns each atom, -1 where none does."""
        found = np.full(len(self.groups.analysis.store.labels), -1)
        for index, group in enumerate(self.groups):
            if group.prunable:
                found[group.origin.atoms] = index
        return found

    def _part(self, leaf: Leaf) -> int | None:
        """Index of an axis without parts, None where nothing on it can go."""
        key = id(leaf.axis)
        if key in self._parts:
            return key
        owners = self._group_of[leaf.atoms]
        mine = owners >= 0
        if not mine.any():
            return None
        coordinates, owners = leaf.coordinates[mine], owners[mine]
        counts = np.bincount(owners, minlength=len(self.groups))
        names = {int(index): self.groups[int(index)].name for index in np.flatnonzero(counts)}
        per_unit = {name: int(counts[index]) // self._units[name] for index, name in names.items()}
        shared: dict[tuple[str, ...], int] = {}
        if len(np.unique(coordinates)) < len(coordinates):
            of_coordinate: dict[int, list[str]] = {}
            for coordinate, owner in zip(coordinates.tolist(), owners.tolist(), strict=True):
                of_coordinate.setdefault(coordinate, []).append(names[owner])
            for owned in of_coordinate.values():
                shared[tuple(owned)] = shared.get(tuple(owned), 0) + 1
            free = leaf.size - len(of_coordinate)
            shared[()] = free
        self._parts[key] = _Part(leaf, per_unit, shared)
        return key

    def _extents(self, value: ir.Value, shape: Shape) -> tuple[_Extent, ...]:
        tracks = self.groups.analysis.state.tracks.get(value)
        if tracks is None or len(tracks) != len(shape):
            return tuple(map(_Extent, shape))
        found: list[_Extent] = []
        for axis, size in enumerate(shape):
            parts: list[tuple[int, int]] = []
            for axis_part in self.groups.units.leaves(value, axis):
                leaf = self.groups.units.leaf(axis_part)
                index = None if leaf is None else self._part(leaf)
                if index is not None and leaf is not None:
                    parts.append((index, leaf.size))
            found.append(_Extent(size, tuple(parts)))
        return tuple(found)

    def _collect(self, model: ir.Model, facts: Facts) -> None:
        row_of = self.groups.analysis.row
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or not value.uses():
                    continue
                extents = self._extents(value, tuple(int(size) for size in tensor.shape.numpy()))
                parts = _parts_of(extents)
                if parts:
                    numbers = numbers_per_element(value, row_of)
                    self._terms.append(_Term(parts, _Weight(extents, numbers, tensor.dtype)))
        self._macs: dict[ir.Node, int] = {}
        self._runs: dict[ir.Node, int] = {}
        self._constants: dict[ir.Node, tuple[np.ndarray | None, ...]] = {}
        for entry in self.counted.nodes:
            if entry.macs and entry.runs:
                self._macs[entry.node], self._runs[entry.node] = entry.macs, entry.runs
                self._collect_node(entry, facts)

    def _sides(self, node: ir.Node) -> tuple[_Operands, _Operands]:
        """The axes of what a node reads and of what it makes."""
        if node not in self._known_sides:
            sides: list[_Operands] = []
            for values in (node.inputs, node.outputs):
                shapes = [(value, self._facts.shape(value)) for value in values]
                sides.append(
                    tuple(
                        None if value is None or shape is None else self._extents(value, shape)
                        for value, shape in shapes
                    )
                )
            self._known_sides[node] = sides[0], sides[1]
        return self._known_sides[node]

    def _collect_node(self, entry: NodeCost, facts: Facts) -> None:
        node, row = entry.node, self.groups.analysis.row(entry.node)
        sides = self._sides(node)
        parts = tuple(dict.fromkeys(part for side in sides for one in side if one for part in _parts_of(one)))
        if not parts or row is None or row.cost is None:
            return
        constants = tuple(
            facts.constant(value) if index in row.structural else None for index, value in enumerate(node.inputs)
        )
        self._terms.append(_Term(parts, _Linear(node, row.cost, entry.runs, constants, sides[0], sides[1])))


class _Staying:
    """How many coordinates stay on each axis without parts, computed when asked for."""

    def __init__(self, parts: Mapping[int, _Part], removed: Mapping[str, int], units: Mapping[str, int]) -> None:
        self._parts, self._removed, self._units = parts, removed, units
        self._found: dict[int, int] = {}

    def __getitem__(self, part: int) -> int:
        if part not in self._found:
            self._found[part] = self._parts[part].staying(self._removed, self._units)
        return self._found[part]


def _parts_of(extents: Sequence[_Extent]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(index for extent in extents for index, _ in extent.parts))


def producing_nodes(groups: ChannelGroups, group: ChannelGroup, nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """The nodes among `nodes` with a result that the units of the group are coordinates of, in order.

    Args:
        groups: all groups of the model.
        group: one of them.
        nodes: candidates, for instance all linear operators.
    """
    mine = {id(leaf.axis) for leaf in group.origin.leaves}
    tracks = groups.analysis.state.tracks
    return [
        node
        for node in nodes
        if any(
            id(part) in mine
            for value in node.outputs
            for axis in range(len(tracks.get(value, ())))
            for part in groups.units.leaves(value, axis)
        )
    ]
