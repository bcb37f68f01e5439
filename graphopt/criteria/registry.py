"""The criteria by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from graphopt.criteria.activation import ActivationMean, ActivationVariance, Apoz
from graphopt.criteria.contract import Criterion
from graphopt.criteria.distance import Fpgm, KReciprocal
from graphopt.criteria.domain import DomainSimilarity
from graphopt.criteria.gradient import Fisher, Taylor, TaylorBatchnorm
from graphopt.criteria.magnitude import L1, L2, BatchnormScale, FoldedNorm, Random
from graphopt.criteria.path import CoupledPath
from graphopt.criteria.residual import Residual
from graphopt.criteria.unanimous import Unanimous
from graphopt.errors import GraphoptError

_KINDS: tuple[type[Criterion], ...] = (
    *(L1, L2, FoldedNorm, BatchnormScale, Fpgm, KReciprocal, CoupledPath, Random),
    *(ActivationMean, ActivationVariance, Apoz, DomainSimilarity, Residual),
    *(Taylor, TaylorBatchnorm, Fisher),
    Unanimous,
)
CRITERIA: dict[str, type[Criterion]] = {kind.name: kind for kind in _KINDS}
"""Every criterion by its name."""


def criterion(name_or_criterion: str | Criterion, **options: Any) -> Criterion:
    """A criterion by name, with its options; a criterion is returned as it is.

    Args:
        name_or_criterion: a key of `CRITERIA`, or a criterion.
        options: fields of the criterion; only with a name.

    Raises:
        GraphoptError: there is no such criterion or option, or an option has a value that it cannot have.

    Example:
        >>> criterion("l2", combine="max")
        L2(combine='max')
    """
    if isinstance(name_or_criterion, Criterion):
        if options:
            raise GraphoptError(
                f"options with a criterion: {', '.join(options)}",
                where=f"criterion {name_or_criterion.name!r}",
                help="set them where the criterion is made, or give its name",
            )
        return name_or_criterion
    kind = CRITERIA.get(name_or_criterion) if isinstance(name_or_criterion, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if kind is None:
        raise GraphoptError(f"there is no criterion {name_or_criterion!r}", help=_nearest(name_or_criterion))
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise GraphoptError(
            f"the criterion {kind.name!r} has no option {unknown[0]!r}", help=f"it has {', '.join(known) or 'none'}"
        )
    return kind(**options)


def _nearest(name: Any) -> str:
    close = difflib.get_close_matches(str(name).lower().replace("_", "-"), CRITERIA, n=1)
    return f"do you mean {close[0]!r}?" if close else f"use one of {', '.join(CRITERIA)}"
