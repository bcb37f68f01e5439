"""Meeting the target: how far along the path of an allocation, in widths that are fast, checked by a true count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from graphopt.errors import SelectionError, TargetMissedError
from graphopt.ir.channels import Selection
from graphopt.ir.cost import cost
from graphopt.ir.removal import remove_channels
from graphopt.search.contract import Allocation, Candidate, Path, Problem
from graphopt.search.costs import Costs
from graphopt.search.rounding import nearest

TOLERANCE = 0.01
"""How far from a target a result may be, relative to it, where the granularity of the widths allows to be nearer."""
_GOAL = 0.001
"""How near is near enough to stop looking, relative to the target."""
_BISECTIONS = 50
_CORRECTIONS = 4
"""How often the estimate is corrected by a true count."""
_MOVES = 2000
"""Steps of the final fill, at most."""
_MOST_TRADING = 40
_TRADES = 8
"""Groups up to which pairs of packets are tried, and how often one is taken."""


@dataclass(frozen=True)
class Solution:
    """What goes.

    Attributes:
        removed: name of each candidate to the units that go, ascending; empty where none does.
        before: costs of the model.
        after: costs of the pruned model, counted on the pruned graph.
        share: what is left of what the target counts.
        limited: names of groups that lose fewer units than wanted, because several groups share an axis.
    """

    removed: dict[str, tuple[int, ...]]
    before: Costs
    after: Costs
    share: float
    limited: tuple[str, ...] = ()


def solve(problem: Problem, allocation: Allocation, sizes: Mapping[str, int] | None = None) -> Solution:
    """Find the units that go so that the target is met.

    A ratio of units is the point of the path with that ratio, each group rounded to the nearest width; where all of
    them together are off by more than the tolerance then, some are rounded to the other side. A cost is met by
    bisection over the path in rounded widths, then filled packet by packet to come as near as the widths allow. The
    fast count that this runs on is corrected by a true count of the pruned graph.

    Args:
        problem: groups, scores, target.
        allocation: how the units spread over groups.
        sizes: elements of the symbolic dimensions, as the cost model of the problem has them.

    Returns:
        The solution; its `after` is a true count.

    Raises:
        TargetMissedError: even with all that may go gone, more is left than the target allows.
    """
    path = allocation.path(problem)
    if problem.target.kind == "units":
        return _solved_ratio(problem, allocation, path, sizes)
    factor = 1.0
    best: Solution | None = None
    for _ in range(_CORRECTIONS):
        search = _Search(problem, factor)
        search.along(path)
        search.fill()
        search.trade()
        found = _counted(problem, search.removed(), sizes)
        if best is None or _distance(found.share, problem.target.share) < _distance(best.share, problem.target.share):
            best = found
        estimated = search.share() / factor
        if abs(found.share - estimated * factor) <= _GOAL * problem.target.share / 2 or not estimated:
            break
        factor = found.share / estimated
    assert best is not None
    if best.share > problem.target.share * (1 + TOLERANCE):
        _raise_missed(problem, best)
    return best


def _solved_ratio(problem: Problem, allocation: Allocation, path: Path, sizes: Mapping[str, int] | None) -> Solution:
    ratio = 1 - problem.target.share
    wanted = allocation.at_ratio(path, problem, ratio)
    search = _Search(problem, 1.0)
    search.round(wanted)
    search.even_out()
    return _counted(problem, search.removed(), sizes)


def _distance(share: float, target: float) -> tuple[bool, float]:
    """Order of results: those within the tolerance or below first, then the nearest."""
    return share > target * (1 + TOLERANCE), abs(share - target)


def _raise_missed(problem: Problem, reached: Solution) -> None:
    target = problem.target
    steps = any(candidate.step > 1 for candidate in problem.candidates)
    advice = ["ask for less", "let more groups go (`skip`, `keep`, `min_units`)"]
    advice += ["round to smaller steps (`round_to=1`)"] if steps else []
    raise TargetMissedError(
        f"{target.share:.3f} of the {target.kind} was asked for, and {reached.share:.3f} is left with all gone "
        f"that may go: {sum(map(len, reached.removed.values()))} of "
        f"{sum(candidate.units for candidate in problem.candidates)} units in {len(problem.candidates)} groups",
        where=target.kind,
        help=f"{'; '.join(advice)}",
    )


def _counted(problem: Problem, counts: Mapping[str, int], sizes: Mapping[str, int] | None) -> Solution:
    """The lowest units of each candidate, as many as can go together, and what is left after them, truly counted."""
    removed, limited = _feasible(problem, counts)
    selection: Selection = {name: units for name, units in removed.items() if units}
    before = problem.costs.whole
    after = before
    if selection:
        pruned = remove_channels(problem.model, selection, groups=problem.groups)
        after = Costs.of(cost(pruned, sizes, table=problem.groups.analysis.table))
    if problem.target.kind == "units":
        total = sum(candidate.units for candidate in problem.candidates)
        share = 1 - sum(map(len, removed.values())) / total
    else:
        share = after.get(problem.target.kind) / max(before.get(problem.target.kind), 1)
    return Solution(removed, before, after, share, limited)


def _feasible(problem: Problem, counts: Mapping[str, int]) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """The lowest units, fewer of a group where otherwise nothing would be left on an axis that groups share."""
    wanted = {candidate.name: candidate.lowest(counts[candidate.name]) for candidate in problem.candidates}
    if _fits(problem, wanted):
        return wanted, ()
    chosen: dict[str, tuple[int, ...]] = {}
    limited: list[str] = []
    for candidate in problem.candidates:
        name = candidate.name
        kept = [int(count) for count in candidate.choices if count >= candidate.units - counts[name]]
        for count in kept:
            attempt = {**chosen, name: candidate.lowest(candidate.units - count)}
            if _fits(problem, attempt):
                chosen = attempt
                break
        if len(chosen[name]) < counts[name]:
            limited.append(name)
    return chosen, tuple(limited)


def _fits(problem: Problem, removed: Mapping[str, tuple[int, ...]]) -> bool:
    try:
        selection: Selection = {name: units for name, units in removed.items()}  # noqa: C416
        problem.groups.atoms(selection)
    except SelectionError:
        return False
    return True


@dataclass
class _Search:
    """Widths of all groups on the way to the target.

    Attributes:
        problem: what is to be solved.
        factor: true share over estimated share, as measured so far.
        chosen: index of each candidate's width among its choices.
    """

    problem: Problem
    factor: float
    chosen: dict[str, int] = field(default_factory=dict[str, int])
    _by_name: dict[str, Candidate] = field(default_factory=dict[str, Candidate])
    _ahead: dict[str, int] = field(default_factory=dict[str, int])
    """The widths on the other side of the target."""

    def __post_init__(self) -> None:
        self._by_name = {candidate.name: candidate for candidate in self.problem.candidates}
        self.chosen = {name: len(candidate.choices) - 1 for name, candidate in self._by_name.items()}

    def removed(self, chosen: Mapping[str, int] | None = None) -> dict[str, int]:
        """How many units of each group go."""
        indices = self.chosen if chosen is None else chosen
        return {
            name: candidate.units - int(candidate.choices[indices[name]]) for name, candidate in self._by_name.items()
        }

    def round(self, wanted: Mapping[str, float]) -> None:
        """Take the widths nearest to what is wanted gone."""
        self.chosen = {
            name: nearest(candidate.choices, candidate.units - wanted[name])
            for name, candidate in self._by_name.items()
        }

    def share(self) -> float:
        """What is left, in the coin of the target, as the corrected estimate has it."""
        return self.problem.costs.remaining(self.removed(), self.problem.target.kind) * self.factor

    def even_out(self) -> None:
        """Move packets while one brings the number of units nearer to the target, the cheapest of equals first."""
        total = sum(candidate.units for candidate in self._by_name.values())
        wanted = self.problem.target.share * total
        for _ in range(_MOVES):
            removed = self.removed()
            left = total - sum(removed.values())
            if abs(left - wanted) <= TOLERANCE * wanted:
                return
            moves: list[tuple[float, float, str, int]] = []
            step = -1 if left > wanted else 1
            for name, candidate in self._by_name.items():
                index = self.chosen[name] + step
                if 0 <= index < len(candidate.choices):
                    gone = candidate.units - int(candidate.choices[index])
                    after = abs(left + removed[name] - gone - wanted)
                    moves.append((after, -step * candidate.price(removed[name], gone), name, index))
            if not moves or min(moves)[0] >= abs(left - wanted):
                return
            _, _, name, self.chosen[name] = min(moves)

    def along(self, path: Path) -> None:
        """Bisect to where the target lies between two neighbouring points; take the one on which more is left."""
        target = self.problem.target.share
        low, high = 0.0, 1.0
        self.round(path(high))
        if self.share() > target:
            return
        for _ in range(_BISECTIONS):
            self.round(path((low + high) / 2))
            low, high = ((low + high) / 2, high) if self.share() > target else (low, (low + high) / 2)
        self.round(path(high))
        self._ahead = dict(self.chosen)
        self.round(path(low))

    def fill(self) -> None:
        """Move packets until the target is met, the cheapest first, then until no single packet brings it nearer."""
        target, kind = self.problem.target.share, self.problem.target.kind
        whole = max(self.problem.costs.whole.get(kind), 1)
        share = self.share()
        for _ in range(_MOVES):
            if abs(share - target) <= _GOAL * target:
                return
            step = -1 if share > target else 1
            removed = self.removed()
            moves: list[tuple[tuple[float, ...], str, float]] = []
            for name, candidate in self._by_name.items():
                index = self.chosen[name] + step
                if 0 <= index < len(candidate.choices):
                    gone = candidate.units - int(candidate.choices[index])
                    change = self.problem.costs.change(removed, name, gone).get(kind)
                    after = share + change / whole * self.factor
                    rank = self._rank(name, removed[name], gone, share, after)
                    if rank is not None:
                        moves.append((rank, name, after))
            if not moves:
                return
            _, name, share = min(moves)
            self.chosen[name] += step

    def trade(self) -> None:
        """Where single packets come no nearer: one goes in exchange for one that comes back, in another group."""
        target, kind = self.problem.target.share, self.problem.target.kind
        if len(self.chosen) > _MOST_TRADING:
            return
        for _ in range(_TRADES):
            share = self.share()
            if abs(share - target) <= TOLERANCE / 2 * target or share > target * (1 + TOLERANCE):
                return
            best = (abs(share - target), self.chosen)
            for one in self._moved(self.chosen, -1):
                for both in self._moved(one, 1):
                    after = self.problem.costs.remaining(self.removed(both), kind) * self.factor
                    if after <= target * (1 + _GOAL) and abs(after - target) < best[0]:
                        best = (abs(after - target), both)
            if best[1] is self.chosen:
                return
            self.chosen = best[1]

    def _moved(self, chosen: Mapping[str, int], step: int) -> Iterator[dict[str, int]]:
        for name, index in chosen.items():
            if 0 <= index + step < len(self._by_name[name].choices):
                yield {**chosen, name: index + step}

    def _rank(self, name: str, gone: int, then: int, share: float, after: float) -> tuple[float, ...] | None:
        """How good a packet is as the next one, the smallest first; None where it is not to be moved.

        While too much is left, packets that stay above the target go first: those that the path removes next, then
        the cheapest for what they save. One that goes below it is the last resort, and the nearest is taken. While too
        little is left, the packet that comes back is the one that ends nearest, and never above the target.
        """
        target = self.problem.target.share
        near = abs(after - target)
        if share < target:
            return (near,) if share < after <= target * (1 + _GOAL) else None
        if after >= share:
            return None
        if after >= target * (1 - _GOAL):
            candidate = self._by_name[name]
            follows = self._ahead.get(name, self.chosen[name]) < self.chosen[name]
            return (0.0 if follows else 1.0, candidate.price(gone, then) / (share - after))
        needed = share > target * (1 + TOLERANCE) or near < share - target
        return (2.0, near) if needed else None
