"""Which channels are the same: one pass over the graph that applies the `channels` column of the op table.

Every static axis of every value gets an `Axis`; the rules only ever unify. What a rule does not account for, and all
that an operator without a rule touches, is frozen with the reason. Nothing is guessed, and no weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError, GraphoptError, InvalidGraphError
from graphopt.ir.dimensions import symbolic_dimensions
from graphopt.ir.ops import default_table
from graphopt.ir.ops.axes import AxisStore, Reason, Sizes, UntrackableError
from graphopt.ir.ops.channels.quant import zero_points_of
from graphopt.ir.ops.flow import ChannelSite, ChannelState, ContradictionError, OpaqueError, Track
from graphopt.ir.ops.row import OpRow, OpTable, Shape, tensor_shape
from graphopt.ir.propagate import Facts
from graphopt.ir.shapes import Probes

_OLDEST_OPSET = 18
_FEW = 64
"""Elements up to which a constant of floats is read; exponents and bounds are meant, not weights."""
_MANY_INDICES = 1 << 20
"""Elements up to which a constant of integers is read; tables of relative positions are large."""


@dataclass
class ChannelAnalysis:
    """What the rules found out about one model; `graphopt.ir.channel_units` makes groups of it.

    Attributes:
        model: the model. It must not change while the analysis is in use.
        table: the op rows that were used.
        facts: what is known at each probe of the symbolic dimensions, the first first.
        sizes: elements of the symbolic dimensions at each probe.
        state: axes of every value.
        spared: initializers that masking leaves as they are, because a division by 0 would follow, or because they
            are scales, zero points or indices.
        opaque: nodes that no rule accounts for, with the reason.
    """

    model: ir.Model
    table: OpTable
    facts: list[Facts]
    sizes: list[dict[str, int]]
    state: ChannelState
    spared: set[ir.Value]
    opaque: list[tuple[ir.Node, str]]

    @property
    def store(self) -> AxisStore:
        """The axes."""
        return self.state.store

    def row(self, node: ir.Node) -> OpRow | None:
        """The op row of a node."""
        return self.table.row(node.domain, node.op_type, self.model.opset_imports.get(node.domain, 1))

    def constant(self, value: ir.Value) -> np.ndarray | None:
        """A small value that is the same in all probes, else None. Weights are not read."""
        tensor = value.const_value
        if value.is_initializer() and tensor is not None:
            small = tensor.size <= (_FEW if tensor.dtype.is_floating_point() else _MANY_INDICES)
            return tensor.numpy() if small else None
        first = self.facts[0].constants.get(value)
        if first is None or self.elements_that_vary(value).any():
            return None
        return first

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Element type of a value, declared or inferred."""
        return self.facts[0].dtypes.get(value, value.dtype)

    def elements_that_vary(self, value: ir.Value) -> np.ndarray:
        """Which elements of a value that is known in the first probe differ in another, flat."""
        first = self.facts[0].constants[value].reshape(-1)
        varies = np.zeros(first.shape, bool)
        for facts in self.facts[1:]:
            other = facts.constants.get(value)
            varies |= True if other is None or other.size != first.size else other.reshape(-1) != first
        return varies

    def shapes(self, value: ir.Value) -> tuple[Shape, ...] | None:
        """Shape of a value in each probe, None where it is not known in all of them or its rank differs."""
        found = [facts.shape(value) for facts in self.facts]
        known = [shape for shape in found if shape is not None]
        if len(known) < len(found) or len({len(shape) for shape in known}) != 1:
            return None
        return tuple(known)


