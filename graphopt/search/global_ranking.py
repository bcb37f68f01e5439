"""All units of all groups in one ranking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.search.contract import Allocation, Candidate, Path, Problem

NORMALISATIONS = ("none", "max", "mean", "norm", "sum")
"""What the scores of a group are divided by."""
GAINS = ("unit", "parameter", "mac")
"""What a score is a price for."""


def check_limit(limit: float) -> None:
    """Raise `GraphoptError` where the largest share of a group is not in (0, 1]."""
    if not 0 < limit <= 1:
        raise GraphoptError(f"limit is {limit}", help="it is the largest share of a group that may go, in (0, 1]")


@dataclass(frozen=True)
class GlobalRanking(Allocation):
    """Rank the units of all groups together and remove the lowest, wherever they are.

    Scores of different groups are rarely comparable as they are (norms of filters depend on their size): `normalise`
    divides those of a group by their largest, their mean, their Euclidean norm (Molchanov et al. 2017, "Pruning
    Convolutional Neural Networks for Resource Efficient Inference") or their sum. With `gain` a score is divided by
    what the unit takes with it, so that the cheapest parameters or multiplications go first.

    Options:
        normalise: one of `NORMALISATIONS`.
        gain: "unit", "parameter" or "mac".
        limit: largest share of a group that may go; a whole layer in ruins is rarely worth its cost.

    Raises:
        GraphoptError: an option is none of these.

    Example:
        >>> GlobalRanking(normalise="max").normalised(np.array([1.0, 4.0]))
        array([0.25, 1.  ])
    """

    name: ClassVar[str] = "global"

    normalise: str = "max"
    gain: str = "unit"
    limit: float = 0.9

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISATIONS:
            raise GraphoptError(f"unknown normalisation {self.normalise!r}", help=f"one of {', '.join(NORMALISATIONS)}")
        if self.gain not in GAINS:
            raise GraphoptError(f"unknown gain {self.gain!r}", help=f"one of {', '.join(GAINS)}")
        check_limit(self.limit)

    def normalised(self, scores: np.ndarray) -> np.ndarray:
        """Scores [units] over the figure that `normalise` names; as they are where that is 0."""
        divisors = {"max": np.max, "mean": np.mean, "norm": np.linalg.norm, "sum": np.sum}
        divisor = float(divisors[self.normalise](scores)) if self.normalise in divisors else 1.0
        return scores / divisor if divisor > 0 else scores

    def path(self, problem: Problem) -> Path:
        """The pressure is the share of the ranking, of which each group has its lowest units up to `limit`."""
        ranked = {candidate.name: self._prices(problem, candidate) for candidate in problem.candidates}
        everything = np.sort(np.concatenate(list(ranked.values())))

        def removed(pressure: float) -> dict[str, float]:
            count = round(pressure * len(everything))
            if count == len(everything):
                return {name: float(len(prices)) for name, prices in ranked.items()}
            threshold = everything[count]
            return {name: float(np.searchsorted(prices, threshold)) for name, prices in ranked.items()}

        return removed

    def _prices(self, problem: Problem, candidate: Candidate) -> np.ndarray:
        """Prices of the units that may go, ascending."""
        kinds = {"unit": "units", "parameter": "params", "mac": "macs"}
        saving = problem.saving(candidate, kinds[self.gain])
        prices = self.normalised(candidate.scores) / max(saving, 1.0)
        count = min(candidate.most, int(self.limit * candidate.units))
        return np.sort(prices)[:count]
