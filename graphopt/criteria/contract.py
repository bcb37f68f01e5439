"""What a criterion is (design.md, floor 2): coupled channels in, one score a unit out.

The contract only: what a criterion may look at, what it must return, and how the parts of a coupled unit become one
number. The criteria themselves are one file a family beside this one.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError, GraphoptError
from graphopt.ir.channels import ChannelGroup, ChannelGroups

COMBINATIONS = ("sum", "mean", "max", "norm")
"""Ways in which the parts of a coupled unit become one score."""


@dataclass(frozen=True)
class Knowledge:
    """What a criterion may look at.

    Attributes:
        model: canonical, float; no criterion changes it.
        groups: `channel_groups(model)` of this very model.
        feeds: batches of inputs by name, iterable more than once; None where there are none.
        threads: intra-op threads of onnxruntime, 0 for its default.
        seed: of everything random, from 0 on.

    Raises:
        GraphoptError: the groups are those of another model, or the seed is no whole number from 0 on.
    """

    model: ir.Model
    groups: ChannelGroups
    feeds: Iterable[Mapping[str, np.ndarray]] | None = None
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.groups.analysis.model is not self.model:
            raise GraphoptError("the groups are those of another model", help="pass channel_groups of this very model")
        check_seed(self.seed)


class Criterion(abc.ABC):
    """How important a channel is: subclasses are frozen dataclasses, fields are options.

    Class attributes:
        name: kebab-case, the key in `graphopt.criteria.CRITERIA`.
        needs: "weights" (nothing but the model), "inputs" (`Knowledge.feeds`) or "gradients" (inputs and torch).

    Example:
        >>> import graphopt, onnx.parser
        >>> from graphopt.criteria import Knowledge, criterion
        >>> model = graphopt.load(onnx.parser.parse_model('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[n,2] x) => (float[n,1] y) <float[2,3] a = {1,0,2,0,0,2}, float[3,1] b = {1,1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> groups = graphopt.channel_groups(model)
        >>> criterion("l1").scores(Knowledge(model, groups), [groups.named("mlp hidden of a")])
        {'mlp hidden of a': array([1., 0., 4.])}
    """

    name: ClassVar[str]
    needs: ClassVar[str]

    @abc.abstractmethod
    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """Score every unit of some groups of the model.

        Args:
            knowledge: the model and what is known besides.
            groups: of `knowledge.groups`, in any order.

        Returns:
            Group name to float64 [units], finite, >= 0; the smallest goes first. Comparable within a group; between
            groups as far as the docstring of the criterion says.

        Raises:
            DataError: the criterion needs inputs and there are none.
            GraphoptError: an option is wrong, or torch is needed and not there.
        """

    def remarks(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> tuple[str, ...]:
        """What the user should know of how these groups are ranked, one clause each; none as a rule."""
        return ()

    def __str__(self) -> str:
        """Name and options as Python, functions by their qualified names: the same in every process."""
        return re.sub(r"(?:<function (\S+))? at 0x[0-9a-fA-F]+(?(1)>)", r"\1", repr(self))


def checked_scores(criterion: Criterion, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
    """The scores of a criterion, which may be anybody's, held to the contract.

    Args:
        criterion: built in or the user's own.
        knowledge: what it may look at.
        groups: those to score.

    Returns:
        What `Criterion.scores` promises: group name to float64 [units], finite, >= 0, for exactly these groups.

    Raises:
        GraphoptError: it returned something else, or raised an error that is not graphopt's.

    Example:
        >>> import graphopt, onnx.parser
        >>> from graphopt.criteria import criterion
        >>> model = graphopt.load(onnx.parser.parse_model('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[n,2] x) => (float[n,1] y) <float[2,3] a = {1,0,2,0,0,2}, float[3,1] b = {1,1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> groups = graphopt.channel_groups(model)
        >>> checked_scores(criterion("l1"), Knowledge(model, groups), [groups.named("mlp hidden of a")])
        {'mlp hidden of a': array([1., 0., 4.])}
    """
    where = f"criterion {_name(criterion)!r}"
    promised = "`scores` returns a dict: name of each group to an array [units] of finite numbers of at least 0"
    try:
        found: Any = criterion.scores(knowledge, groups)
    except GraphoptError:
        raise
    except Exception as error:
        raise GraphoptError(
            f"the criterion raised {type(error).__name__}: {error}", where=where, help="the traceback shows where"
        ) from error
    if not isinstance(found, Mapping):
        raise GraphoptError(f"the criterion returned a {type(found).__name__}", where=where, help=promised)
    return {group.name: _checked(found, group, where, promised) for group in groups}  # pyright: ignore[reportUnknownArgumentType]


def _checked(found: Mapping[Any, Any], group: ChannelGroup, where: str, promised: str) -> np.ndarray:
    """The scores of one group."""
    problem = ""
    scores = np.zeros(0)
    if group.name not in found:
        problem = "no scores"
    else:
        try:
            scores = np.asarray(found[group.name], np.float64)
        except (TypeError, ValueError):
            problem = f"no numbers but a {type(found[group.name]).__name__}"
    if not problem and scores.shape != (group.units,):
        problem = f"scores of shape {list(scores.shape)} for {group.units} units"
    elif not problem and not np.isfinite(scores).all():
        problem = "scores that are NaN or infinite"
    elif not problem and (scores < 0).any():
        problem = f"scores below 0, the smallest {scores.min():.4g}"
    if problem:
        raise GraphoptError(f"the criterion returned {problem} for {group.name!r}", where=where, help=promised)
    return scores


def _name(criterion: Criterion) -> str:
    """Its name; that of its class where it has none."""
    return getattr(criterion, "name", type(criterion).__name__)


def check_seed(seed: int) -> None:
    """Raise `GraphoptError` where `seed` is no whole number from 0 on."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GraphoptError(f"seed is {seed!r}", help="give a whole number from 0 on")


def check_combination(combine: str) -> None:
    """Raise `GraphoptError` where `combine` is none of `COMBINATIONS`."""
    if combine not in COMBINATIONS:
        raise GraphoptError(f"there is no combination {combine!r}", help=f"use one of {', '.join(COMBINATIONS)}")


def combined(parts: Sequence[np.ndarray], combine: str) -> np.ndarray:
    """The scores of several members of a group as one: float64 [units].

    Args:
        parts: one float64 array [units] a member, >= 0, at least one.
        combine: "sum", "mean", "max", or "norm" (root of the sum of squares).

    Example:
        >>> combined([np.array([3.0, 1.0]), np.array([4.0, 0.0])], "norm")
        array([5., 1.])
    """
    check_combination(combine)
    stacked = np.stack(parts)
    if combine == "sum":
        return stacked.sum(axis=0)
    if combine == "mean":
        return stacked.mean(axis=0)
    return stacked.max(axis=0) if combine == "max" else np.linalg.norm(stacked, axis=0)


def required_feeds(criterion: Criterion, knowledge: Knowledge) -> Iterable[Mapping[str, np.ndarray]]:
    """The batches that a criterion needs.

    Raises:
        DataError: there are none.
    """
    if knowledge.feeds is None:
        raise DataError(
            f"the criterion {criterion.name!r} needs inputs, and there are none",
            where="criterion",
            help="pass calibration inputs (or let probes stand in), or choose a criterion of the weights, as 'l2'",
        )
    return knowledge.feeds
