"""Which coordinates of which axes each unit of a group owns, for all units at once.

`ChannelGroup.slices` answers for one unit and is slow for thousands. This is the same answer as arrays, for every
value that the channels run through, activations included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from graphopt.ir.channel_units import Leaf, Place
from graphopt.ir.channels import ChannelGroup


@dataclass(frozen=True, eq=False)
class Owned:
    """Coordinates of one axis, by the unit that they belong to.

    Attributes:
        coordinates: int64 [pairs], ascending within a unit.
        units: int64 [pairs], ascending: the unit that goes with the coordinate of the same position.
        count: number of units of the group.

    Example:
        >>> owned = Owned(np.array([0, 2, 1, 3]), np.array([0, 0, 1, 1]), 2)
        >>> owned.sums(np.array([1.0, 10.0, 100.0, 1000.0]))
        array([ 101., 1010.])
        >>> owned.rows(np.arange(4.0)[:, None]).tolist()
        [[[0.0], [2.0]], [[1.0], [3.0]]]
    """

    coordinates: np.ndarray
    units: np.ndarray
    count: int

    def sums(self, numbers: np.ndarray) -> np.ndarray:
        """Float64 [units]: the sum of `numbers` [size of the axis] over what each unit owns."""
        return np.bincount(self.units, numbers[self.coordinates], self.count)

    def rows(self, array: np.ndarray) -> np.ndarray:
        """What each unit owns of an array [size of the axis, rest]: [units, coordinates a unit, rest].

        Units that own fewer coordinates than others are padded with zeros.
        """
        if self.even:
            gathered = array[self.coordinates]
            return gathered.reshape(self.count, len(self.units) // max(self.count, 1), *array.shape[1:])
        lengths = np.bincount(self.units, minlength=self.count)
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        filled = np.zeros((self.count, int(lengths.max(initial=0)), *array.shape[1:]), array.dtype)
        filled[self.units, np.arange(len(self.units)) - first[self.units]] = array[self.coordinates]
        return filled

    @cached_property
    def even(self) -> bool:
        """Whether every unit owns as many coordinates as any other: so it is, by what a group is."""
        lengths = np.bincount(self.units, minlength=self.count)
        return bool((lengths == lengths[:1]).all())


class Ownership:
    """The coordinates that the units of one group own, on every axis of every value.

    Attributes:
        group: the group.
    """

    def __init__(self, group: ChannelGroup) -> None:
        self.group = group
        self._places: dict[Place, list[tuple[int, Leaf]]] = {}
        self._axes: dict[ir.Value, list[int]] = {}
        self._pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._owned: dict[tuple[Place, int | None], Owned] = {}
        atoms = np.asarray(group.origin.atoms)
        self._order = np.argsort(atoms)
        self._sorted = atoms[self._order]
        for leaf in group.origin.leaves:
            for place, position in leaf.places:
                self._places.setdefault(place, []).append((position, leaf))
        for value, axis in sorted(self._places, key=lambda place: place[1]):
            self._axes.setdefault(value, []).append(axis)

    @property
    def values(self) -> list[ir.Value]:
        """Every value that the channels run through: weights, and activations."""
        return list(self._axes)

    def axes(self, value: ir.Value | None) -> list[int]:
        """The axes of a value on which units own coordinates, ascending; none where the value has none."""
        return [] if value is None else self._axes.get(value, [])

    def owned(self, value: ir.Value, axis: int, length: int | None = None) -> Owned:
        """What the units own on an axis of `axes(value)`.

        Args:
            value: the value.
            axis: one of `axes(value)`.
            length: how long the axis is at run time, where that may differ from one input to the next.
        """
        key = ((value, axis), length)
        if key not in self._owned:
            self._owned[key] = self._find((value, axis), length)
        return self._owned[key]

    def _find(self, place: Place, length: int | None) -> Owned:
        parts = self.group.analysed.leaves(*place)
        sizes = [part.size for part in parts]
        dynamic = [index for index, part in enumerate(parts) if not part.static]
        if length is not None and len(dynamic) == 1:
            others = math.prod(size for index, size in enumerate(sizes) if index != dynamic[0])
            sizes[dynamic[0]] = length // max(others, 1)
        total = math.prod(sizes)
        keys: list[np.ndarray] = []
        for position, leaf in self._places[place]:
            coordinates, units = self._pairs_of(leaf)
            inner = math.prod(sizes[position + 1 :])
            outer = math.prod(sizes[:position])
            flat = np.arange(outer)[:, None, None] * sizes[position] + coordinates[None, :, None]
            flat = flat * inner + np.arange(inner)
            keys.append((units[None, :, None] * total + flat).reshape(-1))
        found = np.unique(np.concatenate(keys))
        return Owned(found % max(total, 1), found // max(total, 1), self.group.units)

    def _pairs_of(self, leaf: Leaf) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of a part of an axis, and the unit of each."""
        if id(leaf) not in self._pairs:
            at = np.searchsorted(self._sorted, leaf.atoms).clip(max=len(self._sorted) - 1)
            mine = self._sorted[at] == leaf.atoms
            self._pairs[id(leaf)] = leaf.coordinates[mine], self._order[at[mine]]
        return self._pairs[id(leaf)]
