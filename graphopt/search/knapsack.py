"""A knapsack on linear costs, repeated as the network shrinks (HALP, arXiv 2110.10811: latency-saliency knapsack).

At the present state every option of every choice has the cost and the value that it alone would change; taken together
as if they added up, they make a multiple-choice knapsack: one option of each choice, which for packets of channels
sorted by importance keeps the more important ones first. It is solved exactly by dynamic programming. Costs that depend
on two choices at once are linear only nearby, so the budget comes down in steps and costs are taken anew at each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.search.budget import Assignment, BudgetProblem, alternatives, assignment, highest, missed, totals
from graphopt.search.moves import improved, repaired
from graphopt.search.relaxation import Tree, cheapest, relax

_CORRECTIONS = 10
"""Steps at the full budget, at most, until the state no longer changes."""


def solve_knapsack(problem: BudgetProblem, *, iterations: int = 10, resolution: int = 10_000) -> Assignment:
    """A good assignment within the budget; the best where costs and values are linear (terms of one choice, no gate).

    Args:
        problem: choices, tables, budget.
        iterations: steps in which the budget comes down from what the model costs as it is, exponentially:
            `exp(t/T ln budget + (1 - t/T) ln cost)`.
        resolution: units that the part of the budget that can be decided is cut into. Costs are rounded up to units,
            so that a budget is never exceeded by rounding; whole numbers up to this many are taken as they are.

    Returns:
        An assignment within the budget. Its bound is that of prices (`graphopt.search.relaxation`) where the choices
        lie in a tree, and the sum of the greatest values where they do not.

    Raises:
        TargetMissedError: no assignment is within the budget; the error names the least cost.
        GraphoptError: none was found, though there may be one, or an option is out of range.

    Example:
        >>> from graphopt.search.budget import Choice, Term
        >>> widths = Choice("a", ("4", "2")), Choice("b", ("4", "2"))
        >>> layer = Term("layer", ("a", "b"), cost=np.outer([4, 2], [4, 2]), value=np.add.outer([3, 1], [5, 4]))
        >>> dict(solve_knapsack(BudgetProblem(widths, (layer,), budget=8.0)).options)
        {'a': 0, 'b': 1}
    """
    if iterations < 1 or resolution < 1:
        raise GraphoptError(f"{iterations} iterations at a resolution of {resolution} cannot be", help="give 1 or more")
    start = time.perf_counter()
    bound, safe = _bound(problem)
    taken = [0] * len(problem.choices)
    cost = totals(problem, taken)[1]
    for step in range(1, iterations + 1):
        taken = _step(problem, taken, _budget_at(step / iterations, cost, problem.budget), resolution)
    best: list[int] | None = None
    seen: set[tuple[int, ...]] = set()
    while len(seen) < _CORRECTIONS and tuple(taken) not in seen:
        seen.add(tuple(taken))
        value, cost = totals(problem, taken)
        if cost <= problem.budget + problem.slack and (best is None or value > totals(problem, best)[0]):
            best = taken
        taken = _step(problem, taken, problem.budget, resolution)
    for beginning in (taken, [0] * len(problem.choices), safe):
        best = best or (None if beginning is None else repaired(problem, beginning))
    if best is None:
        raise GraphoptError(
            "steps of one choice each do not lead into the budget", help="the solver `milp` decides whether others do"
        )
    rounded = None if _is_whole(problem) else f"costs were rounded up to 1/{resolution} of what can be decided"
    best = improved(problem, best)  # what is linear nearby leaves a little of the budget
    return assignment(problem, best, bound=bound, solver="knapsack", seconds=time.perf_counter() - start, note=rounded)


def _bound(problem: BudgetProblem) -> tuple[float, list[int] | None]:
    """See `solve_knapsack`, and the cheapest assignment where it is known; raises where the budget is below it."""
    if not problem.choices:
        if totals(problem, ())[1] > problem.budget + problem.slack:
            raise missed(problem, ())
        return totals(problem, ())[0], []
    tree = Tree.of(problem)
    if tree is not None:
        return relax(problem, tree).bound, cheapest(tree)
    return highest(problem), None


def _is_whole(problem: BudgetProblem) -> bool:
    return all((factor.cost == np.floor(factor.cost)).all() for factor in problem.factors)


def _budget_at(share: float, first: float, last: float) -> float:
    """The budget when this share of the way from the first cost is gone."""
    if first <= last:
        return last
    if last <= 0:
        return share * last + (1 - share) * first
    return last if share == 1 else math.exp(share * math.log(last) + (1 - share) * math.log(first))


def _step(problem: BudgetProblem, taken: Sequence[int], budget: float, resolution: int) -> list[int]:
    """The best assignment as if what each choice alone changes added up."""
    values, costs = [], []
    for choice, now in enumerate(taken):
        value, cost = alternatives(problem, taken, choice)
        values.append(value - value[now])
        costs.append(cost - cost[now])
    allowed = budget + problem.slack - totals(problem, taken)[1]
    return multiple_choice(values, costs, allowed, resolution)


def multiple_choice(
    values: Sequence[np.ndarray], costs: Sequence[np.ndarray], capacity: float, resolution: int
) -> list[int]:
    """One option a class with the greatest sum of values and a sum of costs within the capacity.

    Args:
        values: float64 [options] a class.
        costs: float64 [options] a class; negative ones are savings.
        capacity: the most that they may cost together.
        resolution: see `solve_knapsack`.

    Returns:
        The option of each class; the cheapest ones where even they cost more than the capacity.

    Example:
        >>> two = np.array([0.0, 5.0]), np.array([0.0, 4.0])
        >>> multiple_choice(two, (np.array([0.0, 3.0]), np.array([0.0, 2.0])), capacity=4.0, resolution=100)
        [1, 0]
    """
    above = [cost - cost.min() for cost in costs]
    room = capacity - sum(float(cost.min()) for cost in costs)
    if room < 0:
        return [int(np.argmin(cost)) for cost in costs]
    if sum(float(cost.max()) for cost in above) <= room:
        return [int(np.argmax(value)) for value in values]
    whole = room <= resolution and all((cost == np.floor(cost)).all() for cost in above)
    units, size = (math.floor(room), 1.0) if whole else (resolution, room / resolution)
    best = np.zeros(units + 1)  # by the units that may be spent on the classes so far
    options = np.zeros((len(values), units + 1), dtype=np.int32)
    for place, (value, cost) in enumerate(zip(values, above, strict=True)):
        weights = np.ceil(cost / max(size, 1e-300) - 1e-9).astype(np.float64)
        after = np.full(units + 1, -np.inf)
        for option in np.flatnonzero(weights <= units):
            weight = int(weights[option])
            worth = best[: units + 1 - weight] + value[option]
            better = worth > after[weight:]
            after[weight:][better] = worth[better]
            options[place, weight:][better] = option
        best = after
    left, taken = units, [0] * len(values)
    for place in reversed(range(len(values))):
        taken[place] = int(options[place, left])
        left -= math.ceil(float(above[place][taken[place]]) / max(size, 1e-300) - 1e-9)
    return taken
