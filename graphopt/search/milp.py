"""The exact solution of a budget problem as a mixed-integer linear program (the one of MDP, arXiv 2504.02168, Sec. 3).

One bit y for each option, one of which is 1 in each choice. A term over several choices gets a weight w >= 0 for each
combination of their options; the sum over the other choices is y of the option, so for bits y the weights are 1 at the
combination taken and 0 elsewhere, and what is bilinear or worse in y is linear in w. A gated term's weights sum to the
bit of its gate. Only y is binary.

What makes networks of a hundred widths solvable is done before (`graphopt.search.relaxation`): with a bound for each
combination and a good assignment at hand, every option and combination whose bound is below what is already there goes.
That is exact, and leaves a few percent.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import scipy.optimize as optimize
import scipy.sparse as sparse

from graphopt.errors import GraphoptError
from graphopt.search.budget import (
    Assignment,
    BudgetProblem,
    Factor,
    assignment,
    highest,
    missed,
    totals,
)
from graphopt.search.moves import improved, repaired
from graphopt.search.relaxation import Relaxation, Tree, relax

_SOLVER = "milp"
_MOST_ENTRIES = 100_000
"""Combinations of options that go to the solver, at most; with more it runs far past its time limit (measured: 200,000
took 90 seconds of 20). Behind the bounds there are some thousands."""
_LARGEST_VALUE = 1e3
"""What values are scaled to: HiGHS takes an absolute gap of 1e-6 for none."""
_INFEASIBLE, _SOLVED, _LIMIT = 2, 0, 1
"""`status` of `scipy.optimize.milp`."""


def solve_milp(problem: BudgetProblem, *, seconds: float = 20.0, gap: float = 1e-5, reduce: bool = True) -> Assignment:
    """The best assignment within the budget.

    Args:
        problem: choices, tables, budget.
        seconds: wall clock for the solver; what was found until then is returned with its gap.
        gap: stop when the best found is within this share of the bound, 0 for the very best.
        reduce: bound first by prices, which leaves less to the solver; False gives it everything.

    Returns:
        An assignment within the budget; the model as it is, where nothing is better. `note` says where the time ended.

    Raises:
        TargetMissedError: no assignment is within the budget; the error names the least cost.
        GraphoptError: the time ended before any assignment within the budget was found, the solver failed, or an
            option is out of range.

    Example:
        >>> from graphopt.search.budget import Choice, Term
        >>> widths = Choice("a", ("4", "2")), Choice("b", ("4", "2"))
        >>> layer = Term("layer", ("a", "b"), cost=np.outer([4, 2], [4, 2]), value=np.add.outer([3, 1], [5, 4]))
        >>> dict(solve_milp(BudgetProblem(widths, (layer,), budget=8.0)).options)
        {'a': 0, 'b': 1}
    """
    if not (seconds > 0 and 0 <= gap < 1):
        raise GraphoptError(
            f"a time of {seconds} seconds and a gap of {gap} cannot be", help="seconds > 0, 0 <= gap < 1"
        )
    start = time.perf_counter()
    if not problem.choices and totals(problem, ())[1] > problem.budget + problem.slack:
        raise missed(problem, ())
    tree = Tree.of(problem) if reduce else None
    known = None if tree is None else relax(problem, tree)

    def record(taken: Sequence[int], bound: float, note: str | None = None) -> Assignment:
        passed = time.perf_counter() - start
        return assignment(problem, taken, bound=bound, solver=_SOLVER, seconds=passed, note=note)

    bound = highest(problem) if known is None else known.bound
    if known is not None:
        unchanged = record([0] * len(problem.choices), bound)
        if unchanged.optimal and unchanged.cost <= problem.budget + problem.slack:
            return unchanged
        first = record(known.taken, bound)
        if first.optimal or first.gap <= gap:
            return first
    found, proven, note = _Program(problem, known).solved(seconds - (time.perf_counter() - start), gap)
    bound = min(bound, proven)
    begun = known.taken if known is not None else repaired(problem, [0] * len(problem.choices))
    candidates = [taken for taken in (begun, found) if taken is not None]
    if not candidates:
        raise GraphoptError(
            f"no assignment within the budget was found in {seconds:g} seconds",
            where=f"{len(problem.choices)} choices, {len(problem.terms)} terms",
            help="give it more time (`seconds`), or fewer options: coarser packets",
        )
    best = max((improved(problem, taken) for taken in candidates), key=lambda taken: totals(problem, taken)[0])
    return record(best, bound, note)


@dataclass
class _Table:
    """A factor cut to what may still be taken: `allowed` marks the combinations; axes with one option are gone."""

    scope: tuple[int, ...]
    gate: int | None
    cost: np.ndarray
    value: np.ndarray
    allowed: np.ndarray


@dataclass
class _Rows:
    """Linear constraints as they grow: `lower <= A x <= upper`."""

    entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(
        default_factory=list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    )
    lower: list[float] = field(default_factory=list[float])
    upper: list[float] = field(default_factory=list[float])

    def add(self, columns: np.ndarray, numbers: np.ndarray | float, lower: float, upper: float) -> None:
        row = np.full(len(columns), len(self.lower))
        self.entries.append((row, columns, np.broadcast_to(np.asarray(numbers, dtype=np.float64), len(columns))))
        self.lower.append(lower)
        self.upper.append(upper)

    def constraint(self, columns: int) -> optimize.LinearConstraint:
        rows, places, numbers = (np.concatenate(parts) for parts in zip(*self.entries, strict=True))
        matrix = sparse.csr_array((numbers, (rows, places)), shape=(len(self.lower), columns))
        return optimize.LinearConstraint(matrix, self.lower, self.upper)  # pyright: ignore[reportArgumentType]


@contextmanager
def _quiet() -> Generator[None]:
    """Let what C code prints to stdout go to stderr: HiGHS has a message that no option turns off.

    Standard output may be a JSON document that a program reads. Where there is no such file, nothing is done.
    """
    try:
        sys.stdout.flush()
        _flush_c()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        _flush_c()
        os.dup2(kept, 1)
        os.close(kept)


def _flush_c() -> None:
    """Write out what C code has printed to a buffer."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)


