"""Which rank: candidates that kernels like and that pay, and the ways to choose among them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphopt.factorizations.contract import Factorization, Fit, Layer, Rank
from graphopt.factorizations.variational import variational_rank
from graphopt.search.rounding import check_round_to, kept_choices, step_of
from graphopt.search.sensitivity import convex_curve

_MOST_RANKS = {1: 64, 2: 20}
"""How many candidates there are for each number of a rank, by how many numbers it has; evenly thinned beyond."""
_MOST_SOLVED = 10
"""The same for a form that solves each rank anew."""


@dataclass(frozen=True)
class Option:
    """One way to replace a layer.

    Attributes:
        form: name of the factorisation.
        rank: of it.
        error: expected squared error of the outputs over their power.
        saved: of what is counted, how much goes.
    """

    form: str
    rank: Rank
    error: float
    saved: float


def candidate_ranks(form: Factorization, layer: Layer, round_to: int | None = None) -> tuple[Rank, ...]:
    """Ranks below break-even, the cheapest first.

    Args:
        form: a factorisation that the layer has.
        layer: the layer.
        round_to: ranks are multiples of this, 1 for any; None for what kernels are fast at (`step_of` the width that
            the rank stands for: 16, less where it is narrow).

    Raises:
        GraphoptError: `round_to` is no whole number of at least 1.

    Example:
        >>> from graphopt.factorizations import ChannelSvd
        >>> layer = Layer(np.ones((64, 64, 3, 3)), before=(8, 8), after=(8, 8))
        >>> candidate_ranks(ChannelSvd(), layer)
        ((16,), (32,), (48,))
    """
    check_round_to(round_to)
    full = form.full(layer)
    most = _MOST_RANKS[len(full)]
    axes: list[list[int]] = []
    for width in full:
        step = step_of(min(width, layer.inputs, layer.outputs)) if round_to is None else round_to
        choices = kept_choices(width, step, 1)
        if len(full) == 1:
            choices = choices[[form.is_cheaper(layer, (int(one),)) for one in choices]]
        thinned = np.unique(np.linspace(0, len(choices) - 1, most).round().astype(int)) if len(choices) > most else None
        axes.append([int(one) for one in (choices if thinned is None else choices[thinned])])
    if form.name == "cp" and len(axes[0]) > _MOST_SOLVED:
        places = np.unique(np.geomspace(1, len(axes[0]), _MOST_SOLVED).round().astype(int)) - 1
        axes[0] = [axes[0][place] for place in places]
    ranks = [rank for rank in itertools.product(*axes) if form.is_cheaper(layer, rank)]
    return tuple(sorted(ranks, key=lambda rank: (form.macs(layer, rank), rank)))


def cheapest_within(fit: Fit, ranks: Sequence[Rank], error: float) -> Rank | None:
    """The first of `ranks`, which are ordered by cost, whose squared relative error is at most `error`."""
    if len(fit.form.full(fit.layer)) == 1 and fit.form.name != "cp":  # errors fall: look at few
        low, high = 0, len(ranks)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fit.error(ranks[middle]) <= error else (middle + 1, high)
        return ranks[low] if low < len(ranks) else None
    return next((rank for rank in ranks if fit.error(rank) <= error), None)


def variational(form: Factorization, layer: Layer) -> Rank:
    """The rank that variational Bayes finds in the weight, at least 1; see `variational_rank`."""
    return tuple(max(1, variational_rank(values, shape)) for values, shape in form.spectra(layer))


def rounded_up(rank: Rank, ranks: Sequence[Rank]) -> Rank | None:
    """The cheapest of `ranks`, ordered by cost, that is nowhere below a rank."""
    return next((one for one in ranks if all(a >= b for a, b in zip(one, rank, strict=True))), None)


@dataclass
class Budget:
    """Which option each layer takes so that a total is saved, the cheapest error for what it saves first.

        minimise  sum of errors  where  sum of savings >= wanted

    by one multiplier over all layers: of each layer the corners of the largest convex curve below (saved, error) are
    followed in order of their slopes. What is saved beyond the need at last is given back where that lowers the error
    most.

    Attributes:
        options: by layer; the layer as it is need not be among them.
        weights: what an error of each layer counts, 1 where not given.

    Example:
        >>> half = Option("svd", (8,), 0.01, 50.0)
        >>> Budget({"a": [half, Option("svd", (4,), 0.2, 75.0)], "b": [Option("svd", (8,), 0.03, 50.0)]}).choose(60.0)
        {'a': Option(form='svd', rank=(8,), error=0.01, saved=50.0), 'b': Option(form='svd', rank=(8,), error=0.03, \
saved=50.0)}
    """

    options: Mapping[str, Sequence[Option]]
    weights: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def most(self) -> float:
        """What can be saved at all."""
        return sum(max((one.saved for one in options), default=0.0) for options in self.options.values())

    def choose(self, wanted: float) -> dict[str, Option]:
        """The option of each layer that takes one; all savings there are where `wanted` is more."""
        steps: list[tuple[float, str, Option]] = []
        for layer, options in self.options.items():
            steps.extend(self._steps(layer, [one for one in options if one.saved > 0]))
        steps.sort(key=lambda step: step[0])
        taken: dict[str, Option] = {}
        saved = 0.0
        for _, layer, option in steps:
            if saved >= wanted:
                break
            saved += option.saved - (taken[layer].saved if layer in taken else 0.0)
            taken[layer] = option
        self._give_back(taken, saved - wanted)
        return {layer: taken[layer] for layer in self.options if layer in taken}

    def _steps(self, layer: str, options: Sequence[Option]) -> list[tuple[float, str, Option]]:
        """Slope and option of each corner of a layer."""
        if not options:
            return []
        weight = self.weights.get(layer, 1.0)
        largest = max(one.saved for one in options)
        best: dict[float, Option] = {}
        for one in options:
            share = one.saved / largest
            if share not in best or one.error < best[share].error:
                best[share] = one
        shares, errors = convex_curve((tuple(best), tuple(weight * one.error for one in best.values())), 1.0)
        slopes = np.diff(errors) / (np.diff(shares) * largest)
        corners = [best[float(share)] for share in shares[1:]]
        return [(float(slope), layer, one) for slope, one in zip(slopes, corners, strict=True)]

    def _give_back(self, taken: dict[str, Option], spare: float) -> None:
        while spare > 0:
            best: tuple[float, str, Option | None, float] | None = None
            for layer, now in taken.items():
                for other in (None, *self.options[layer]):
                    given = now.saved - (other.saved if other is not None else 0.0)
                    won = (now.error - (other.error if other is not None else 0.0)) * self.weights.get(layer, 1.0)
                    if 0 <= given <= spare and won > 0 and (best is None or won > best[0]):
                        best = won, layer, other, given
            if best is None:
                return
            _, layer, other, given = best
            spare -= given
            if other is None:
                del taken[layer]
            else:
                taken[layer] = other
