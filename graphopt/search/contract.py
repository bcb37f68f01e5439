"""What an allocation is (design.md, floor 2): groups with scores and a target in, how many units of each go out.

The contract only: what an allocation may look at, and the one thing that it must say. Every allocation is a path from
nothing removed to as much as it would ever remove; how far along the path the target lies is found by bisection in
`graphopt.search.solve`, the same for all.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir.channels import ChannelGroup, ChannelGroups
from graphopt.search.costs import CostModel
from graphopt.search.rounding import kept_choices

KINDS = ("units", "macs", "params", "bytes")
"""What a target counts: units of the groups that may be pruned, or a cost of the whole model."""

Path = Callable[[float], dict[str, float]]
"""Pressure in [0, 1] to the number of units of each group that should go, a real number that never falls."""


@dataclass(frozen=True)
class Target:
    """How much is to be left.

    Attributes:
        kind: one of `KINDS`. "units" counts the units of the candidates; "macs", "params" (parameters) and "bytes"
            (storage of the weights) count the whole model, with what cannot be pruned.
        share: what is to be left of it, in (0, 1].

    Raises:
        GraphoptError: there is no such kind, or the share is outside (0, 1].
    """

    kind: str
    share: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GraphoptError(f"unknown kind of target {self.kind!r}", help=f"kinds are {', '.join(KINDS)}")
        if not 0 < self.share <= 1:  # NaN fails as well
            raise GraphoptError(
                f"a target of {self.share} is no share of what there was",
                where=self.kind,
                help="0.5 leaves half of it: give a number above 0 and at most 1",
            )

    def __str__(self) -> str:
        return f"{self.share:.4g} of the {self.kind}"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group that may be pruned.

    Attributes:
        group: the group.
        scores: float64 [units], the smallest goes first.
        step: what is kept should be a multiple of this number of units.
        least: number of units that must stay, at least 1.

    Raises:
        GraphoptError: the scores are not one finite number a unit.
    """

    group: ChannelGroup
    scores: np.ndarray
    step: int = 1
    least: int = 1

    def __post_init__(self) -> None:
        if self.scores.shape != (self.group.units,) or not np.isfinite(self.scores).all():
            raise GraphoptError(
                f"scores must be {self.group.units} finite numbers, one a unit, not {self.scores.dtype} of shape "
                f"{list(self.scores.shape)}",
                where=self.name,
                help="the criterion is wrong, or the weights are not finite",
            )

    @property
    def name(self) -> str:
        """Name of the group."""
        return self.group.name

    @property
    def units(self) -> int:
        """Number of units."""
        return self.group.units

    @property
    def most(self) -> int:
        """How many units may go."""
        return max(0, self.units - max(self.least, 1))

    @cached_property
    def order(self) -> np.ndarray:
        """Indices of the units, the first to go first; int64 [units]. Equal scores go in the order of their index."""
        return np.argsort(self.scores, kind="stable")

    @cached_property
    def choices(self) -> np.ndarray:
        """Numbers of units that may be kept, ascending."""
        return kept_choices(self.units, self.step, self.units - self.most)

    def lowest(self, count: int) -> tuple[int, ...]:
        """The `count` units that go first, ascending by index."""
        return tuple(sorted(int(unit) for unit in self.order[:count]))

    def price(self, gone: int, then: int) -> float:
        """Share of the scores of the group in the units between `gone` and `then` units removed."""
        between = self.scores[self.order[min(gone, then) : max(gone, then)]]
        return float(between.sum()) / max(float(self.scores.sum()), 1e-30)


@dataclass(frozen=True, eq=False)
class Problem:
    """What an allocation may look at.

    Attributes:
        model: canonical; nothing changes it.
        groups: `channel_groups(model)`.
        candidates: the groups that may be pruned, in stable order, at least one.
        target: how much is to be left.
        costs: what the model costs with units gone.
        feeds: gives batches of inputs, where there can be any; called only by allocations that need them.
        threads: intra-op threads of onnxruntime, 0 for its default.
    """

    model: ir.Model
    groups: ChannelGroups
    candidates: tuple[Candidate, ...]
    target: Target
    costs: CostModel
    feeds: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None = None
    threads: int = 1

    def saving(self, candidate: Candidate, kind: str) -> float:
        """What the first unit of a group takes with it of a kind of cost, the other groups being whole."""
        if kind == "units":
            return 1.0
        return float(-self.costs.change({}, candidate.name, 1).get(kind))


class Allocation(abc.ABC):
    """How many units of each group go: subclasses are frozen dataclasses, fields are options.

    Class attributes:
        name: kebab-case, the key in `graphopt.search.ALLOCATIONS`.
        needs: "scores" (nothing but the problem) or "inputs" (`Problem.feeds`).
    """

    name: ClassVar[str]
    needs: ClassVar[str] = "scores"

    @abc.abstractmethod
    def path(self, problem: Problem) -> Path:
        """How the numbers of removed units grow with the pressure.

        Args:
            problem: the groups, their scores and costs.

        Returns:
            A function of the pressure: 0 gives 0 for every candidate, 1 as many as this allocation would ever remove.
            No number falls when the pressure rises. The result of each pressure is a real number a candidate, by
            name; rounding and the target are the business of the caller.

        Raises:
            DataError: the allocation needs inputs and there are none.
        """

    def at_ratio(self, path: Path, problem: Problem, ratio: float) -> dict[str, float]:
        """The point of a path where `ratio` of all units go (the nearest, where the path jumps or ends before)."""
        wanted = ratio * sum(candidate.units for candidate in problem.candidates)
        low, high = 0.0, 1.0
        if sum(path(high).values()) <= wanted:
            return path(high)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(path(middle).values()) < wanted else (low, middle)
        below, above = path(low), path(high)
        return min((above, below), key=lambda point: abs(sum(point.values()) - wanted))
