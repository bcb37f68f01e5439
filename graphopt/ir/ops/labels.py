"""Labels: which coordinates of which axes are the same channel. A union-find over integers, vectorised by numpy.

A label is an integer; labels that were unified form a class. A class may be *bound* to a pair of classes: where an
axis of heads x width is cut in two, coordinate (h, d) of the long axis is bound to coordinate h of the first and d of
the second, and goes exactly when one of the two goes. What is left after following all bindings are atoms: the
units that can be removed. Knows no operator, no graph and no axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Labels = np.ndarray
"""One label a coordinate, int64."""
Factor = tuple[int, "Labels | None"]
"""A piece of an axis: number of coordinates and their labels, None where all of them carry the same channel."""

_NONE = -1


class LabelStore:
    """All labels of one analysis.

    Attributes:
        covering: labels that were found on every coordinate of an axis, which would be empty without them.

    Example:
        >>> store = LabelStore()
        >>> a, b = store.fresh(3), store.fresh(3)
        >>> store.unify(a, b[::-1])
        >>> store.find(b).tolist()
        [2, 1, 0]
        >>> long = store.fresh(6)
        >>> [size for size, _ in store.factor(long)], [len(piece) for (_, piece), in store.split(long, (2, 3))]
        ([6], [2, 3])
        >>> [size for size, _ in store.factor(long)]
        [2, 3]
    """

    def __init__(self) -> None:
        self.covering: list[int] = []
        self._count = 0
        self._parent = np.arange(1024)
        self._left = np.full(1024, _NONE)
        self._right = np.full(1024, _NONE)

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int) -> Labels:
        """`count` labels that nothing else has."""
        first, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            size = max(2 * len(self._parent), self._count)
            grown = np.full((2, size), _NONE)
            grown[0, :first], grown[1, :first] = self._left[:first], self._right[:first]
            self._left, self._right = grown[0].copy(), grown[1].copy()
            parent = np.arange(size)
            parent[:first] = self._parent[:first]
            self._parent = parent
        return np.arange(first, self._count)

    def find(self, labels: Labels) -> Labels:
        """The representative of the class of each label: the smallest label of the class."""
        parent = self._parent
        roots = parent[labels]
        while True:
            above = parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        parent[labels] = roots
        return roots

    def unify(self, a: Labels, b: Labels) -> None:
        """Make `a[i]` and `b[i]` one class for every i; bindings of united classes are unified in turn.

        Every step of the worklist that is not a no-op lowers the number of classes, so that this ends.
        """
        pending = [(np.asarray(a), np.asarray(b))]
        while pending:
            left, right = pending.pop()
            hooked = self._hook(self.find(left), self.find(right))
            bound = hooked[self._left[hooked] != _NONE]
            if not len(bound):
                continue
            roots = self.find(bound)
            free, first = np.unique(roots, return_index=True)
            first = first[self._left[free] == _NONE]
            self._left[roots[first]], self._right[roots[first]] = self._left[bound[first]], self._right[bound[first]]
            pending.append((self._left[roots], self._left[bound]))
            pending.append((self._right[roots], self._right[bound]))

    def _hook(self, a: Labels, b: Labels) -> Labels:
        """Unite classes by their representatives; returns those that are representatives no more."""
        gone: list[Labels] = []
        while True:
            differ = a != b
            if not differ.any():
                return np.unique(np.concatenate(gone)) if gone else np.zeros(0, np.int64)
            a, b = a[differ], b[differ]
            high, low = np.maximum(a, b), np.minimum(a, b)
            np.minimum.at(self._parent, high, low)
            gone.append(high)
            a, b = self.find(a), self.find(b)

    def bound(self, outer: Labels, inner: Labels) -> Labels:
        """Labels of the axis whose coordinate (i, j), j running fastest, goes where `outer[i]` or `inner[j]` goes."""
        labels = self.fresh(len(outer) * len(inner))
        self._left[labels], self._right[labels] = np.repeat(outer, len(inner)), np.tile(inner, len(outer))
        return labels

    def bindings(self, roots: Labels) -> tuple[Labels, Labels]:
        """Representatives of the two classes that each representative is bound to, -1 where it is bound to none."""
        left, right = self._left[roots], self._right[roots]
        free = left == _NONE
        return np.where(free, _NONE, self.find(np.maximum(left, 0))), np.where(
            free, _NONE, self.find(np.maximum(right, 0))
        )

    def unbind(self, roots: Labels) -> None:
        """Forget the bindings of these representatives."""
        self._left[roots] = self._right[roots] = _NONE

    def factor(self, labels: Labels) -> list[Factor]:
        """The axis as a product of pieces, outermost first, as far as what is known of its labels goes.

        A piece whose coordinates all carry the same channels (the copies of a Tile, the pixels of a flattened
        image) has no labels.
        """
        size = len(labels)
        roots = self.find(labels)
        run = math.gcd(size, *(np.flatnonzero(roots[1:] != roots[:-1]) + 1).tolist())
        if run == size > 1:
            self.covering.append(int(roots[0]))
        if run > 1:
            return [*(self.factor(labels[::run]) if run < size else []), (run, None)]
        period = self._period(roots)
        if period < size:
            return [(size // period, None), *self.factor(labels[:period])]
        left, right = self.bindings(roots)
        if size > 1 and (left != _NONE).all():
            width = math.gcd(size, *(np.flatnonzero(left[1:] != left[:-1]) + 1).tolist())
            if 1 < width < size and np.array_equal(right, np.tile(right[:width], size // width)):
                return [*self.factor(left[::width]), *self.factor(right[:width])]
        return [(size, labels)]

    @staticmethod
    def _period(roots: Labels) -> int:
        size = len(roots)
        if len(np.unique(roots)) == size:
            return size
        again = np.flatnonzero(roots == roots[0])[1:]
        for period in again.tolist():
            if size % period == 0 and np.array_equal(roots, np.tile(roots[:period], size // period)):
                return int(period)
        return size

    def split(self, labels: Labels, sizes: Sequence[int]) -> list[list[Factor]]:
        """Cut an axis into axes of `sizes` (outermost first, product = its length); each as a list of pieces.

        Pieces that do not nest (24 = 4 x 6 cut as 6 x 4) are unified as far as both cuts demand: coarser, but sound.
        """
        rest = self.factor(labels)
        axes: list[list[Factor]] = []
        for size in reversed(sizes):
            axis: list[Factor] = []
            missing = size
            while missing > 1:
                extent, piece = rest.pop()
                if missing % extent == 0:
                    axis.insert(0, (extent, piece))
                    missing //= extent
                elif extent % missing == 0:
                    outer, inner = self._cut(piece, extent // missing, missing)
                    rest.append((extent // missing, outer))
                    axis.insert(0, (missing, inner))
                    missing = 1
                else:
                    return self._cut_anew(labels, sizes)
            axes.insert(0, axis)
        return axes

    def _cut(self, piece: Labels | None, outer: int, inner: int) -> tuple[Labels | None, Labels | None]:
        if piece is None:
            return None, None
        rows, columns = self.fresh(outer), self.fresh(inner)
        self.unify(piece, self.bound(rows, columns))
        return rows, columns

    def _cut_anew(self, labels: Labels, sizes: Sequence[int]) -> list[list[Factor]]:
        pieces = [self.fresh(size) for size in sizes]
        whole = pieces[-1]
        for piece in reversed(pieces[:-1]):
            whole = self.bound(piece, whole)
        self.unify(labels, whole)
        return [[(size, piece)] for size, piece in zip(sizes, pieces, strict=True)]

    def atoms(self, labels: Labels) -> tuple[np.ndarray, Labels]:
        """Pairs (coordinate, atom): the coordinate goes where the atom goes. Bindings must hold no cycle."""
        roots = self.find(labels)
        coordinates = np.arange(len(labels))
        found: list[tuple[np.ndarray, Labels]] = []
        while len(roots):
            left, right = self.bindings(roots)
            bound = left != _NONE
            found.append((coordinates[~bound], roots[~bound]))
            coordinates = np.concatenate([coordinates[bound], coordinates[bound]])
            roots = np.concatenate([left[bound], right[bound]])
        pairs = np.concatenate([np.stack(pair) for pair in found], axis=1) if found else np.zeros((2, 0), np.int64)
        pairs = np.unique(pairs, axis=1) if len(found) > 1 else pairs
        return pairs[0], pairs[1]

    def break_cycles(self) -> Labels:
        """Drop the bindings that lead back to their own class; returns the classes that must stay because of it.

        Where p goes when p or c goes, c must stay. Longer cycles (none is known to occur) must stay as a whole.
        """
        everything = np.arange(self._count)
        roots = everything[self.find(everything) == everything]
        left, right = self.bindings(roots)
        bound = left != _NONE
        roots, left, right = roots[bound], left[bound], right[bound]
        itself = (left == roots) | (right == roots)
        other = np.where(left == roots, right, left)
        stays = [other[itself & (other != roots)]]
        self.unbind(roots[itself])
        roots, left, right = roots[~itself], left[~itself], right[~itself]
        endless = np.zeros(self._count, bool)
        endless[roots] = True
        while True:
            still = endless[left] | endless[right]
            if np.array_equal(still, endless[roots]):
                break
            endless[roots] = still
        cyclic = endless[roots]
        self.unbind(roots[cyclic])
        return np.unique(np.concatenate([*stays, roots[cyclic], left[cyclic], right[cyclic]]))
