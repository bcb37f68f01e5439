"""Criteria of size: how large the weights are that make a channel, or the scales that it passes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.criteria.contract import Criterion, Knowledge, check_combination, combined
from graphopt.criteria.members import Member, Membership
from graphopt.criteria.roles import Role
from graphopt.ir.channels import ChannelGroup
from graphopt.ir.rewrite import is_op


@dataclass(frozen=True)
class L1(Criterion):
    """Sum of the absolute weights that make a channel (Li et al. 2017, "Pruning Filters for Efficient ConvNets").

    They are the filters on whose output axis the channel is: of convolutions, matrix products, recurrences and
    embeddings, depthwise ones included. Where no such weight makes the channels, all float weights that the units own
    count, statistics excepted. Comparable within a group only.

    Args:
        combine: how the members of a coupled unit become one score: "sum", "mean", "max" or "norm".

    Example:
        >>> L1(combine="max").needs
        'weights'
    """

    name: ClassVar[str] = "l1"
    needs: ClassVar[str] = "weights"
    combine: str = "sum"

    def __post_init__(self) -> None:
        check_combination(self.combine)

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        membership = Membership(knowledge)

        def one(member: Member) -> np.ndarray:
            return member.sums(np.abs(membership.weights.array(member.value)))

        return {
            group.name: combined([one(member) for member in membership.makers(group)], self.combine) for group in groups
        }


@dataclass(frozen=True)
class L2(Criterion):
    """Euclidean norm of the weights that make a channel (the norm of methods.md, sections 1 and 2).

    Which weights these are: see `L1`. With "norm" the score is the norm of all members together. Comparable within a
    group only.

    Args:
        combine: how the members of a coupled unit become one score: "norm", "sum", "mean" or "max".

    Example:
        >>> criterion = L2(combine="sum")
        >>> criterion.name, criterion.combine
        ('l2', 'sum')
    """

    name: ClassVar[str] = "l2"
    needs: ClassVar[str] = "weights"
    combine: str = "norm"

    def __post_init__(self) -> None:
        check_combination(self.combine)

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        membership = Membership(knowledge)
        return {group.name: combined(_norms(membership, membership.makers(group)), self.combine) for group in groups}


@dataclass(frozen=True)
class FoldedNorm(Criterion):
    """Norm of the filter with what scales it folded in: v_n = gamma / sigma * vec(W_n) (methods.md, notation).

    The filters are those of `L1`. What scales the result of a filter before anything else reads it counts: one
    BatchNormalization, and products with one constant a channel. Where nothing does, it is `L2`. The score does not
    depend on whether normalisations are folded. Comparable within a group; between groups of equal fan-in roughly.

    Args:
        combine: how the members of a coupled unit become one score: "norm", "sum", "mean" or "max".

    Example:
        >>> str(FoldedNorm())
        "FoldedNorm(combine='norm')"
    """

    name: ClassVar[str] = "folded-norm"
    needs: ClassVar[str] = "weights"
    combine: str = "norm"

    def __post_init__(self) -> None:
        check_combination(self.combine)

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        membership = Membership(knowledge)
        return {
            group.name: combined(
                [_folded_norm(membership, member) for member in membership.makers(group)], self.combine
            )
            for group in groups
        }


@dataclass(frozen=True)
class BatchnormScale(Criterion):
    """|gamma| of BatchNormalization (Liu et al. 2017, "Learning Efficient Convolutional Networks through Slimming").

    Where the channels of a group pass no BatchNormalization, the scales of other normalisations and products with one
    constant a channel stand in; where there are none, the norm of the filters (`L2`). Comparable within a group, and
    between groups that have a BatchNormalization.

    Args:
        combine: how several normalisations of a coupled unit become one score: "sum", "mean", "max" or "norm".

    Example:
        >>> BatchnormScale().combine
        'sum'
    """

    name: ClassVar[str] = "batchnorm-scale"
    needs: ClassVar[str] = "weights"
    combine: str = "sum"

    def __post_init__(self) -> None:
        check_combination(self.combine)

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        membership = Membership(knowledge)
        return {group.name: self._one(membership, group) for group in groups}

    def _one(self, membership: Membership, group: ChannelGroup) -> np.ndarray:
        scales = membership.of_role(group, Role.SCALE)
        chosen = [member for member in scales if is_op(member.node, "BatchNormalization")] or scales
        if not chosen:
            return combined(_norms(membership, membership.makers(group)), "norm")
        arrays = [(member, np.abs(membership.weights.array(member.value))) for member in chosen]
        return combined([member.sums(array) for member, array in arrays], self.combine)

    def remarks(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> tuple[str, ...]:
        """Which groups pass no BatchNormalization, and what ranks them."""
        membership = Membership(knowledge)
        without = groups_without_batchnorm(membership, groups)
        other = sum(bool(membership.of_role(group, Role.SCALE)) for group in without)
        by = " or ".join(["other scales"] * (other > 0) + ["l2"] * (other < len(without)))
        return without_batchnorm(without, groups, by)


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform in [0, 1): the baseline that every criterion has to beat.

    Drawn anew for each group from `Knowledge.seed` and the name of the group, so that which other groups are scored
    makes no difference. Comparable between groups.

    Example:
        >>> Random().needs
        'weights'
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[str] = "weights"

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        return {group.name: self._one(knowledge.seed, group) for group in groups}

    def _one(self, seed: int, group: ChannelGroup) -> np.ndarray:
        return np.random.default_rng([seed, zlib.crc32(group.name.encode())]).random(group.units)


def groups_without_batchnorm(membership: Membership, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Those of the groups whose channels pass no BatchNormalization."""
    return [
        group
        for group in groups
        if not any(is_op(member.node, "BatchNormalization") for member in membership.of_role(group, Role.SCALE))
    ]


def without_batchnorm(without: Sequence[ChannelGroup], groups: Sequence[ChannelGroup], by: str) -> tuple[str, ...]:
    """The remark on groups that pass no BatchNormalization and are ranked by something else; none without such."""
    if not without:
        return ()
    extent = "" if len(without) == len(groups) else f" in {len(without)} of {len(groups)} groups"
    return (
        f"no BatchNormalization{extent}, ranked by {by} there" if extent else f"no BatchNormalization, ranked by {by}",
    )


def _norms(membership: Membership, members: Sequence[Member]) -> list[np.ndarray]:
    return [np.sqrt(member.sums(np.square(membership.weights.array(member.value)))) for member in members]


def _folded_norm(membership: Membership, member: Member) -> np.ndarray:
    factor = membership.following(member).factor
    rows = np.square(member.arranged(membership.weights.array(member.value))).sum(axis=1)
    return np.sqrt(member.owned.sums(rows * np.square(factor)))
