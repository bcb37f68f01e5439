"""Parts of a graph that are entered and left in one place, and which of them a network can do without.

A residual block computes `shortcut + branch(x)`, where the shortcut is x or a projection of it. Without the branch the
shortcut is what is left, and the graph stays valid. Which nodes are the branch, and no more than the branch, is what
post-dominators say (`graphopt.ir.region_flow`); no name and no pattern of a framework is looked for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir.channel_names import ANONYMOUS, common_module
from graphopt.ir.region_flow import Flow
from graphopt.ir.region_signature import signature
from graphopt.ir.rewrite import Rewriter, is_op
from graphopt.ir.shapes import Probes
from graphopt.ir.text import describe, subgraphs, type_text

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the modules around a node: a list of quoted paths, the last one the node's own name."""
_QUOTED = re.compile(r"'([^']*)'")

KINDS = ("residual branch", "block", "chain", "subgraph")
"""What a region may be, see `Region.kind`."""


@dataclass(frozen=True)
class Region:
    """A part of the main graph. Values and nodes are named, so that it means the same on a clone.

    Attributes:
        name: readable and unique in its graph: the module path that its weights share, where they have names.
        kind: "residual branch" (what an Add adds to a shortcut), "block" (everything between a value and the next one
            that all ways lead through, ways in parallel included), "chain" (one layer and what follows it one by one),
            "subgraph" (a node with bodies: regions inside are not looked for).
        entry: the value that goes in.
        exit: the value that comes out.
        reads: other run-time values that it reads: masks, positions, sizes.
        nodes: its nodes, in graph order. The Add behind a residual branch is not among them.
        parent: name of the smallest region that has all these nodes and more, None where there is none.
        signature: equal for regions that compute the same with other weights: same operators, attributes, connections,
            shapes and element types.
        replaced: the value that goes with the region: the sum behind a residual branch, else `exit`.
        replacement: the value that stands for it then, None where the region cannot go.
        by: "identity" (the replacement is the entry), "projection" (it is what a shortcut makes of the entry), or None.
        reason: why it cannot go, None where it can.
    """

    name: str
    kind: str
    entry: str
    exit: str
    reads: tuple[str, ...]
    nodes: tuple[str, ...]
    parent: str | None
    signature: str
    replaced: str
    replacement: str | None
    by: str | None
    reason: str | None

    @property
    def replaceable(self) -> bool:
        """Whether `drop_region` can take it away."""
        return self.replacement is not None


def regions(model: ir.Model) -> tuple[Region, ...]:
    """The regions of the main graph that hold a layer, a node that multiplies by weights.

    Args:
        model: in canonical form; it is not changed.

    Returns:
        In the order of their first nodes, a nested one after its parent. Bodies of If and Loop are not looked into.

    Example:
        >>> from graphopt.ir.canonical import canonicalize
        >>> model = canonicalize(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[n,2] x) => (float[n,2] z) <float[2,2] w = {1, 2, 3, 4}>
        ...     { h = MatMul (x, w)  r = Relu (h)  y = Add (x, r)  z = Relu (y) }'''))
        >>> [(region.kind, region.exit, region.by) for region in regions(model) if region.replaceable]
        [('residual branch', 'r', 'identity')]
    """
    flow = Flow(model)
    standing = _Standing(flow)
    found: list[tuple[Region, frozenset[ir.Node]]] = []
    for search in (_residual_branches, _subgraphs, _blocks, _chains):
        known = {nodes for _, nodes in found}
        found += [(region, nodes) for region, nodes in search(flow, standing) if nodes not in known]
    found = _with_reasons(found)
    found.sort(key=lambda pair: (min(map(flow.position.__getitem__, pair[1])), -len(pair[1])))
    return tuple(_with_parents(_with_names(found)))


# Search -----------------------------------------------------------------------------------------------------


