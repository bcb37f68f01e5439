"""Cross-layer ranking of single weights, made comparable by what their layers compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.ir.channel_analysis import weight_sources
from graphopt.search.contract import Allocation, Candidate, Path, Problem
from graphopt.search.costs import producing_nodes
from graphopt.search.global_ranking import check_limit

_EXPONENTS = tuple(np.linspace(0.0, 4.0, 17).tolist())
"""Exponents that are tried before the bisection between two of them."""


@dataclass(frozen=True)
class CrossLayer(Allocation):
    """Widths of CLR: one threshold over all weights, each worth |w| / c^exponent with c the MACs of its layer.

    Concatenate the worth of all T weights that make the channels of the groups. With sparsity p the threshold is the
    int(T (1 - p))-th largest, p_l the share of a group's weights below it, and the group keeps 1 - p_l of its
    units. c_l are the MACs of the layers that make the group's channels, over those of the first group; the larger
    the exponent, the more goes where MACs are. Source: Lin et al. 2022, "Pruning Networks with Cross-Layer Ranking
    & k-Reciprocal Nearest Filters" (arXiv 2202.07464).

    Options:
        exponent: lambda of the paper. With 0 all weights are ranked by magnitude alone. None searches it for the
            target: at sparsity `sparsity` the exponent is the one with which the target is met.
        sparsity: p where the exponent is searched; None takes what the target wants gone (1 - share).
        limit: largest share of a group that may go.

    Raises:
        GraphoptError: the exponent is negative or not finite, or a share is out of range.

    Example:
        >>> CrossLayer(exponent=None, sparsity=0.5).name
        'cross-layer'
    """

    name: ClassVar[str] = "cross-layer"

    exponent: float | None = 0.5
    sparsity: float | None = None
    limit: float = 0.9

    def __post_init__(self) -> None:
        if self.exponent is not None and not (self.exponent >= 0 and math.isfinite(self.exponent)):
            raise GraphoptError(
                f"exponent is {self.exponent}", help="it is a number of at least 0, or None to search it"
            )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise GraphoptError(f"sparsity is {self.sparsity}", help="it is a share of the weights, between 0 and 1")
        if self.sparsity is not None and self.exponent is not None:
            raise GraphoptError(
                "a sparsity and an exponent leave nothing to search", help="with a sparsity, pass exponent=None"
            )
        check_limit(self.limit)

    def path(self, problem: Problem) -> Path:
        """The pressure is the sparsity p."""
        weights = [made_by(problem, candidate) for candidate in problem.candidates]
        factors = layer_factors(problem)
        exponent = self._searched(problem, weights, factors) if self.exponent is None else self.exponent
        ranking = CrossLayerRanking(weights, factors, exponent)
        return lambda pressure: self._removed(problem, ranking.sparsities(pressure))

    def _removed(self, problem: Problem, sparsities: np.ndarray) -> dict[str, float]:
        return {
            candidate.name: min(float(sparsity) * candidate.units, self.limit * candidate.units, float(candidate.most))
            for candidate, sparsity in zip(problem.candidates, sparsities, strict=True)
        }

    def _searched(self, problem: Problem, weights: Sequence[np.ndarray], factors: np.ndarray) -> float:
        """The exponent with which the sparsity meets the target, the nearest where none does."""
        target = problem.target
        sparsity = min(max(1 - target.share if self.sparsity is None else self.sparsity, 1e-6), 1 - 1e-6)
        total = sum(candidate.units for candidate in problem.candidates)

        def missing(exponent: float) -> float:
            removed = self._removed(problem, CrossLayerRanking(weights, factors, exponent).sparsities(sparsity))
            if target.kind == "units":
                return 1 - sum(removed.values()) / total - target.share
            counts = {name: round(count) for name, count in removed.items()}
            return problem.costs.remaining(counts, target.kind) - target.share

        found = [missing(exponent) for exponent in _EXPONENTS]
        for index, (first, second) in enumerate(itertools.pairwise(found)):
            if first * second <= 0:
                low, high = _EXPONENTS[index : index + 2]
                for _ in range(20):
                    middle = (low + high) / 2
                    low, high = (middle, high) if missing(middle) * first > 0 else (low, middle)
                return high
        return _EXPONENTS[int(np.argmin(np.abs(found)))]


class CrossLayerRanking:
    """All weights in one ranking, without one array that holds them all.

    Args:
        weights: float32 [weights of the layer] magnitudes, ascending, one array a layer.
        factors: float64 [layers], c_l > 0.
        exponent: lambda.

    Example:
        >>> ranking = CrossLayerRanking([np.array([1, 2], np.float32), np.array([3, 4], np.float32)], np.ones(2), 1.0)
        >>> ranking.sparsities(0.75)
        array([1. , 0.5])
    """

    def __init__(self, weights: Sequence[np.ndarray], factors: np.ndarray, exponent: float) -> None:
        self._weights = weights
        self._scales = factors**exponent
        self._sizes = np.array([layer.size for layer in weights])
        self._total = int(self._sizes.sum())
        ends = [float(layer[-1] / scale) for layer, scale in zip(weights, self._scales, strict=True) if layer.size]
        self._largest = max(ends, default=0.0)

    def below(self, threshold: float) -> np.ndarray:
        """How many weights of each layer are worth less than `threshold`: int64 [layers]."""
        found: list[int] = []
        for layer, scale in zip(self._weights, self._scales, strict=True):
            limit = threshold * float(scale)
            single = np.float32(limit)
            if float(single) < limit:  # compare in float32, which the weights are in, without rounding down
                single = np.nextafter(single, np.float32(np.inf))
            found.append(int(np.searchsorted(layer, single)))
        return np.array(found)

    def threshold(self, sparsity: float) -> float:
        """The int(T (1 - sparsity))-th largest worth, up to the last bit of a float64."""
        gone = self._total - int(self._total * (1 - sparsity))
        if gone <= 0:
            return 0.0
        if gone >= self._total:
            return math.inf
        low, high = 0.0, self._largest * 2 + 1e-300
        while True:
            middle = (low + high) / 2
            if not low < middle < high:
                return low  # the largest threshold with no more than `gone` below it
            low, high = (middle, high) if int(self.below(middle).sum()) <= gone else (low, middle)

    def sparsities(self, sparsity: float) -> np.ndarray:
        """Share of each layer's weights below the threshold of an overall sparsity: float64 [layers]."""
        threshold = self.threshold(sparsity)
        below = self._sizes if math.isinf(threshold) else self.below(threshold)
        return below / np.maximum(self._sizes, 1)


