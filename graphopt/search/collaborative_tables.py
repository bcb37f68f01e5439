"""I of every layer at every width and rank that is allowed, and the cheapest combination at a price of cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphopt.search.collaborative_layers import Costing, Layer, channels_of
from graphopt.search.collaborative_states import Snapshot
from graphopt.search.collaborative_surrogates import States
from graphopt.search.contract import Candidate
from graphopt.search.rounding import kept_choices, step_of

_SWEEPS = 6
_NEAR = 1e-3
"""How near to the budget is near enough, relative to it."""


@dataclass
class Choice:
    """Widths and ranks of a model.

    Attributes:
        removed: name of each candidate to how many units are gone.
        ranks: name of each decomposed layer to its rank.
    """

    removed: dict[str, int]
    ranks: dict[str, int] = field(default_factory=dict[str, int])

    def copy(self) -> Choice:
        """The same, to be changed."""
        return Choice(dict(self.removed), dict(self.ranks))


def rank_choices(layer: Layer, round_to: int | None) -> list[int]:
    """Ranks that a layer may be cut to: multiples of what kernels like, below the full rank.

    Args:
        layer: the layer.
        round_to: multiples of this; None for `graphopt.search.rounding.step_of` the full rank.
    """
    if not layer.rankable:
        return []
    step = step_of(layer.full_rank) if round_to is None else round_to
    return [int(rank) for rank in kept_choices(layer.full_rank, min(step, layer.full_rank), 1)[:-1]]


class Tables:
    """I(layer, units gone of what it reads, units gone of what it makes, rank), computed where it is asked for.

    Outputs that are pruned themselves count for nothing: their loss is that of their readers. Of a layer that reads
    several candidates the losses are added up.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        candidates: Sequence[Candidate],
        orders: Mapping[str, np.ndarray],
        states: Mapping[str, States],
        round_to: int | None,
    ) -> None:
        self.layers = tuple(layers)
        self.orders = dict(orders)
        self.ranks = {layer.name: rank_choices(layer, round_to) for layer in layers}
        self._states = states
        self.widths = {
            candidate.name: [candidate.units - int(kept) for kept in candidate.choices[::-1]]
            for candidate in candidates
        }
        self._snapshots: dict[tuple[str, str, int], Snapshot] = {}
        self._known: dict[tuple[object, ...], tuple[float, np.ndarray]] = {}

    def losses(self, layer: Layer, removed: Mapping[str, int]) -> tuple[float, np.ndarray]:
        """I of the dense layer and of each of its `ranks`."""
        reads = tuple((name, removed.get(name, 0)) for name, _ in layer.reads)
        makes = tuple((name, removed.get(name, 0)) for name, _ in layer.makes)
        key = (layer.name, reads, makes)
        if key not in self._known:
            outputs = self._outputs(layer, makes)
            ranks = self.ranks[layer.name]
            found = [self._snapshot(layer, name, gone).losses(ranks, outputs) for name, gone in reads or (("", 0),)]
            self._known[key] = (sum(dense for dense, _ in found), sum((cut for _, cut in found), np.zeros(len(ranks))))
        return self._known[key]

    def loss(self, choice: Choice) -> float:
        """The sum of I over all layers."""
        return sum(self.of(layer, choice.removed, choice.ranks.get(layer.name)) for layer in self.layers)

    def of(self, layer: Layer, removed: Mapping[str, int], rank: int | None) -> float:
        """I of one layer."""
        dense, cut = self.losses(layer, removed)
        return dense if rank is None else float(cut[self.ranks[layer.name].index(rank)])

    def _outputs(self, layer: Layer, makes: tuple[tuple[str, int], ...]) -> np.ndarray | None:
        """Indices of the outputs that are left, None for all."""
        gone = np.zeros(layer.outputs + 1, bool)
        for (name, count), (_, owned) in zip(makes, layer.makes, strict=True):
            gone[channels_of(owned, layer.outputs)[self.orders[name][:count]]] = True
        return np.flatnonzero(~gone[:-1]) if gone[:-1].any() else None

    def _snapshot(self, layer: Layer, name: str, count: int) -> Snapshot:
        """Of a layer without the first units of one candidate; those of all its widths are taken on the way."""
        key = (layer.name, name, count)
        if key not in self._snapshots:
            state = self._states[layer.name]()
            self._snapshots[layer.name, name, 0] = state.snapshot()
            first = 0
            for read, owned in layer.reads:
                if read == name:
                    break
                first += owned.count
            before = 0
            for gone in sorted({*self.widths.get(name, ()), count} - {0}):
                state.remove(first + self.orders[name][before:gone], np.zeros(0, np.int64))
                self._snapshots[layer.name, name, gone] = state.snapshot()
                before = gone
        return self._snapshots[key]