class _Standing:
    """Whether one value can stand for another."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._probes: Probes | None = None

    def objection(self, replaced: ir.Value, replacement: ir.Value) -> str | None:
        """Why `replacement` cannot take the place of `replaced`, None where it can."""
        if replaced.dtype != replacement.dtype or not self._same_shape(replaced, replacement):
            here, there = type_text(replacement) or "?", type_text(replaced) or "?"
            return f"{replacement.name} is {here}, what it would stand for, {replaced.name}, is {there}"
        if replaced.is_graph_output() and (replacement.producer() is None or replacement.is_graph_output()):
            kind = "input" if replacement.producer() is None else "output"
            return f"{replaced.name} is an output of the graph, and {replacement.name} an {kind}: a copy would be left"
        return None

    def _same_shape(self, first: ir.Value, second: ir.Value) -> bool:
        if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
            return False
        pairs = [(a, b) for a, b in zip(first.shape, second.shape, strict=True) if a != b or _is_anonymous(a)]
        if not pairs:
            return True
        if any(isinstance(a, int) and isinstance(b, int) for a, b in pairs):
            return False
        self._probes = self._probes or Probes(self._flow.model)
        return all(
            facts.shape(first) is not None and facts.shape(first) == facts.shape(second)
            for facts in (self._probes.first, self._probes.second)
        )


def _is_anonymous(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and dim.value is None


_Found = Iterator[tuple[Region, frozenset[ir.Node]]]


def _residual_branches(flow: Flow, standing: _Standing) -> _Found:
    for add in flow.nodes:
        values = [value for value in add.inputs if value is not None]
        if not is_op(add, "Add") or len(set(values)) < 2 or not all(value in flow.dynamic for value in values):
            continue
        served = [flow.serving(add, index) for index in range(2)]
        for index, (branch, shortcut) in enumerate(((0, 1), (1, 0))):
            exit_value, other = values[branch], values[shortcut]
            entry = _shared_entry(flow, exit_value, other, (served[branch], served[shortcut]))
            if entry is None:
                continue
            between = flow.between(entry, exit_value)
            nodes = served[branch] | between
            layers, beside = flow.layers(nodes), 0 if entry is other else flow.layers(served[shortcut])
            if layers == 0 or layers < beside or (layers == beside and entry is not other and index == 1):
                continue
            objection = (
                _seen_from_outside(flow, between - served[branch], served[branch])
                or standing.objection(add.outputs[0], other)
                or _no_shortcut(layers, beside)
            )
            yield _region(flow, "residual branch", entry, exit_value, nodes, (add.outputs[0], other), objection)


def _shared_entry(
    flow: Flow, branch: ir.Value, shortcut: ir.Value, sides: Sequence[frozenset[ir.Node]]
) -> ir.Value | None:
    """The value that a branch and its shortcut both begin at, None where the other operand is no shortcut around it.

    A projection has one entry, from which all that leads to the branch serves the branch alone: sums of gates, of
    scores and a mask, or of two levels of a pyramid are none.
    """
    if flow.between(shortcut, branch):
        return shortcut
    entries = flow.entries(sides[1])
    if len(entries) != 1:
        return None
    between = flow.between(entries[0], branch)
    return entries[0] if between and between <= sides[0] else None


def _seen_from_outside(flow: Flow, leaking: frozenset[ir.Node], nodes: frozenset[ir.Node]) -> str | None:
    """Why a branch is not closed: some of what it computes on the way is needed elsewhere."""
    for node in flow.in_order(leaking):
        seen = flow.outside_reader(node, nodes | leaking)
        if seen is not None:
            reader = "an output of the graph" if seen[1] is None else f"read by {describe(seen[1])}"
            return f"{seen[0].name} inside is also {reader}"
    return None


def _no_shortcut(layers: int, beside: int) -> str | None:
    if beside == layers:
        return f"both sides of the sum have as many layers ({layers}): neither is the shortcut of the other"
    return f"the other side of the sum is no shortcut: it has {beside} layers" if beside > 1 else None


def _blocks(flow: Flow, standing: _Standing) -> _Found:
    starts = [flow.model.graph.inputs[0]] if len(flow.model.graph.inputs) == 1 else []
    starts += [node.outputs[0] for node in flow.nodes if node.outputs[0] in flow.dynamic]
    for start in starts:
        producer = start.producer()
        end = flow.next_meeting(start)
        led = flow.led_by(start)
        if end is None or end not in led or (producer is not None and _has_other_results(flow, producer)):
            continue
        inside = frozenset(node for node in led & flow.served_by(end) if node is not producer)
        nodes = flow.with_constants(inside)
        if len(inside) < 2 or flow.layers(inside) == 0 or _has_other_results(flow, end):
            continue
        exit_value = end.outputs[0]
        yield _region(
            flow, "block", start, exit_value, nodes, (exit_value, start), standing.objection(exit_value, start)
        )


def _has_other_results(flow: Flow, node: ir.Node) -> bool:
    return any(output.is_graph_output() or flow.readers.get(output) for output in node.outputs[1:])


def _chains(flow: Flow, standing: _Standing) -> _Found:
    for layer in flow.nodes:
        read = flow.run_time_operands(layer)
        if not flow.is_layer(layer) or len(read) != 1 or any(subgraphs(layer)):
            continue
        chain = [layer]
        while not _has_other_results(flow, chain[-1]) and not chain[-1].outputs[0].is_graph_output():
            readers = flow.readers.get(chain[-1].outputs[0], [])
            if len(readers) != 1 or flow.is_layer(readers[0]) or len(flow.run_time_operands(readers[0])) != 1:
                break
            chain.append(readers[0])
        exit_value, nodes = chain[-1].outputs[0], flow.with_constants(chain)
        objection = "it has several results" if _has_other_results(flow, chain[-1]) else None
        objection = objection or standing.objection(exit_value, read[0])
        yield _region(flow, "chain", read[0], exit_value, nodes, (exit_value, read[0]), objection)


def _subgraphs(flow: Flow, _: _Standing) -> _Found:
    for node in flow.nodes:
        read = flow.run_time_operands(node)
        if any(subgraphs(node)):
            why = f"regions in the bodies of {describe(node)} are not looked for: when they run is decided at run time"
            entry = read[0] if read else node.outputs[0]
            nodes = frozenset({node})
            yield _region(flow, "subgraph", entry, node.outputs[0], nodes, (node.outputs[0], node.outputs[0]), why)


def _region(
    flow: Flow,
    kind: str,
    entry: ir.Value,
    exit_value: ir.Value,
    nodes: frozenset[ir.Node],
    swap: tuple[ir.Value, ir.Value],
    objection: str | None,
) -> tuple[Region, frozenset[ir.Node]]:
    """The record; name and parent are filled in when all are known. `swap` is what is replaced, and by what."""
    replaced, replacement = swap
    region = Region(
        name=_module(flow, nodes),
        kind=kind,
        entry=entry.name or "",
        exit=exit_value.name or "",
        reads=tuple(value.name or "" for value in flow.entries(nodes) if value is not entry),
        nodes=tuple(node.name or "" for node in flow.in_order(nodes)),
        parent=None,
        signature=signature(flow, nodes, entry, exit_value),
        replaced=replaced.name or "",
        replacement=None if objection else replacement.name,
        by=None if objection else "identity" if replacement is entry else "projection",
        reason=objection,
    )
    return region, nodes


def _module(flow: Flow, nodes: frozenset[ir.Node]) -> str:
    """The module path that its layers share: in the names of weights, else as torch's exporter noted it, else of nodes.

    Where they share none, the first and the last. Weights that are read elsewhere, too, say nothing.
    """
    ordered = flow.in_order(nodes)
    layers = [node for node in ordered if flow.is_layer(node)] or list(ordered)
    weights = [weight for node in layers for weight in _weights(flow, node)]
    own = [weight for weight in weights if all(use.node in nodes for use in weight.uses())]
    named = [weight for weight in own if not ANONYMOUS.fullmatch(weight.name or "")]
    if named and (path := common_module(named)):
        return path
    scopes = [_QUOTED.findall(node.metadata_props.get(_SCOPES, "")) for node in layers]
    if all(len(scope) > 1 for scope in scopes):
        return _joined([scope[-2] for scope in scopes])
    known = named or own
    return _joined([common_module([weight]) for weight in known]) if known else layers[0].name or ""


def _joined(paths: Sequence[str]) -> str:
    """What dotted paths begin with, or the first and the last where that is nothing."""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    common = ".".join(part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
    return common or " to ".join(dict.fromkeys((paths[0], paths[-1])))


def _weights(flow: Flow, node: ir.Node) -> Iterator[ir.Value]:
    """The initializers of more than one axis that a node reads, also through nodes that compute on constants."""
    pending = [value for value in node.inputs if value is not None and value not in flow.dynamic]
    while pending:
        value = pending.pop()
        producer = value.producer()
        if value.is_initializer() and len(value.shape or ()) > 1:
            yield value
        elif producer is not None:
            pending.extend(operand for operand in producer.inputs if operand is not None)


# Order ------------------------------------------------------------------------------------------------------


_Pairs = list[tuple[Region, frozenset[ir.Node]]]


def _with_reasons(found: _Pairs) -> _Pairs:
    """A block goes when its residual branch goes: there is one way to say so, the branch."""
    branches = {
        region.replaced: region for region, _ in found if region.kind == "residual branch" and region.replaceable
    }
    changed: _Pairs = []
    for region, nodes in found:
        branch = branches.get(region.replaced)
        if region.kind == "block" and branch is not None and branch.replacement == region.replacement:
            why = f"dropping the residual branch to {branch.exit} does the same"
            region = replace(region, replacement=None, by=None, reason=why)
        changed.append((region, nodes))
    return changed


def _with_names(found: _Pairs) -> _Pairs:
    """Names made unique: the first residual branch of a module has its name, other regions say what they are."""
    taken: set[str] = set()
    names: dict[int, str] = {}
    for index, (region, _) in sorted(enumerate(found), key=lambda item: KINDS.index(item[1][0].kind)):
        name = region.name
        if name in taken:
            name = f"{region.name} ({region.kind})"
        number = 2
        while name in taken:
            name, number = f"{region.name} ({region.kind} {number})", number + 1
        taken.add(name)
        names[index] = name
    return [(replace(region, name=names[index]), nodes) for index, (region, nodes) in enumerate(found)]


def _with_parents(found: _Pairs) -> Iterator[Region]:
    for region, nodes in found:
        around = [(len(other), outer.name) for outer, other in found if len(other) > len(nodes) and nodes < other]
        yield replace(region, parent=min(around)[1] if around else None)


# Dropping ---------------------------------------------------------------------------------------------------


def drop_regions(model: ir.Model, dropped: Sequence[Region]) -> ir.Model:
    """A model without these regions: what stands for them is read in their place, and what only served them is gone.

    Values that remain keep their names, and the interface is as it was. A region inside another one that goes, too,
    goes with it. Dropping a residual branch is the same as multiplying it by 0. Weights are shared with `model`, which
    is not changed; a graph input that nothing reads any more stays an input.

    Args:
        model: the model whose regions these are, or one that came of it and still has their Adds.
        dropped: regions with `replaceable`, in any order.

    Raises:
        GraphoptError: a region cannot go, is not in this model, has values of another shape by now, or nothing would be
            left between an input and an output.
    """
    clone = model.clone()
    rewriter = Rewriter(clone)
    standing = _Standing(Flow(model))
    originals = _values(model)
    values = _values(clone)
    stand_in: dict[ir.Value, ir.Value] = {}
    for region in sorted(dropped, key=lambda region: -len(region.nodes)):
        old, new = _swap(region, values)
        objection = standing.objection(originals[region.replaced], originals[new.name or ""])
        if objection is not None:
            raise GraphoptError(f"the region can no longer go: {objection}", where=region.name)
        while new in stand_in:
            new = stand_in[new]
        producer = old.producer()
        if producer is None or producer.graph is None:
            continue  # went with a region around it
        if not rewriter.bypass(old, new):
            raise GraphoptError(
                f"nothing would be left between {new.name} and the output {old.name}",
                where=region.name,
                help="keep one of the regions on the way",
            )
        stand_in[old] = new
    return clone


def drop_region(model: ir.Model, region: Region) -> ir.Model:
    """`drop_regions` for one.

    Example:
        >>> from graphopt.ir.canonical import canonicalize
        >>> model = canonicalize(ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[n,2] x) => (float[n,2] z) <float[2,2] w = {1, 2, 3, 4}>
        ...     { h = MatMul (x, w)  r = Relu (h)  y = Add (x, r)  z = Relu (y) }'''))
        >>> branch = next(region for region in regions(model) if region.replaceable)
        >>> [node.op_type for node in drop_region(model, branch).graph]
        ['Relu']
    """
    return drop_regions(model, (region,))


def _values(model: ir.Model) -> dict[str, ir.Value]:
    produced = [output for node in model.graph for output in node.outputs]
    return {value.name: value for value in (*model.graph.inputs, *produced) if value.name}


def _swap(region: Region, values: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """The value that goes and the one that takes its place, in a model with these values."""
    if region.replacement is None:
        raise GraphoptError(f"this region cannot go: {region.reason}", where=region.name)
    missing = [name for name in (region.replaced, region.exit) if name not in values]
    if missing:
        raise GraphoptError(
            f"the model has no value {missing[0]!r}", where=region.name, help="ask for the regions of this very model"
        )
    old = values[region.replaced]
    join = old.producer()
    if region.kind == "residual branch" and join is not None:  # whatever the other side is called by now
        others = [value for value in join.inputs if value is not None and value.name != region.exit]
        if is_op(join, "Add") and len(others) == 1:
            return old, others[0]
    if region.replacement not in values:
        raise GraphoptError(f"the model has no value {region.replacement!r}", where=region.name)
    return old, values[region.replacement]
