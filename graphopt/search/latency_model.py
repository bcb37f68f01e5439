"""How long a model takes once units are gone: each node's time, measured at a few widths, as a function of the shapes.

A kernel's time follows what it multiplies and what it moves, in whole blocks of channels. How much of each, and what it
takes at least, is fitted node by node to what was measured inside whole graphs (`graphopt.latency`), so that what
surrounds a node is in its figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from scipy.optimize import nnls

from graphopt.search.costs import CostModel
from graphopt.search.integers import Border, IntegerForms
from graphopt.search.layer_forms import LayerForm, LayerForms
from graphopt.search.rounding import BLOCK


@dataclass(frozen=True)
class Variant:
    """What a variant of a model is without.

    Attributes:
        removed: units that are gone, by name of the group.
        forms: of the layers that are taken apart, by name of the node; the chain's nodes begin with that name and "/".
        integers: names of the nodes that compute on integers.
    """

    removed: Mapping[str, int] = field(default_factory=dict[str, int])
    forms: Mapping[str, LayerForm] = field(default_factory=dict[str, LayerForm])
    integers: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` takes."""
        forms = {node: [form.form, form.rank] for node, form in self.forms.items()}
        return {"removed": dict(self.removed), "forms": forms, "integers": sorted(self.integers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Variant:
        """What `to_json` wrote."""
        forms = {node: LayerForm(form, rank) for node, (form, rank) in data["forms"].items()}
        return cls(data["removed"], forms, frozenset(data["integers"]))


Build = Callable[[Variant], "tuple[ir.Model, Variant] | None"]
"""The graph of a variant, and the variant that it came to be; None where there is none."""


@dataclass(frozen=True)
class Measured:
    """One variant of a model and what was measured of it.

    Attributes:
        variant: which it is.
        nodes: microseconds of each node of the model by name, with what stands for it in the variant.
        total: microseconds of a run of the whole.
        conversions: of values that become integers and of those that become floats, elements and microseconds of each.
    """

    variant: Variant
    nodes: Mapping[str, float]
    total: float
    conversions: tuple[Sequence[tuple[float, float]], Sequence[tuple[float, float]]] = ((), ())

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` takes."""
        return {
            "variant": self.variant.to_json(),
            "nodes": dict(self.nodes),
            "total": self.total,
            "conversions": [[list(pair) for pair in kind] for kind in self.conversions],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """What `to_json` wrote."""
        inwards, outwards = ([(count, time) for count, time in kind] for kind in data["conversions"])
        return cls(Variant.from_json(data["variant"]), data["nodes"], data["total"], (inwards, outwards))


class LatencyModel:
    """The latency of a model as a function of how many units of each group are gone, of the ranks of its layers, and of
    which operators compute on integers.

    A `graphopt.search.joint.NodeCosts` in microseconds.

    Attributes:
        costs: shapes and counts.
        places: names of the nodes that take time, each with the groups that its time depends on.
        fixed: microseconds that a run takes beyond its nodes.
        notes: what to know about the measurement.
    """

    def __init__(
        self,
        costs: CostModel,
        measured: Sequence[Measured],
        forms: LayerForms | None = None,
        integers: IntegerForms | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Fit the nodes.

        Args:
            costs: of the model.
            measured: variants, at least one; the first is the whole model.
            forms: of the layers, where some were measured taken apart.
            integers: where values are converted, where some were measured on integers.
            notes: of the measurements.
        """
        self.costs, self.notes = costs, tuple(notes)
        self.places: dict[str, tuple[str, ...]] = {}
        self._forms, self._borders = forms, () if integers is None else integers.borders
        self._ends = {end for border in self._borders for end in border.ends}
        self._nodes = {node.name or "": node for node in costs.groups.analysis.model.graph}
        self._fits: dict[tuple[str, str, bool], np.ndarray] = {}
        """By name of the node, name of the form ("" is dense), and whether it computes on integers."""
        self._known: dict[tuple[object, ...], float] = {}
        self._scale, self._conversion_scale = 1.0, 1.0
        for name, node in self._nodes.items():
            self._fit(name, node, measured)
        self._conversions = [_conversion_fit(one.conversions[kind] for one in measured) for kind in (0, 1)]
        sums = np.array([self._computed(one.variant) for one in measured])
        converted = np.array([self._converted(one.variant) for one in measured])
        totals = np.array([one.total for one in measured])
        pure = converted == 0
        self._scale, self.fixed = _line(sums[pure], totals[pure])
        self._conversion_scale = _share(converted, totals - self._scale * sums - self.fixed, totals)
        self._known.clear()

    def at(
        self, node: str, removed: Mapping[str, int], form: LayerForm | None = None, *, integer: bool = False
    ) -> float:
        """Microseconds of a node in a run of the whole, 0 where it is fused into another; see `NodeCosts`.

        A form that was not measured costs what the dense layer does, one that was not measured on integers what it does
        in floats: neither pays then.
        """
        if node not in self.places:
            return 0.0
        key = (node, form, integer, *(removed.get(name, 0) for name in self.places[node]))
        if key not in self._known:
            kind = "" if form is None else form.form
            known = [(one, is_integer) for one in (kind, "") for is_integer in (integer, False)]
            own = next(((node, *one) for one in known if (node, *one) in self._fits), (node, "", False))
            if form is None or not own[1]:
                features = self._features(self._nodes[node], removed)
            else:
                features = self._chain_features(node, removed, form)
            self._known[key] = self._scale * float(self._fits[own] @ features)
        return self._known[key]

    def conversion(self, border: Border, removed: Mapping[str, int], *, to_integers: bool) -> float:
        """Microseconds that it takes to convert a value; see `NodeCosts`."""
        shapes = self.costs.shapes(self._nodes[border.node], removed)[0 if border.inwards else 1]
        elements = math.prod(shapes[border.index] or ())
        constant, slope = self._conversions[0 if to_integers else 1]
        return self._conversion_scale * float(constant + slope * elements)

    def estimate(self, variant: Variant, without: Container[str] = ()) -> float:
        """Microseconds of a run.

        Args:
            variant: units that are gone, chains, and what is on integers.
            without: names of nodes that are gone altogether.
        """
        return self._computed(variant, without) + self._converted(variant) + self.fixed

    def _computed(self, variant: Variant, without: Container[str] = ()) -> float:
        return sum(
            self.at(node, variant.removed, variant.forms.get(node), integer=node in variant.integers)
            for node in self.places
            if node not in without
        )

    def _converted(self, variant: Variant) -> float:
        return sum(
            self.conversion(border, variant.removed, to_integers=to_integers)
            for border in (self._borders if variant.integers else ())
            for to_integers in border.conversions(variant.integers)
        )

    def _fit(self, name: str, node: ir.Node, measured: Sequence[Measured]) -> None:
        kinds = dict.fromkeys(_kind(one.variant, name) for one in measured)
        own = {kind: [one for one in measured if _kind(one.variant, name) == kind] for kind in kinds}
        if not any(one.nodes.get(name) for one in measured) and name not in self._ends:
            return
        self.places[name] = groups = self.costs.groups_around(node)
        for (form, integer), several in own.items():
            times = np.array([one.nodes.get(name, 0.0) for one in several])
            if not form:
                features = np.array([self._features(node, one.variant.removed) for one in several])
                self._fits[name, form, integer] = _fitted(
                    features if groups else features[:, :1], times, features.shape[1]
                )
            elif times.any():
                chains = [(one.variant.removed, one.variant.forms[name]) for one in several]
                features = np.array([self._chain_features(name, *chain) for chain in chains])
                self._fits[name, form, integer] = _fitted(features[times > 0], times[times > 0], features.shape[1])

    def _features(self, node: ir.Node, removed: Mapping[str, int]) -> np.ndarray:
        """What the time of a node is made of: 1; MACs, and elements read and written, both of whole blocks of channels
        and of the channels that are there."""
        found = [1.0]
        for block in (BLOCK, 1):
            inputs, outputs = self.costs.shapes(node, removed, block)
            elements = sum(math.prod(shape) for shape in (*inputs, *outputs) if shape is not None)
            found += [float(self.costs.macs_without(node, removed, block)), float(elements)]
        return np.array(found)

    def _chain_features(self, node: str, removed: Mapping[str, int], form: LayerForm) -> np.ndarray:
        """1, and MACs of whole blocks."""
        assert self._forms is not None
        return np.array([1.0, self._forms.macs(node, removed, form, BLOCK)])


def _fitted(features: np.ndarray, times: np.ndarray, width: int) -> np.ndarray:
    """Coefficients, at least 0, with the least relative error: float64 [width]; of features that there are not, 0."""
    sizes = np.maximum(features.max(axis=0), 1e-30)
    if not times.any():
        return np.zeros(width)
    weights = 1 / np.maximum(times, float(times[times > 0].min()))
    coefficients, _ = nnls(features / sizes * weights[:, None], times * weights)
    return np.pad(coefficients / sizes, (0, width - features.shape[1]))


def _kind(variant: Variant, node: str) -> tuple[str, bool]:
    """Name of the form that a node has in a variant, "" for dense, and whether it computes on integers."""
    form = variant.forms.get(node)
    return "" if form is None else form.form, node in variant.integers


def _conversion_fit(kinds: Iterable[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Microseconds of a conversion, and of each element of it."""
    pairs = np.array([pair for kind in kinds for pair in kind]).reshape(-1, 2)
    if not len(pairs):
        return 0.0, 0.0
    constant, slope = _fitted(np.stack([np.ones(len(pairs)), pairs[:, 0]], axis=1), pairs[:, 1], 2)
    return float(constant), float(slope)


def _line(sums: np.ndarray, totals: np.ndarray) -> tuple[float, float]:
    """Scale and offset, at least 0, that lead from sums of nodes to whole runs, with the least relative error."""
    size = float(sums.max(initial=1e-9))
    solved, _ = nnls(np.stack([sums, np.full(len(sums), size)], axis=1) / totals[:, None], np.ones(len(totals)))
    return float(solved[0]), float(solved[1] * size)


def _share(parts: np.ndarray, rests: np.ndarray, totals: np.ndarray) -> float:
    """The scale, at least 1, that leads from sums of conversions to what they add to whole runs.

    The kernels of conversions are not all that they cost: layouts change at borders, and what was fused no longer is.
    """
    energy = float(np.square(parts / totals).sum())
    return max(float((parts * rests / np.square(totals)).sum()) / energy, 1.0) if energy > 0 else 1.0
