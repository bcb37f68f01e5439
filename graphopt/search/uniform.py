"""The same share of every group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.search.contract import Allocation, Path, Problem


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every group loses the same share of its units, as far as it may.

    The scores choose which units of a group go, never how many. It is what most papers compare with.

    Example:
        >>> Uniform().name
        'uniform'
    """

    name: ClassVar[str] = "uniform"

    def path(self, problem: Problem) -> Path:
        """The pressure is the share."""
        return lambda pressure: {
            candidate.name: min(pressure * candidate.units, float(candidate.most)) for candidate in problem.candidates
        }

    def at_ratio(self, path: Path, problem: Problem, ratio: float) -> dict[str, float]:
        """The ratio itself, whatever groups that may lose less do."""
        return path(ratio)
