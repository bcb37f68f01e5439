"""Axes: what is known of the channels along an axis of a value. Shared by all values that have the same channels.

An axis is *open* (channels, nobody has asked for single ones yet), *labelled* (one label a coordinate), a *product* of
axes (a merge of heads and widths, of batch and heads, of channels and pixels) or *fixed* (no coordinate can go, with
the reason). Unifying two axes makes them one object, so that a residual stream is one axis however many values it has,
and no label is made before an operator addresses single coordinates. Knows no operator and no graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.labels import Factor, Labels, LabelStore

Sizes = tuple[int, ...]
"""Number of coordinates in each probe of the symbolic dimensions; all equal where it is static."""

ONE_OF_A_PACK = "it is one slot of a packed axis, taken out by itself"
"""Why a position that is taken out by itself must stay: the slots of a packed query, key and value, for one."""
_LONGEST = 1 << 22
"""Coordinates up to which an axis is labelled one by one."""


@dataclass(frozen=True)
class Reason:
    """Why coordinates must stay, or why removing them changes more than masking does.

    Attributes:
        text: one clause.
        node: the node to blame, None for the interface of the model.
        channel: whether the axis is one that a reader would call channels; kernel windows and pixels are not.
    """

    text: str
    node: ir.Node | None = None
    channel: bool = True

    def __str__(self) -> str:
        return self.text if self.node is None else f"{self.node.op_type} {self.node.name}: {self.text}"


@dataclass(eq=False)
class Axis:
    """One axis; equal channels are one object after `AxisStore.root`.

    Attributes:
        sizes: number of coordinates in each probe.
        labels: one a coordinate; also the labels of a product that was addressed one by one.
        parts: the axes that this one is the product of, outermost first.
        fixed: why no coordinate can go.
        forward: the axis that this one was unified with.
    """

    sizes: Sizes
    labels: Labels | None = None
    parts: tuple[Axis, ...] | None = None
    fixed: Reason | None = None
    forward: Axis | None = None

    @property
    def size(self) -> int:
        """Number of coordinates in the first probe."""
        return self.sizes[0]

    @property
    def static(self) -> bool:
        """Whether the number of coordinates is known before run time."""
        return all(size == self.sizes[0] for size in self.sizes)

    @property
    def open(self) -> bool:
        """Whether nothing is known but the size."""
        return self.labels is None and self.parts is None and self.fixed is None


@dataclass(frozen=True)
class Mark:
    """Something that holds for all channels of an axis.

    Attributes:
        kind: "frozen" (they must stay) or "inexact" (removal differs from masking).
        axis: the axis.
        reason: why.
    """

    kind: Literal["frozen", "inexact"]
    axis: Axis
    reason: Reason


class AxisStore:
    """The axes of one analysis, and the algebra on them.

    Args:
        probes: number of probes that sizes are given for.

    Example:
        >>> store = AxisStore(probes=1)
        >>> width, hidden = store.open(12), store.open(12)
        >>> heads, depth = store.split(width, [(3,), (4,)])
        >>> store.unify(hidden, width)
        >>> [part.size for part in store.leaves(hidden)]
        [3, 4]
    """

    def __init__(self, probes: int = 1) -> None:
        self.probes = probes
        self.labels = LabelStore()
        self.marks: list[Mark] = []

    # Making -------------------------------------------------------------------------------------------------

    def open(self, size: int) -> Axis:
        """`size` channels that nothing else has yet. One channel alone can never go: it is fixed."""
        if size == 1:
            return Axis((1,) * self.probes, fixed=Reason("there is one", channel=False))
        return Axis((size,) * self.probes)

    def fix(self, sizes: Sizes | int, reason: Reason) -> Axis:
        """An axis on which every coordinate stays."""
        return Axis((sizes,) * self.probes if isinstance(sizes, int) else sizes, fixed=reason)

    def labelled(self, labels: Labels) -> Axis:
        """An axis with these labels, one a coordinate."""
        return Axis((len(labels),) * self.probes, labels=labels)

    def product(self, parts: Iterable[Axis]) -> Axis:
        """The axis that runs over all combinations of coordinates of `parts`, the last running fastest."""
        leaves = [leaf for part in parts for leaf in self.leaves(part)]
        if len(leaves) == 1:
            return leaves[0]
        if not leaves:
            return self.open(1)
        return Axis(_multiplied([leaf.sizes for leaf in leaves], self.probes), parts=tuple(leaves))

    # Reading ------------------------------------------------------------------------------------------------

    def root(self, axis: Axis) -> Axis:
        """The axis that stands for `axis` after unifications."""
        found = axis
        while found.forward is not None:
            found = found.forward
        while axis.forward is not None and axis.forward is not found:
            axis.forward, axis = found, axis.forward
        return found

    def leaves(self, axis: Axis) -> list[Axis]:
        """The axes without parts that `axis` is the product of, outermost first, those of one element left out."""
        axis = self.root(axis)
        if axis.parts is None:
            return [] if axis.static and axis.size == 1 else [axis]
        return [leaf for part in axis.parts for leaf in self.leaves(part)]

    def is_fixed(self, axis: Axis) -> bool:
        """Whether no coordinate is known to be removable: fixed as a whole."""
        return all(leaf.fixed is not None for leaf in self.leaves(axis))

    def reason(self, axis: Axis) -> Reason | None:
        """The reason of the first fixed piece of an axis."""
        axis = self.root(axis)
        return axis.fixed or next((leaf.fixed for leaf in self.leaves(axis) if leaf.fixed is not None), None)

    def flat(self, axis: Axis) -> Labels:
        """One label a coordinate. Raises `UntrackableError` where the length is decided at run time or too long."""
        axis = self.root(axis)
        if axis.labels is not None:
            return axis.labels
        if not axis.static or axis.size > _LONGEST:
            why = "its length is decided at run time" if not axis.static else f"it has {axis.size:,} coordinates"
            raise UntrackableError(why)
        if axis.parts is None:
            axis.labels = self.labels.fresh(axis.size)
            if axis.fixed is not None:
                self.marks.append(Mark("frozen", Axis(axis.sizes, labels=axis.labels), axis.fixed))
            return axis.labels
        *outer, inner = self.leaves(axis)
        labels = self._piece(inner)
        for leaf in reversed(outer):
            labels = self._multiply(self._piece(leaf), labels)
        if isinstance(labels, int):
            reason = self.reason(axis)
            assert reason is not None
            labels = self.flat(self.fix(axis.sizes, reason))
        axis.labels = labels
        return labels

    def _piece(self, leaf: Axis) -> Labels | int:
        return leaf.size if leaf.fixed is not None else self.flat(leaf)

    def _multiply(self, outer: Labels | int, inner: Labels | int) -> Labels | int:
        """Labels of a product; a number stands for as many coordinates that all stay."""
        if isinstance(outer, int):
            return outer * inner if isinstance(inner, int) else np.tile(inner, outer)
        return np.repeat(outer, inner) if isinstance(inner, int) else self.labels.bound(outer, inner)

    # Relating -----------------------------------------------------------------------------------------------

    def unify(self, a: Axis, b: Axis) -> None:
        """Both have the same channels in the same order. Where one is fixed, the other must stay as well."""
        a, b = self.root(a), self.root(b)
        if a is b or (self.is_fixed(a) and self.is_fixed(b)):
            return
        if a.open or b.open:
            a, b = (a, b) if a.open else (b, a)
            a.forward = b
        elif a.fixed is not None or b.fixed is not None:
            if a.fixed is None:
                a, b = b, a
            assert a.fixed is not None
            self.freeze(b, a.fixed)
        elif a.labels is not None and b.labels is not None:
            self.labels.unify(a.labels, b.labels)
        else:
            self._unify_parts(a, b)

    def _unify_parts(self, a: Axis, b: Axis) -> None:
        """At least one is a product, and none is open or fixed."""
        if a.parts is None:
            a, b = b, a
        if b.parts is None:
            parts = self.split(b, [leaf.sizes for leaf in self.leaves(a)])
            for leaf, part in zip(self.leaves(a), parts, strict=True):
                self.unify(leaf, part)
            return
        left, right = self._refined(self.leaves(a), self.leaves(b))
        for leaf, other in zip(left, right, strict=True):
            self.unify(leaf, other)
        if self.root(a) is not a or self.root(b) is not b or self.is_fixed(a):
            return
        if a.labels is not None and b.labels is not None:
            self.labels.unify(a.labels, b.labels)
        if [leaf.sizes for leaf in self.leaves(a)] == [leaf.sizes for leaf in self.leaves(b)]:
            b.labels = b.labels if b.labels is not None else a.labels
            a.forward = b

    def _refined(self, left: list[Axis], right: list[Axis]) -> tuple[list[Axis], list[Axis]]:
        """Both lists cut so that they have the same sizes one by one, as far as the sizes nest; the rest is unified."""
        left, right = left[::-1], right[::-1]
        a: list[Axis] = []
        b: list[Axis] = []
        while left and right:
            first, second = left.pop(), right.pop()
            if self.leaves(first) != [first] or self.leaves(second) != [second]:  # cut where they came before
                left.extend(reversed(self.leaves(first)))
                right.extend(reversed(self.leaves(second)))
            elif first.sizes == second.sizes:
                a.append(first)
                b.append(second)
            elif (rest := _quotient(first.sizes, second.sizes)) is not None:
                left.extend(reversed(self.split(first, [second.sizes, rest])))
                right.append(second)
            elif (rest := _quotient(second.sizes, first.sizes)) is not None:
                right.extend(reversed(self.split(second, [first.sizes, rest])))
                left.append(first)
            else:
                self._unify_labels(self.product([first, *reversed(left)]), self.product([second, *reversed(right)]))
                left, right = [], []
        return a, b

    def _unify_labels(self, a: Axis, b: Axis) -> None:
        """Unify by labels, one a coordinate; where there can be none, all must stay."""
        try:
            labels = self.flat(a), self.flat(b)
        except UntrackableError as error:
            for axis in (a, b):
                self.freeze(axis, Reason(f"its pieces do not nest and {error}"))
            return
        self.labels.unify(*labels)

    def freeze(self, axis: Axis, reason: Reason) -> None:
        """No coordinate of `axis` can go."""
        axis = self.root(axis)
        if axis.parts is not None:
            for leaf in self.leaves(axis):
                self.freeze(leaf, reason)
        elif axis.open:
            axis.fixed = reason
        elif axis.fixed is None:
            self.marks.append(Mark("frozen", axis, reason))

    def mark_inexact(self, axis: Axis, reason: Reason) -> None:
        """Removing coordinates of `axis` differs from masking them."""
        self.marks.append(Mark("inexact", axis, reason))

    # Cutting and joining ------------------------------------------------------------------------------------

    def split(self, axis: Axis, sizes: Sequence[Sizes]) -> list[Axis]:
        """Cut an axis into axes of `sizes`, outermost first, whose product is its length in every probe."""
        return self.regroup([axis], sizes, Reason("its pieces do not nest"))

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[Sizes], reason: Reason) -> list[Axis]:
        """Merge all axes and cut the result into axes of `sizes`, as Reshape does, in every probe alike.

        Where probes disagree on which coordinates belong together, everything concerned is frozen for `reason`.
        """
        rest = [leaf for axis in axes for leaf in self.leaves(axis)][::-1]
        result: list[Axis] = []
        position = 0
        while position < len(sizes):
            wanted = sizes[position]
            taken: list[Axis] = []
            missing: Sizes | None = wanted
            while missing is not None and any(size != 1 for size in missing):
                if not rest:
                    missing = None
                    break
                leaf = rest.pop()
                if self.leaves(leaf) != [leaf]:  # it occurs twice, and was cut where it came first
                    rest.extend(reversed(self.leaves(leaf)))
                    continue
                if (left := _quotient(missing, leaf.sizes)) is not None:
                    taken.append(leaf)
                    missing = left
                elif (over := _quotient(leaf.sizes, missing)) is not None:
                    head, *tail = self._cut(leaf, [missing, over])
                    taken.extend(self.leaves(head))
                    rest.extend(leaf for axis in reversed(tail) for leaf in reversed(self.leaves(axis)))
                    missing = tuple(1 for _ in missing)
                else:
                    rest.append(leaf)
                    missing = None
            if missing is None:
                block = [*taken, *reversed(rest)]
                return [*result, *self._regroup_anew(block, sizes[position:], reason)]
            result.append(self.product(taken) if taken else self.open(1))
            position += 1
        return result

    def _regroup_anew(self, block: list[Axis], sizes: Sequence[Sizes], reason: Reason) -> list[Axis]:
        """Pieces that do not nest: by label, as far as the lengths are static, else frozen."""
        whole = self.product(block)
        matches = _multiplied(list(sizes), self.probes) == whole.sizes
        static = whole.static and all(len(set(size)) == 1 for size in sizes)
        if not self.is_fixed(whole) and static and matches and whole.size <= _LONGEST:
            return [self._from_factors(factors) for factors in self._split_labels(whole, sizes)]
        self.freeze(whole, reason)
        fixed = self.reason(whole) or reason
        return [self.fix(size, fixed) for size in sizes]

    def _cut(self, leaf: Axis, sizes: Sequence[Sizes]) -> list[Axis]:
        """Cut a leaf in place: whoever shares it sees the pieces, and lists of leaves from before are stale."""
        assert leaf.parts is None
        if leaf.fixed is None and any(len(set(size)) > 1 for size in sizes):
            reason = Reason("it is cut into lengths that are decided at run time")
            self.freeze(leaf, reason)
            return [self.fix(size, reason) for size in sizes]
        if leaf.fixed is not None:
            return [self.fix(size, leaf.fixed) for size in sizes]
        if leaf.labels is None:
            leaf.parts = tuple(Axis(size) for size in sizes)
            return list(leaf.parts)
        pieces = [self._from_factors(factors) for factors in self._split_labels(leaf, sizes)]
        leaf.parts = tuple(pieces)
        return pieces

    def _split_labels(self, axis: Axis, sizes: Sequence[Sizes]) -> list[list[Factor]]:
        return self.labels.split(self.flat(axis), [size[0] for size in sizes])

    def _from_factors(self, factors: Sequence[Factor]) -> Axis:
        repeated = Reason("all of its coordinates carry the same channels")
        return self.product(
            self.fix(size, repeated) if labels is None else self.labelled(labels) for size, labels in factors
        )

    def select(self, axis: Axis, indices: np.ndarray) -> Axis:
        """The axis with the coordinates `indices` (1-D, none negative), in that order.

        A single coordinate must stay, since an axis cannot be empty.
        """
        axis = self.root(axis)
        if self.is_fixed(axis):
            reason = self.reason(axis)
            return self.fix(len(indices), reason) if reason is not None and len(indices) != 1 else self.open(1)
        labels = self.flat(axis)[indices]
        if len(labels) == 1:
            alone = self.open(1)
            self.marks.append(Mark("frozen", self.labelled(labels), Reason(ONE_OF_A_PACK)))
            return alone
        return self.labelled(labels)

    def concat(self, axes: Sequence[Axis]) -> Axis:
        """The axes behind one another."""
        if all(self.is_fixed(axis) for axis in axes):
            reason = next(filter(None, map(self.reason, axes)), None) or Reason("there is one", channel=False)
            return self.fix(tuple(sum(sizes) for sizes in zip(*(axis.sizes for axis in axes), strict=True)), reason)
        return self.labelled(np.concatenate([self.flat(axis) for axis in axes]))


class UntrackableError(Exception):
    """An axis cannot be labelled one by one; the driver freezes what the node touches and says why."""


def _quotient(a: Sizes, b: Sizes) -> Sizes | None:
    """a / b where it is whole in every probe."""
    if any(divisor == 0 or size % divisor for size, divisor in zip(a, b, strict=True)):
        return None
    return tuple(size // divisor for size, divisor in zip(a, b, strict=True))


def _multiplied(sizes: Sequence[Sizes], probes: int) -> Sizes:
    return tuple(math.prod(size[probe] for size in sizes) for probe in range(probes))
