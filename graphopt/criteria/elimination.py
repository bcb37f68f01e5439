"""Which inputs a least-squares solve can do without: blocks of columns eliminated one after another.

A linear operator W reads columns with covariance C. Without the columns P, and solved again with the ridge l,

    E(P) = tr( W_P (C_PP - C_PK (C_KK + L)^-1 C_KP) W_P^T ),    L = diag(l)

is lost. With H = (C + L)^-1 that is tr( W_P (H_PP^-1 - L_PP) W_P^T ), and taking out one block u more costs

    tr( W_u H_uu^-1 W_u^T ) - tr( W0_u L_uu W0_u^T )
    W <- W - W_u H_uu^-1 H_u:,    H <- H - H_:u H_uu^-1 H_u:

(Hassibi and Stork 1993, "Optimal Brain Surgeon", with blocks for single weights and the layer's output for the loss).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

_EXACT = 512
"""Columns up to which every unit that is left is compared at every step."""
_ROUNDS, _POOL = 32, 3
"""Beyond, units go in so many packets, each chosen one by one among so many times as many of the cheapest."""
_ROUNDING = 1e-12
"""What is lost by less than this share of the block's own weight is nothing."""


@dataclass(frozen=True, eq=False)
class Reader:
    """An operator that reads the units of a group, or several that read the same columns.

    Columns are those of the units alone, in their order: unit u has [u * taps, (u + 1) * taps).

    Attributes:
        inverse: H over these columns, other columns staying; float64 [units * taps, units * taps].
        weight: W0, scaled to what a loss is counted in; float64 [rows, units * taps].
        ridge: l; float64 [units * taps].
        units: number of units.
    """

    inverse: np.ndarray
    weight: np.ndarray
    ridge: np.ndarray
    units: int

    @property
    def taps(self) -> int:
        """Columns a unit."""
        return len(self.ridge) // self.units

    def penalties(self) -> np.ndarray:
        """tr(W0_u L_uu W0_u^T), float64 [units]."""
        return (np.square(self.weight).sum(axis=0) * self.ridge).reshape(self.units, -1).sum(axis=1)


@dataclass(frozen=True, eq=False)
class Losses:
    """What losing units of a group does, to all that reads it.

    Attributes:
        readers: operators that can be solved again.
        alone: what losing each unit costs elsewhere, whatever else is lost; float64 [units].
    """

    readers: tuple[Reader, ...]
    alone: np.ndarray

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.alone)


def eliminate(losses: Losses) -> tuple[np.ndarray, np.ndarray]:
    """Take units out one after another, each time the one that costs least in addition.

    Up to 512 columns all units are compared at every step. Beyond, units go in packets of about 3 % of the group,
    chosen one by one among the three times as many that are cheapest when the packet begins; what they cost together
    is exact all the same.

    Args:
        losses: of a group.

    Returns:
        The units in the order in which they go, int64 [units], and E of the first, the first two, ..., float64 [units].

    Example:
        >>> covariance, weight = np.diag([4.0, 1.0, 9.0]), np.array([[1.0, 1.0, 1.0]])
        >>> ridge = np.full(3, 1e-9)
        >>> reader = Reader(np.linalg.inv(covariance + np.diag(ridge)), weight, ridge, 3)
        >>> order, errors = eliminate(Losses((reader,), np.zeros(3)))
        >>> order.tolist(), errors.round(6).tolist()
        ([1, 0, 2], [1.0, 5.0, 14.0])
    """
    base = losses.alone - _total([reader.penalties() for reader in losses.readers], losses.units)
    states = [_State(reader.inverse, reader.weight, reader.units) for reader in losses.readers]
    left = np.arange(losses.units)
    widest = max((len(reader.ridge) for reader in losses.readers), default=0)
    packet = losses.units if widest <= _EXACT else math.ceil(losses.units / _ROUNDS)
    order: list[int] = []
    costs: list[float] = []
    while len(left):
        marginal = base[left] + _total([state.marginals() for state in states], len(left))
        pool = np.sort(np.argsort(marginal, kind="stable")[: _POOL * packet])
        chosen, paid = _one_by_one([state.of(pool) for state in states], base[left[pool]], packet)
        gone = pool[chosen]
        order.extend(left[gone].tolist())
        costs.extend(paid)
        if len(gone) < len(left):
            states = [state.without(gone) for state in states]
        left = np.delete(left, gone)
    return np.array(order, np.int64), _clean(np.cumsum(costs), losses, np.array(order, np.int64))


