"""One model of the zoo, pruned at random by graphopt and held against the masked model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import graphopt
from benchmarks.isolation import first_line
from benchmarks.results import Row, stopwatch
from graphopt.ir.channels import ChannelGroup, ChannelGroups
from graphopt.ir.compare import compare_outputs
from graphopt.ir.ops import default_table
from graphopt.ir.session import open_session
from tests.zoo.models import zoo_feeds, zoo_model

RATIO = 0.3
TOLERANCE = 1e-4
_MOST_SUSPECTS = 5


def measure(name: str) -> Row:
    """Analysis, prunable share, and the two cuts: all exact groups, all prunable groups."""
    try:
        model = zoo_model(name)
    except Exception as error:
        return {"traced": False, "failure": f"load: {first_line(error)}"}
    row: Row = {"traced": True, "nodes": sum(1 for _ in model.graph.all_nodes()), "parameters": parameters(model)}
    default_table()
    try:
        with stopwatch() as watch:
            groups = graphopt.channel_groups(model)
    except Exception as error:
        return row | {"failure": f"analysis: {first_line(error)}"}
    prunable = [group for group in groups if group.prunable]
    exact = [group for group in prunable if group.exact]
    row |= {
        "analysis_seconds": watch.seconds,
        "groups": len(groups),
        "prunable_groups": len(prunable),
        "exact_groups": len(exact),
        "has_axes": any(value.const_value is not None and value.const_value.size > 1 for value in weights(groups)),
        "prunable_share": prunable_share(groups),
    }
    cut = Cut(model, groups)
    row["exact"] = cut.exact(exact)
    row["every"] = cut.every(prunable)
    failures = [
        f"{kind}: {row[kind]['failure']}" for kind in ("exact", "every") if row[kind] and "failure" in row[kind]
    ]
    return row | ({"failure": failures[0]} if failures else {})


class Cut:
    """A model, its groups, and what its outputs are at each size of the inputs."""

    def __init__(self, model: ir.Model, groups: ChannelGroups) -> None:
        self.model, self.groups = model, groups
        dynamic = any(not isinstance(size, int) for value in model.graph.inputs for size in value.shape or ())
        self.scales = (1, 2) if dynamic else (1,)
        self.feeds = [zoo_feeds(model, scale=scale) for scale in self.scales]

    def exact(self, groups: Sequence[ChannelGroup]) -> Row | None:
        """Remove and mask the same units of exact groups: the outputs must agree. None where there is no group."""
        chosen = selection(groups)
        if not chosen:
            return None
        stage = "remove"
        found: Row = {"units": sum(map(len, chosen.values())), "scales": list(self.scales)}
        try:
            removed = graphopt.remove_channels(self.model, chosen, groups=self.groups)
            found["parameters"] = parameters(removed)
            stage = "mask"
            masked = graphopt.mask_channels(self.model, chosen, groups=self.groups)
            stage = "load"
            sessions = [open_session(removed, optimized=False), open_session(removed)]
            stage = "run"
            plain, optimized = map(self.outputs, sessions)
            reference, before = (self.outputs(open_session(other, optimized=False)) for other in (masked, self.model))
        except Exception as error:
            return found | {"failure": f"{stage}: {first_line(error)}"}
        found["effect"] = _worst(before, reference)
        found["error"], found["error_optimized"] = _worst(reference, plain), _worst(reference, optimized)
        if not found["error_optimized"] <= TOLERANCE:
            # onnxruntime's own rewriting of QDQ moves results by a step: then its two optimized models are compared
            alike = self.outputs(open_session(masked))
            found["onnxruntime_error"] = _worst(reference, alike)
            found["error_optimized"] = _worst(alike, optimized)
        if not max(found["error"], found["error_optimized"]) <= TOLERANCE:
            found["failure"] = f"differs from the masked model by {max(found['error'], found['error_optimized']):.1e}"
            found["suspects"] = self.suspects(groups)
        return found

    def every(self, groups: Sequence[ChannelGroup]) -> Row | None:
        """Remove units of all groups, the inexact ones too: it must load, run, and return outputs of the same shape."""
        chosen = selection(groups)
        if not chosen:
            return None
        stage = "remove"
        found: Row = {"units": sum(map(len, chosen.values()))}
        try:
            removed = graphopt.remove_channels(self.model, chosen, groups=self.groups)
            found["parameters"] = parameters(removed)
            stage = "load"
            session = open_session(removed)
            stage = "run"
            after, before = self.outputs(session), self.outputs(open_session(self.model, optimized=False))
        except Exception as error:
            return found | {"failure": f"{stage}: {first_line(error)}"}
        for one, other in zip(before, after, strict=True):
            if [array.shape for array in one] != [array.shape for array in other]:
                found["failure"] = "the shape of an output changed"
            elif any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in other):
                found["failure"] = "an output is not finite"
        return found

    def outputs(self, session: Any) -> list[list[np.ndarray]]:
        """Outputs at each size of the inputs."""
        return [session.run_feeds(feeds) for feeds in self.feeds]

    def suspects(self, groups: Sequence[ChannelGroup]) -> list[str]:
        """Groups that differ from the masked model by themselves."""
        found: list[str] = []
        for group in groups:
            alone = selection([group])
            if not alone:
                continue
            removed = graphopt.remove_channels(self.model, alone, groups=self.groups)
            masked = graphopt.mask_channels(self.model, alone, groups=self.groups)
            pair = (self.outputs(open_session(model, optimized=False)) for model in (masked, removed))
            error = _worst(*pair)
            if not error <= TOLERANCE:
                found.append(f"{group.name}: {error:.1e}")
        return found[:_MOST_SUSPECTS]


def selection(groups: Iterable[ChannelGroup]) -> dict[str, list[int]]:
    """30 % of the units of each group at random, one at least, and one at least stays."""
    rng = np.random.default_rng(0)
    chosen: dict[str, list[int]] = {}
    for group in groups:
        count = min(max(1, round(RATIO * group.units)), group.units - 1)
        if count > 0:
            chosen[group.name] = sorted(rng.choice(group.units, count, replace=False).tolist())
    return chosen


def parameters(model: ir.Model) -> int:
    """Elements of all floating-point initializers and of the quantized ones, of up to 8 bits."""
    return sum(
        value.const_value.size
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and _is_number(value.const_value.dtype)
    )


def weights(groups: ChannelGroups) -> list[ir.Value]:
    """Floating-point and quantized initializers of the model that groups belong to."""
    initializers = groups.analysis.model.graph.initializers.values()
    return [value for value in initializers if value.const_value is not None and _is_number(value.const_value.dtype)]


def prunable_share(groups: ChannelGroups) -> float:
    """Share of the elements of all weights that lie on a coordinate which some prunable unit owns."""
    total, staying = 0, 0.0
    for value in weights(groups):
        share = 1.0
        for axis in range(len(groups.analysis.state.tracks[value])):
            share *= 1 - groups.units.removable_share(value, axis)
        assert value.const_value is not None
        total += value.const_value.size
        staying += value.const_value.size * share
    return 1 - staying / total if total else 0.0


def _is_number(dtype: ir.DataType) -> bool:
    return dtype.is_floating_point() or (dtype.is_integer() and dtype.itemsize <= 1)


def _worst(reference: Sequence[Sequence[np.ndarray]], candidate: Sequence[Sequence[np.ndarray]]) -> float:
    return max(compare_outputs(one, other) for one, other in zip(reference, candidate, strict=True))


def summary(rows: Sequence[Mapping[str, Any]], kind: str) -> tuple[list[str], list[str]]:
    """Models that a cut (`exact` or `every`) was made of, and those of them where it failed."""
    tried = [row for row in rows if row.get(kind)]
    return [row["model"] for row in tried], [row["model"] for row in tried if "failure" in row[kind]]
