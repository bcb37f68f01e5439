"""How much to remove where: allocations of a target over groups of channels (design.md, floor 2)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.search.contract import KINDS, Allocation, Candidate, Path, Problem, Target
from graphopt.search.costs import CostModel, Costs
from graphopt.search.cross_layer import CrossLayer
from graphopt.search.global_ranking import GlobalRanking
from graphopt.search.rounding import step_of, unit_step
from graphopt.search.sensitivity import Sensitivity
from graphopt.search.solve import Solution, solve
from graphopt.search.uniform import Uniform

ALLOCATIONS: dict[str, type[Allocation]] = {
    kind.name: kind for kind in (Uniform, GlobalRanking, CrossLayer, Sensitivity)
}
"""Every allocation by its name."""


def allocation(name_or_allocation: str | Allocation, **options: Any) -> Allocation:
    """The allocation of that name with these options; an allocation object as it is.

    Args:
        name_or_allocation: a key of `ALLOCATIONS`, or an allocation.
        options: fields of the allocation, where a name was given.

    Raises:
        GraphoptError: there is no such allocation or option, or an option is out of range.

    Example:
        >>> allocation("global", normalise="max")
        GlobalRanking(normalise='max', gain='unit', limit=0.9)
    """
    if isinstance(name_or_allocation, Allocation):
        if options:
            raise GraphoptError("options go with the name of an allocation, not with an allocation that has its own")
        return name_or_allocation
    kind = ALLOCATIONS.get(name_or_allocation) if isinstance(name_or_allocation, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if kind is None:
        raise GraphoptError(
            f"there is no allocation {name_or_allocation!r}", help=_suggestion(str(name_or_allocation), ALLOCATIONS)
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            raise GraphoptError(
                f"the allocation {kind.name!r} has no option {option!r}", help=_suggestion(option, fields) or None
            )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise GraphoptError(f"bad option of the allocation {kind.name!r}: {error}") from error


def _suggestion(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{guess}there are {', '.join(known) or 'none'}"


__all__ = [
    "ALLOCATIONS",
    "KINDS",
    "Allocation",
    "Candidate",
    "CostModel",
    "Costs",
    "CrossLayer",
    "GlobalRanking",
    "Path",
    "Problem",
    "Sensitivity",
    "Solution",
    "Target",
    "Uniform",
    "allocation",
    "solve",
    "step_of",
    "unit_step",
]
