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
    """What is lost of the operators that read a channel once they are solved anew without it, greedily.

    An operator with weight W reads patches with covariance C. Without the units P, and with least squares (ridge l) on
    what stays, it loses E(P) = tr(W_P (C_PP - C_PK (C_KK + l I)^-1 C_KP) W_P^T). Units are taken out one after another,
    each time the one with which E grows least (`graphopt.criteria.elimination`: Optimal Brain Surgeon with blocks);
    the score of a unit is E of everything up to it. So the m lowest scores are the greedy choice of m units, for
    every m, and channels that others can stand in for go first, however large they are.

    E is counted in shares: relative to the variance of what the operator makes, behind BatchNormalization and constant
    scales, and behind the addition of another branch where one follows at once: a branch that hardly moves its
    residual stream is worth little. Shares of all operators that read a group are added up. Scores are
    comparable between groups as far as shares of different places are; with allocation "global" (normalise "none",
    gain "mac") and with "sensitivity" (objective "residual") they decide how much goes where.

    Counted are operators with a weight that mix channels (convolutions, products), in the main graph. Units live on
    through depthwise operators, whose loss is that of who reads them next. Attention products, recurrent
    operators and subgraphs are not counted; units that nothing else reads are ranked by the variance of their
    activation (`ActivationVariance`), as cumulative share of the group. Outputs that go with the units are counted.

    Up to 512 columns (channels x kernel positions) of an operator every step is exact; beyond, units go in packets of
    3 %. Operators with more than `columns` columns are solved for channels alone, their kernel positions being taken
    as unrelated; with more than `columns` channels, without covariances: each unit costs its own energy. Of each
    value 16 rows a column and 8,192 more are looked at. Where inputs give fewer, correlations are shrunk.

    ResNet-20 and 56 on CIFAR-10, all pruned inside of blocks to a share of the MACs and rebuilt by least squares, 256
    images: see `graphopt.search.Sensitivity`.

    Args:
        ridge: relative to the mean variance of a column, at least 1e-9.
        columns: see above.

    Raises:
        GraphoptError: an option is out of range.
        DataError: there are no inputs, they do not fit the model, or an activation is NaN or infinite.

    Example:
        >>> import graphopt, onnx_ir as ir
        >>> model = graphopt.load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) =>
        ...     (float[n,1] y) <float[2,3] a = {9,0,9,0,1,0}, float[3,1] b = {1,1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> groups = graphopt.channel_groups(model)
        >>> x = np.random.default_rng(0).standard_normal((500, 2)).astype(np.float32)
        >>> scores = Residual().scores(Knowledge(model, groups, [{"x": x}]), [groups.named("mlp hidden of a")])
        >>> scores["mlp hidden of a"].round(3)  # the first and the last channel are the same
        array([0.   , 0.004, 1.   ])
    """

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
            found[group.name] = np.empty(group.units)
            found[group.name][order] = _rising(errors)
        return {group.name: found[group.name] for group in groups}

    def losses(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> Iterator[tuple[ChannelGroup, Losses]]:
        """What losing units of each group does, as it becomes known, each group once.

        Raises:
            DataError: see the class.
        """
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
    """How E grows as a group shrinks, in closed form: the curves that `graphopt.search.Sensitivity` can go by.

    Args:
        knowledge: the model, with inputs.
        groups: of the model.
        scores: a ranking by group, float64 [units], the smallest goes first; None for the greedy order of `Residual`.
            With scores of `Residual` the curves are the same.
        criterion: the options; those of `Residual()` where not given.

    Returns:
        Group name to shares of its units that are gone (1 unit, 2, ..., all but one; ascending, float64) and E at
        each (float64, at least 0, never falling).

    Raises:
        DataError: there are no inputs, they do not fit the model, or an activation is NaN or infinite.

    Example:
        >>> import graphopt, onnx_ir as ir
        >>> model = graphopt.load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) =>
        ...     (float[n,1] y) <float[2,2] a = {1,0,0,2}, float[2,1] b = {1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> groups = graphopt.channel_groups(model)
        >>> x = np.random.default_rng(0).standard_normal((500, 2)).astype(np.float32)
        >>> curves = residual_curves(Knowledge(model, groups, [{"x": x}]), [groups.named("mlp hidden of a")])
        >>> [side.round(1).tolist() for side in curves["mlp hidden of a"]]
        [[0.5], [0.2]]
    """
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
