"""Forms that a layer may have besides dense: a chain of two, along channels or along the axes of its kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.factorizations import FORMS, Metric, candidate_ranks
from graphopt.factorizations import Layer as FactorizedLayer
from graphopt.ir.rewrite import is_op
from graphopt.search.collaborative_layers import Layer, macs
from graphopt.search.collaborative_states import CovarianceState
from graphopt.search.collaborative_surrogates import States
from graphopt.search.collaborative_tables import Tables
from graphopt.search.costs import CostModel

CHANNEL, PRODUCT, SPATIAL = "channel-svd", "svd", "spatial-svd"
_MOST_COLUMNS = 2400
"""Columns of a weight up to which it is taken apart along the axes of its kernel."""


@dataclass(frozen=True)
class LayerForm:
    """A chain of two layers in the place of one.

    Attributes:
        form: name in `graphopt.factorizations.FORMS`.
        rank: of the chain.
    """

    form: str
    rank: int

    def __str__(self) -> str:
        return f"{self.form} {self.rank}"


def low_rank_form(layer: Layer) -> str:
    """The form whose rank is that of the weight as a matrix [N, C T]."""
    return CHANNEL if layer.taps > 1 else PRODUCT


class LayerForms:
    """All forms of all layers of a model, with what each loses and multiplies.

    Forms along channels lose what `Tables` says at every width. Forms along the axes of the kernel are taken apart at
    full width, in the metric of the inputs; what they lose there is added to what the width loses, in proportion to the
    outputs that are left: narrower layers need less rank, so it is never too little.

    Attributes:
        layers: all layers, those with no other form included.
        of: name of a layer to its forms, those that multiply most first within each kind.
    """

    def __init__(self, tables: Tables, states: Mapping[str, States], costs: CostModel, round_to: int | None) -> None:
        """Take the layers apart.

        Args:
            tables: the layers and what their ranks lose.
            states: of the layers.
            costs: of the same model.
            round_to: as for `candidate_ranks`.
        """
        self._tables, self.layers = tables, tables.layers
        self._layers = {layer.name: layer for layer in tables.layers}
        self._shapes: dict[str, FactorizedLayer] = {}
        self._spatial: dict[tuple[str, int], float] = {}
        self._known: dict[tuple[object, ...], float] = {}
        self.of: dict[str, tuple[LayerForm, ...]] = {}
        for layer in tables.layers:
            form = low_rank_form(layer)
            found = [LayerForm(form, rank) for rank in reversed(tables.ranks[layer.name])]
            found += self._along_axes(layer, states, costs, round_to)
            if found:
                self.of[layer.name] = tuple(found)

    def loss(self, layer: Layer, removed: Mapping[str, int], form: LayerForm | None) -> float:
        """What a layer loses with these units gone, in a form; None is dense."""
        if form is None or form.form != SPATIAL:
            return self._tables.of(layer, removed, None if form is None else form.rank)
        share = layer.kept_outputs(removed) / layer.outputs
        return self._tables.of(layer, removed, None) + share * self._spatial[layer.name, form.rank]

    def fits(self, node: str, removed: Mapping[str, int], form: LayerForm) -> bool:
        """Whether a layer still has a chain of this rank with these units gone: narrow layers have fewer."""
        layer = self._layers[node]
        inputs, outputs = layer.kept_inputs(removed), layer.kept_outputs(removed)
        if form.form == SPATIAL:
            first, *others = layer.rows.linear.kernel
            return form.rank <= min(inputs * first, outputs * int(np.prod(others)))
        columns = inputs * layer.taps
        return min(columns, outputs) > 1 and form.rank <= min(columns, outputs)

    def macs(self, node: str, removed: Mapping[str, int], form: LayerForm, block: int = 1) -> float:
        """Multiply-accumulates of a chain with these units gone.

        Args:
            node: name of the layer.
            removed: units that are gone, by name of the group.
            form: the chain.
            block: widths and ranks are rounded up to multiples of this.
        """
        layer = self._layers[node]
        inputs, outputs, rank = (
            -(-size // block) * block for size in (layer.kept_inputs(removed), layer.kept_outputs(removed), form.rank)
        )
        if form.form != SPATIAL:
            return macs(layer, inputs, outputs, rank)
        key = (node, inputs, outputs, rank)
        if key not in self._known:
            whole = self._shapes[node]
            shape = (outputs, inputs, *whole.kernel)
            narrow = FactorizedLayer(np.broadcast_to(0.0, shape), 1, whole.before, whole.after, whole.rows)
            self._known[key] = float(FORMS[SPATIAL].macs(narrow, (rank,)))
        return self._known[key]

    def parameters(self, node: str, removed: Mapping[str, int], form: LayerForm) -> int:
        """Elements of the weights of a chain with these units gone."""
        layer = self._layers[node]
        inputs, outputs = layer.kept_inputs(removed), layer.kept_outputs(removed)
        if form.form != SPATIAL:
            return form.rank * (inputs * layer.taps + outputs)
        first, *others = layer.rows.linear.kernel
        return form.rank * (inputs * first + outputs * int(np.prod(others)))

    def full_rank(self, node: str, form: str) -> int:
        """The rank at which nothing is lost."""
        return FORMS[form].full(self._shapes[node])[0] if form == SPATIAL else self._layers[node].full_rank

    def _along_axes(
        self, layer: Layer, states: Mapping[str, States], costs: CostModel, round_to: int | None
    ) -> list[LayerForm]:
        """The spatial forms of a layer, none where it has none or its metric is not known column by column."""
        kernel = layer.rows.linear.kernel
        if not layer.rankable or not is_op(layer.node, "Conv") or len(kernel) != 2 or min(kernel) < 2:
            return []
        state = states[layer.name]()
        columns = layer.inputs * layer.taps
        apart = isinstance(state, CovarianceState) and state.original.shape == (layer.outputs, 1, columns)
        (data, *_), (result, *_) = costs.shapes(layer.node, {})
        if (
            not isinstance(state, CovarianceState)
            or not apart
            or columns > _MOST_COLUMNS
            or data is None
            or result is None
        ):
            return []
        weight = state.original.reshape(layer.outputs, layer.inputs, *kernel)
        if not weight.any():
            return []
        whole = FactorizedLayer(weight, 1, tuple(data[2:]), tuple(result[2:]), int(data[0]))
        self._shapes[layer.name] = whole
        fit = FORMS[SPATIAL].fit(whole, Metric(state.covariance[None], np.zeros((1, columns))))
        found: list[LayerForm] = []
        for rank in candidate_ranks(FORMS[SPATIAL], whole, round_to):
            self._spatial[layer.name, rank[0]] = state.price * max(float(fit.residual(rank)), 0.0)
            found.append(LayerForm(SPATIAL, rank[0]))
        return sorted(found, key=lambda form: -form.rank)


def thinned(forms: Sequence[LayerForm], most: int) -> tuple[LayerForm, ...]:
    """As many forms of each kind as may be, the first and the last among them."""
    found: list[LayerForm] = []
    for kind in dict.fromkeys(form.form for form in forms):
        own = [form for form in forms if form.form == kind]
        places = np.unique(np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int))
        found += [own[place] for place in places]
    return tuple(found)
