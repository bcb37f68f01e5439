"""Labels of what may be scaled together: which elements of which values share one positive factor.

Labels of a value are an int64 array that broadcasts against it, 1 on the axes along which the factor does not vary.
Classes of labels that something reads as it is are *fixed*: their factor is 1. Knows no operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.labels import LabelStore

Dimension = int | str | None
"""A size, the name of a symbolic one, or None where nothing is known."""
_MOST_LABELS = 2**22
"""Elements of a block of axes beyond which its factor is not told apart by element when the block is reshaped."""


class ScaleLabels:
    """The labels of the values of one graph.

    Example:
        >>> labels = ScaleLabels()
        >>> a, b = labels.fresh((1, 3)), labels.fresh((1, 3))
        >>> labels.unify(a, b)
        >>> labels.fix(a[:, :1], "it is a graph output", "y")
        >>> labels.is_fixed(b).tolist(), labels.reason(b)
        ([[True, False, False]], ('it is a graph output', 'y'))
    """

    def __init__(self) -> None:
        self._store = LabelStore()
        self._of: dict[ir.Value, np.ndarray] = {}
        self._fixed: list[tuple[np.ndarray, tuple[str, str]]] = []

    def __getitem__(self, value: ir.Value) -> np.ndarray:
        return self._of[value]

    def __setitem__(self, value: ir.Value, labels: np.ndarray) -> None:
        self._of[value] = labels

    def __contains__(self, value: ir.Value) -> bool:
        return value in self._of

    def items(self) -> Iterable[tuple[ir.Value, np.ndarray]]:
        """Values with their labels, in the order in which they got them."""
        return self._of.items()

    def fresh(self, shape: Sequence[int]) -> np.ndarray:
        """New labels of this shape."""
        return self._store.fresh(math.prod(shape)).reshape(tuple(shape))

    def find(self, labels: np.ndarray) -> np.ndarray:
        """One representative for each class."""
        return self._store.find(labels.reshape(-1)).reshape(labels.shape)

    def unify(self, a: np.ndarray, b: np.ndarray) -> None:
        """Give what meets by broadcasting one factor."""
        if a is b:
            return
        left, right = np.broadcast_arrays(a, b)
        self._store.unify(left.reshape(-1), right.reshape(-1))

    def fix(self, labels: np.ndarray, why: str, where: str) -> None:
        """Keep the factor of these labels at 1."""
        self._fixed.append((labels.reshape(-1), (why, where)))

    def is_fixed(self, labels: np.ndarray) -> np.ndarray:
        """Which labels are fixed."""
        if not self._fixed:
            return np.zeros(labels.shape, bool)
        roots = self._store.find(np.concatenate([fixed for fixed, _ in self._fixed]))
        return np.isin(self.find(labels), roots)

    def reason(self, labels: np.ndarray) -> tuple[str, str] | None:
        """Why the first fixed one of these labels is, and at which node or value; None where none is."""
        roots = self.find(labels).reshape(-1)
        for fixed, reason in self._fixed:
            if np.isin(self.find(fixed), roots).any():
                return reason
        return None

    def collapse(self, labels: np.ndarray, axes: Iterable[int]) -> np.ndarray:
        """The labels once everything along these axes shares a factor: 1 on them."""
        for axis in axes:
            if labels.shape[axis] > 1:
                first = np.take(labels, [0], axis=axis)
                self.unify(labels, first)
                labels = first
        return labels

    def reshaped(self, labels: np.ndarray, before: Sequence[Dimension], after: Sequence[Dimension]) -> np.ndarray:
        """The labels of a value of shape `before` once it has shape `after`."""
        pieces = list(_blocks(before, after))
        for old, new in pieces:
            if max(labels.shape[old], default=1) > 1 and not _is_told_apart(before[old], after[new]):
                labels = self.collapse(labels, range(old.start, old.stop))
        shape: list[int] = []
        for old, new in pieces:
            sizes = [size for size in before[old] if isinstance(size, int)]
            inner = labels.shape[old]
            if max(inner, default=1) == 1:
                shape += [1] * (new.stop - new.start)
            elif old.stop - old.start == new.stop - new.start == 1:
                shape += inner
            else:
                full = [*labels.shape[: old.start], *sizes, *labels.shape[old.stop :]]
                labels = np.broadcast_to(labels, full)
                shape += [size for size in after[new] if isinstance(size, int)]
        return labels.reshape(shape)


def dimensions(value: ir.Value) -> list[Dimension] | None:
    """The shape of a value, None where not even its rank is known."""
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def _is_told_apart(before: Sequence[Dimension], after: Sequence[Dimension]) -> bool:
    """Whether each element of a run of axes is known to lie at one place of the run that it becomes."""
    if len(before) == len(after) == 1:
        return before[0] == after[0]
    old, new = ([size for size in sizes if isinstance(size, int)] for sizes in (before, after))
    known = len(old) == len(before) and len(new) == len(after)
    return known and math.prod(old) == math.prod(new) <= _MOST_LABELS


def _blocks(before: Sequence[Dimension], after: Sequence[Dimension]) -> list[tuple[slice, slice]]:
    """Runs of axes that hold the same elements, found from both ends; what is left between is one run."""
    back, i, j = _matched(before[::-1], after[::-1])
    rest_before, rest_after = before[: len(before) - i], after[: len(after) - j]
    front, p, q = _matched(rest_before, rest_after)
    found = [(slice(*a), slice(*b)) for a, b in front]
    found.append((slice(p, len(rest_before)), slice(q, len(rest_after))))
    flipped = [
        (slice(len(before) - a[1], len(before) - a[0]), slice(len(after) - b[1], len(after) - b[0])) for a, b in back
    ]
    return found + flipped[::-1]


def _matched(
    before: Sequence[Dimension], after: Sequence[Dimension]
) -> tuple[list[tuple[tuple[int, int], tuple[int, int]]], int, int]:
    """Runs of equal size from the start on, and where they end on either side."""
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        same = before[i] == after[j] and before[i] is not None
        end = (i + 1, j + 1) if same else _run(before, after, i, j)
        if end is None:
            break
        found.append(((i, end[0]), (j, end[1])))
        i, j = end
    return found, i, j


def _run(before: Sequence[Dimension], after: Sequence[Dimension], i: int, j: int) -> tuple[int, int] | None:
    """Ends of the shortest runs of known sizes from `i` and `j` on that hold equally many elements."""
    left, right = before[i], after[j]
    if not isinstance(left, int) or not isinstance(right, int):
        return None
    i, j = i + 1, j + 1
    while left != right:
        if not left or not right:
            return None
        following = (
            before[i] if left < right and i < len(before) else after[j] if right < left and j < len(after) else None
        )
        if not isinstance(following, int):
            return None
        if left < right:
            left, i = left * following, i + 1
        else:
            right, j = right * following, j + 1
    return i, j
