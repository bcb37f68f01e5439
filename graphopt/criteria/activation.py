"""Criteria of activity: what a channel says on inputs, measured in onnxruntime."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.criteria.contract import Criterion, Knowledge, check_combination, combined, required_feeds
from graphopt.criteria.members import Membership
from graphopt.criteria.observation import by_channel, differing_shapes, living_values, stream
from graphopt.errors import GraphoptError
from graphopt.ir.channels import ChannelGroup


@dataclass(frozen=True)
class _Activity(Criterion):
    """What all criteria of activity share: where they look, and how places are combined."""

    needs: ClassVar[str] = "inputs"
    combine: str = "sum"

    def __post_init__(self) -> None:
        check_combination(self.combine)

    def scores(self, knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """See `Criterion`."""
        membership = Membership(knowledge)
        places = {group.name: living_values(membership, group, knowledge.model) for group in groups}
        readings: dict[tuple[ir.Value, int], _Reading] = {}
        looking: dict[ir.Value, set[int]] = {}
        for group in groups:
            for value in places[group.name]:
                looking.setdefault(value, set()).update(membership.ownership(group).axes(value))

        def see(value: ir.Value, array: np.ndarray) -> None:
            for axis in looking[value]:
                readings.setdefault((value, axis), self._reading()).see(value, axis, array)

        stream(knowledge.model, list(looking), required_feeds(self, knowledge), see, knowledge.threads)
        return {group.name: self._score(membership, group, places[group.name], readings) for group in groups}

    def _score(
        self,
        membership: Membership,
        group: ChannelGroup,
        values: Sequence[ir.Value],
        readings: Mapping[tuple[ir.Value, int], _Reading],
    ) -> np.ndarray:
        ownership = membership.ownership(group)
        parts: list[np.ndarray] = []
        for value in values:
            for axis in ownership.axes(value):
                found = readings[value, axis].result()
                owned = ownership.owned(value, axis, len(found))
                counts = np.maximum(owned.sums(np.ones(len(found))), 1)
                parts.append(owned.sums(found) / counts)
        if parts:
            return combined(parts, self.combine)
        arrays = [(member, membership.weights.array(member.value)) for member in membership.makers(group)]
        return combined([np.sqrt(member.sums(np.square(array))) for member, array in arrays], "norm")

    @abc.abstractmethod
    def _reading(self) -> _Reading:
        """What gathers the activity of each coordinate of an axis."""


@dataclass(frozen=True)
class ActivationMean(_Activity):
    """Mean of |a|, the absolute activation of a channel over inputs and positions.

    Looked at is what the consumers of the channels read (behind activations and normalisations). A unit with several
    coordinates there counts with their mean. Channels that are never active score 0. Channels inside subgraphs alone
    cannot be seen; they score by `L2`. Comparable within a group.

    Args:
        combine: how several values that carry the channels become one score: "sum", "mean", "max" or "norm".

    Raises:
        DataError: there are no inputs, or they do not fit the model.

    Example:
        >>> import graphopt
        >>> model = graphopt.load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,1] x) =>
        ...     (float[n,1] y) <float[1,2] a = {1,-1}, float[2,1] b = {1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> groups = graphopt.channel_groups(model)
        >>> knowledge = Knowledge(model, groups, [{"x": np.array([[1.0], [2.0]], np.float32)}])
        >>> ActivationMean().scores(knowledge, [groups.named("mlp hidden of a")])
        {'mlp hidden of a': array([1.5, 0. ])}
    """

    name: ClassVar[str] = "activation-mean"

    def _reading(self) -> _Reading:
        return _Mean()


@dataclass(frozen=True)
class ActivationVariance(_Activity):
    """Variance of the activation of a channel over inputs and positions: what its mean could not stand in for.

    Where it looks, what else it scores, and when it raises: as `ActivationMean`. A constant channel scores 0.

    Args:
        combine: how several values that carry the channels become one score: "sum", "mean", "max" or "norm".

    Example:
        >>> ActivationVariance(combine="max").combine
        'max'
    """

    name: ClassVar[str] = "activation-variance"

    def _reading(self) -> _Reading:
        return _Variance()


@dataclass(frozen=True)
class Apoz(_Activity):
    """Share of activations that are not 0: one minus the "average percentage of zeros" of Hu et al. 2016.

    Made for ReLU and its kin. Smooth activations are hardly ever exactly 0; give a `threshold` for them. Channels that
    are 0 equally often are ordered by their mean |a|, in the digits behind the share. Where it looks, what else it
    scores, and when it raises: as `ActivationMean`. Comparable between groups, being a share,
    where `combine` is "mean" or "max".

    Args:
        combine: how several values that carry the channels become one score: "mean", "max", "sum" or "norm".
        threshold: |a| up to which an activation counts as 0.

    Example:
        >>> Apoz(threshold=0.01).needs
        'inputs'
    """

    name: ClassVar[str] = "apoz"
    combine: str = "mean"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold >= 0:
            raise GraphoptError(f"threshold is {self.threshold}", help="give an activation of at least 0")

    def _reading(self) -> _Reading:
        return _Share(self.threshold)


class _Reading(abc.ABC):
    """Gathers one number for each coordinate of an axis."""

    def see(self, value: ir.Value, axis: int, array: np.ndarray) -> None:
        """Take in one array."""
        channels = by_channel(array, axis)
        previous = self.length()
        if previous is not None and previous != len(channels):
            raise differing_shapes(value)
        self.add(channels)

    @abc.abstractmethod
    def length(self) -> int | None:
        """Number of coordinates so far, None before the first array."""

    @abc.abstractmethod
    def add(self, channels: np.ndarray) -> None:
        """Take in [coordinates, samples]."""

    @abc.abstractmethod
    def result(self) -> np.ndarray:
        """Float64 [coordinates]."""


class _Mean(_Reading):
    """Mean absolute value."""

    def __init__(self) -> None:
        self.count = 0
        self.total: np.ndarray | None = None

    def length(self) -> int | None:
        return None if self.total is None else len(self.total)

    def add(self, channels: np.ndarray) -> None:
        self.count += channels.shape[1]
        total = np.abs(channels).sum(axis=1, dtype=np.float64)
        self.total = total if self.total is None else self.total + total

    def result(self) -> np.ndarray:
        assert self.total is not None
        return self.total / max(self.count, 1)


class _Share(_Mean):
    """Share of values beyond a threshold; ties are ordered by the mean absolute value."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.beyond = np.zeros(())

    def add(self, channels: np.ndarray) -> None:
        super().add(channels)
        self.beyond = self.beyond + (np.abs(channels) > self.threshold).sum(axis=1, dtype=np.float64)

    def result(self) -> np.ndarray:
        mean = super().result()
        largest = mean.max(initial=0.0)
        # Half a count at most: never more than one activation that is not 0.
        return (self.beyond + mean / (2 * largest if largest > 0 else 1.0)) / (self.count + 0.5)


class _Variance(_Reading):
    """Variance, by merging the moments of batches (Chan, Golub, LeVeque 1979), which loses no digits."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: np.ndarray | None = None
        self.squares = np.zeros(0)

    def length(self) -> int | None:
        return None if self.mean is None else len(self.mean)

    def add(self, channels: np.ndarray) -> None:
        samples = channels.shape[1]
        if samples == 0:
            return
        mean = channels.mean(axis=1, dtype=np.float64)
        squares = np.square(channels - mean[:, None]).sum(axis=1)
        if self.mean is None:
            self.count, self.mean, self.squares = samples, mean, squares
            return
        apart = mean - self.mean
        total = self.count + samples
        self.mean = self.mean + apart * (samples / total)
        self.squares = self.squares + squares + np.square(apart) * (self.count * samples / total)
        self.count = total

    def result(self) -> np.ndarray:
        return self.squares / max(self.count, 1)
