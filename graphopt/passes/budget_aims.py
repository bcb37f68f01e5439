"""Where to aim so that what is measured, not what is predicted, fills a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.passes.budget_plan import Try

NEAR = 0.02
"""How far below the budget a solution may be, relative to it, without another try to use more of it."""
MARGIN = 0.004
"""How far below the budget the next solution is aimed at, relative to it."""
_CLOSE = 1e-3
"""Shares that are so near to each other are not told apart."""


@dataclass
class Aims:
    """The share of the cost that the next solution may have, as predicted.

    Predictions err, and solutions come in steps. A solution over the budget says that nothing of its predicted cost is
    to be tried again; one within says that less need not be. Between the two the aim follows the error of the
    prediction, or is the middle where that leads outside.

    Attributes:
        share: the budget, as a share of the whole.
        low: the largest aim whose solution was within the budget.
        high: the least prediction of a solution that was over it.

    Example:
        >>> aims = Aims(0.5)
        >>> round(aims.after(0.5, Try(predicted=0.5, measured=0.6, loss=0.0)), 3)
        0.415
        >>> round(aims.after(0.415, Try(predicted=0.4, measured=0.45, loss=0.0)), 3)
        0.459
    """

    share: float
    low: float = 0.0
    high: float = math.inf

    def is_near(self, tried: Try) -> bool:
        """Whether a solution is within the budget and fills it, or is the model as it is."""
        within = tried.measured <= self.share
        return within and (tried.measured >= self.share * (1 - NEAR) or tried.predicted >= 1)

    def after(self, aim: float, tried: Try) -> float | None:
        """The next aim, None where there is none left."""
        if tried.measured <= self.share:
            base = self.low = max(self.low, aim, tried.predicted)
        else:
            base = self.high = min(self.high, tried.predicted)
        if min(self.high, 1.0) - self.low <= _CLOSE:
            return None
        following = base * self.share * (1 - MARGIN) / tried.measured
        if not self.low < following < self.high:
            following = 1.0 if math.isinf(self.high) else (self.low + self.high) / 2
        return min(following, 1.0)
