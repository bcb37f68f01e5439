"""How long a model takes once units are gone: each node's time, measured at a few widths, as a function of the shapes.

A kernel's time follows what it multiplies and what it moves, in whole blocks of channels. How much of each, and what it
takes at least, is fitted node by node to what was measured inside whole graphs (`graphopt.latency`), so that what
surrounds a node is in its figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from scipy.optimize import nnls

from graphopt.errors import SelectionError
from graphopt.ir.channels import Selection
from graphopt.ir.ops.row import Site, UnknownShapeError
from graphopt.ir.removal import remove_channels
from graphopt.ir.session import Feeds
from graphopt.latency.kernels import KernelProfile, node_name, profile_kernels
from graphopt.search.contract import Candidate
from graphopt.search.costs import CostModel, Shapes
from graphopt.search.rounding import BLOCK

LEVELS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the units that variants keep."""
MIXED = 6
"""Variants in which each group keeps a share of its own, drawn at random, beside those where all keep the same."""
_AT_ONCE = 3
"""Variants that are measured in turns with the whole model, which bounds how many sessions are open."""


@dataclass(frozen=True)
class Measured:
    """One variant of a model and what was measured of it.

    Attributes:
        removed: units that are gone, by name of the group.
        nodes: microseconds of each node, by name.
        total: microseconds of a run of the whole.
    """

    removed: Mapping[str, int]
    nodes: Mapping[str, float]
    total: float


@dataclass(frozen=True)
class NodeTime:
    """Microseconds of one node: `coefficients` @ features, where units of `groups` can be cut from what it touches.

    Attributes:
        node: of the model.
        groups: names of the groups that its time depends on.
        coefficients: of what `_features` gives, at least 0; float64.
    """

    node: ir.Node
    groups: tuple[str, ...]
    coefficients: np.ndarray


