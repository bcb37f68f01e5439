"""Channel groups as a graph: which groups the weights lead from and to. For networkx, DOT and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import combinations, pairwise, product

import networkx
import numpy as np
import onnx_ir as ir
from networkx.drawing import nx_pydot

from graphopt.ir.channel_analysis import weight_sources
from graphopt.ir.channels import ChannelGroup, ChannelGroups
from graphopt.ir.ops.axes import Axis

_READ_FIRST = ("inputs", "rows")
"""Roles of groups that are on the reading side of a weight, where no operator says which axis its results have."""
_RESULTS = ("outputs", "hidden units")
"""Roles of axes that are results of the weights of their node."""
COLOURS = {
    "exact": ("#e2f3e5", "#3b8a4f"),
    "inexact": ("#fdf0d2", "#b98a1d"),
    "frozen": ("#ececee", "#8c8f96"),
}
"""State of a group to the colours of its box and of its border."""


def group_graph(groups: ChannelGroups) -> networkx.DiGraph[str]:
    """The groups as nodes, and an edge from A to B where a weight has A on its input and B on its output side.

    Nodes are names of groups, with the attributes `role`, `units`, `parameters` (a unit), `prunable`, `exact` and
    `state` ("exact", "inexact" or "frozen"). Edges have:

    * `relation`: "weights"; between groups that no weight connects "factor" where both together make up an axis
      (heads and their width), "beside" where one follows the other on an axis (the parts of a concatenation).
    * `weights`: names of the initializers, in stable order, none but for the relation "weights".
    * `parameters`: their elements that have coordinates of both groups.

    A weight from a group to itself (a recurrence, a square layer on a residual stream) is a loop. An embedding leads
    from its rows to its columns. Where no operator says which axis of a weight is its output, the group that the
    model reaches first counts as the input.

    Example:
        >>> import graphopt
        >>> model = graphopt.load(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[n,2] x) => (float[n,1] y) <float[2,3] a = {1,2,3,4,5,6}, float[3,1] b = {1,1,1}>
        ...     { h = MatMul(x, a) y = MatMul(h, b) }'''))
        >>> list(group_graph(graphopt.channel_groups(model)).edges(data="parameters"))
        [('inputs of a', 'inner width of a', 6)]
    """
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for group in groups:
        graph.add_node(
            group.name,
            role=group.role,
            units=group.units,
            parameters=group.parameters,
            prunable=group.prunable,
            exact=group.exact,
            state=state_of(group),
        )
    finder = _Relations(groups)
    for a, b, name, parameters in finder.by_weights():
        if not graph.has_edge(a, b):
            graph.add_edge(a, b, relation="weights", weights=(), parameters=0)
        edge = graph.edges[a, b]
        edge["weights"], edge["parameters"] = (*edge["weights"], name), edge["parameters"] + parameters
    for a, b, relation in finder.by_axes():
        if a != b and not graph.has_edge(a, b) and not graph.has_edge(b, a):
            graph.add_edge(a, b, relation=relation, weights=(), parameters=0)
    return graph


def state_of(group: ChannelGroup) -> str:
    """ "exact", "inexact" or "frozen"."""
    if not group.prunable:
        return "frozen"
    return "exact" if group.exact else "inexact"


def to_dot(graph: networkx.DiGraph[str]) -> str:
    """A group graph in DOT, for Graphviz: labels with units, colours by state, weights as labels of edges."""
    plain: networkx.DiGraph[str] = networkx.DiGraph()
    plain.graph["graph"] = {"rankdir": "LR"}
    plain.graph["node"] = {"shape": "box", "style": '"rounded,filled"', "fontname": "Helvetica"}
    plain.graph["edge"] = {"fontname": "Helvetica", "fontsize": "10"}
    identifier = {name: f"group{index}" for index, name in enumerate(graph)}
    for name, about in graph.nodes(data=True):
        fill, border = COLOURS[about["state"]]
        label = _quoted(f"{name}\n{about['units']} units, {about['state']}")
        plain.add_node(identifier[name], label=label, fillcolor=f'"{fill}"', color=f'"{border}"')
    for a, b, about in graph.edges(data=True):
        style = {} if about["relation"] == "weights" else {"style": "dotted", "dir": "none", "constraint": "false"}
        label = about["relation"] if style else "\n".join(about["weights"][:3])
        more = len(about["weights"]) - 3
        plain.add_edge(identifier[a], identifier[b], label=_quoted(label + (f"\n+{more}" if more > 0 else "")), **style)
    return str(nx_pydot.to_pydot(plain).to_string())


def _quoted(text: str) -> str:
    """A DOT string. Line breaks are kept; backslashes, which DOT takes for placeholders, are doubled."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\r", " ").replace("\n", "\\n")
    return f'"{escaped}"'


class _Relations:
    """Finds which groups stand on which axes of the initializers."""

    def __init__(self, groups: ChannelGroups) -> None:
        self._units, self._state = groups.units, groups.analysis.state
        self._store, self._names = groups.analysis.store, [group.name for group in groups]
        self._first = [group.role in _READ_FIRST for group in groups]
        self._group_of = np.full(len(self._store.labels), -1)
        for index, group in enumerate(groups.units.groups):
            self._group_of[group.atoms] = index
        self._values = list(groups.analysis.model.graph.initializers.values())
        self._produced = self._outputs()

    def _outputs(self) -> dict[ir.Value, set[int]]:
        """Groups that are the results of applying an initializer."""
        found: dict[ir.Value, set[int]] = {}
        for axis, role, node in self._state.roles:
            if role in _RESULTS:
                groups = {group for part in self._store.leaves(axis) for group in self._of_part(part)}
                for operand in node.inputs:
                    if operand is not None and operand in self._state.weights:
                        for source in weight_sources(operand):
                            found.setdefault(source, set()).update(groups)
        return found

    def by_weights(self) -> Iterator[tuple[str, str, str, int]]:
        """Input group, output group, initializer and number of its elements that have coordinates of both."""
        for value in self._values:
            tracks = self._state.tracks.get(value, ())
            held = [self._on_axis(value, axis) for axis in range(len(tracks))]
            size = int(np.prod([track.axis.size for track in tracks], dtype=np.int64))
            for (a, b), share in self._oriented(held, self._produced.get(value, set())).items():
                yield self._names[a], self._names[b], value.name or "", round(size * share)

    def _oriented(self, held: Sequence[Mapping[int, float]], produced: Set[int]) -> Mapping[tuple[int, int], float]:
        """Input and output group to the share of elements that have coordinates of both."""
        outputs = [axis for axis, on_axis in enumerate(held) if produced & on_axis.keys()]
        pairs = [(i, o) for o in outputs for i in range(len(held)) if i != o] or combinations(range(len(held)), 2)
        found: dict[tuple[int, int], float] = {}
        for input_axis, output_axis in pairs:
            for a, b in product(held[input_axis], held[output_axis]):
                ordered = (a, b) if outputs else tuple(sorted((a, b), key=self._rank))
                found[ordered[0], ordered[1]] = held[input_axis][a] * held[output_axis][b]
        return found

    def _rank(self, group: int) -> tuple[bool, int]:
        return not self._first[group], group

    def _on_axis(self, value: ir.Value, axis: int) -> dict[int, float]:
        """Groups on an axis of a value, with the share of its coordinates that each has."""
        return {
            group: share for part in self._units.leaves(value, axis) for group, share in self._of_part(part).items()
        }

    def _of_part(self, part: Axis) -> dict[int, float]:
        leaf = self._units.leaf(part)
        if leaf is None:
            return {}
        groups = self._group_of[leaf.atoms]
        return {
            int(group): len(np.unique(leaf.coordinates[groups == group])) / leaf.size
            for group in np.unique(groups[groups >= 0])
        }

    def by_axes(self) -> Iterator[tuple[str, str, str]]:
        """Groups that make up an axis of an initializer together, one inside the other or one behind the other."""
        for value in self._values:
            for axis in range(len(self._state.tracks.get(value, ()))):
                parts = self._units.leaves(value, axis)
                for outer, inner in pairwise(parts):
                    for a in self._of_part(outer):
                        for b in self._of_part(inner):
                            yield self._names[a], self._names[b], "factor"
                for part in parts:
                    for a, b in pairwise(self._in_order(part)):
                        yield self._names[a], self._names[b], "beside"

    def _in_order(self, part: Axis) -> list[int]:
        """Groups on a part of an axis by their first coordinate."""
        leaf = self._units.leaf(part)
        if leaf is None:
            return []
        order = np.argsort(leaf.coordinates, kind="stable")
        groups = self._group_of[leaf.atoms[order]]
        return list(dict.fromkeys(groups[groups >= 0].tolist()))
