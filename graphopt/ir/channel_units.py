"""From labels to units: what can be removed independently, and which units are interchangeable.

A unit is a class of labels that is bound to nothing further; it owns coordinates of initializers. Units that occur
equally often on the same axes of the same values, activations included, form a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.ir.channel_analysis import ChannelAnalysis, subgraphs_of, weight_sources
from graphopt.ir.ops.axes import Axis, Reason
from graphopt.ir.ops.labels import Labels

Place = tuple[ir.Value, int]
"""An axis of a value."""
_ALONE = "there would be none left on an axis"
_SINGLE = "it is the only unit of its kind, and a group keeps one"
_CYCLE = "its copies are combined with itself"


@dataclass
class Leaf:
    """An axis without parts, with one label a coordinate.

    Attributes:
        axis: the axis.
        coordinates: of the pairs (coordinate, atom); a coordinate goes where one of its atoms goes.
        atoms: of the same pairs.
        places: the axes of values that it is a part of, with its position among the parts.
    """

    axis: Axis
    coordinates: np.ndarray
    atoms: Labels
    places: list[tuple[Place, int]] = field(default_factory=list[tuple[Place, int]])

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self.axis.size

    @cached_property
    def _by_atom(self) -> tuple[Labels, np.ndarray]:
        order = np.argsort(self.atoms, kind="stable")
        return self.atoms[order], self.coordinates[order]

    def owned(self, atom: int) -> np.ndarray:
        """Coordinates that go with one atom, ascending."""
        atoms, coordinates = self._by_atom
        first, last = np.searchsorted(atoms, [atom, atom + 1])
        return np.sort(coordinates[first:last])

    def kept(self, removed: np.ndarray) -> np.ndarray:
        """Which coordinates stay when the atoms that are true in `removed` go."""
        kept = np.ones(self.size, bool)
        kept[self.coordinates[removed[self.atoms]]] = False
        return kept


@dataclass
class UnitGroup:
    """Interchangeable units.

    Attributes:
        atoms: one a unit, in the order of their first coordinate.
        leaves: the axes that they occur on.
        frozen: why none of them can go, None where each can.
        inexact: why removing one differs from masking it, None where it does not.
        members: the axes of initializers that they own coordinates of, in stable order.
    """

    atoms: Labels
    leaves: list[Leaf]
    frozen: Reason | None
    inexact: Reason | None
    members: list[Place]


class Units:
    """All units of an analysis.

    Attributes:
        analysis: the analysis that they come from.
        groups: in an order that does not depend on the order of the nodes.
    """

    def __init__(self, analysis: ChannelAnalysis) -> None:
        self.analysis = analysis
        self._store = analysis.store
        self._roots: dict[int, tuple[Axis, list[Place]]] = {}
        self._leaf_of: dict[int, Leaf] = {}
        self._depth = _depths(analysis.model, analysis.state.weights)
        self._collect()
        self._resolve()
        self.groups = self._group()

    # Axes of values -----------------------------------------------------------------------------------------

    def leaves(self, value: ir.Value, axis: int) -> list[Axis]:
        """The parts of an axis of a value, outermost first."""
        return self._store.leaves(self.analysis.state.tracks[value][axis].axis)

    def leaf(self, axis: Axis) -> Leaf | None:
        """The labels of a part; None where it is fixed and no reader would call it channels."""
        return self._leaf_of.get(id(axis))

    def kept(self, value: ir.Value, axis: int, removed: np.ndarray) -> np.ndarray | None:
        """Which coordinates of an axis stay when atoms go, None where all do."""
        return self.kept_of(self.analysis.state.tracks[value][axis].axis, removed)

    def kept_of(self, axis: Axis, removed: np.ndarray) -> np.ndarray | None:
        """Which coordinates of an axis stay when atoms go, None where all do."""
        kept = np.ones(1, bool)
        touched = False
        for part in self._store.leaves(axis):
            leaf = self.leaf(part)
            mask = np.ones(part.size, bool) if leaf is None else leaf.kept(removed)
            touched = touched or not mask.all()
            kept = np.logical_and.outer(kept, mask).reshape(-1)
        return kept if touched else None

    def removable_share(self, value: ir.Value, axis: int) -> float:
        """Share of the coordinates of an axis that some unit which is not frozen owns."""
        return 1 - math.prod(self._staying_share(part) for part in self.leaves(value, axis))

    def _staying_share(self, axis: Axis) -> float:
        leaf = self.leaf(axis)
        if leaf is None:
            return 1.0
        goes = np.zeros(leaf.size, bool)
        goes[leaf.coordinates[self._free[leaf.atoms]]] = True
        return 1 - float(goes.mean())

    # Building -----------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Label every part of every axis, and note where it occurs."""
        for value, tracks in self.analysis.state.tracks.items():
            for index, track in enumerate(tracks):
                root = self._store.root(track.axis)
                self._roots.setdefault(id(root), (root, []))[1].append((value, index))
        for root, places in self._roots.values():
            stored = any(value.is_initializer() for value, _ in places)
            for part in self._store.leaves(root):
                if part.fixed is None or (part.fixed.channel and stored and part.static):
                    self._store.flat(part)

    def _resolve(self) -> None:
        """Find atoms, and carry what holds for axes over to them."""
        labels = self._store.labels
        stays = labels.break_cycles()
        self._reasons: list[Reason] = []
        self.frozen = self._flags("frozen")
        self.inexact = self._flags("inexact")
        if len(stays):
            self._reasons.append(Reason(_CYCLE))
            self._freeze(stays)
        for flags in (self.frozen, self.inexact):
            self._push(flags)
        for root, places in self._roots.values():
            for position, part in enumerate(self._store.leaves(root)):
                if part.labels is None:
                    continue
                if id(part) not in self._leaf_of:
                    self._leaf_of[id(part)] = Leaf(part, *labels.atoms(part.labels))
                self._leaf_of[id(part)].places.extend((place, position) for place in places)
        self._freeze_last()

    def _flags(self, kind: str) -> np.ndarray:
        """Index of the first reason for each class of labels, -1 where there is none."""
        flags = np.full(len(self._store.labels), -1)
        for mark in reversed(self._store.marks):
            if mark.kind != kind:
                continue
            self._reasons.append(mark.reason)
            for part in self._store.leaves(mark.axis) or [self._store.root(mark.axis)]:
                if part.labels is not None:
                    flags[self._store.labels.find(part.labels)] = len(self._reasons) - 1
        return flags

    def _push(self, flags: np.ndarray) -> None:
        """What holds for a class holds for what it is bound to."""
        labels = self._store.labels
        pending = np.flatnonzero(flags >= 0)
        pending = pending[labels.find(pending) == pending]
        while len(pending):
            left, right = labels.bindings(pending)
            bound = left >= 0
            components = np.concatenate([left[bound], right[bound]])
            reasons = np.tile(flags[pending[bound]], 2)
            new = flags[components] < 0
            flags[components[new]] = reasons[new]
            pending = np.unique(components[new])

    def _freeze_last(self) -> None:
        """An atom that covers a whole axis cannot go: something must be left."""
        self._reasons.append(Reason(_ALONE))
        for leaf in self._leaf_of.values():
            atoms, counts = np.unique(leaf.atoms, return_counts=True)
            self._freeze(atoms[counts == leaf.size])
        self._freeze(self._store.labels.atoms(np.array(self._store.labels.covering, np.int64))[1])

    def _freeze(self, atoms: Labels) -> None:
        """Freeze atoms for the last reason, those that have one already excepted."""
        self.frozen[atoms] = np.where(self.frozen[atoms] < 0, len(self._reasons) - 1, self.frozen[atoms])

    @cached_property
    def _free(self) -> np.ndarray:
        """Atoms that are units and not frozen."""
        return self._stored & (self.frozen < 0)

    @cached_property
    def _stored(self) -> np.ndarray:
        """Atoms that own coordinates of an initializer."""
        stored = np.zeros(len(self._store.labels), bool)
        for leaf in self._leaf_of.values():
            if any(value.is_initializer() for (value, _), _ in leaf.places):
                stored[leaf.atoms] = True
        return stored

    def _signatures(self) -> np.ndarray:
        """A number for each atom that is equal exactly (up to 2 to -64) where atoms occur on the same axes."""
        numbers = np.random.default_rng(0)
        signatures = np.zeros(len(self._store.labels), np.uint64)
        for leaf in self._leaf_of.values():
            weight = numbers.integers(1, 2**63, dtype=np.uint64)
            np.add.at(signatures, leaf.atoms, weight)
        return signatures

    def _group(self) -> list[UnitGroup]:
        units = np.flatnonzero(self._stored)
        classes = [(flags >= 0).astype(np.uint64)[units] for flags in (self.frozen, self.inexact)]
        keys = np.stack([self._signatures()[units], *classes])
        _, inverse, counts = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
        inverse = inverse.reshape(-1)
        single = units[counts[inverse] == 1]
        self._reasons.append(Reason(_SINGLE))
        self._freeze(single)
        order = np.argsort(inverse, kind="stable")
        runs = np.split(units[order], np.flatnonzero(np.diff(inverse[order])) + 1) if len(units) else []
        of_atom: dict[int, list[Leaf]] = {int(atoms[0]): [] for atoms in runs}
        for leaf in self._leaf_of.values():
            for atom in np.unique(leaf.atoms).tolist():
                if atom in of_atom:
                    of_atom[atom].append(leaf)
        found = [self._unit_group(atoms, of_atom[int(atoms[0])]) for atoms in runs]
        named = [(key, group) for key, group in found if self._is_shown(group)]
        return [group for _, group in sorted(named, key=lambda item: item[0])]

    def _is_shown(self, group: UnitGroup) -> bool:
        """Whether a reader would call it channels: no kernel windows, no pixels, no sizes and indices."""
        if group.frozen is None:
            return True
        dtypes = [value.dtype for value, _ in group.members]
        real = any(dtype is not None and (dtype.is_floating_point() or dtype.bitwidth <= 8) for dtype in dtypes)
        return group.frozen.channel and real

    def _unit_group(self, atoms: Labels, leaves: list[Leaf]) -> tuple[tuple[Any, ...], UnitGroup]:
        places = {place for leaf in leaves for place, _ in leaf.places if place[0].is_initializer()}
        members = sorted(places, key=lambda place: self._place_key(*place))
        first = self._first_coordinates(atoms, members[0], leaves)
        atoms = atoms[np.argsort(first, kind="stable")]
        frozen, inexact = (
            self._reasons[int(flags[atoms].max())] if flags[atoms].max() >= 0 else None
            for flags in (self.frozen, self.inexact)
        )
        own = tuple(self.owned(members[0], int(atoms[0])).tolist())
        key = (*self._place_key(*members[0]), int(first.min()), own, frozen is not None, inexact is not None)
        return key, UnitGroup(atoms, leaves, frozen, inexact, members)

    def _place_key(self, value: ir.Value, axis: int) -> tuple[int, str, int]:
        return self._depth.get(value, 0), value.name or "", axis

    def _first_coordinates(self, atoms: Labels, member: Place, leaves: Iterable[Leaf]) -> np.ndarray:
        """The first coordinate of each atom on a member."""
        first = np.full(len(atoms), np.iinfo(np.int64).max)
        order = np.argsort(atoms)
        for leaf in leaves:
            if any(place == member for place, _ in leaf.places):
                found = np.searchsorted(atoms, leaf.atoms, sorter=order).clip(max=len(atoms) - 1)
                mine = atoms[order[found]] == leaf.atoms
                np.minimum.at(first, order[found[mine]], leaf.coordinates[mine])
        return first

    def owned(self, place: Place, atom: int) -> np.ndarray:
        """Coordinates of an axis that go with one atom, ascending."""
        parts = self.leaves(*place)
        sizes = [part.size for part in parts]
        everything = np.arange(math.prod(sizes)).reshape(sizes)
        found: list[np.ndarray] = []
        for position, part in enumerate(parts):
            leaf = self.leaf(part)
            mine = np.zeros(0, np.int64) if leaf is None else leaf.owned(atom)
            if len(mine):
                found.append(everything.take(mine, axis=position).reshape(-1))
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def coordinates(self, place: Place, removed: np.ndarray) -> np.ndarray:
        """Coordinates of an axis that go with the atoms that are true in `removed`."""
        kept = self.kept(*place, removed)
        return np.zeros(0, np.int64) if kept is None else np.flatnonzero(~kept)

    def emptied(self, removed: np.ndarray) -> Place | None:
        """An axis on which nothing would be left, None where there is none."""
        for leaf in self._leaf_of.values():
            if leaf.size and not leaf.kept(removed).any():
                return leaf.places[0][0]
        return None

    def parameters(self, group: UnitGroup) -> int:
        """Elements of initializers that go with all units of a group."""
        chosen = self.chosen(group.atoms)
        total = 0
        for value in dict.fromkeys(value for value, _ in group.members):
            tracks = self.analysis.state.tracks[value]
            staying = 1
            for axis, track in enumerate(tracks):
                kept = self.kept(value, axis, chosen)
                staying *= track.axis.size if kept is None else int(kept.sum())
            total += math.prod(track.axis.size for track in tracks) - staying
        return total

    def chosen(self, atoms: Labels | Iterable[int]) -> np.ndarray:
        """`atoms` as one boolean a label."""
        chosen = np.zeros(len(self._store.labels), bool)
        chosen[np.asarray(list(atoms), np.int64)] = True
        return chosen


def _depths(model: ir.Model, weights: Set[ir.Value]) -> Mapping[ir.Value, int]:
    """Longest path from an input to the first node that reads a value: independent of the order of nodes.

    What is computed from weights alone takes no steps: a transposed weight is read where its transpose is.
    """
    depths: dict[ir.Value, int] = {}
    readers: dict[ir.Value, int] = {}

    def visit(graph: ir.Graph, base: int) -> int:
        deepest = base
        for node in graph:
            if node.outputs and all(value in weights for value in node.outputs):
                continue
            depth = 1 + max([base, *(depths.get(value, base) for value in node.inputs if value is not None)])
            for inner in subgraphs_of(node):
                depth = max(depth, visit(inner, depth))
            for value in node.inputs:
                for source in weight_sources(value) if value in weights and value is not None else ():
                    readers[source] = min(readers.get(source, depth), depth)
            for value in node.outputs:
                depths[value] = depth
            deepest = max(deepest, depth)
        return deepest

    visit(model.graph, 0)
    return readers