class _Program:
    """The linear program of a problem, without what the relaxation rules out."""

    def __init__(self, problem: BudgetProblem, known: Relaxation | None) -> None:
        self.problem = problem
        self.known = known
        self.options = [self._left((choice,)).nonzero()[0] for choice in range(len(problem.choices))]
        self.starts = np.cumsum([0, *(len(options) for options in self.options)])
        self.columns = int(self.starts[-1])
        self.values: list[np.ndarray] = [np.zeros(self.columns)]
        self.costs: list[np.ndarray] = [np.zeros(self.columns)]
        self.constant_value, self.constant_cost = 0.0, 0.0
        self.rows = _Rows()

    def _left(self, scope: tuple[int, ...]) -> np.ndarray:
        """Which combinations of options of these choices may still be in the best assignment."""
        limits = None if self.known is None else self.known.limits(scope)
        if limits is None or self.known is None:
            return np.ones([len(self.problem.choices[choice].options) for choice in scope], dtype=bool)
        return limits >= self.known.value - 1e-9 * max(abs(self.known.value), abs(self.known.bound))

    def _column(self, choice: int, option: int = 0) -> int:
        """Column of a bit, by the position of the option among those left."""
        return int(self.starts[choice]) + option

    def solved(self, seconds: float, gap: float) -> tuple[list[int] | None, float, str | None]:
        """The best assignment found, a bound on all, and what to say about it."""
        tables = _merged([table for factor in self.problem.factors if (table := self._cut(factor)) is not None])
        entries = sum(int(table.allowed.sum()) for table in tables)
        if entries > _MOST_ENTRIES:
            what = f"the linear program has {entries} combinations of options, more than {_MOST_ENTRIES}"
            if self.known is not None:
                return None, math.inf, what
            raise GraphoptError(
                what, help="decide between fewer options: coarser packets, fewer ranks a layer; or solve by knapsack"
            )
        for choice, options in enumerate(self.options):
            bits = self._column(choice) + np.arange(len(options))
            self.rows.add(bits, 1.0, 1.0, 1.0)
        for table in tables:
            self._add(table)
        value, cost = np.concatenate(self.values), np.concatenate(self.costs)
        if seconds <= 0:
            return None, math.inf, "the time ended before the linear program was begun"
        return self._answer(value, cost, seconds, gap)

    def _answer(
        self, value: np.ndarray, cost: np.ndarray, seconds: float, gap: float
    ) -> tuple[list[int] | None, float, str | None]:
        scale = (float(np.abs(value).max(initial=0.0)) or 1.0) / _LARGEST_VALUE
        known = None if self.known is None else self.known.value
        relative = gap if known is None else gap * abs(known) / max(abs(known - self.constant_value), 1e-12 * scale)
        result = self._run(-value / scale, cost, seconds, min(relative, 1.0))
        if result.status == _INFEASIBLE and self.known is None:
            cheapest = self._run(cost / (float(np.abs(cost).max(initial=0.0)) or 1.0), None, seconds, 0.0)
            if cheapest.x is not None:
                raise missed(self.problem, self._taken(cheapest.x))
        if result.status not in (_SOLVED, _LIMIT, _INFEASIBLE):
            raise GraphoptError(f"the solver failed: {result.message}", where="scipy.optimize.milp (HiGHS)")
        dual = getattr(result, "mip_dual_bound", None)
        bound = math.inf
        if result.status != _INFEASIBLE and dual is not None and math.isfinite(dual):
            bound = -dual * scale + self.constant_value
        note = f"the time limit of the solver ended it after {seconds:.1f} s" if result.status == _LIMIT else None
        if result.x is None:
            return None, bound, note
        return repaired(self.problem, self._taken(result.x)), bound, note

    def _run(self, goal: np.ndarray, cost: np.ndarray | None, seconds: float, gap: float) -> optimize.OptimizeResult:
        """Minimise `goal`, with all rows and, where costs are given, the budget."""
        constraints = [self.rows.constraint(self.columns)]
        if cost is not None:
            scale = float(np.abs(cost).max(initial=0.0)) or 1.0
            left = self.problem.budget + self.problem.slack - self.constant_cost
            row = sparse.csr_array(cost[None, :] / scale)
            constraints.append(optimize.LinearConstraint(row, -np.inf, left / scale))  # pyright: ignore[reportArgumentType]
        binary = np.zeros(self.columns)
        binary[: self.starts[-1]] = 1
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # that a limit was met is in the status
            return optimize.milp(
                goal,
                integrality=binary,
                bounds=optimize.Bounds(0, 1),
                constraints=constraints,
                # behind the relaxation there is little to presolve
                options={"time_limit": seconds, "mip_rel_gap": gap, "presolve": self.known is None},
            )

    def _taken(self, solution: np.ndarray) -> list[int]:
        taken: list[int] = []
        for choice, options in enumerate(self.options):
            bits = solution[self._column(choice) : self._column(choice) + len(options)]
            taken.append(int(options[int(np.argmax(bits))]))
        return taken

    def _cut(self, factor: Factor) -> _Table | None:
        """The factor with the options that are left; None where its gate is known to drop it."""
        gate = factor.gate
        allowed = self._left(factor.everything)
        if gate is not None:
            allowed = allowed[..., 0]
            if 0 not in self.options[gate]:
                return None
            gate = gate if 1 in self.options[gate] else None
        at = np.ix_(*(self.options[choice] for choice in factor.scope))
        wide = [axis for axis, choice in enumerate(factor.scope) if len(self.options[choice]) > 1]
        shape = [len(self.options[factor.scope[axis]]) for axis in wide]
        cost, value, allowed = (table[at].reshape(shape) for table in (factor.cost, factor.value, allowed))
        return _Table(tuple(factor.scope[axis] for axis in wide), gate, cost, value, allowed)

    def _add(self, table: _Table) -> None:
        """Columns and rows of one table."""
        if not table.scope and table.gate is None:
            self.constant_value += float(table.value)
            self.constant_cost += float(table.cost)
        elif not table.scope or (len(table.scope) == 1 and table.gate is None):
            start = self._column(table.scope[0] if table.scope else table.gate or 0)
            self.values[0][start : start + table.value.size] += table.value.reshape(-1)
            self.costs[0][start : start + table.cost.size] += table.cost.reshape(-1)
        else:
            self._add_weights(table)

    def _add_weights(self, table: _Table) -> None:
        combinations = np.argwhere(table.allowed)
        columns = self.columns + np.arange(len(combinations))
        self.columns += len(combinations)
        self.values.append(table.value[table.allowed])
        self.costs.append(table.cost[table.allowed])
        lowest = 0.0 if table.gate is None else -np.inf
        for axis, choice in enumerate(table.scope):
            for option in range(table.allowed.shape[axis]):
                mine = columns[combinations[:, axis] == option]
                bit = self._column(choice, option)
                self.rows.add(np.append(mine, bit), np.append(np.ones(len(mine)), -1.0), lowest, 0.0)
        if table.gate is not None:
            bit = self._column(table.gate)  # keep is option 0, and is left
            self.rows.add(np.append(columns, bit), np.append(np.ones(len(columns)), -1.0), 0.0, 0.0)


def _merged(tables: Sequence[_Table]) -> list[_Table]:
    """The same sum with fewer tables: those of one gate whose choices lie within the choices of another join it."""
    merged: list[_Table] = []
    for table in sorted(tables, key=lambda table: -len(table.scope)):
        scope = set(table.scope)
        host = next((other for other in merged if other.gate == table.gate and scope <= set(other.scope)), None)
        if host is None:
            merged.append(_Table(table.scope, table.gate, table.cost.copy(), table.value.copy(), table.allowed.copy()))
            continue
        places = [host.scope.index(choice) for choice in table.scope]
        order = np.argsort(places)
        shape = [size if choice in scope else 1 for choice, size in zip(host.scope, host.value.shape, strict=True)]
        host.value += table.value.transpose(order).reshape(shape)
        host.cost += table.cost.transpose(order).reshape(shape)
        host.allowed &= table.allowed.transpose(order).reshape(shape)
    return merged