def errors_in_order(losses: Losses, order: np.ndarray) -> np.ndarray:
    """E of the first unit of an order, of the first two, ...: one Cholesky factor gives them all.

    With the columns in that order and H = F F^T, F lower triangular, the leading blocks of F are the factors of the
    leading blocks of H.

    Args:
        losses: of a group.
        order: units, each once, int64 [any number].

    Returns:
        Float64 [len(order)].
    """
    total = losses.alone[order]
    for reader in losses.readers:
        columns = (order[:, None] * reader.taps + np.arange(reader.taps)).reshape(-1)
        factor = np.linalg.cholesky(reader.inverse[np.ix_(columns, columns)])
        lost = np.square(scipy.linalg.solve_triangular(factor, reader.weight[:, columns].T, lower=True))
        total = total + lost.sum(axis=1).reshape(len(order), -1).sum(axis=1) - reader.penalties()[order]
    return _clean(np.cumsum(total), losses, order)


class _State:
    """H and W of one reader while units go."""

    def __init__(self, inverse: np.ndarray, weight: np.ndarray, units: int) -> None:
        self.inverse, self.weight, self.units = inverse, weight, units
        self.taps = weight.shape[1] // max(units, 1)

    def marginals(self) -> np.ndarray:
        """tr(W_u H_uu^-1 W_u^T), float64 [units]."""
        if self.taps == 1:
            return np.square(self.weight).sum(axis=0) / np.diagonal(self.inverse)
        places = np.arange(self.units)
        blocks = self.inverse.reshape(self.units, self.taps, self.units, self.taps)[places, :, places, :]
        parts = self.weight.T.reshape(self.units, self.taps, -1)
        return np.einsum("utm,utm->u", parts, np.linalg.solve(blocks, parts))

    def columns(self, units: np.ndarray) -> np.ndarray:
        return (units[:, None] * self.taps + np.arange(self.taps)).reshape(-1)

    def of(self, units: np.ndarray) -> _State:
        """The part of some units, a copy."""
        columns = self.columns(units)
        return _State(self.inverse[np.ix_(columns, columns)], self.weight[:, columns], len(units))

    def without(self, units: np.ndarray) -> _State:
        """What is left once some units are gone."""
        gone = self.columns(units)
        kept = np.delete(np.arange(self.weight.shape[1]), gone)
        across = self.inverse[np.ix_(gone, kept)]
        solved = scipy.linalg.solve(self.inverse[np.ix_(gone, gone)], across, assume_a="pos")
        inverse = self.inverse[np.ix_(kept, kept)]
        inverse -= across.T @ solved
        return _State(inverse, self.weight[:, kept] - self.weight[:, gone] @ solved, self.units - len(units))

    def take(self, unit: int) -> None:
        """Take one unit out in place; its rows and columns become those of the identity, its weight 0."""
        own = slice(unit * self.taps, (unit + 1) * self.taps)
        across = self.inverse[own].copy()
        solved = np.linalg.solve(self.inverse[own, own], across)
        self.weight -= self.weight[:, own] @ solved
        self.inverse -= across.T @ solved
        self.inverse[own], self.inverse[:, own] = 0, 0
        self.inverse[own, own] = np.eye(self.taps)
        self.weight[:, own] = 0


def _one_by_one(states: Sequence[_State], base: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """The first `count` units of an elimination, by position, and what each costs. The states are used up."""
    chosen: list[int] = []
    costs: list[float] = []
    gone = np.zeros(len(base), bool)
    for _ in range(min(count, len(base))):
        marginal = base + _total([state.marginals() for state in states], len(base))
        marginal[gone] = np.inf
        unit = int(np.argmin(marginal))
        gone[unit] = True
        chosen.append(unit)
        costs.append(float(marginal[unit]))
        for state in states:
            state.take(unit)
    return chosen, costs


def _clean(errors: np.ndarray, losses: Losses, order: np.ndarray) -> np.ndarray:
    """Errors without rounding: what is below the precision of the sums is 0."""
    size = np.cumsum(_total([reader.penalties() for reader in losses.readers], losses.units)[order])
    return np.where(errors > _ROUNDING * size, errors, 0.0)


def _total(parts: Sequence[np.ndarray], units: int) -> np.ndarray:
    return np.sum(parts, axis=0) if len(parts) else np.zeros(units)