class LatencyModel:
    """The latency of a model as a function of how many units of each group are gone.

    Attributes:
        costs: shapes and counts.
        nodes: the time of each node, by name.
        scale, offset: a run of the whole takes `scale` times the sum of its nodes and `offset` microseconds more.
        notes: what to know about the measurement.
    """

    def __init__(self, costs: CostModel, measured: Sequence[Measured], notes: Sequence[str] = ()) -> None:
        """Fit the nodes.

        Args:
            costs: of the model.
            measured: variants, at least one; the first is the whole model.
            notes: of the measurements.
        """
        self.costs, self.notes = costs, tuple(notes)
        self.nodes: dict[str, NodeTime] = {}
        for node in costs.groups.analysis.model.graph:
            name = node_name(node)
            times = np.array([one.nodes.get(name, 0.0) for one in measured])
            if times.any():
                self.nodes[name] = self._fitted(node, times, [one.removed for one in measured])
        sums = np.array([self._sum(one.removed, frozenset()) for one in measured])
        self.scale, self.offset = _line(sums, np.array([one.total for one in measured]))

    def node(self, name: str, removed: Mapping[str, int]) -> float:
        """Microseconds of a node in a run of the whole with these units gone; 0 where it is fused into another.

        Args:
            name: of the node.
            removed: units that are gone, by name of the group.
        """
        time = self.nodes.get(name)
        return 0.0 if time is None else self.scale * self._time(time, removed)

    def estimate(self, removed: Mapping[str, int], without: frozenset[str] = frozenset()) -> float:
        """Microseconds of a run.

        Args:
            removed: units that are gone, by name of the group.
            without: names of nodes that are gone altogether.
        """
        return self.scale * self._sum(removed, without) + self.offset

    def _sum(self, removed: Mapping[str, int], without: frozenset[str]) -> float:
        return sum(self._time(time, removed) for name, time in self.nodes.items() if name not in without)

    def _time(self, time: NodeTime, removed: Mapping[str, int]) -> float:
        return float(time.coefficients @ self._features(time.node, removed))

    def _fitted(self, node: ir.Node, times: np.ndarray, removed: Sequence[Mapping[str, int]]) -> NodeTime:
        groups = self.costs.groups_around(node)
        features = np.array([self._features(node, one) for one in removed])
        if not groups or len(times) == 1:
            whole = np.zeros(features.shape[1])
            whole[0] = float(np.median(times))
            return NodeTime(node, groups, whole)
        least = float(times[times > 0].min())
        weights = 1 / np.maximum(times, least)
        sizes = np.maximum(features.max(axis=0), 1e-30)
        coefficients, _ = nnls(features / sizes * weights[:, None], times * weights)
        return NodeTime(node, groups, coefficients / sizes)

    def _features(self, node: ir.Node, removed: Mapping[str, int]) -> np.ndarray:
        """What the time of a node is made of: 1; MACs, and elements read and written, of whole blocks of channels and
        of the channels that are there."""
        found = [1.0]
        for block in (BLOCK, 1):
            inputs, outputs = self.costs.shapes(node, removed, block)
            elements = sum(math.prod(shape) for shape in (*inputs, *outputs) if shape is not None)
            found += [self._macs(node, inputs, outputs), float(elements)]
        return np.array(found)

    def _macs(self, node: ir.Node, inputs: Shapes, outputs: Shapes) -> float:
        row = self.costs.groups.analysis.row(node)
        if row is None or row.cost is None:
            return 0.0
        constants = tuple(
            None
            if value is None or value.const_value is None or index not in row.structural
            else value.const_value.numpy()
            for index, value in enumerate(node.inputs)
        )
        try:
            return float(row.cost(Site(node, inputs, outputs, constants)))
        except UnknownShapeError:
            return 0.0


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
    target: str = "cpu",
    threads: int = 1,
    seconds: float = 20.0,
    seed: int = 0,
) -> LatencyModel:
    """Measure variants of a model, node by node, and fit its latency to them.

    Args:
        costs: of the model.
        candidates: the groups that may be cut.
        feeds: one set of inputs.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads, 0 for onnxruntime's default.
        seconds: about how long to measure.
        seed: of the widths that are drawn.

    Raises:
        DataError, InvalidGraphError, GraphoptError: as `graphopt.latency.kernels.profile_kernels`.
    """
    model = costs.groups.analysis.model
    by_name = {candidate.name: candidate for candidate in candidates}
    wanted = variants(candidates, seed)[1:]
    measured: list[Measured] = []
    notes: dict[str, None] = {}
    chunks = [wanted[start : start + _AT_ONCE] for start in range(0, len(wanted), _AT_ONCE)] or [[]]
    for chunk in chunks:
        known = [(removed, pruned) for removed in chunk if (pruned := _pruned(costs, by_name, removed)) is not None]
        profiles = profile_kernels(
            model,
            feeds,
            target=target,
            threads=threads,
            seconds=seconds / len(chunks),
            against=[pruned for _, pruned in known],
        )
        notes |= dict.fromkeys(note for profile in profiles for note in profile.notes)
        first = measured[0].total if measured else _microseconds(profiles[0])
        drift = first / _microseconds(profiles[0])
        if not measured:
            measured.append(_measured({}, profiles[0], 1.0))
        measured += [
            _measured(removed, profile, drift) for (removed, _), profile in zip(known, profiles[1:], strict=True)
        ]
    return LatencyModel(costs, measured, tuple(notes))


def _pruned(costs: CostModel, candidates: Mapping[str, Candidate], removed: Mapping[str, int]) -> ir.Model | None:
    """The variant; None where its units cannot go together."""
    selection: Selection = {name: candidates[name].lowest(count) for name, count in removed.items() if count}
    if not selection:
        return None
    try:
        return remove_channels(costs.groups.analysis.model, selection, groups=costs.groups)
    except SelectionError:
        return None


def _microseconds(profile: KernelProfile) -> float:
    return profile.latency.median * 1e3


def _measured(removed: Mapping[str, int], profile: KernelProfile, drift: float) -> Measured:
    nodes = {name: time * drift for name, time in profile.by_node().items()}
    return Measured(removed, nodes, _microseconds(profile) * drift)


def _line(sums: np.ndarray, totals: np.ndarray) -> tuple[float, float]:
    """Scale and offset, at least 0, that lead from sums of nodes to whole runs, with the least relative error."""
    features = np.stack([sums, np.full(len(sums), float(sums.max(initial=1e-9)))], axis=1)
    solved, _ = nnls(features / totals[:, None], np.ones(len(totals)))
    return float(solved[0]), float(solved[1] * features[0, 1])
