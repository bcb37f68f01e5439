"""A price on the budget: how good an assignment can be at best, and which options the best one cannot have.

With a price on cost in place of the budget, choices are coupled only where they meet in a term, and these couplings
are sparse in a network: a layer joins its input width, its output width and its form. The best assignment for a price
is then found exactly by passing messages along a tree of small sets of choices (a tree decomposition, from networkx;
Lauritzen and Spiegelhalter 1988), whatever the tables hold. Its value plus the price of the unused budget is never
below the best of the budget problem (Lagrangian relaxation), and the lowest such bound over all prices is found in a
few solves, since the bound is convex and piecewise linear in the price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import networkx as nx
import numpy as np
from networkx.algorithms.approximation import treewidth_min_degree, treewidth_min_fill_in

from graphopt.search.budget import BudgetProblem, Factor, missed, totals
from graphopt.search.moves import improved, repaired

LARGEST = 1 << 24
"""Entries of all tables of a tree together, at most; problems whose choices hang together more have no tree."""
_PRICES = 100
"""Solves at different prices, at most. The search ends by itself, after a dozen as a rule."""


@dataclass
class _Bag:
    """A set of choices that lies in the tree; `scope` ascends.

    Attributes:
        parent: index of the bag that it reports to, None for the root.
        shared: the choices that it has in common with its parent.
    """

    scope: tuple[int, ...]
    parent: int | None
    shared: tuple[int, ...]
    value: np.ndarray
    cost: np.ndarray


class Tree:
    """The choices of a problem in a tree of bags, each term in one bag that holds all its choices.

    Attributes:
        bags: parents before children.
    """

    def __init__(self, problem: BudgetProblem, bags: list[_Bag]) -> None:
        self.problem = problem
        self.bags = bags

    @staticmethod
    def of(problem: BudgetProblem, largest: int = LARGEST) -> Tree | None:
        """The smaller of two heuristic trees, None where even that has more than `largest` entries."""
        graph: nx.Graph = nx.Graph()
        graph.add_nodes_from(range(len(problem.choices)))
        for factor in problem.factors:
            everything = factor.everything
            graph.add_edges_from((a, b) for a in everything for b in everything if a < b)
        if not len(graph):
            return None
        sizes = [len(choice.options) for choice in problem.choices]
        found: tuple[int, list[tuple[tuple[int, ...], int | None]]] | None = None
        for heuristic in (treewidth_min_fill_in, treewidth_min_degree):
            layout = _layout(heuristic(graph)[1])
            entries = sum(math.prod(sizes[choice] for choice in scope) for scope, _ in layout)
            if found is None or entries < found[0]:
                found = entries, layout
        assert found is not None
        return Tree(problem, _filled(problem, found[1], sizes)) if found[0] <= largest else None

    def best(self, reward: float, price: float) -> tuple[list[int], float]:
        """The assignment with the greatest `reward * value - price * cost`, and how great that is.

        Among equals each bag takes the options that come first.
        """
        tables, total = self._upward(reward, price)
        taken = [0] * len(self.problem.choices)
        for bag, table in zip(self.bags, tables, strict=True):
            at = tuple(taken[choice] if choice in bag.shared else slice(None) for choice in bag.scope)
            free = [choice for choice in bag.scope if choice not in bag.shared]
            view = table[at]
            for choice, index in zip(free, np.unravel_index(int(np.argmax(view)), view.shape), strict=True):
                taken[choice] = int(index)
        return taken, total

    def at_best(self, reward: float, price: float) -> list[np.ndarray]:
        """For each bag, and each combination of options in it, how great the sum can be with that combination."""
        tables, _ = self._upward(reward, price)
        messages = [_onto(table, bag.scope, bag.shared) for bag, table in zip(self.bags, tables, strict=True)]
        for bag, table, message in zip(self.bags, tables, messages, strict=True):
            if bag.parent is not None:
                parent = self.bags[bag.parent]
                rest = _onto(tables[bag.parent], parent.scope, bag.shared) - message
                table += _spread(rest, bag.shared, bag.scope)
        return tables

    def _upward(self, reward: float, price: float) -> tuple[list[np.ndarray], float]:
        """Tables with all that lies below them added, and the greatest sum."""
        tables = [reward * bag.value - price * bag.cost for bag in self.bags]
        for bag, table in zip(reversed(self.bags), reversed(tables), strict=True):
            if bag.parent is not None:
                message = _onto(table, bag.scope, bag.shared)
                tables[bag.parent] += _spread(message, bag.shared, self.bags[bag.parent].scope)
        return tables, float(tables[0].max())


@dataclass
class Relaxation:
    """What is known of a problem from prices on its budget.

    Attributes:
        tree: where its choices lie.
        bound: no assignment within the budget is worth more.
        taken: the best assignment within the budget that was met on the way; indices in the order of the choices.
        value: what it is worth.
        price: the price at which the bound is least; 0 where the budget does not bind.
    """

    tree: Tree
    bound: float
    taken: list[int]
    value: float
    price: float
    _limits: list[np.ndarray] = field(default_factory=list[np.ndarray])

    def limits(self, scope: Sequence[int]) -> np.ndarray | None:
        """For each combination of options of these choices, what an assignment with it is worth at most.

        None where no bag holds all of them; those of a term (and its gate) always lie in one.
        """
        if not self._limits:
            spare = self.price * (self.tree.problem.budget + self.tree.problem.slack)
            self._limits = [table + spare for table in self.tree.at_best(1.0, self.price)]
        for bag, table in zip(self.tree.bags, self._limits, strict=True):
            if set(scope) <= set(bag.scope):
                ascending = tuple(sorted(scope))
                return np.transpose(_onto(table, bag.scope, ascending), [ascending.index(choice) for choice in scope])
        return None


def cheapest(tree: Tree) -> list[int]:
    """The assignment of least cost."""
    return tree.best(0.0, 1.0)[0]


def relax(problem: BudgetProblem, tree: Tree) -> Relaxation:
    """The least bound that a price on the budget gives, and a good assignment.

    Raises:
        TargetMissedError: no assignment is within the budget.
    """
    allowed = problem.budget + problem.slack
    low = cheapest(tree)
    if totals(problem, low)[1] > allowed:
        raise missed(problem, low)
    high, bound = tree.best(1.0, 0.0)
    if totals(problem, high)[1] <= allowed:
        return Relaxation(tree, bound, high, totals(problem, high)[0], 0.0)
    starts, price = [low], 0.0
    over, under = totals(problem, high), totals(problem, low)
    for _ in range(_PRICES):
        trial = (over[0] - under[0]) / (over[1] - under[1])
        middle, greatest = tree.best(1.0, trial)
        if greatest + trial * allowed < bound:
            bound, price = greatest + trial * allowed, trial
        value, cost = totals(problem, middle)
        starts.append(middle)
        line = over[0] - trial * over[1]
        if value - trial * cost <= line + 1e-12 * max(abs(line), abs(value), abs(trial * cost)):
            break  # no assignment lies above the line through the two: this is the lowest bound
        over, under = ((value, cost), under) if cost > allowed else (over, (value, cost))
    near = [*starts[-6:], low, high]
    better = [improved(problem, start) for begin in near if (start := repaired(problem, begin)) is not None]
    taken = max(better, key=lambda start: totals(problem, start)[0])
    return Relaxation(tree, bound, taken, totals(problem, taken)[0], price)


# Tables -----------------------------------------------------------------------------------------------------


def _layout(tree: nx.Graph) -> list[tuple[tuple[int, ...], int | None]]:
    """Bags with the index of their parent, parents first; a bag that lies within its parent is left out."""
    layout: list[tuple[tuple[int, ...], int | None]] = []
    places: dict[frozenset[int], int] = {}
    for component in nx.connected_components(tree):
        root = max(component, key=lambda bag: (len(bag), sorted(bag)))
        hang = 0 if layout else None  # separate parts hang together by an empty set of choices
        for bag in nx.dfs_preorder_nodes(tree, root):
            above = next((places[near] for near in tree[bag] if near in places), hang)
            if above is not None and set(bag) <= set(layout[above][0]):
                places[bag] = above
                continue
            places[bag] = len(layout)
            layout.append((tuple(sorted(bag)), above))
    return layout


def _filled(
    problem: BudgetProblem, layout: list[tuple[tuple[int, ...], int | None]], sizes: Sequence[int]
) -> list[_Bag]:
    bags: list[_Bag] = []
    for scope, parent in layout:
        shared = () if parent is None else tuple(choice for choice in scope if choice in layout[parent][0])
        shape = tuple(sizes[choice] for choice in scope)
        bags.append(_Bag(scope, parent, shared, np.zeros(shape), np.zeros(shape)))
    for factor in problem.factors:
        everything = set(factor.everything)
        bag = min((bag for bag in bags if everything <= set(bag.scope)), key=lambda bag: bag.value.size)
        bag.value += _placed(factor, factor.value, bag.scope)
        bag.cost += _placed(factor, factor.cost, bag.scope)
    return bags


def _placed(factor: Factor, table: np.ndarray, scope: tuple[int, ...]) -> np.ndarray:
    """A table of a factor with the axes of `scope`, of size 1 where it does not depend on a choice."""
    everything = factor.everything
    if factor.gate is not None:
        table = np.stack([table, np.zeros_like(table)], axis=-1)
    ascending = sorted(everything)
    return _spread(np.transpose(table, [everything.index(choice) for choice in ascending]), tuple(ascending), scope)


def _onto(table: np.ndarray, scope: tuple[int, ...], kept: tuple[int, ...]) -> np.ndarray:
    """The greatest entry for each combination of the choices `kept`, which ascend as `scope` does."""
    return table.max(axis=tuple(axis for axis, choice in enumerate(scope) if choice not in kept))


def _spread(table: np.ndarray, scope: tuple[int, ...], wide: tuple[int, ...]) -> np.ndarray:
    """A table over `scope` with the axes of `wide`, of size 1 where it has none."""
    return table.reshape([table.shape[scope.index(choice)] if choice in scope else 1 for choice in wide])
