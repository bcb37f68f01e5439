"""The one statement of "what is taken where, so that a budget is met": choices, and tables of what they cost together.

Everything that may be decided about a network is a choice of one option: units kept of a group, dense or a rank or int8
of a layer, keep or drop of a block. What a combination costs and is worth is a sum of tables, each over the few choices
that meet in one place (a layer: its input width, its output width, its form). Solvers know no more than this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from graphopt.errors import GraphoptError, TargetMissedError

Solver = Callable[["BudgetProblem"], "Assignment"]
"""Anything that solves a problem; options are bound beforehand."""

ROUNDING = 1e-9
"""Share of the sums by which a cost may lie over the budget: what adding up in another order changes."""
PROVEN = 1e-6
"""Share of the sums by which a value may lie below its bound and count as the best: what solvers take for zero."""
_NAMED = 5
"""How many of the dearest terms a message names."""


@dataclass(frozen=True)
class Choice:
    """One option out of several is taken.

    Attributes:
        name: unique in its problem.
        options: what each option is called, at least one. Option 0 is the model as it is.

    Raises:
        GraphoptError: there is no option.
    """

    name: str
    options: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise GraphoptError("a choice needs at least one option", where=self.name)


@dataclass(frozen=True, eq=False)
class Term:
    """What the options of a few choices cost and are worth together.

    Attributes:
        name: unique in its problem.
        choices: names of the choices that it depends on, each once; none for a constant.
        cost: float64, one axis a choice, in the order of `choices`, one entry an option; any unit, one for all terms.
        value: float64 of the same shape; any unit, one for all terms; more is better.
        gate: name of a choice with two options, keep and drop, that is none of `choices`: when it is dropped the term
            costs nothing and is worth nothing. A term inside two nested gates names the outer one here and has the
            inner one among its choices, with zeros where that one drops.

    Raises:
        GraphoptError: the tables do not have one axis a choice, differ in shape, or hold numbers that are not finite;
            or a choice is named twice.
    """

    name: str
    choices: tuple[str, ...]
    cost: np.ndarray
    value: np.ndarray
    gate: str | None = None

    def __post_init__(self) -> None:
        for field in ("cost", "value"):
            table = np.array(getattr(self, field), dtype=np.float64)
            table.setflags(write=False)
            if table.ndim != len(self.choices) or not np.isfinite(table).all():
                raise GraphoptError(
                    f"the {field} of a term must be finite numbers with one axis for each of its {len(self.choices)} "
                    f"choices; the table has shape {list(table.shape)}",
                    where=self.name,
                )
            object.__setattr__(self, field, table)
        if self.cost.shape != self.value.shape:
            raise GraphoptError(
                f"cost has shape {list(self.cost.shape)}, value {list(self.value.shape)}: they must agree",
                where=self.name,
            )
        if len({*self.choices, self.gate}) != len(self.choices) + 1:
            raise GraphoptError(
                "a term names the same choice twice",
                where=self.name,
                help="what depends on one choice in two ways has one axis for it: the diagonal of the larger table",
            )


@dataclass(frozen=True)
class Factor:
    """A term with numbers for names: positions of its choices and of its gate (None: none) in the problem."""

    scope: tuple[int, ...]
    gate: int | None
    cost: np.ndarray
    value: np.ndarray

    @property
    def everything(self) -> tuple[int, ...]:
        """Positions of all choices that the factor depends on, the gate last."""
        return self.scope if self.gate is None else (*self.scope, self.gate)


@dataclass(frozen=True, eq=False)
class BudgetProblem:
    """Take one option of each choice so that the sum of the values is greatest and the sum of the costs within budget.

    Attributes:
        choices: what is decided.
        terms: what it costs and is worth.
        budget: the most that all terms may cost together, a finite number in the unit of the costs.

    Raises:
        GraphoptError: two choices or terms share a name, a term names a choice that does not exist or whose number of
            options is not the size of its axis, a gate does not have two options, or the budget is not finite.

    Example:
        >>> width = Choice("width", ("32", "16"))
        >>> layer = Term("layer", ("width",), cost=np.array([8.0, 5.0]), value=np.array([1.0, 0.7]))
        >>> evaluate(BudgetProblem((width,), (layer,), budget=6.0), {"width": 1})
        (0.7, 5.0)
    """

    choices: tuple[Choice, ...]
    terms: tuple[Term, ...]
    budget: float

    def __post_init__(self) -> None:
        for kind, items in (("choices", self.choices), ("terms", self.terms)):
            names = [item.name for item in items]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise GraphoptError(f"two {kind} have the same name", where=twice[0])
        if not math.isfinite(self.budget):
            raise GraphoptError(f"a budget of {self.budget} is no number to stay within", help="give a finite number")
        options = {choice.name: len(choice.options) for choice in self.choices}
        for term in self.terms:
            for name in term.choices if term.gate is None else (*term.choices, term.gate):
                if name not in options:
                    raise GraphoptError(f"there is no choice {name!r}", where=term.name)
            expected = tuple(options[name] for name in term.choices)
            if expected != term.cost.shape:
                raise GraphoptError(
                    f"the tables have shape {list(term.cost.shape)}, their choices have {list(expected)} options",
                    where=term.name,
                )
            if term.gate is not None and options[term.gate] != 2:
                raise GraphoptError(
                    f"the gate {term.gate!r} has {options[term.gate]} options, not keep and drop", where=term.name
                )

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        """The terms with positions of choices in place of names, in the same order."""
        position = {choice.name: index for index, choice in enumerate(self.choices)}
        return tuple(
            Factor(
                tuple(position[name] for name in term.choices),
                None if term.gate is None else position[term.gate],
                term.cost,
                term.value,
            )
            for term in self.terms
        )

    @cached_property
    def factors_of(self) -> tuple[tuple[Factor, ...], ...]:
        """For each choice the factors that depend on it, as a gate included."""
        touching: list[list[Factor]] = [[] for _ in self.choices]
        for factor in self.factors:
            for index in factor.everything:
                touching[index].append(factor)
        return tuple(map(tuple, touching))

    @cached_property
    def slack(self) -> float:
        """How far over the budget a sum of costs may lie by rounding alone."""
        largest = sum(float(np.abs(factor.cost).max()) for factor in self.factors)
        return ROUNDING * max(abs(self.budget), min(largest, 1e3 * abs(self.budget)))


@dataclass(frozen=True)
class Assignment:
    """What is taken, what it is worth and costs, and how far from the best it can be at most.

    Attributes:
        options: name of each choice to the index of the option that is taken.
        value: sum of the values.
        cost: sum of the costs, within the budget.
        bound: no assignment within the budget is worth more than this.
        gap: `bound - value`, relative to the larger magnitude of the two; 0 where the value is proven to be the best.
        optimal: whether the gap is no more than what solvers take for zero, a millionth of the sums.
        solver: which solver found it, kebab-case.
        seconds: wall clock that it took.
        note: what the reader must know (a time limit was met, costs were rounded), or None.
    """

    options: Mapping[str, int]
    value: float
    cost: float
    bound: float
    gap: float
    optimal: bool
    solver: str
    seconds: float
    note: str | None = None

    def taken(self, problem: BudgetProblem) -> dict[str, str]:
        """The names of the options taken, for the choices that are not left as they are."""
        return {
            choice.name: choice.options[self.options[choice.name]]
            for choice in problem.choices
            if self.options[choice.name]
        }


def evaluate(problem: BudgetProblem, options: Mapping[str, int]) -> tuple[float, float]:
    """What an assignment is worth and what it costs.

    Args:
        problem: the choices and terms.
        options: an index for each choice, by name.

    Returns:
        The sum of the values and the sum of the costs.

    Raises:
        GraphoptError: a choice is missing or unknown, or has no such option.
    """
    names = {choice.name for choice in problem.choices}
    if odd := sorted(names.symmetric_difference(options)):
        raise GraphoptError("an assignment names every choice of its problem once", where=odd[0])
    for choice in problem.choices:
        if not 0 <= options[choice.name] < len(choice.options):
            raise GraphoptError(
                f"there is no option {options[choice.name]}: there are {len(choice.options)}", where=choice.name
            )
    return totals(problem, [options[choice.name] for choice in problem.choices])


def totals(problem: BudgetProblem, taken: Sequence[int]) -> tuple[float, float]:
    """`evaluate` for indices in the order of the choices, unchecked."""
    entries = [entry(factor, taken) for factor in problem.factors]
    return math.fsum(value for value, _ in entries), math.fsum(cost for _, cost in entries)


def entry(factor: Factor, taken: Sequence[int]) -> tuple[float, float]:
    """Value and cost of one factor under an assignment."""
    if factor.gate is not None and taken[factor.gate]:
        return 0.0, 0.0
    at = tuple(taken[index] for index in factor.scope)
    return float(factor.value[at]), float(factor.cost[at])


def alternatives(problem: BudgetProblem, taken: Sequence[int], choice: int) -> tuple[np.ndarray, np.ndarray]:
    """What the factors of one choice are worth and cost for each of its options, all else as in `taken`.

    Returns:
        Values and costs, float64 [options]; differences of their entries are differences of the totals.
    """
    size = len(problem.choices[choice].options)
    value, cost = np.zeros(size), np.zeros(size)
    for factor in problem.factors_of[choice]:
        if factor.gate == choice:
            here = entry(factor, [*taken[:choice], 0, *taken[choice + 1 :]])
            value[0] += here[0]
            cost[0] += here[1]
        elif factor.gate is None or not taken[factor.gate]:
            at = tuple(slice(None) if index == choice else taken[index] for index in factor.scope)
            value += factor.value[at]
            cost += factor.cost[at]
    return value, cost


def assignment(
    problem: BudgetProblem, taken: Sequence[int], *, bound: float, solver: str, seconds: float, note: str | None = None
) -> Assignment:
    """The record of a solution; `bound` below its value by rounding counts as equal."""
    value, cost = totals(problem, taken)
    largest = sum(float(np.abs(factor.value).max()) for factor in problem.factors)
    difference = max(bound - value, 0.0)
    optimal = difference <= PROVEN * max(largest, abs(value))
    gap = 0.0 if optimal else difference / max(abs(bound), abs(value))
    return Assignment(
        {choice.name: int(index) for choice, index in zip(problem.choices, taken, strict=True)},
        value,
        cost,
        max(bound, value),
        gap,
        optimal,
        solver,
        seconds,
        note,
    )


def highest(problem: BudgetProblem) -> float:
    """The sum of the greatest values of all terms, a bound that asks for nothing."""
    return math.fsum(
        max(float(factor.value.max()), -math.inf if factor.gate is None else 0.0) for factor in problem.factors
    )


def missed(problem: BudgetProblem, cheapest: Sequence[int]) -> TargetMissedError:
    """The error for a budget below the least cost there is, which names that cost and what holds it."""
    least = totals(problem, cheapest)[1]
    costs = [
        (entry(factor, cheapest)[1], term.name) for factor, term in zip(problem.factors, problem.terms, strict=True)
    ]
    dearest = sorted((pair for pair in costs if pair[0] > 0), reverse=True)[:_NAMED]
    share = f" ({least / problem.budget:.3g} times the budget)" if problem.budget > 0 else ""
    held = ", ".join(f"{name} {cost:.4g}" for cost, name in dearest)
    error = TargetMissedError(
        f"a budget of {problem.budget:.6g} cannot be met: {least:.6g} is the least that is reachable{share}",
        where=f"the dearest of what remains: {held}" if held else None,
        help=f"ask for {least:.6g} or more, or let more be decided: more groups, smaller packets, blocks that may go",
    )
    error.least = least
    return error