class TableSearch:
    """The least sum of I within a budget of cost.

    At a price p of cost, sum of I + p cost is minimised by coordinates: all widths of one group in turn, each time with
    the best rank of every layer that reads or makes it, until nothing changes. p is found by bisection; what is left
    of the budget then is filled by single moves, the most loss for its cost first. With a loss that is convex in all
    widths this is the optimum but for the granularity; the jump from dense to low rank is not convex, which is why
    ranks are minimised over as a whole, not step by step.

    Args:
        tables: I.
        costing: cost.
        fixed: candidates whose width is not to change, with how many units are gone.
        low_rank: whether layers may be decomposed.
    """

    def __init__(
        self, tables: Tables, costing: Costing, *, fixed: Mapping[str, int] | None = None, low_rank: bool = True
    ) -> None:
        self._tables, self._costing = tables, costing
        self._fixed, self._low_rank = dict(fixed or {}), low_rank
        self._around: dict[str, list[Layer]] = {
            name: [layer for layer in tables.layers if any(name == other for other, _ in (*layer.reads, *layer.makes))]
            for name in tables.widths
        }

    def solve(self, budget: float, others: Sequence[Choice] = ()) -> Choice:
        """The widths and ranks; above the budget only where nothing is within it.

        Args:
            budget: in the coin of the cost.
            others: what else was found; the result is no worse than any of them that is within the budget.
        """
        start = Choice({name: self._fixed.get(name, 0) for name in self._tables.widths})
        if self.cost(start) <= budget:
            return start
        low, high = 0.0, self._high(start, budget)
        best = self._at(high, start)
        for _ in range(40):
            middle = (low * high) ** 0.5 if low > 0 else high / 64
            found = self._at(middle, best)
            other = self._at(middle, start)
            found = min((found, other), key=lambda choice: self._priced(choice, middle))
            if self.cost(found) > budget:
                low = middle
            else:
                high = middle
                if self._tables.loss(found) <= self._tables.loss(best) or self.cost(best) > budget:
                    best = found
            if low and high / low < 1.0005:
                break
        found = [self._filled(one, budget) for one in (best, *others) if self.cost(one) <= budget] or [best]
        return min(found, key=self._tables.loss)

    def cost(self, choice: Choice) -> float:
        """Of the whole model."""
        return self._costing.total(choice.removed, choice.ranks)

    def _priced(self, choice: Choice, price: float) -> float:
        return self._tables.loss(choice) + price * self.cost(choice)

    def _high(self, start: Choice, budget: float) -> float:
        price = 1e-6 / max(self.cost(start), 1e-30)
        for _ in range(60):
            if self.cost(self._at(price, start)) <= budget:
                return price
            price *= 4
        return price

    def _at(self, price: float, start: Choice) -> Choice:
        choice = start.copy()
        for layer in self._tables.layers:
            self._best_rank(layer, choice, price)
        for _ in range(_SWEEPS):
            before = (dict(choice.removed), dict(choice.ranks))
            for name, widths in self._tables.widths.items():
                if name not in self._fixed:
                    self._best_width(name, widths, choice, price)
            if before == (choice.removed, choice.ranks):
                break
        return choice

    def _best_width(self, name: str, widths: Sequence[int], choice: Choice, price: float) -> None:
        best: tuple[float, int, dict[str, int | None]] | None = None
        for gone in widths:
            removed = {**choice.removed, name: gone}
            total = price * self._costing.others(removed)
            ranks: dict[str, int | None] = {}
            for layer in self._around[name]:
                value, ranks[layer.name] = self._layer(layer, removed, price)
                total += value
            if best is None or total < best[0] - 1e-15:
                best = total, gone, ranks
        assert best is not None
        choice.removed[name] = best[1]
        for layer, rank in best[2].items():
            _set_rank(choice, layer, rank)

    def _best_rank(self, layer: Layer, choice: Choice, price: float) -> None:
        _set_rank(choice, layer.name, self._layer(layer, choice.removed, price)[1])

    def _layer(self, layer: Layer, removed: Mapping[str, int], price: float) -> tuple[float, int | None]:
        """The least I + p cost of a layer, and the rank of it."""
        dense, cut = self._tables.losses(layer, removed)
        best, rank = dense + price * self._costing.layer(layer, removed), None
        if self._low_rank:
            for loss, choice in zip(cut.tolist(), self._tables.ranks[layer.name], strict=True):
                if self._costing.saves(layer, removed, choice):
                    value = loss + price * self._costing.layer(layer, removed, choice)
                    if value < best:
                        best, rank = value, choice
        return best, rank

    def _filled(self, choice: Choice, budget: float) -> Choice:
        """Single moves back, and exchanges of a move back for a cheaper one down, while the loss falls."""
        for _ in range(400):
            cost, loss = self.cost(choice), self._tables.loss(choice)
            best: tuple[float, Choice] | None = None
            for moved in self._moves(choice):
                after = self.cost(moved)
                gain = loss - self._tables.loss(moved)
                if after <= budget and gain > 1e-12 * (1 + loss):
                    rate = gain / max(after - cost, 1e-9 * budget)
                    if best is None or rate > best[0]:
                        best = rate, moved
            if best is None:
                return choice
            choice = best[1]
        return choice

    def _moves(self, choice: Choice) -> list[Choice]:
        """Every next width of a group and every other rank of a layer, back to dense included."""
        found: list[Choice] = []
        for name, widths in self._tables.widths.items():
            at = widths.index(choice.removed[name]) if choice.removed[name] in widths else 0
            for near in (at - 1, at + 1):
                if name not in self._fixed and 0 <= near < len(widths):
                    found.append(Choice({**choice.removed, name: widths[near]}, dict(choice.ranks)))
        for layer in self._tables.layers if self._low_rank else ():
            ranks: list[int | None] = [None, *self._tables.ranks[layer.name]]
            now = choice.ranks.get(layer.name)
            for rank in ranks:
                if rank != now and (rank is None or self._costing.saves(layer, choice.removed, rank)):
                    other = choice.copy()
                    _set_rank(other, layer.name, rank)
                    found.append(other)
        return found


def _set_rank(choice: Choice, layer: str, rank: int | None) -> None:
    if rank is None:
        choice.ranks.pop(layer, None)
    else:
        choice.ranks[layer] = rank
