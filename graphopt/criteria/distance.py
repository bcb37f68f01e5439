"""Criteria of redundancy: how far the filters of a channel are from those of the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.criteria.contract import Criterion, Knowledge
from graphopt.criteria.members import Membership
from graphopt.ir.channels import ChannelGroup

_BLOCK_BYTES = 1 << 28
"""Size of the block of distances that is held at a time."""
_RESOLUTION = 1e-9
"""Squared distances that differ by less than this, relative to the largest norm, are ties: rounding, not order."""


@dataclass(frozen=True)
class Fpgm(Criterion):
    """Sum of the distances to all other filters (He et al. 2019, "Filter Pruning via Geometric Median").

    The filter nearest to the geometric median of its group, which the others can best stand in for, has the smallest.
    A row is all weights that make the unit (`L1` says which), those of a coupled group one after the other.
    Comparable within a group only.

    Example:
        >>> Fpgm().name
        'fpgm'
    """

    name: ClassVar[str] = "fpgm"
    needs: ClassVar[str] = "weights"

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        membership = Membership(knowledge)
        found: dict[str, np.ndarray] = {}
        for group in groups:
            blocks = squared_distances(_Rows(membership, group), group.units)
            found[group.name] = np.concatenate([np.sqrt(block).sum(axis=1) for block in blocks])
        return found


@dataclass(frozen=True)
class KReciprocal(Criterion):
    """k-reciprocal nearest filters (Lin et al. 2022, "Cross-Layer Ranking & k-Reciprocal Nearest Filters", CLR-RNF).

    N_k(i) are the k filters nearest to filter i, itself included, and R_k those that are in N_k(i) for every i. A
    filter is in R_k exactly where its largest rank in any N(i) is at most k. So the R_k are nested, and to keep the m
    filters with the smallest largest ranks is the selection of the paper, R_k for the smallest k with m filters, with
    surplus ones dropped from the last to come in; of those, the ones with the larger mean rank go first. The paper
    ranks by exp(-distance), which underflows; here it is the distances. Equal distances share the smaller rank.

    The score is an order: the number of units minus the largest rank, the fraction ordering ties. It keeps *central*
    filters, and was only evaluated with retraining. A row is all weights that make the unit, those of a coupled group
    one after the other. Comparable within a group only.

    Example:
        >>> KReciprocal().needs
        'weights'
    """

    name: ClassVar[str] = "k-reciprocal"
    needs: ClassVar[str] = "weights"

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        membership = Membership(knowledge)
        return {group.name: nearness(_Rows(membership, group), group.units) for group in groups}


def nearness(rows: Iterable[np.ndarray], units: int) -> np.ndarray:
    """The scores of `KReciprocal` for rows given in pieces.

    Args:
        rows: float64 arrays [units, any], the pieces of which the rows consist; iterable more than once.
        units: number of rows.

    Returns:
        Float64 [units] in [0, units): the largest is in R_k first.

    Example:
        >>> nearness([np.array([[0.0], [1.0], [1.5], [9.0]])], 4).round(2).tolist()
        [0.45, 1.6, 1.6, 0.35]
    """
    largest, total = np.zeros(units), np.zeros(units)
    resolution = _RESOLUTION * max(
        max((float(np.square(piece).sum(axis=1).max()) for piece in rows), default=0), 1e-300
    )
    for block in squared_distances(rows, units):
        ranks = _ranks(block, resolution)
        largest = np.maximum(largest, ranks.max(axis=0))
        total += ranks.sum(axis=0)
    return units - largest + (1 - total / units / (units + 1))


def _ranks(block: np.ndarray, resolution: float) -> np.ndarray:
    """Rank of each entry in its row, from 1; an entry within `resolution` of the one before it shares its rank."""
    order = np.argsort(block, axis=1)
    ascending = np.take_along_axis(block, order, axis=1)
    positions = np.broadcast_to(np.arange(1, block.shape[1] + 1), block.shape).copy()
    positions[:, 1:][np.diff(ascending, axis=1) <= resolution] = 0
    ranks = np.empty_like(positions)
    np.put_along_axis(ranks, order, np.maximum.accumulate(positions, axis=1), axis=1)
    return ranks


def squared_distances(rows: Iterable[np.ndarray], units: int) -> Iterator[np.ndarray]:
    """Squared Euclidean distances of each row to all rows, a block of rows at a time: float64 [block, units].

    Args:
        rows: float64 arrays [units, any], the pieces of which the rows consist; iterable more than once.
        units: number of rows.
    """
    step = max(1, _BLOCK_BYTES // (8 * max(units, 1)))
    for first in range(0, units, step):
        mine = slice(first, first + step)
        block = np.zeros((min(step, units - first), units))
        for piece in rows:
            norms = np.square(piece).sum(axis=1)
            block += norms[mine, None] + norms - 2 * piece[mine] @ piece.T
        block[np.arange(len(block)), np.arange(first, first + len(block))] = 0
        yield np.maximum(block, 0)


class _Rows:
    """The weights that make the units of a group, one member at a time: large groups do not fit twice."""

    def __init__(self, membership: Membership, group: ChannelGroup) -> None:
        self._weights, self._members = membership.weights, membership.makers(group)

    def __iter__(self) -> Iterator[np.ndarray]:
        for member in self._members:
            yield member.matrix(self._weights.array(member.value))