def analyse(
    model: ir.Model, *, sizes: Mapping[str, int] | None = None, table: OpTable | None = None
) -> ChannelAnalysis:
    """Apply the rules to a canonical model, which is not changed.

    Args:
        model: what `graphopt.load` or `graphopt.trace` returns, or a pass made of it.
        sizes: elements of the symbolic input dimensions that the model is known to accept, by name; 8 by default.
        table: op rows, the default table where None.

    Raises:
        InvalidGraphError: the model is not in canonical form, or shapes contradict each other.
    """
    check_canonical(model)
    _check_sizes(model, sizes)
    table = table or default_table()
    probes = Probes(model, sizes, table)
    facts, chosen = _agreeing(probes)
    _check_shapes(facts)
    _check_outputs(model, facts)
    spared = _never_masked(model, table)
    carried: set[ir.Value] = set()
    while True:  # both sets only grow, and end with all weights and carried values
        state = ChannelState(AxisStore(len(facts)), carried=set(carried))
        analysis = ChannelAnalysis(model, table, facts, chosen, state, spared, [])
        _Run(analysis).run()
        more = _divisor_weights(analysis) - spared
        if not more and state.carried == carried:
            return analysis
        spared, carried = spared | more, set(state.carried)


def check_canonical(model: ir.Model, *, constants: bool = False) -> None:
    """Raise `InvalidGraphError` where a model is not in canonical form.

    Args:
        model: what to check.
        constants: whether Constant nodes are allowed; `load` leaves those that are outputs of a graph.
    """
    if not isinstance(model, ir.Model):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GraphoptError(f"a {type(model).__name__} is no graph", help="pass what graphopt.load returns")
    what = _departure(model, constants)
    if what is not None:
        raise InvalidGraphError(
            f"the model is not in canonical form: {what[0]}",
            where=what[1],
            help="pass it through graphopt.load (files, protos, onnx_ir models) or graphopt.trace (torch) first",
        )


def _departure(model: ir.Model, constants: bool) -> tuple[str, str] | None:
    if model.functions:
        return "it has functions", str(next(iter(model.functions)))
    if model.opset_imports.get("", _OLDEST_OPSET) < _OLDEST_OPSET:
        return f"its opset is {model.opset_imports['']}", model.graph.name or "the graph"
    for value in model.graph.inputs:
        if value.is_initializer():
            return "an initializer is also an input", value.name or ""
    for graph in model.graphs():
        if graph is not model.graph and graph.initializers:
            return "a subgraph has initializers of its own", next(iter(graph.initializers))
        for node in graph:
            if not node.name:
                return "a node has no name", node.op_type
            if node.op_type == "Constant" and node.domain == "" and not constants:
                return "a weight is a Constant node", node.name
    return None


