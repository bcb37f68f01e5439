"""How long a model takes once units are gone: each node's time, measured at a few widths, as a function of the shapes.

A kernel's time follows what it multiplies and what it moves, in whole blocks of channels. How much of each, and what it
takes at least, is fitted node by node to what was measured inside whole graphs (`graphopt.latency`), so that what
surrounds a node is in its figures.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from scipy.optimize import nnls

from graphopt.errors import SelectionError
from graphopt.inputs.machine import device
from graphopt.inputs.measurements import Measurements
from graphopt.ir.channels import Selection
from graphopt.ir.removal import remove_channels
from graphopt.ir.session import Feeds
from graphopt.ir.text import print_graph
from graphopt.latency.kernels import KernelProfile, profile_kernels
from graphopt.search.contract import Candidate
from graphopt.search.costs import CostModel
from graphopt.search.layer_forms import LayerForm, LayerForms
from graphopt.search.rounding import BLOCK

LEVELS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the units that variants keep."""
MIXED = 6
"""Variants in which each group keeps a share of its own, drawn at random, beside those where all keep the same."""
_RANK_LEVELS = (0.0, 0.5, 1.0)
"""Where in the list of its ranks each layer is measured."""
_AT_ONCE = 3
"""Variants that are measured in turns with the whole model, which bounds how many sessions are open."""


Build = Callable[[Mapping[str, int], Mapping[str, LayerForm]], "ir.Model | None"]
"""Units gone by group and chains by node to the variant of the model; None where there is no such variant."""


@dataclass(frozen=True)
class Variant:
    """What a variant of a model is without.

    Attributes:
        removed: units that are gone, by name of the group.
        forms: of the layers that are taken apart, by name of the node; the chain's nodes begin with that name and "/".
    """

    removed: Mapping[str, int] = field(default_factory=dict[str, int])
    forms: Mapping[str, LayerForm] = field(default_factory=dict[str, LayerForm])

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` takes."""
        forms = {node: [form.form, form.rank] for node, form in self.forms.items()}
        return {"removed": dict(self.removed), "forms": forms}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Variant:
        """What `to_json` wrote."""
        return cls(data["removed"], {node: LayerForm(form, rank) for node, (form, rank) in data["forms"].items()})


@dataclass(frozen=True)
class Measured:
    """One variant of a model and what was measured of it.

    Attributes:
        variant: which it is.
        nodes: microseconds of each node, by name.
        total: microseconds of a run of the whole.
    """

    variant: Variant
    nodes: Mapping[str, float]
    total: float

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` takes."""
        return {"variant": self.variant.to_json(), "nodes": dict(self.nodes), "total": self.total}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """What `to_json` wrote."""
        return cls(Variant.from_json(data["variant"]), data["nodes"], data["total"])

    def chain(self, node: str) -> float:
        """Microseconds of a layer that is taken apart."""
        return sum(time for name, time in self.nodes.items() if name.startswith(f"{node}/"))


class LatencyModel:
    """The latency of a model as a function of how many units of each group are gone, and of the ranks of its layers.

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
        notes: Sequence[str] = (),
    ) -> None:
        """Fit the nodes.

        Args:
            costs: of the model.
            measured: variants, at least one; the first is the whole model.
            forms: of the layers, where some were measured taken apart.
            notes: of the measurements.
        """
        self.costs, self.notes = costs, tuple(notes)
        self.places: dict[str, tuple[str, ...]] = {}
        self._forms = forms
        self._nodes: dict[str, ir.Node] = {}
        self._dense: dict[str, np.ndarray] = {}
        self._chains: dict[tuple[str, str], np.ndarray] = {}
        self._known: dict[tuple[object, ...], float] = {}
        self._scale = 1.0
        for node in costs.groups.analysis.model.graph:
            self._fit(node, measured)
        sums = np.array([self._sum(one.variant) for one in measured])
        self._scale, self.fixed = _line(sums, np.array([one.total for one in measured]))
        self._known.clear()

    def at(self, node: str, removed: Mapping[str, int], form: LayerForm | None = None) -> float:
        """Microseconds of a node in a run of the whole, 0 where it is fused into another; see `NodeCosts`.

        A form that was not measured costs what the dense layer does, and never pays.
        """
        if node not in self.places:
            return 0.0
        key = (node, form, *(removed.get(name, 0) for name in self.places[node]))
        if key not in self._known:
            if form is None or (node, form.form) not in self._chains:
                time = self._dense[node] @ self._features(self._nodes[node], removed)
            else:
                time = self._chains[node, form.form] @ self._chain_features(node, removed, form)
            self._known[key] = self._scale * float(time)
        return self._known[key]

    def estimate(self, variant: Variant, without: Container[str] = ()) -> float:
        """Microseconds of a run.

        Args:
            variant: units that are gone, and chains.
            without: names of nodes that are gone altogether.
        """
        return self._sum(variant, without) + self.fixed

    def _sum(self, variant: Variant, without: Container[str] = ()) -> float:
        return sum(
            self.at(node, variant.removed, variant.forms.get(node)) for node in self.places if node not in without
        )

    def _fit(self, node: ir.Node, measured: Sequence[Measured]) -> None:
        name = node.name or ""
        dense = [one for one in measured if name not in one.variant.forms]
        times = np.array([one.nodes.get(name, 0.0) for one in dense])
        if not times.any():
            return
        groups = self.costs.groups_around(node)
        self._nodes[name], self.places[name] = node, groups
        features = np.array([self._features(node, one.variant.removed) for one in dense])
        self._dense[name] = _fitted(features if groups else features[:, :1], times, features.shape[1])
        chains = [one for one in measured if name in one.variant.forms and one.chain(name) > 0]
        for kind in dict.fromkeys(one.variant.forms[name].form for one in chains):
            own = [one for one in chains if one.variant.forms[name].form == kind]
            features = np.array(
                [self._chain_features(name, one.variant.removed, one.variant.forms[name]) for one in own]
            )
            times = np.array([one.chain(name) for one in own])
            self._chains[name, kind] = _fitted(features, times, features.shape[1])

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
    weights = 1 / np.maximum(times, float(times[times > 0].min()))
    coefficients, _ = nnls(features / sizes * weights[:, None], times * weights)
    return np.pad(coefficients / sizes, (0, width - features.shape[1]))


