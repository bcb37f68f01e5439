"""What a damaged graph was before: the graph that a lossy rewrite began from, and which channels are left of it.

A lossy pass remembers the graph that it is given. Whatever repairs the damage afterwards (reconstruction, bias
correction) finds there what each value was meant to be. Values are the same by name: an exact pass lets what stands
for a value take its name over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.ir.channels import ChannelGroups, Selection
from graphopt.ir.rewrite import DeclinedError

Masks = tuple["np.ndarray | None", ...]
"""For each axis of a value which of its coordinates are left, None where all are."""
_ORIGIN = "graphopt.origin"
"""Key in `ir.Graph.meta`. It lives in memory only: clones have it too, files do not."""


@dataclass(frozen=True)
class Origin:
    """The graph before it was damaged.

    Attributes:
        model: that graph. Nobody may change it.
        kept: for the values that lost channels, by name, what is left of each axis.
        selection: where channels of this very graph went, once: the units of each group. None where nothing went, or
            where more went afterwards.
    """

    model: ir.Model
    kept: Mapping[str, Masks] = field(default_factory=dict[str, Masks])
    selection: Mapping[str, tuple[int, ...]] | None = None

    def without(self, groups: ChannelGroups, selection: Mapping[str, Sequence[int]]) -> Origin:
        """The same origin once more channels are gone: of the graph as it is now, whose groups these are."""
        kept = dict(self.kept)
        for name, masks in _left_by(groups, selection).items():
            kept[name] = _compose(kept[name], masks) if name in kept else masks
        first = not self.kept and same_structure(groups.analysis.model, self.model)
        return Origin(self.model, kept, {name: tuple(units) for name, units in selection.items()} if first else None)

    def cut(self, name: str, array: np.ndarray) -> np.ndarray:
        """What is left of a value of the origin.

        Args:
            name: the value's.
            array: the value in `model`, with all channels.

        Raises:
            DeclinedError: channels went from an axis of run-time length, on which they are not told apart.

        Example:
            >>> model = ir.from_onnx_text(
            ...     '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
            >>> Origin(model, {"y": (np.array([False, True]),)}).cut("y", np.array([3.0, 4.0]))
            array([4.])
        """
        for axis, mask in enumerate(self.kept.get(name, ())):
            if mask is not None and len(mask) != array.shape[axis]:
                raise DeclinedError("its channels lie on an axis of run-time length")
            if mask is not None:
                array = np.compress(mask, array, axis=axis)
        return array


def origin_of(model: ir.Model) -> Origin | None:
    """What the graph was before the first lossy rewrite of this process, None where there was none."""
    return model.graph.meta.get(_ORIGIN)


def remember_origin(model: ir.Model) -> Origin:
    """Note that `model`, as it is now, is about to be damaged; the first such call counts. Weights are shared."""
    known = origin_of(model)
    if known is None:
        known = Origin(model.clone())
        set_origin(model, known)
    return known


def set_origin(model: ir.Model, origin: Origin) -> None:
    """Replace what is known of the graph before."""
    model.graph.meta[_ORIGIN] = origin


def same_structure(first: ir.Model, second: ir.Model) -> bool:
    """Whether two graphs have the same nodes by name and operator, so that their channel groups are the same."""
    return [(node.name, node.op_type) for node in first.graph] == [(node.name, node.op_type) for node in second.graph]


def _left_by(groups: ChannelGroups, selection: Mapping[str, Sequence[int]]) -> dict[str, Masks]:
    """What a selection leaves of the values that it touches, by name."""
    chosen: Selection = {name: units for name, units in selection.items()}  # noqa: C416
    removed = groups.atoms(chosen)
    left: dict[str, Masks] = {}
    for value, tracks in groups.analysis.state.tracks.items():
        if not value.name:
            continue
        masks = tuple(groups.units.kept(value, axis, removed) for axis in range(len(tracks)))
        if any(mask is not None for mask in masks):
            left[value.name] = masks
    return left


def _compose(outer: Masks, inner: Masks) -> Masks:
    """Which coordinates of the origin are left when `inner` says what is left of those that `outer` left."""
    result: list[np.ndarray | None] = []
    for first, second in zip(outer, inner, strict=True):
        if first is None or second is None:
            result.append(second if first is None else first)
            continue
        both = first.copy()
        both[np.flatnonzero(first)[~second]] = False
        result.append(both)
    return tuple(result)
