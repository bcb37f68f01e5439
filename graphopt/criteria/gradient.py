"""Criteria of gradients: how much the loss, or the output, would change if a channel went. Needs torch when called."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.criteria.contract import Criterion, Knowledge, required_feeds
from graphopt.criteria.magnitude import groups_without_batchnorm, without_batchnorm
from graphopt.criteria.members import MAKERS, Member, Membership
from graphopt.criteria.roles import Role
from graphopt.errors import DataError, GraphoptError
from graphopt.ir.channels import ChannelGroup
from graphopt.ir.rewrite import is_op

if TYPE_CHECKING:
    import torch

DIVERGENCES = ("mse", "kl")
"""Distances to the model's own output, as `graphopt.recover` has them."""
Term = tuple[ir.Value, Member]
"""A weight, and where its units are."""


@dataclass(frozen=True)
class _Gradient(Criterion):
    """What the criteria of gradients share; `Taylor` says it to the reader."""

    needs: ClassVar[str] = "gradients"
    loss: Callable[..., torch.Tensor] | None = None
    data: Iterable[Any] | None = field(default=None, compare=False, repr=False)
    divergence: str = "mse"
    projections: int = 8
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.loss is None) != (self.data is None):
            raise GraphoptError(
                "`loss` and `data` come together",
                where=f"criterion {self.name!r}",
                help="pass both for gradients of your loss, neither for the divergence to the model's own output",
            )
        if self.data is not None and not isinstance(self.data, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GraphoptError(
                f"`data` is a {type(self.data).__name__}, which cannot be iterated",
                where=f"criterion {self.name!r}",
                help="pass a list or a DataLoader of batches (inputs..., labels...)",
            )
        if self.loss is not None and self.outputs:
            raise GraphoptError(
                "`outputs` is for gradients without a loss", help="let the loss read the outputs that you mean"
            )
        if self.divergence not in DIVERGENCES:
            raise GraphoptError(f"there is no divergence {self.divergence!r}", help="use 'mse' or 'kl'")
        if self.projections < 1:
            raise GraphoptError(f"projections is {self.projections}", help="give a whole number from 1 on")

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        feeds = required_feeds(self, knowledge) if self.loss is None else ()
        if importlib.util.find_spec("torch") is None:
            raise GraphoptError(
                f"the criterion {self.name!r} needs torch, which is not installed",
                help="pip install 'graphopt[torch]', or choose a criterion of weights or inputs",
            )
        from graphopt.criteria.lifted_gradients import Gradients

        membership = Membership(knowledge)
        terms = {group.name: self._terms(membership, group) for group in groups}
        gradients = Gradients(knowledge, [value for found in terms.values() for value, _ in found])
        if self.loss is not None and self.data is not None:
            source = gradients.of_loss(self.loss, self.data)
        else:
            source = gradients.of_output(feeds, self.divergence, self.projections, self.outputs)
        totals = {group.name: np.zeros(group.units) for group in groups}
        count = 0
        for step in source:
            count += 1
            for group in groups:
                totals[group.name] += self._measured(group, terms[group.name], step, membership)
        if not count:
            raise DataError("no inputs to take gradients on", help="pass at least one batch")
        return {name: total / count for name, total in totals.items()}

    def _measured(
        self, group: ChannelGroup, terms: Sequence[Term], step: dict[ir.Value, np.ndarray], membership: Membership
    ) -> np.ndarray:
        """What one gradient says: [units]."""
        changes = [
            member.sums(step[value] * membership.weights.array(value)) for value, member in terms if value in step
        ]
        return self._measure(sum(changes, np.zeros(group.units)))

    def _terms(self, membership: Membership, group: ChannelGroup) -> list[Term]:
        """The weights whose products with their gradients are added up."""
        return _made_by(membership, group, membership.makers(group))

    @abc.abstractmethod
    def _measure(self, change: np.ndarray) -> np.ndarray:
        """The summed products [units] of one gradient as what is averaged."""


@dataclass(frozen=True)
class Taylor(_Gradient):
    """First-order Taylor: mean over batches of |sum of w dL/dw| over all that makes the unit (Molchanov et al. 2019).

    The sum runs over the filters of all producers of a coupled unit and their biases, inside the absolute value: it is
    the derivative of the loss with respect to one factor on what the producers make, so the change of the loss to
    first order when that is 0. A BatchNormalization behind them still adds its shift then; `TaylorBatchnorm` and
    `Fisher` look behind it.

    Without a loss, the divergence of the outputs from the model's own takes its place. Its gradient is 0 at the model
    itself, so first order says nothing; to second order the divergence is d'Hd / 2 with d = J m, the change of the
    outputs to first order. Random z with E[z z'] = H give the derivative z'J of one number, and E[(z'J)^2] is what is
    wanted: an unbiased projection of the Gauss-Newton (Fisher) matrix, one backward pass each. "mse" is the mean
    squared difference over the variance of an output in the batch (z: random signs), "kl" the divergence of softmax
    distributions on the last axis (z: a label drawn from the model's own distribution, minus the distribution).
    This criterion averages |z'J|, which grows as the root of the divergence.

    Comparable between groups. The lifted model runs in evaluation mode. Operators without a derivative (quantizers,
    Round) stop gradients: what lies before them alone scores 0.

    Args:
        loss: `loss(outputs, *labels)` returns one number; `outputs` is one tensor or a tuple. None needs no labels.
        data: with `loss`: batches as for `graphopt.recover`, tuples (inputs..., labels...) or dicts by input name
            whose other entries are labels by keyword. Without, the inputs are `Knowledge.feeds`.
        divergence: without a loss: "mse" or "kl".
        projections: without a loss: backward passes a batch.
        outputs: without a loss: names of the outputs that count; all float outputs where empty.

    Raises:
        DataError: there are no inputs, or they do not fit the model.
        GraphoptError: an option is wrong, torch is not installed, no output is a float, or a gradient is not finite.
        LiftError: an operator has no torch function.

    Example:
        >>> import graphopt, torch
        >>> model = graphopt.load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,1] x) =>
        ...     (float[n,1] y) <float[1,2] a = {1,2}, float[2,1] b = {3,-1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> groups = graphopt.channel_groups(model)
        >>> taylor = Taylor(loss=lambda y, label: (y - label).sum(), data=[(torch.ones(1, 1), torch.zeros(1, 1))])
        >>> taylor.scores(Knowledge(model, groups), [groups.named("mlp hidden of a")])
        {'mlp hidden of a': array([3., 2.])}
    """

    name: ClassVar[str] = "taylor"

    def _measure(self, change: np.ndarray) -> np.ndarray:
        return np.abs(change)


@dataclass(frozen=True)
class TaylorBatchnorm(_Gradient):
    """First-order Taylor on BatchNormalization: mean over batches of |sum of gamma dL/dgamma + beta dL/dbeta|.

    The sum over all BatchNormalizations of a coupled unit is inside the absolute value (the form of HALP and MDP, Shen
    et al. 2022 and Sun et al. 2025, from methods.md section 4). A producer behind which there is no BatchNormalization
    adds w dL/dw instead, as in `Taylor`. Everything else, arguments included: see `Taylor`.

    Example:
        >>> TaylorBatchnorm(projections=32).needs
        'gradients'
    """

    name: ClassVar[str] = "taylor-batchnorm"

    def _terms(self, membership: Membership, group: ChannelGroup) -> list[Term]:
        normalized = [
            (member.value, member)
            for member in membership.of_role(group, Role.SCALE, Role.SHIFT)
            if is_op(member.node, "BatchNormalization")
        ]
        if not normalized:
            return super()._terms(membership, group)
        makers = membership.of_role(group, *MAKERS)
        bare = [member for member in makers if membership.following(member).normalization is None]
        return normalized + _made_by(membership, group, bare)

    def remarks(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> tuple[str, ...]:
        """Which groups pass no BatchNormalization, and what ranks them."""
        return without_batchnorm(groups_without_batchnorm(Membership(knowledge), groups), groups, "taylor")

    def _measure(self, change: np.ndarray) -> np.ndarray:
        return np.abs(change)


@dataclass(frozen=True)
class Fisher(_Gradient):
    """Empirical Fisher information of one factor on the unit, halved: mean over batches of (sum of w dL/dw)^2 / 2.

    The sum runs over all places where the unit is made: over the scale and shift of the BatchNormalization right behind
    a producer, which is the derivative by one factor on its result, over filter and bias where there is none.

    With `loss` a batch of one sample gives the empirical Fisher information (Theis et al. 2018, "Faster gaze prediction
    with dense networks and Fisher pruning"; summed over coupled members as in Liu et al. 2021, "Group Fisher pruning"),
    a larger one the square of its mean gradient: pass small batches. Without a loss the score estimates the divergence
    itself that removing the unit causes, to second order, for any size of the batch; more `projections` make it more
    accurate. Arguments, errors and the divergence: see `Taylor`.

    Example:
        >>> Fisher(divergence="kl").divergence
        'kl'
    """

    name: ClassVar[str] = "fisher"

    def _terms(self, membership: Membership, group: ChannelGroup) -> list[Term]:
        makers = membership.makers(group)
        behind = {member: membership.following(member).normalization for member in makers}
        nodes = {node for node in behind.values() if node is not None}
        scaled = [member for member in membership.of_role(group, Role.SCALE, Role.SHIFT) if member.node in nodes]
        bare = [member for member, node in behind.items() if node is None]
        return [(member.value, member) for member in scaled] + _made_by(membership, group, bare)

    def _measure(self, change: np.ndarray) -> np.ndarray:
        return np.square(change) / 2


def _made_by(membership: Membership, group: ChannelGroup, makers: Sequence[Member]) -> list[Term]:
    """Weights that make channels, and the biases of the same operators."""
    return [(member.value, member) for member in [*makers, *membership.biases(group, makers)]]