def _check_sizes(model: ir.Model, sizes: Mapping[str, int] | None) -> None:
    known = symbolic_dimensions(model)
    for name, size in (sizes or {}).items():
        if name not in known:
            names = ", ".join(map(repr, known)) or "none"
            raise DataError(f"the model has no dynamic dimension {name!r}", help=f"it has {names}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DataError(f"the size of {name!r} is {size!r}, and sizes are whole numbers from 1 on")


def _agreeing(probes: Probes) -> tuple[list[Facts], list[dict[str, int]]]:
    """The probes that know at least what the first knows: the sizes that the model accepts."""
    found = [dict(probes.base)]
    for sizes in probes.vote_sizes()[1:] if probes.symbols else ():
        # Where all symbols cannot change together, one may be pinned (a table of positions), and the others not.
        single = [probes.only(name, sizes[name]) for name in probes.symbols]
        candidates = [sizes] if _accepts(probes, sizes) else [each for each in single if _accepts(probes, each)]
        found += [candidate for candidate in candidates if candidate not in found]
    return [probes.at(sizes) for sizes in found], found


def _accepts(probes: Probes, sizes: dict[str, int]) -> bool:
    """Whether as much is known at these sizes as at the first ones."""
    first, facts = probes.first, probes.at(sizes)
    return len(facts.conflicts) <= len(first.conflicts) and all(
        (shape := facts.shape(value)) is not None and len(shape) == len(known) for value, known in first.shapes.items()
    )


def _check_shapes(facts: Sequence[Facts]) -> None:
    """Nodes that shape inference rejects at every size of the symbols contradict themselves."""
    everywhere = [node for node, _ in facts[0].conflicts]
    for other in facts[1:]:
        rejected = {node for node, _ in other.conflicts}
        everywhere = [node for node in everywhere if node in rejected]
    for node, message in facts[0].conflicts:
        if node in everywhere and all(facts[0].shape(value) is not None for value in node.inputs if value is not None):
            raise InvalidGraphError(
                f"the shapes around a node contradict each other: {message.splitlines()[0]}",
                where=f"{node.op_type} {node.name}",
                help="give sizes that the model accepts (`sizes`, on the command line --input), or mend the model",
            )


def _check_outputs(model: ir.Model, facts: Sequence[Facts]) -> None:
    """A declared size of an output that no probe confirms is a contradiction."""
    for value in model.graph.outputs:
        found = [shape for shape in (each.shape(value) for each in facts) if shape is not None]
        declared = value.shape
        if declared is None or not found:
            continue
        wrong = len(declared) != len(found[0]) or any(
            isinstance(size, int) and all(shape[axis] != size for shape in found) for axis, size in enumerate(declared)
        )
        if wrong:
            raise InvalidGraphError(
                f"output {value.name!r} is declared as {declared}, and the graph gives {list(found[0])}",
                where=model.graph.name,
                help="export the model again",
            )


def _never_masked(model: ir.Model, table: OpTable) -> set[ir.Value]:
    """Initializers that do not stand for 0 when they are filled with it: scales, zero points, indices, flags."""
    spared: set[ir.Value] = set()
    for value in model.graph.initializers.values():
        dtype = value.dtype
        uses = [
            (table.row(use.node.domain, use.node.op_type, model.opset_imports.get(use.node.domain, 1)), use.idx)
            for use in value.uses()
        ]
        quantized = [row is not None and bool(row.quantization) for row, _ in uses]
        scale = any(row is not None and index in row.quantization for row, index in uses)
        is_float = dtype is not None and dtype.is_floating_point()
        number = is_float or (dtype is not None and all(quantized) and dtype.is_integer())
        points = {point for point in zero_points_of(value) if not is_float} if quantized else set()
        if scale or not number or len(points) > 1:
            spared.add(value)
    return spared


def _divisor_weights(analysis: ChannelAnalysis) -> set[ir.Value]:
    """Initializers behind divisors that would be 0; where a divisor comes from data, its channels become inexact."""
    found: set[ir.Value] = set()
    store = analysis.store
    for value, axis, node in analysis.state.divisors:
        if store.is_fixed(axis):
            continue
        if value in analysis.state.weights:
            found |= weight_sources(value)
        else:
            store.mark_inexact(axis, Reason("it divides by what is 0 where masked", node))
    return found


def weight_sources(value: ir.Value) -> set[ir.Value]:
    """The values without a producer that a value is computed from: initializers, for a weight."""
    pending, found = [value], set[ir.Value]()
    seen: set[ir.Value] = set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        producer = current.producer()
        if producer is None:
            found.add(current)
        else:
            pending.extend(operand for operand in producer.inputs if operand is not None)
    return found


class _Run:
    """One application of all rules, in the order of the nodes."""

    def __init__(self, analysis: ChannelAnalysis) -> None:
        self.analysis, self.state, self.store = analysis, analysis.state, analysis.store

    def run(self) -> None:
        graph = self.analysis.model.graph
        for value in graph.inputs:
            self._fix_all(value, Reason(f"graph input {value.name!r}"))
        for value in graph.initializers.values():
            if value.const_value is not None:
                self.state.weights.add(value)
                zero = value not in self.analysis.spared
                self.state.tracks[value] = tuple(
                    Track(self.store.open(size), zero) for size in tensor_shape(value.const_value)
                )
        self._graph(graph)
        for value in graph.outputs:
            self._freeze(value, Reason(f"graph output {value.name!r}"))
        for inner in self.analysis.model.graphs():
            for value in inner.outputs:
                self._freeze_sizes(value)
        for value in graph.initializers.values():
            if not value.uses() and not value.is_graph_output():
                self._freeze(value, Reason("nothing reads it", channel=False))

    def _graph(self, graph: ir.Graph) -> None:
        for node in graph:
            self._node(node)

    def _node(self, node: ir.Node) -> None:
        row = self.analysis.row(node)
        subgraphs = list(subgraphs_of(node))
        if all(value is None or value in self.state.weights for value in node.inputs) and not subgraphs:
            self.state.weights.update(node.outputs if node.inputs else ())
        if row is None or row.channels is None:
            self._opaque(node, row.why_frozen if row is not None else "an operator that the table does not know")
            return
        site = ChannelSite(
            node, self.state, self.analysis.shapes, self.analysis.constant, self.analysis.dtype, self._graph
        )
        try:
            row.channels(site)
        except (OpaqueError, UntrackableError) as error:
            self._opaque(node, str(error))
            return
        except ContradictionError as error:
            raise InvalidGraphError(
                f"the shapes around a node contradict each other: {error}",
                where=f"{node.op_type} {node.name}",
                help="export the model again",
            ) from error
        reason = Reason("no rule accounts for this axis", node)
        for index, value in enumerate(node.inputs):
            for axis, track in enumerate(self.state.tracks.get(value, ()) if value is not None else ()):
                if (index, axis) not in site.accounted:
                    self.store.freeze(track.axis, reason)
        self._check_outputs(node)

    def _check_outputs(self, node: ir.Node) -> None:
        for value in node.outputs:
            shapes, tracks = self.analysis.shapes(value), self.state.tracks.get(value)
            if tracks is None and not value.uses() and not value.is_graph_output():
                continue
            if tracks is None:
                self._opaque(node, "the shape of its result is unknown")
                return
            expected = None if shapes is None else list(zip(*shapes, strict=True))
            if expected is not None and [track.axis.sizes for track in tracks] != expected:
                found = [track.axis.sizes for track in tracks]
                self._opaque(node, f"its rule expects sizes {found}, and they are {expected}")
                return

    def _opaque(self, node: ir.Node, why: str) -> None:
        """Hands off: everything that the node reads, captures and returns stays."""
        self.analysis.opaque.append((node, why))
        reason = Reason(why, node)
        read = [value for value in node.inputs if value is not None]
        for graph in subgraphs_of(node):
            read += list(graph.outputs)
            read += [value for inner in nodes_below(graph) for value in inner.inputs if value is not None]
        for value in read:
            self._freeze(value, reason)
        for value in node.outputs:
            self._fix_all(value, reason)

    def _freeze(self, value: ir.Value, reason: Reason) -> None:
        for track in self.state.tracks.get(value, ()):
            self.store.freeze(track.axis, reason)

    def _freeze_sizes(self, output: ir.Value) -> None:
        """A size that leaves a graph cannot be put back to what it was: the axes that it is the size of must stay."""
        pending, seen, facts = [output], set[ir.Value](), self.analysis.facts[0]
        while pending:
            value = pending.pop()
            node = value.producer()
            arithmetic = value in facts.sizes and value in facts.constants and value not in facts.from_weights
            if value in seen or node is None or not arithmetic:
                continue
            seen.add(value)
            if node.op_type not in ("Shape", "Size"):
                pending += [operand for operand in node.inputs if operand is not None]
            elif node.inputs[0] is not None:
                self._freeze(node.inputs[0], Reason(f"its size becomes {output.name!r}, the result of a graph", node))

    def _fix_all(self, value: ir.Value, reason: Reason) -> None:
        self._freeze(value, reason)
        shapes = self.analysis.shapes(value)
        self.state.tracks.pop(value, None)
        if shapes is not None:
            sizes: Iterable[Sizes] = zip(*shapes, strict=True)
            self.state.tracks[value] = tuple(Track(self.store.fix(size, reason)) for size in sizes)


def subgraphs_of(node: ir.Node) -> Iterable[ir.Graph]:
    """The graphs that a node holds in attributes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def nodes_below(graph: ir.Graph) -> Iterable[ir.Node]:
    """All nodes of a graph and of the graphs inside."""
    for node in graph:
        yield node
        for inner in subgraphs_of(node):
            yield from nodes_below(inner)
