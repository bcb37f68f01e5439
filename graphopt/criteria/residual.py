"""Criterion "residual": a channel is worth what no least-squares solve of its readers can make up for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.criteria.activation import ActivationVariance
from graphopt.criteria.contract import Criterion, Knowledge, required_feeds
from graphopt.criteria.elimination import Losses, eliminate, errors_in_order
from graphopt.criteria.residual_readers import group_losses
from graphopt.errors import GraphoptError
from graphopt.ir.channels import ChannelGroup

_LEAST_RIDGE = 1e-9
_STEP = 1e-12
"""Scores of units that go one after the other differ by this share at least, so that their order is theirs alone."""


@dataclass(frozen=True)
class Residual(Criterion):
    name: ClassVar[str] = "residual"
    needs: ClassVar[str] = "inputs"
    ridge: float = 1e-3
    columns: int = 6000

    def __post_init__(self) -> None:
        if not _LEAST_RIDGE <= self.ridge < np.inf:
            raise GraphoptError(f"ridge is {self.ridge}", help=f"give a number of at least {_LEAST_RIDGE}")
        if isinstance(self.columns, bool) or not isinstance(self.columns, int) or self.columns < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GraphoptError(f"columns is {self.columns!r}", help="give a whole number of at least 1")

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        found: dict[str, np.ndarray] = {}
        for group, losses in self.losses(knowledge, groups):
            order, errors = eliminate(losses)
            rising = _rising(errors)
            found[group.name] = np.empty(group.units)
            found[group.name][order] = rising
        return {group.name: found[group.name] for group in groups}

    def losses(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> Iterator[tuple[ChannelGroup, Losses]]:
        feeds = required_feeds(self, knowledge)
        waiting = {group.name: group for group in groups}
        for group, losses in group_losses(knowledge, groups, feeds, ridge=self.ridge, columns=self.columns):
            del waiting[group.name]
            yield group, losses
        left = list(waiting.values())
        for name, variance in (ActivationVariance().scores(knowledge, left) if left else {}).items():
            yield waiting[name], Losses((), variance / (variance.sum() or 1.0))


def residual_curves(
    knowledge: Knowledge,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, np.ndarray] | None = None,
    criterion: Residual | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    chosen = criterion or Residual()
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for group, losses in chosen.losses(knowledge, groups):
        if scores is None:
            errors = eliminate(losses)[1]
        else:
            errors = errors_in_order(losses, np.argsort(scores[group.name], kind="stable"))
        counts = np.arange(1, max(group.units, 2))
        found[group.name] = counts / group.units, np.maximum.accumulate(errors)[counts - 1]
    return {group.name: found[group.name] for group in groups}


def _rising(errors: np.ndarray) -> np.ndarray:
    """Errors that never fall, and rise a little wherever they are not 0."""
    rising = np.maximum.accumulate(errors)
    for index in range(1, len(rising)):
        rising[index] = max(rising[index], rising[index - 1] * (1 + _STEP))
    return rising
