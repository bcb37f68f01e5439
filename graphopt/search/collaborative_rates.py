"""How much each item saves: the global compression-rate optimisation of CC over the descents of the heuristic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphopt.search.collaborative_layers import Costing
from graphopt.search.collaborative_steps import Descent, Step
from graphopt.search.collaborative_tables import Choice, Tables
from graphopt.search.sensitivity import Exponential, closed_form, fit_exponential

_BISECTIONS = 40


class GlobalRates:
    """The closed form of CC: exponentials through the descents, one number x for all, rates in [0, limit].

    The rate of an item is what it saves alone, everything else whole, over what its layers and the layers that make its
    group cost; curves are divided by their largest I, as CC does, and fitted by `fit_exponential`. Layers between
    two groups are shared by two items, so what items save together is less than their sum: the share that the closed
    form is asked for is found by bisection on the true cost.

    Args:
        descents: of all items.
        costing: cost.
        limit: largest rate of an item.
    """

    def __init__(self, descents: Sequence[Descent], costing: Costing, limit: float = 0.95) -> None:
        self._descents, self._costing, self.limit = tuple(descents), costing, limit
        self._whole = costing.total({}, {})
        self.costs = np.array([self._item_cost(descent) for descent in descents])
        self._savings = [
            np.array([self._saved(descent, step, step.ranks) for step in descent.steps]) for descent in descents
        ]
        self.fits = [self._fit(number) for number in range(len(descents))]

    def rates(self, share: float) -> np.ndarray:
        """rho of each item such that the sum of F rho is `share` of the sum of F, in [0, limit]; float64 [items]."""
        return closed_form(self.fits, self.costs, share, self.limit)

    def steps(self, share: float) -> list[Step]:
        """The first step of each item that saves as much; its terms come back where the channels alone save it."""
        found: list[Step] = []
        for number, (descent, rate) in enumerate(zip(self._descents, self.rates(share), strict=True)):
            wanted = float(rate) * self.costs[number]
            enough = np.flatnonzero(self._savings[number] >= wanted * (1 - 1e-9))
            step = descent.steps[int(enough[0])] if len(enough) else descent.steps[int(self._savings[number].argmax())]
            if self._saved(descent, step, {}) >= wanted:
                step = Step(step.units, {}, step.loss)
            found.append(step)
        return found

    def solve(self, budget: float, tables: Tables) -> Choice:
        """Widths and ranks within the budget where any are: steps rounded to what kernels like.

        Args:
            budget: in the coin of the cost.
            tables: the ranks and widths that are allowed.
        """
        low, high = 0.0, self.limit
        best = self._rounded(high, tables)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            found = self._rounded(middle, tables)
            if self._costing.total(found.removed, found.ranks) <= budget:
                best, high = found, middle
            else:
                low = middle
        return best

    def _rounded(self, share: float, tables: Tables) -> Choice:
        choice = Choice(dict.fromkeys(tables.widths, 0))
        steps = self.steps(share)
        for descent, step in zip(self._descents, steps, strict=True):
            if descent.item.candidate is not None:
                widths = np.array(tables.widths[descent.item.name])
                choice.removed[descent.item.name] = int(widths[np.abs(widths - step.units).argmin()])
        for descent, step in zip(self._descents, steps, strict=True):
            for layer in descent.item.layers:
                ranks = np.array(tables.ranks[layer.name])
                if step.ranks.get(layer.name, layer.full_rank) < layer.full_rank and len(ranks):
                    rank = int(ranks[np.abs(ranks - step.ranks[layer.name]).argmin()])
                    if self._costing.saves(layer, choice.removed, rank):
                        choice.ranks[layer.name] = rank
        return choice

    def _saved(self, descent: Descent, step: Step, ranks: Mapping[str, int]) -> float:
        """What a step saves with everything else whole."""
        removed = {descent.item.name: step.units} if descent.item.candidate is not None else {}
        cut = {
            layer.name: ranks[layer.name] for layer in descent.item.layers if self._is_cut(layer.name, ranks, descent)
        }
        return self._whole - self._costing.total(removed, cut)

    def _is_cut(self, name: str, ranks: Mapping[str, int], descent: Descent) -> bool:
        return name in ranks and ranks[name] < descent.steps[0].ranks[name]

    def _item_cost(self, descent: Descent) -> float:
        name = descent.item.name
        layers = {layer.name: layer for layer in descent.item.layers}
        if descent.item.candidate is not None:
            layers |= {
                layer.name: layer for layer in self._costing.layers if any(name == made for made, _ in layer.makes)
            }
        return max(sum(self._costing.layer(layer, {}) for layer in layers.values()), 1e-9)

    def _fit(self, number: int) -> Exponential:
        rates = self._savings[number] / self.costs[number]
        losses = np.array([step.loss for step in self._descents[number].steps])
        chosen = rates > 0
        if not chosen.any() or not losses[chosen].max() > 0:
            return Exponential(1.0, 1.0) if not chosen.any() else fit_exponential(rates[chosen], losses[chosen])
        return fit_exponential(rates[chosen], losses[chosen] / losses[chosen].max())
