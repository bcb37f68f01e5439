"""Budget problems: every solver against brute force on small instances, and what the answer must say."""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest

from graphopt.errors import GraphoptError, TargetMissedError
from graphopt.search import milp
from graphopt.search.budget import BudgetProblem, Choice, Term, evaluate, totals
from graphopt.search.knapsack import solve_knapsack
from graphopt.search.milp import solve_milp
from graphopt.search.relaxation import Tree, relax


def random_problem(seed: int, *, arities: tuple[int, ...] = (0, 1, 2, 2, 3), whole: bool = False) -> BudgetProblem:
    """Up to five choices of up to four options, up to two gates, up to six terms; values and costs of either sign."""
    random = np.random.default_rng(seed)
    gates = [Choice(f"gate{index}", ("keep", "drop")) for index in range(random.integers(0, 3))]
    sizes = random.integers(1, 5, size=random.integers(2, 5))
    widths = [Choice(f"width{index}", tuple(map(str, range(size)))) for index, size in enumerate(sizes)]
    terms: list[Term] = []
    for index in range(random.integers(2, 7)):
        arity = min(int(random.choice(arities)), len(widths))
        scope = [widths[place] for place in random.choice(len(widths), size=arity, replace=False)]
        shape = [len(choice.options) for choice in scope]
        cost, value = random.integers(0, 30, size=shape), random.integers(-4, 30, size=shape)
        noise = 0 if whole else random.uniform(-0.4, 0.4, size=shape)
        gate = str(random.choice([choice.name for choice in gates])) if gates and random.random() < 0.6 else None
        names = tuple(choice.name for choice in scope)
        terms.append(Term(f"term{index}", names, cost + noise, value + noise, gate))
    choices = tuple(random.permutation(np.array([*gates, *widths], dtype=object)))
    problem = BudgetProblem(choices, tuple(terms), 0.0)
    costs = [totals(problem, taken)[1] for taken in everything(problem)]
    low, high = min(costs), max(costs)
    budget = float(random.choice([low, high, random.uniform(low, high), random.uniform(low, high)]))
    return BudgetProblem(choices, tuple(terms), float(math.floor(budget)) if whole and budget != low else budget)


def everything(problem: BudgetProblem) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(len(choice.options)) for choice in problem.choices))


def brute_force(problem: BudgetProblem) -> float:
    worth = [totals(problem, taken) for taken in everything(problem)]
    return max(value for value, cost in worth if cost <= problem.budget + problem.slack)


def check(problem: BudgetProblem, found: object) -> None:
    assert evaluate(problem, found.options) == (found.value, found.cost)
    assert found.cost <= problem.budget + problem.slack
    assert found.value <= found.bound


@pytest.mark.parametrize("reduce", [True, False])
def test_milp_is_brute_force(reduce: bool) -> None:
    for seed in range(100 + 100 * reduce):
        problem = random_problem(seed)
        found = solve_milp(problem, gap=0.0, reduce=reduce)
        check(problem, found)
        assert found.value == pytest.approx(brute_force(problem), abs=1e-9), seed
        assert found.optimal, seed


def test_prices_bound_every_combination_of_options() -> None:
    """What the relaxation says of a combination is true of each assignment that has it, and its own is one."""
    for seed in range(60):
        problem = random_problem(seed)
        tree = Tree.of(problem)
        assert tree is not None
        known = relax(problem, tree)
        best = brute_force(problem)
        assert known.value <= best + 1e-9 <= known.bound + 2e-9
        for factor in problem.factors:
            limits = known.limits(factor.everything)
            for taken in everything(problem):
                value, cost = totals(problem, taken)
                if cost <= problem.budget:
                    assert value <= limits[tuple(taken[choice] for choice in factor.everything)] + 1e-7


def test_knapsack_is_the_milp_where_costs_are_linear() -> None:
    for seed in range(60):
        problem = random_problem(seed, arities=(0, 1, 1), whole=True)
        problem = BudgetProblem(
            problem.choices,
            tuple(Term(term.name, term.choices, term.cost, term.value) for term in problem.terms),
            sum(float(term.cost.max()) for term in problem.terms) * 0.5,
        )
        if min(totals(problem, taken)[1] for taken in everything(problem)) > problem.budget:
            continue
        found = solve_knapsack(problem, iterations=1 + seed % 3)
        check(problem, found)
        assert found.value == pytest.approx(solve_milp(problem, gap=0.0).value, abs=1e-9), seed


def test_knapsack_stays_within_budgets_that_are_not_linear() -> None:
    gaps: list[float] = []
    for seed in range(60):
        problem = random_problem(seed)
        found = solve_knapsack(problem)
        check(problem, found)
        best = brute_force(problem)
        assert found.value <= best + 1e-9
        gaps.append((best - found.value) / max(abs(best), 1.0))
    assert np.median(gaps) < 0.05


def bilinear(budget: float) -> BudgetProblem:
    """Two layers between three widths, in a block that may be dropped, and one outside."""
    widths = [Choice(name, ("32", "24", "16", "8")) for name in ("a", "b", "c")]
    kept = np.array([4.0, 3.0, 2.0, 1.0])
    product, worth = np.outer(kept, kept), np.add.outer(np.zeros(4), 6 * np.sqrt(kept))
    terms = (
        Term("first", ("a",), 2 * kept, 5 * np.sqrt(kept)),
        Term("second", ("a", "b"), product, worth, "block"),
        Term("third", ("b", "c"), product, worth, "block"),
        Term("last", ("c",), kept, np.zeros(4)),
    )
    return BudgetProblem((*widths, Choice("block", ("keep", "drop"))), terms, budget)