def variants(candidates: Sequence[Candidate], seed: int = 0) -> list[dict[str, int]]:
    """Units gone in each of the variants that a latency model is fitted to, the whole model first.

    All groups at each of `LEVELS`, then `MIXED` where each group has a level of its own: every pair of groups that
    meets in a node so occurs at several pairs of widths.

    Args:
        candidates: the groups, with the widths that they may be cut to.
        seed: of what is drawn.
    """
    generator = np.random.default_rng(seed)
    shares = [dict.fromkeys((candidate.name for candidate in candidates), level) for level in LEVELS]
    names = [candidate.name for candidate in candidates]
    for _ in range(MIXED):
        shares.append(dict(zip(names, generator.choice(LEVELS, len(names)).tolist(), strict=True)))
    found: list[dict[str, int]] = []
    for share in shares:
        removed = {
            candidate.name: candidate.units - _kept(candidate, share[candidate.name]) for candidate in candidates
        }
        if removed not in found:
            found.append(removed)
    return found


def _kept(candidate: Candidate, share: float) -> int:
    return int(candidate.choices[int(np.abs(candidate.choices - share * candidate.units).argmin())])


def measure_latency(
    costs: CostModel,
    candidates: Sequence[Candidate],
    feeds: Feeds,
    *,
    forms: LayerForms | None = None,
    build: Build | None = None,
    target: str = "cpu",
    threads: int = 1,
    seconds: float = 20.0,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> LatencyModel:
    """Measure variants of a model, node by node, and fit its latency to them.

    What was measured undisturbed is kept on disk, by the structure of the graph and the machine: the next call measures
    nothing.

    Args:
        costs: of the model.
        candidates: the groups that may be cut.
        feeds: one set of inputs.
        forms: that layers may have; `build` is needed then.
        build: makes a variant; cuts channels alone where not given.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads, 0 for onnxruntime's default.
        seconds: about how long to measure.
        seed: of the widths that are drawn.
        progress: `progress(done, total, text)`, called before each part of the measurement.

    Raises:
        DataError, InvalidGraphError, GraphoptError: as `graphopt.latency.kernels.profile_kernels`.
    """
    wanted = [Variant(removed) for removed in variants(candidates, seed)[1:]]
    wanted += _taken_apart(forms) if forms is not None else []
    store, key = Measurements(), _key(costs.groups.analysis.model, wanted, feeds, target, threads)
    known = store.read(key)
    if known is not None:
        return LatencyModel(costs, [Measured.from_json(one) for one in known], forms)
    measured, notes = _in_turns(
        costs, wanted, build or _Cut(costs, candidates), feeds, target, threads, seconds, progress
    )
    if not notes:  # what was disturbed is not kept
        store.write(key, "latency", [one.to_json() for one in measured])
    return LatencyModel(costs, measured, forms, (*notes, *store.notes))


def _key(model: ir.Model, wanted: Sequence[Variant], feeds: Feeds, target: str, threads: int) -> str:
    """All that the measurement depends on; weights do not count."""
    shapes = sorted((name, array.dtype.name, array.shape) for name, array in feeds.items())
    parts = (print_graph(model), [one.to_json() for one in wanted], shapes, target, threads, device(target))
    return hashlib.sha256("\n".join(map(repr, (*parts, onnxruntime.__version__))).encode()).hexdigest()


def _in_turns(
    costs: CostModel,
    wanted: Sequence[Variant],
    make: Build,
    feeds: Feeds,
    target: str,
    threads: int,
    seconds: float,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[list[Measured], tuple[str, ...]]:
    """The whole model and the variants that can be made, and what to know about the measurement."""
    model = costs.groups.analysis.model
    measured: list[Measured] = []
    notes: dict[str, None] = {}
    chunks = [wanted[start : start + _AT_ONCE] for start in range(0, len(wanted), _AT_ONCE)] or [[]]
    for number, chunk in enumerate(chunks):
        if progress is not None:
            progress(number, len(chunks), "measure the latency at several widths")
        made = [(one, graph) for one in chunk if (graph := make(one.removed, one.forms)) is not None]
        profiles = profile_kernels(
            model,
            feeds,
            target=target,
            threads=threads,
            seconds=seconds / len(chunks),
            against=[graph for _, graph in made],
        )
        notes |= dict.fromkeys(note for profile in profiles for note in profile.notes)
        drift = measured[0].total / _microseconds(profiles[0]) if measured else 1.0
        if not measured:
            measured.append(_measured(Variant(), profiles[0], 1.0))
        pairs = zip(made, profiles[1:], strict=True)
        measured += [_measured(one, profile, drift) for (one, _), profile in pairs]
    return measured, tuple(notes)


def _taken_apart(forms: LayerForms) -> list[Variant]:
    """All layers that have a form, at a few of its ranks; one form after the other."""
    found: list[Variant] = []
    for kind in dict.fromkeys(form.form for several in forms.of.values() for form in several):
        own = {node: [form for form in several if form.form == kind] for node, several in forms.of.items()}
        for level in _RANK_LEVELS:
            chosen = {node: several[round(level * (len(several) - 1))] for node, several in own.items() if several}
            if Variant({}, chosen) not in found:
                found.append(Variant({}, chosen))
    return found


@dataclass(frozen=True)
class _Cut:
    """The model without the lowest units of its groups; None where they cannot go together."""

    costs: CostModel
    candidates: Sequence[Candidate]

    def __call__(self, removed: Mapping[str, int], forms: Mapping[str, LayerForm]) -> ir.Model | None:
        selection: Selection = {
            candidate.name: candidate.lowest(removed[candidate.name])
            for candidate in self.candidates
            if removed.get(candidate.name)
        }
        try:
            return remove_channels(self.costs.groups.analysis.model, selection, groups=self.costs.groups)
        except SelectionError:
            return None


def _microseconds(profile: KernelProfile) -> float:
    return profile.latency.median * 1e3


def _measured(variant: Variant, profile: KernelProfile, drift: float) -> Measured:
    nodes = {name: time * drift for name, time in profile.by_node().items()}
    return Measured(variant, nodes, _microseconds(profile) * drift)


def _line(sums: np.ndarray, totals: np.ndarray) -> tuple[float, float]:
    """Scale and offset, at least 0, that lead from sums of nodes to whole runs, with the least relative error."""
    size = float(sums.max(initial=1e-9))
    solved, _ = nnls(np.stack([sums, np.full(len(sums), size)], axis=1) / totals[:, None], np.ones(len(totals)))
    return float(solved[0]), float(solved[1] * size)
