"""Measuring a model at a few widths, ranks and kinds of numbers, so that its latency at any others can be told."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime

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
from graphopt.search.integers import IntegerForms
from graphopt.search.latency_model import Build, LatencyModel, Measured, Variant
from graphopt.search.layer_forms import LayerForms

LEVELS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the units that variants keep."""
MIXED = 6
"""Variants in which each group keeps a share of its own, drawn at random, beside those where all keep the same."""
_RANK_LEVELS = (0.0, 0.5, 1.0)
"""Where in the list of its ranks each layer is measured."""
_INTEGER_RANK_LEVELS = (0.0, 1.0)
"""The same on integers."""
_INTEGER_WIDTHS, _HALVES = 2, 3
"""Variants with mixed widths whose operators are all on integers, and such where half of them are, drawn at random."""
_AT_ONCE = 3
"""Variants that are measured in turns with the whole model, which bounds how many sessions are open."""


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
    integers: IntegerForms | None = None,
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
        integers: operators that may compute on integers; `build` is needed then.
        build: makes a variant; cuts channels alone where not given.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads, 0 for onnxruntime's default.
        seconds: about how long to measure.
        seed: of the widths that are drawn.
        progress: `progress(done, total, text)`, called before each part of the measurement.

    Raises:
        DataError, InvalidGraphError, GraphoptError: as `graphopt.latency.kernels.profile_kernels`.
    """
    widths = variants(candidates, seed)
    wanted = [Variant(removed) for removed in widths[1:]]
    wanted += _taken_apart(forms, _RANK_LEVELS) if forms is not None else []
    wanted += _on_integers(integers, widths, forms, seed) if integers is not None and integers.losses else []
    form = "" if integers is None else integers.form
    store, key = Measurements(), _key(costs.groups.analysis.model, wanted, form, feeds, target, threads)
    known = store.read(key)
    if known is not None:
        return LatencyModel(costs, [Measured.from_json(one) for one in known], forms, integers)
    measured, notes = _in_turns(
        costs, wanted, build or _Cut(costs, candidates), feeds, target, threads, seconds, progress
    )
    if not notes:  # what was disturbed is not kept
        store.write(key, "latency", [one.to_json() for one in measured])
    return LatencyModel(costs, measured, forms, integers, (*notes, *store.notes))


def _key(model: ir.Model, wanted: Sequence[Variant], form: str, feeds: Feeds, target: str, threads: int) -> str:
    """All that the measurement depends on; weights do not count."""
    shapes = sorted((name, array.dtype.name, array.shape) for name, array in feeds.items())
    parts = (print_graph(model), [one.to_json() for one in wanted], form, shapes, target, threads, device(target))
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
    names = {node.name or "" for node in model.graph}
    chunks = [wanted[start : start + _AT_ONCE] for start in range(0, len(wanted), _AT_ONCE)] or [[]]
    for number, chunk in enumerate(chunks):
        if progress is not None:
            progress(number, len(chunks), "measure the latency at several widths")
        made = [built for one in chunk if (built := make(one)) is not None]
        profiles = profile_kernels(
            model,
            feeds,
            target=target,
            threads=threads,
            seconds=seconds / len(chunks),
            against=[graph for graph, _ in made],
        )
        notes |= dict.fromkeys(note for profile in profiles for note in profile.notes)
        drift = measured[0].total / _microseconds(profiles[0]) if measured else 1.0
        if not measured:
            measured.append(_measured(Variant(), model, profiles[0], names, 1.0))
        pairs = zip(made, profiles[1:], strict=True)
        measured += [_measured(one, graph, profile, names, drift) for (graph, one), profile in pairs]
    return measured, tuple(notes)


def _taken_apart(forms: LayerForms, levels: Sequence[float]) -> list[Variant]:
    """All layers that have a form, at a few of its ranks; one form after the other."""
    found: list[Variant] = []
    for kind in dict.fromkeys(form.form for several in forms.of.values() for form in several):
        own = {node: [form for form in several if form.form == kind] for node, several in forms.of.items()}
        for level in levels:
            chosen = {node: several[round(level * (len(several) - 1))] for node, several in own.items() if several}
            if Variant({}, chosen) not in found:
                found.append(Variant({}, chosen))
    return found


def _on_integers(
    integers: IntegerForms, widths: Sequence[Mapping[str, int]], forms: LayerForms | None, seed: int
) -> list[Variant]:
    """Everything on integers at several widths and ranks, and halves of it."""
    generator = np.random.default_rng(seed)
    names = sorted(integers.losses)
    everything = frozenset(names)
    found = [Variant(removed, {}, everything) for removed in widths[: len(LEVELS) + _INTEGER_WIDTHS]]
    apart = _taken_apart(forms, _INTEGER_RANK_LEVELS) if forms is not None else []
    found += [Variant({}, one.forms, everything) for one in apart]
    for _ in range(_HALVES):
        drawn = generator.random(len(names)) < 0.5
        found.append(Variant({}, {}, frozenset(name for name, taken in zip(names, drawn, strict=True) if taken)))
    return found


@dataclass(frozen=True)
class _Cut:
    """The model without the lowest units of its groups; None where they cannot go together."""

    costs: CostModel
    candidates: Sequence[Candidate]

    def __call__(self, variant: Variant) -> tuple[ir.Model, Variant] | None:
        selection: Selection = {
            candidate.name: candidate.lowest(variant.removed[candidate.name])
            for candidate in self.candidates
            if variant.removed.get(candidate.name)
        }
        try:
            return remove_channels(self.costs.groups.analysis.model, selection, groups=self.costs.groups), variant
        except SelectionError:
            return None


def _microseconds(profile: KernelProfile) -> float:
    return profile.latency.median * 1e3


def _measured(
    variant: Variant, graph: ir.Model, profile: KernelProfile, names: Collection[str], drift: float
) -> Measured:
    """What was measured of the graph of a variant, by the names of the nodes of the whole model."""
    nodes: dict[str, float] = {}
    conversions: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    kinds = {"QuantizeLinear": 0, "DequantizeLinear": 1}
    made = {node.name or "": node for node in graph.graph}
    bytes_moved = {entry.node.name: min(entry.bytes_read, entry.bytes_written) for entry in profile.cost.nodes}
    for name, time in profile.by_node().items():
        node = made.get(name)
        if node is not None and name not in names and node.op_type in kinds:
            if time:
                conversions[kinds[node.op_type]].append((float(bytes_moved.get(name, 0)), time * drift))
            continue
        if node is not None and node.op_type == "DynamicQuantizeLinear":  # it is for who reads it
            name = next((reader.name or "" for reader in node.outputs[0].consumers()), name)
        whole = next(_stems(name, names), name)
        nodes[whole] = nodes.get(whole, 0.0) + time * drift
    return Measured(variant, nodes, _microseconds(profile) * drift, conversions)


def _stems(name: str, names: Collection[str]) -> Iterator[str]:
    """The nodes of the model that one of a variant may stand for, the one with the longest name first.

    What rewrites make of a node is called after it.
    """
    while name:
        if name in names:
            yield name
        name = name[: max(name.rfind("/"), name.rfind("."))] if {"/", "."} & set(name) else ""
