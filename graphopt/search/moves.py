"""Small moves on an assignment: into the budget where it is over, and up while there is room."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.search.budget import BudgetProblem, alternatives, totals

_MOST_MOVES = 10_000
"""A guard: each move improves on the last, so far fewer are made."""


def repaired(problem: BudgetProblem, taken: Sequence[int]) -> list[int] | None:
    """The assignment brought within the budget, by the moves of one choice each that lose least value per cost saved.

    A move that alone is enough is preferred where it loses less than the best ratio would. None where single moves
    do not lead below the budget.
    """
    at = list(taken)
    for _ in range(_MOST_MOVES):
        cost = totals(problem, at)[1]
        if cost <= problem.budget + problem.slack:
            return at
        best: tuple[float, int, int] | None = None
        for choice in range(len(problem.choices)):
            values, costs = alternatives(problem, at, choice)
            saved, lost = costs[at[choice]] - costs, values[at[choice]] - values
            useful = np.minimum(saved, cost - problem.budget)  # what is saved beyond the need is worth nothing
            price = np.where(useful > 0, np.where(lost > 0, lost / np.maximum(useful, 1e-300), lost * 1e12), np.inf)
            option = int(np.argmin(price))
            if np.isfinite(price[option]) and (best is None or price[option] < best[0]):
                best = float(price[option]), choice, option
        if best is None:
            return None
        at[best[1]] = best[2]
    return None


def improved(problem: BudgetProblem, taken: Sequence[int]) -> list[int]:
    """An assignment within the budget, made better by moves of one choice each, the best first, until none helps."""
    at = list(taken)
    for _ in range(_MOST_MOVES):
        if not _single(problem, at):
            break
    return at


def _single(problem: BudgetProblem, at: list[int]) -> bool:
    """Make the one best move within the budget, in place; whether there was one."""
    room = problem.budget + problem.slack - totals(problem, at)[1]
    best, where = 0.0, (-1, -1)
    for choice in range(len(problem.choices)):
        values, costs = alternatives(problem, at, choice)
        gain = np.where(costs - costs[at[choice]] <= room, values - values[at[choice]], -np.inf)
        option = int(np.argmax(gain))
        if gain[option] > best + _least(values):
            best, where = float(gain[option]), (choice, option)
    if where[0] < 0:
        return False
    at[where[0]] = where[1]
    return True


def _least(values: np.ndarray) -> float:
    """A gain that is no more than rounding."""
    return 1e-12 * float(np.abs(values).max())