@pytest.mark.parametrize("solve", [solve_milp, solve_knapsack])
def test_more_budget_is_worth_no_less_and_enough_changes_nothing(solve: object) -> None:
    full = evaluate(bilinear(0.0), {"a": 0, "b": 0, "c": 0, "block": 0})
    found = [solve(bilinear(budget)) for budget in np.linspace(3, full[1], 12)]
    assert sorted(result.value for result in found) == [result.value for result in found]
    for budget in (full[1], 10 * full[1]):
        whole = solve(bilinear(budget))
        assert set(whole.options.values()) == {0}
        assert (whole.value, whole.gap, whole.optimal) == (full[0], 0.0, True)
    assert solve(bilinear(4.0)).options["block"] == 1
    assert solve(bilinear(4.0)).taken(bilinear(4.0))["block"] == "drop"


@pytest.mark.parametrize("solve", [solve_milp, solve_knapsack, lambda problem: solve_milp(problem, reduce=False)])
def test_a_budget_that_cannot_be_met_names_what_can(solve: object) -> None:
    with pytest.raises(TargetMissedError, match=r"2\.5 cannot be met: 3 is the least that is reachable") as raised:
        solve(bilinear(2.5))
    assert "first 2" in raised.value.where
    assert solve(bilinear(3.0)).cost == 3.0


def test_a_gate_inside_another_is_an_axis_with_zeros() -> None:
    gates = [Choice(name, ("keep", "drop")) for name in ("outer", "inner")]
    term = Term("layer", ("inner",), np.array([4.0, 0.0]), np.array([7.0, 0.0]), gate="outer")
    other = Term("rest", (), np.array(3.0), np.array(1.0), gate="outer")
    for budget, taken in ((7.0, (0, 0)), (6.0, (0, 1)), (2.0, (1, 0))):
        problem = BudgetProblem((*gates,), (term, other), budget)
        assert tuple(solve_milp(problem).options.values()) == taken


def test_the_time_limit_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Past the limit: what is known with its gap and a note, or an error where nothing is."""
    pair = Choice("a", ("x", "y")), Choice("b", ("x", "y"))
    problem = BudgetProblem(pair, (Term("t", ("a", "b"), np.array([[9.0, 10], [10, 1]]), np.zeros((2, 2))),), 5.0)
    monkeypatch.setattr(milp, "improved", lambda problem, taken: list(taken))
    monkeypatch.setattr(milp.optimize, "milp", timed_out)
    found = solve_milp(bilinear(21.0))
    check(bilinear(21.0), found)
    assert found.gap > 0
    assert not found.optimal
    assert "time limit" in found.note
    with pytest.raises(GraphoptError, match="no assignment within the budget was found in 5 seconds"):
        solve_milp(problem, seconds=5, reduce=False)
    assert "a message of the solver" not in capfd.readouterr().out
    monkeypatch.setattr(milp, "_MOST_ENTRIES", 0)
    assert "more than 0" in solve_milp(bilinear(21.0)).note
    with pytest.raises(GraphoptError, match="more than 0"):
        solve_milp(problem, reduce=False)


def timed_out(*_arguments: object, **_options: object) -> object:
    os.write(1, b"a message of the solver")
    return milp.optimize.OptimizeResult(status=1, x=None, mip_dual_bound=None, message="time limit reached")


def test_choices_that_hang_together_too_much_have_no_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    choices = [Choice(str(index), tuple("abcdefg")) for index in range(9)]
    pairs = [
        Term(f"{a.name},{b.name}", (a.name, b.name), random.random((7, 7)), random.random((7, 7)))
        for a, b in itertools.combinations(choices, 2)
    ]
    problem = BudgetProblem((*choices,), (*pairs,), budget=14.0)
    assert Tree.of(problem) is None
    monkeypatch.setattr(milp.optimize, "milp", timed_out)
    check(problem, found := solve_milp(problem))
    assert found.bound == sum(term.value.max() for term in pairs)
    check(problem, solve_knapsack(problem))


@pytest.mark.parametrize(
    ("terms", "budget", "message"),
    [
        ([Term("t", ("a",), np.zeros(2), np.zeros(2))], 1.0, "tables have shape"),
        ([Term("t", ("z",), np.zeros(2), np.zeros(2))], 1.0, "no choice 'z'"),
        ([Term("t", (), np.zeros(()), np.zeros(()), gate="a")], 1.0, "not keep and drop"),
        ([Term("t", (), np.zeros(()), np.zeros(()))] * 2, 1.0, "same name"),
        ([], math.nan, "no number to stay within"),
    ],
)
def test_problems_that_are_none(terms: list[Term], budget: float, message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        BudgetProblem((Choice("a", ("x", "y", "z")),), tuple(terms), budget)


def test_terms_that_are_none() -> None:
    with pytest.raises(GraphoptError, match="finite"):
        Term("t", ("a",), np.array([1.0, np.nan]), np.zeros(2))
    with pytest.raises(GraphoptError, match="must agree"):
        Term("t", ("a",), np.zeros(2), np.zeros(3))
    with pytest.raises(GraphoptError, match="twice"):
        Term("t", ("a", "a"), np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(GraphoptError, match="no option 3"):
        evaluate(bilinear(1.0), {"a": 0, "b": 0, "c": 0, "block": 3})
