"""Several tasks, one vote each: a channel goes only if every task can do without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np

from graphopt.criteria.contract import Criterion, Knowledge, checked_scores
from graphopt.errors import GraphoptError
from graphopt.ir.channels import ChannelGroup

_NEEDS = ("weights", "inputs", "gradients")
"""From least to most."""


@dataclass(frozen=True)
class Unanimous(Criterion):
    """The largest share that any of several criteria gives a unit (Sun et al. 2022, "DiSparse", as a combiner).

    One criterion a task, for instance `Taylor` with the loss of the task, or limited to its `outputs`. The scores of
    each are divided by their sum over all groups that are scored, so that tasks count alike whatever the scale of
    their losses, and a unit gets its largest share: whoever is in the top of any task is in the top. Comparable
    between groups where the criteria are.

    Args:
        criteria: one a task, at least one: criteria, names of criteria, or tables with a name and options.

    Raises:
        GraphoptError: there is none, or one of them is no criterion.

    Example:
        >>> from graphopt.criteria import criterion
        >>> votes = criterion("unanimous", criteria=(criterion("l1"), criterion("taylor", outputs=("depth",))))
        >>> votes.needs
        'gradients'
    """

    name: ClassVar[str] = "unanimous"
    needs: ClassVar[str] = "weights"
    criteria: tuple[Criterion, ...] = ()

    def __post_init__(self) -> None:
        given: Any = self.criteria
        if isinstance(given, (str, Criterion, Mapping)) or not isinstance(given, Iterable) or not given:
            raise GraphoptError(
                f"`criteria` is {given!r}" if given else "no criteria are given, and 'unanimous' combines several",
                where="criterion 'unanimous'",
                help="pass one criterion a task: criteria=('l1', criterion('taylor', outputs=('a',)), ...)",
            )
        object.__setattr__(self, "criteria", tuple(map(_member, cast("Iterable[Any]", given))))
        # What is needed depends on who votes: an attribute of the instance in front of that of the class.
        object.__setattr__(self, "needs", max((each.needs for each in self.criteria), key=_NEEDS.index))

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        found = {group.name: np.zeros(group.units) for group in groups}
        for each in self.criteria:
            votes = checked_scores(each, knowledge, groups)
            total = sum(float(vote.sum()) for vote in votes.values())
            for name, vote in votes.items():
                found[name] = np.maximum(found[name], vote / (total if total > 0 else 1.0))
        return found

    def remarks(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> tuple[str, ...]:
        """Those of the criteria, each with its name."""
        return tuple(f"{each.name}: {line}" for each in self.criteria for line in each.remarks(knowledge, groups))


def _member(entry: Any) -> Criterion:
    """A criterion, one by name, or one as a table with its name and options."""
    from graphopt.criteria.registry import criterion  # which knows this one too

    options = dict(cast("Mapping[str, Any]", entry)) if isinstance(entry, Mapping) else {"name": entry}
    return criterion(options.pop("name", None), **options)
