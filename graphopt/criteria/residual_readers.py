"""What reads the channels of each group and could be solved again without some of them: `graphopt.criteria.residual`.

Everything here is measured on the unpruned model, in one run of it, one set of patches after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import scipy.linalg

from graphopt.criteria.contract import Knowledge
from graphopt.criteria.elimination import Losses, Reader
from graphopt.criteria.ends import end_of, shrunk, variance_at
from graphopt.criteria.members import Membership
from graphopt.criteria.ownership import Owned
from graphopt.errors import DataError
from graphopt.ir.channels import ChannelGroup
from graphopt.ir.linear import LINEAR_OPS, channel_axis, linear_at
from graphopt.ir.linear_rows import LinearRows, linear_rows
from graphopt.ir.pieces import Pieces
from graphopt.ir.rewrite import DeclinedError, constant_tensor, is_op

_ROWS_A_COLUMN, _ROWS = 16, 8192
"""How many rows are looked at for each column, and beyond; with as many for each, covariances are taken as they are."""
_Key = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class _Operator:
    """A linear operator that mixes channels.

    Attributes:
        node: of the model.
        data: what it reads.
        rows: how its arrays become matrices.
        end: what it makes, behind what scales and shifts it and behind the addition of another branch.
        factor: what its results are multiplied with on the way there, float64 [M].
    """

    node: ir.Node
    data: ir.Value
    rows: LinearRows
    end: ir.Value
    factor: np.ndarray


@dataclass
class _Patches:
    """Operators that read the same patches, and the groups whose channels are in them."""

    operators: list[_Operator] = field(default_factory=list[_Operator])
    groups: list[tuple[ChannelGroup, Owned]] = field(default_factory=list["tuple[ChannelGroup, Owned]"])

    @property
    def rows(self) -> LinearRows:
        return self.operators[0].rows

    @property
    def data(self) -> ir.Value:
        return self.operators[0].data


def group_losses(
    knowledge: Knowledge,
    groups: Sequence[ChannelGroup],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    ridge: float,
    columns: int,
) -> Iterator[tuple[ChannelGroup, Losses]]:
    """What the operators lose that read the channels of each group, as each becomes known.

    Args:
        knowledge: the model.
        groups: of it.
        feeds: batches.
        ridge: relative to the mean variance of a column.
        columns: up to so many are solved for.

    Yields:
        Groups with at least one operator that can be solved again, in the order of the graph, each once.

    Raises:
        DataError: there are no inputs, they do not fit the model, or an activation is NaN or infinite.
    """
    found = _patches(knowledge, groups)
    if not found:
        return
    open_sets = {group.name: 0 for group in groups}
    for patches in found:
        for group, _ in patches.groups:
            open_sets[group.name] += 1
    losses = {group.name: Losses((), np.zeros(group.units)) for group in groups}
    pieces = Pieces(knowledge.model, feeds, threads=knowledge.threads)
    pieces.hold(patches.data for patches in found)
    for patches in found:
        survey = _Survey(patches, pieces, ridge, columns, knowledge.seed)
        # held once from the beginning and once by computing
        pieces.release([patches.data, patches.data, *(operator.end for operator in patches.operators)])
        for group, owned in patches.groups:
            losses[group.name] = survey.add_to(losses[group.name], owned)
            open_sets[group.name] -= 1
            if not open_sets[group.name]:
                yield group, losses.pop(group.name)


def _patches(knowledge: Knowledge, groups: Sequence[ChannelGroup]) -> list[_Patches]:
    """The operators that mix the channels of some groups, by what they read, in the order of the graph."""
    membership = Membership(knowledge)
    reading: dict[ir.Node, list[ChannelGroup]] = {}
    for group in groups:
        for node in membership.readers(group):
            reading.setdefault(node, []).append(group)
    found: dict[_Key, _Patches] = {}
    for node in knowledge.model.graph:
        if node not in reading:
            continue
        try:
            operator = _mixing(node, membership)
        except DeclinedError:
            continue
        if operator is None:
            continue
        pairs = [(group, _owned(operator, group, membership, knowledge)) for group in reading[node]]
        owners = [(group, owned) for group, owned in pairs if owned is not None]
        if owners:
            rows, linear = operator.rows, operator.rows.linear
            placing = (rows.strides, rows.dilations, rows.begins, rows.ends, rows.spread)
            names = tuple(group.name for group, _ in owners)
            key = (operator.data, linear.in_axis, linear.kernel, linear.groups, placing, names)
            found.setdefault(key, _Patches(groups=owners)).operators.append(operator)
    return list(found.values())


def _mixing(node: ir.Node, membership: Membership) -> _Operator | None:
    """A node as an operator; None where it does not sum over channels of computed data.

    Raises:
        DeclinedError: its weight or its padding has a form that cannot be worked with.
    """
    if not is_op(node, *LINEAR_OPS):
        return None
    linear = linear_at(_with_constants(node, membership))
    if linear is None or linear.in_channels // linear.groups < 2:
        return None
    data = node.inputs[linear.data_index]
    if data is None or membership.is_weight(data):
        return None
    return _Operator(node, data, linear_rows(linear), *end_of(node, linear, membership))


def _with_constants(node: ir.Node, membership: Membership) -> ir.Node:
    """A node like `node`, of no graph, where weights that the graph computes (transposes, dequantizes) are constants.

    The node itself where there are none.
    """
    weights = [value is not None and membership.is_weight(value) for value in node.inputs]
    pairs = list(zip(node.inputs, weights, strict=True))
    if all(constant_tensor(value) is not None for value, known in pairs if known):
        return node
    operands: list[ir.Value | None] = []
    for value, known in pairs:
        if value is None:
            operands.append(None)
        elif known:
            tensor = ir.Tensor(membership.weights.array(value), name=value.name)
            operands.append(ir.node("Constant", [], {"value": tensor}).outputs[0])
        else:  # a use of the value itself would change the model
            operands.append(ir.Value(name=value.name, shape=value.shape, type=value.type))
    return ir.Node(node.domain, node.op_type, operands, tuple(node.attributes.values()), num_outputs=1)


def _owned(operator: _Operator, group: ChannelGroup, membership: Membership, knowledge: Knowledge) -> Owned | None:
    """Which of the channels that an operator reads belong to which unit; None where it is not one unit each."""
    linear = operator.rows.linear
    axis = channel_axis(linear.in_axis, len(knowledge.groups.analysis.state.tracks[operator.data]))
    ownership = membership.ownership(group)
    if axis not in ownership.axes(operator.data):
        return None
    owned = ownership.owned(operator.data, axis, linear.in_channels)
    single = len(np.unique(owned.coordinates)) == len(owned.coordinates)
    return owned if single and owned.coordinates.max(initial=0) < linear.in_channels else None


class _Survey:
    """The covariance of one set of patches, and the weights of the operators that read it."""

    def __init__(self, patches: _Patches, pieces: Pieces, ridge: float, columns: int, seed: int) -> None:
        rows = patches.rows
        pieces.compute([patches.data, *(operator.end for operator in patches.operators)])
        channels = rows.linear.in_channels
        every = rows.columns * rows.groups
        self._taps = every // channels if every <= columns else 1
        sample = _Sample(rows, patches.data, pieces, seed)
        self._covariance = sample.variances() if channels > columns else sample.covariances(self._taps)
        self._weight = np.concatenate([self._scaled(each, pieces) for each in patches.operators], axis=1)
        variance = _diagonal(self._covariance).mean(axis=1)
        self._ridge = np.where(variance > 0, ridge * variance, 1.0)
        self._inverse: list[np.ndarray] = []
        if self._covariance.ndim == 3 and self._weight.any():
            pairs = zip(self._covariance, self._ridge, strict=True)
            self._inverse = [_inverse(block, least) for block, least in pairs]

    def add_to(self, losses: Losses, owned: Owned) -> Losses:
        """The losses of a group with those that are measured here."""
        if not self._weight.any():
            return losses
        if not self._inverse:
            energy = np.square(self._weight).sum(axis=1) * self._covariance
            return Losses(losses.readers, losses.alone + owned.sums(energy.reshape(-1)))
        return Losses((*losses.readers, self._reader(owned)), losses.alone)

    def _scaled(self, operator: _Operator, pieces: Pieces) -> np.ndarray:
        """The weight [G, rows, K] of an operator, such that what it loses is a share of the variance at its end."""
        weight = operator.rows.weight() * operator.factor.reshape(operator.rows.groups, -1, 1)
        groups, _, columns = weight.shape
        channels = operator.rows.linear.in_channels // groups
        if columns != channels * self._taps:
            weight = weight.reshape(groups, -1, channels, columns // channels).swapaxes(2, 3)
            weight = weight.reshape(groups, -1, channels)
        variance = variance_at(operator.rows, operator.end, pieces)
        if variance is None:
            variance = _energy(weight, self._covariance)
        return weight / np.sqrt(variance) if variance > 0 else np.zeros_like(weight)

    def _reader(self, owned: Owned) -> Reader:
        """H, W and ridge over the columns that the units of a group own."""
        channels = len(self._inverse) * self._covariance.shape[1] // self._taps
        # Units that own fewer channels than others get columns that nothing reads.
        places = owned.rows(np.arange(1, channels + 1)[:, None])[..., 0].reshape(-1) - 1
        columns = (places[:, None] * self._taps + np.arange(self._taps)).reshape(-1)
        real = np.repeat(places >= 0, self._taps)
        block, within = np.divmod(columns, self._covariance.shape[1])
        inverse = np.eye(len(columns))
        weight = np.zeros((*self._weight.shape[:2], len(columns)))
        for group, each in enumerate(self._inverse):
            at = np.flatnonzero(real & (block == group))
            inverse[np.ix_(at, at)] = each[np.ix_(within[at], within[at])]
            weight[group][:, at] = self._weight[group][:, within[at]]
        weight = weight.reshape(-1, len(columns))
        if len(weight) > len(columns):
            weight = np.asarray(np.linalg.qr(weight, mode="r"))  # the same products W^T W in fewer rows
        ridge = np.where(real, self._ridge[np.where(real, block, 0)], 1.0)
        return Reader(inverse, weight, ridge, owned.count)


class _Sample:
    """Patches of one value: as many rows of each batch as its share, drawn at random."""

    def __init__(self, rows: LinearRows, value: ir.Value, pieces: Pieces, seed: int) -> None:
        self.rows, self._value, self._pieces = rows, value, pieces
        counts = [rows.count(self._data(batch)) for batch in range(pieces.batches)]
        share = (_ROWS_A_COLUMN * rows.columns + _ROWS) / max(sum(counts), 1)
        generator = np.random.default_rng(seed)
        self._chosen = [
            None if share >= 1 else np.sort(generator.choice(count, max(1, int(count * share)), replace=False))
            for count in counts
        ]

    def _data(self, batch: int) -> np.ndarray:
        return np.asarray(self._pieces.array(self._value, batch), np.float32)

    def patches(self) -> Iterator[np.ndarray]:
        """Patches [G, R, K] of each batch, from which the mean of the first batch is taken: sums stay precise."""
        shift: np.ndarray | None = None
        for batch, chosen in enumerate(self._chosen):
            patches = self.rows.patches(self._data(batch), chosen)
            if not np.isfinite(patches).all():
                raise DataError(
                    "an activation is NaN or infinite on these inputs",
                    where=self._value.name,
                    help="pass inputs of the range that the model was trained on",
                )
            if shift is None:
                shift = patches.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
            yield patches - shift

    def covariances(self, taps: int) -> np.ndarray:
        """Float64 [G, K, K]; with one of several taps, those of the channels, averaged over the taps."""
        groups, columns = self.rows.groups, self.rows.linear.in_channels // self.rows.groups * taps
        inner = np.zeros((groups, columns, columns))
        mean, count = np.zeros((groups, columns, self.rows.columns // columns)), 0
        for patches in self.patches():
            by_tap = patches.reshape(*patches.shape[:2], columns, -1)
            mean += by_tap.sum(axis=1, dtype=np.float64)
            rows = by_tap.swapaxes(2, 3).reshape(groups, -1, columns)
            inner += rows.transpose(0, 2, 1) @ rows
            count += patches.shape[1]
        mean /= max(count, 1)
        covariance = (inner / max(count, 1) - mean @ mean.swapaxes(1, 2)) / mean.shape[2]
        return shrunk(covariance, count, _ROWS_A_COLUMN)

    def variances(self) -> np.ndarray:
        """Variances of the channels alone, averaged over the taps, float64 [G, C / G]."""
        groups, channels = self.rows.groups, self.rows.linear.in_channels // self.rows.groups
        squares, mean, count = np.zeros((groups, self.rows.columns)), np.zeros((groups, self.rows.columns)), 0
        for patches in self.patches():
            squares += np.square(patches).sum(axis=1, dtype=np.float64)
            mean += patches.sum(axis=1, dtype=np.float64)
            count += patches.shape[1]
        variance = squares / max(count, 1) - np.square(mean / max(count, 1))
        return np.maximum(variance, 0).reshape(groups, channels, -1).mean(axis=2)


def _inverse(covariance: np.ndarray, ridge: float) -> np.ndarray:
    """(C + l I)^-1."""
    regular = covariance + ridge * np.eye(len(covariance))
    factor = scipy.linalg.cho_factor(regular, lower=True, overwrite_a=True)
    inverse = scipy.linalg.cho_solve(factor, np.eye(len(covariance)), overwrite_b=True)
    return (inverse + inverse.T) / 2


def _diagonal(covariance: np.ndarray) -> np.ndarray:
    """Variances [G, K] of covariances [G, K, K] or of variances."""
    return covariance if covariance.ndim == 2 else np.einsum("gkk->gk", covariance)


def _energy(weight: np.ndarray, covariance: np.ndarray) -> float:
    """tr(W C W^T) of a weight [G, M / G, K]."""
    product = weight * covariance[:, None, :] if covariance.ndim == 2 else weight @ covariance
    return float(np.einsum("gmk,gmk->", product, weight))