def made_by(problem: Problem, candidate: Candidate) -> np.ndarray:
    """Magnitudes of the weights that make a group's channels, ascending: float32 [weights].

    They are the weights of the linear operators with these channels in their result, all producers of a residual
    stream together; where there is none, all weights with two axes or more that the units own a part of.
    """
    groups, members = problem.groups, [value for value, _ in candidate.group.origin.members]
    sources = {
        source
        for node in producing_nodes(groups, candidate.group, problem.costs.linear_nodes)
        for value in node.inputs
        if value is not None
        for source in (weight_sources(value) if value in groups.analysis.state.weights else ())
    }
    chosen = [value for value in dict.fromkeys(members) if value in sources and len(value.shape or ()) > 1]
    chosen = chosen or [value for value in dict.fromkeys(members) if len(value.shape or ()) > 1]
    chosen = chosen or list(dict.fromkeys(members))
    arrays = [
        np.abs(value.const_value.numpy().astype(np.float32)).reshape(-1)
        for value in chosen
        if value.const_value is not None
    ]
    return np.sort(np.concatenate(arrays)) if arrays else np.zeros(0, np.float32)


def layer_factors(problem: Problem) -> np.ndarray:
    """c_l: MACs of the linear operators that make each group's channels, over those of the first: float64 [groups]."""
    nodes = problem.costs.linear_nodes
    macs = [
        sum(problem.costs.macs(node) for node in producing_nodes(problem.groups, candidate.group, nodes))
        for candidate in problem.candidates
    ]
    found = np.maximum(np.array(macs, np.float64), 1.0)
    return found / found[0]
