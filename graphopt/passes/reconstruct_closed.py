"""Channels that were removed, rebuilt from those that stay, in every linear operator that reads them.

A removed channel is taken for a combination of the others, A_p = sum_k s_pk A_k. The combination folds into whatever
reads them: U[:, k] += sum_p s_pk U[:, p], and what is missing on average into the bias. Nothing new is in the graph.
Where S comes from is the form, see `graphopt.passes.reconstruct_forms`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.inputs.gaussian import Moments, propagate_moments
from graphopt.ir.channels import ChannelGroup, ChannelGroups
from graphopt.ir.linear import channel_axis
from graphopt.ir.rewrite import DeclinedError, Rewriter, integers, is_op
from graphopt.passes.contract import Context
from graphopt.passes.reconstruct_chain import PASSING, Operator, Places, Rows, Tracer, operator_at
from graphopt.passes.reconstruct_forms import FORMS, ClosedForm, Lbyl, MomentMatch, NeuronMerging, Ridge, closed_form

__all__ = ["FORMS", "ClosedForm", "Lbyl", "MomentMatch", "NeuronMerging", "Ridge", "closed_form", "rebuild_closed"]

_WHAT = "reconstruct"


def rebuild_closed(
    reference: ir.Model,
    damaged: ir.Model,
    groups: ChannelGroups,
    selection: Mapping[str, Sequence[int]],
    *,
    form: str | ClosedForm = "ridge",
    mean_correction: bool = True,
    context: Context,
    bits: int | None = None,
) -> int:
    """Fold what was removed into what stays, consumer by consumer in the order of the graph.

    Filters of a layer are those of the rebuilt model: a layer behind a rebuilt one is first brought to the inputs
    that are left, all its rows, the removed ones too (as if they had been rebuilt before they went), so that rows
    are compared in one space. All is computed from `reference`, in float64; weights of linear operators in `damaged`
    are overwritten, nothing else changes.

    Args:
        reference: the model before; it is not changed.
        damaged: `remove_channels(reference, selection)`, rewritten in place.
        groups: `channel_groups(reference)`.
        selection: names of groups to the units that went.
        form: one of `FORMS` by name, or a form with options.
        mean_correction: whether what is missing on average (by propagated Gaussian moments, BatchNormalization
            statistics where there are some) goes into the bias of the consumer; at padded borders it is too much.
        context: sizes and input specs are read; a consumer that cannot take a combination up leaves a remark.
        bits: where the weights will be rounded to so many bits, channels are rebuilt from the rounded ones, all of
            them, kept ones too. None where they stay as they are.

    Returns:
        How many operators were rebuilt.

    Raises:
        GraphoptError: the form is unknown, or `bits` is below 2.
        SelectionError: the selection does not fit the groups.

    Example:
        >>> import graphopt, onnx.parser
        >>> model = graphopt.load(onnx.parser.parse_model('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[n,2] x) => (float[n,1] y) <float[2,3] a = {1,2,0,1,2,1}, float[3,1] b = {1,1,1}>
        ...     { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }'''))
        >>> groups, selection = graphopt.channel_groups(model), {"mlp hidden of a": [1]}
        >>> smaller = graphopt.remove_channels(model, selection, groups=groups)
        >>> rebuild_closed(model, smaller, groups, selection, form=Ridge(alpha2=0.0), context=Context())
        1
        >>> smaller.graph.initializers["b"].const_value.numpy().round(4).tolist()  # 1 + 2: the second was twice the first
        [[3.0], [1.0]]
    """  # noqa: E501
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or bits < 2):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GraphoptError(
            f"weights cannot be rounded to {bits!r} bits", help="give a whole number from 2 on, or None"
        )
    return _Rebuild(reference, damaged, groups, selection, closed_form(form), mean_correction, context, bits).run()


@dataclass(frozen=True, eq=False)
class _Mix:
    """How the removed channels of one group are to be read from the others, at one consumer.

    Attributes:
        coordinates: int64 [units, positions] on the input axis of the consumer.
        wanted, kept: units that are rebuilt, and those that they are rebuilt from.
        matrix: S, float64 [wanted, kept].
        missing: float64 [wanted, positions], constant that goes with it.
    """

    coordinates: np.ndarray
    wanted: np.ndarray
    kept: np.ndarray
    matrix: np.ndarray
    missing: np.ndarray


class _Rebuild:
    """One reconstruction."""

    def __init__(
        self,
        reference: ir.Model,
        damaged: ir.Model,
        groups: ChannelGroups,
        selection: Mapping[str, Sequence[int]],
        form: ClosedForm,
        mean_correction: bool,
        context: Context,
        bits: int | None,
    ) -> None:
        self.reference, self.form, self.context, self.bits = reference, form, context, bits
        self.mean_correction = mean_correction
        chosen: dict[str | ChannelGroup, Sequence[int]] = {**selection}
        self.places = Places(groups, groups.atoms(chosen))
        self.removed = {
            name: np.unique(np.asarray(list(units), np.int64)) for name, units in selection.items() if len(list(units))
        }
        self.pruned = [group for group in groups if group.name in self.removed]
        if bits is not None:
            self.pruned = [group for group in groups if group.prunable]
        self.rebuilt: dict[ir.Node, tuple[np.ndarray, np.ndarray] | None] = {}
        self.tracer = Tracer(self.places, self.rebuilt, bits)
        self.rewriter, self.nodes = Rewriter(damaged), {node.name: node for node in damaged.graph}
        self.stored = 0
        self._moments: dict[str, Moments] | None = None
        self._mixes: dict[tuple[str, ir.Value, int], _Mix | DeclinedError] = {}

    @property
    def moments(self) -> dict[str, Moments]:
        """Propagated moments of the reference, when they are first needed."""
        if self._moments is None:
            self._moments = propagate_moments(self.reference, specs=self.context.specs, sizes=self.context.sizes)
        return self._moments

    def run(self) -> int:
        for node in self.reference.graph:
            try:
                operator = operator_at(node)
            except DeclinedError:
                continue
            if operator is not None:
                self._consumer(operator)
        return self.stored

    def _consumer(self, operator: Operator) -> None:
        """Bring one linear operator to the inputs that are left."""
        linear, node = operator.linear, operator.node
        rank, product = self.places.rank(linear.data), self.places.rank(operator.product)
        if rank is None or product is None:
            return
        axis = channel_axis(linear.in_axis, rank)
        kept = self.places.kept(linear.data, axis)
        try:
            layer = _Layer(operator, kept)
        except DeclinedError as refusal:
            self.rebuilt[node] = None
            self.context.missed(_WHAT, refusal.why, node)
            return
        touched = False
        for group in self.pruned:
            try:
                if self.places.coordinates(group, linear.data, axis) is None:
                    continue
                if operator.is_shared:
                    raise DeclinedError("another node reads the same weight")
                layer.add(self._mix(group, linear.data, axis), self.bits is not None)
                touched = True
            except DeclinedError as refusal:
                self.context.missed(_WHAT, f"{refusal.why} (channels of {group.name})", node)
        self.rebuilt[node] = layer.weight, layer.bias
        if touched:
            self._store(operator, layer, self.places.kept(operator.product, channel_axis(linear.out_axis, product)))

    def _store(self, operator: Operator, layer: _Layer, rows: np.ndarray) -> None:
        target = self.nodes.get(operator.node.name)
        try:
            found = None if target is None else operator_at(target)
            weight = layer.weight[rows]
            if found is None or found.weight().shape != weight.shape:
                raise DeclinedError("the damaged model does not hold it in the shape that was expected")
            found.store(self.rewriter, weight, layer.bias[rows])
            self.stored += 1
        except DeclinedError as refusal:
            self.context.missed(_WHAT, refusal.why, operator.node)

    # How channels are combined ------------------------------------------------------------------------------

    def _mix(self, group: ChannelGroup, value: ir.Value, axis: int) -> _Mix:
        key = group.name, value, axis
        if key not in self._mixes:
            try:
                self._mixes[key] = self._combination(group, value, axis)
            except DeclinedError as refusal:
                self._mixes[key] = refusal
        found = self._mixes[key]
        if isinstance(found, DeclinedError):
            raise found
        return found

    def _combination(self, group: ChannelGroup, value: ir.Value, axis: int) -> _Mix:
        coordinates = self.places.coordinates(group, value, axis)
        assert coordinates is not None
        units, gone = group.units, self.removed.get(group.name, np.zeros(0, np.int64))
        kept = np.setdiff1d(np.arange(units), gone)
        wanted = gone if self.bits is None else np.arange(units)
        prior = (wanted[:, None] == kept[None]).astype(np.float64)
        if self.form.needs_covariance:
            if self.bits is not None:
                raise DeclinedError("propagated moments do not tell what rounding does")
            shift = np.zeros((units, coordinates.shape[1]))
            rows = Rows(
                np.zeros((0, 0)), np.zeros((0, 0)), np.zeros(0), shift, covariance=self._covariance(group, value)
            )
        else:
            rows = self.tracer.rows(group, value)
        dictionary = kept if self.bits is None else kept + units
        matrix = self.form.combine(rows, wanted, dictionary, prior)
        if rows.gram.size:  # what does not depend on the input is a constant, and left to the mean
            constant = np.diag(rows.gram)[wanted] <= 0
            matrix[constant] = prior[constant]
        if not np.isfinite(matrix).all():
            raise DeclinedError("its filters are not finite")
        missing = self._missing(value, coordinates, wanted, kept, matrix, rows)
        return _Mix(coordinates, wanted, kept, matrix, missing)

    def _missing(
        self, value: ir.Value, coordinates: np.ndarray, wanted: np.ndarray, kept: np.ndarray, matrix: np.ndarray,
        rows: Rows,
    ) -> np.ndarray:  # fmt: skip
        """Expected value of what the combination leaves; without mean correction, only its exact constant part."""
        if self.mean_correction:
            moments = self.moments.get(value.name or "")
            if moments is not None and moments.channels > coordinates.max():
                mean = moments.mean[coordinates]
                return mean[wanted] - matrix @ mean[kept]
            self.context.missed("correct means", "the mean of its channels is unknown", value)
        rebuilt = matrix.any(axis=1, keepdims=True)
        return np.where(rebuilt, rows.shift[wanted] - matrix @ rows.shift[kept], 0.0)

    def _covariance(self, group: ChannelGroup, value: ir.Value) -> np.ndarray:
        """Covariance of the units at a value: over positions, summed; or before it was flattened, where too large."""
        current: ir.Value | None = value
        while current is not None:
            place, moments = self.places.place(group, current), self.moments.get(current.name or "")
            if place is not None and moments is not None and moments.axis == place[0]:
                covariance = moments.covariance
                if covariance is not None:
                    return sum(
                        (covariance[np.ix_(column, column)] for column in place[1].T), np.zeros((group.units,) * 2)
                    )
            node = current.producer()
            current = node.inputs[0] if node is not None and is_op(node, *PASSING) else None
        raise DeclinedError("the covariance of its channels is unknown")


class _Layer:
    """A linear operator on the way to fewer inputs; all rows, also those that are no longer there.

    Attributes:
        weight: float64 [M, kept of C / groups, *kernel].
        bias: float64 [M].
    """

    def __init__(self, operator: Operator, kept: np.ndarray) -> None:
        linear = operator.linear
        self.groups, self.full, self.bias = linear.groups, operator.weight(), operator.bias()
        blocks: np.ndarray = kept.reshape(linear.groups, -1)
        live: np.ndarray = np.any(blocks, axis=1)
        if len(np.unique(blocks[live].sum(axis=1))) > 1:
            raise DeclinedError("its groups keep different numbers of channels")
        cut = not blocks[live].all()
        blocks = np.where(live[:, None], blocks, blocks[live][:1]) if cut else np.ones(blocks.shape, bool)
        self.kept = blocks & live[:, None]
        rows = len(self.full) // linear.groups
        self.weight = np.concatenate(
            [self.full[block * rows : (block + 1) * rows, mask] for block, mask in enumerate(blocks)]
        )
        self.place = np.cumsum(blocks, axis=1) - 1
        strides = integers(operator.node, "strides") or ()
        self.phases = math.prod(strides) if is_op(operator.node, "ConvTranspose") else 1

    def add(self, mix: _Mix, replaces: bool) -> None:
        """Let what is read from the units that went be read from the others."""
        columns = self.full.shape[1]
        block, column = mix.coordinates // columns, mix.coordinates % columns
        if self.groups > 1 and (block != block[:1]).any():
            raise DeclinedError("its groups read different channels, and do not mix them (depthwise)")
        rows = len(self.full) // self.groups
        base = self.weight.copy() if replaces else self.weight
        bias = self.bias.copy()
        for position in range(mix.coordinates.shape[1]):
            of_block = int(block[0, position])
            part = slice(of_block * rows, (of_block + 1) * rows)
            source, target = column[mix.wanted, position], column[mix.kept, position]
            stays = self.kept[of_block, target]
            taken = self.full[part][:, source]
            places = self.place[of_block, target[stays]]
            if replaces:
                base[part, places] = 0.0
            base[part, places] += np.einsum("mp...,pk->mk...", taken, mix.matrix[:, stays], optimize=True)
            spread = taken.reshape(rows, len(source), -1).sum(axis=2) / self.phases
            bias[part] += spread @ mix.missing[:, position]
        self.weight, self.bias = base, bias
