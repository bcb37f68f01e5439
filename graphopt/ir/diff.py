"""The difference of two graphs as hunks: what was taken out, what was put in, and what else differs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx
import onnx_ir as ir
from rich.text import Text

from graphopt.ir.correspondence import Correspondence, Side, correspond, paired_by_name
from graphopt.ir.load import Source, read
from graphopt.ir.ops.row import tensor_bytes
from graphopt.ir.text import node_text, op_text, type_text, value_text
from graphopt.ir.weight_pairs import WeightPair, weight_change, weight_type

_LISTED = 8
"""How many lines of one kind the printed form shows before it says how many more there are."""


@dataclass(frozen=True)
class Hunk:
    """One connected change: the nodes taken out, the nodes put in, and the kept nodes that read something else now."""

    removed: tuple[ir.Node, ...]
    added: tuple[ir.Node, ...]
    rewired: tuple[str, ...]
    """Kept readers, as `%y = Relu(%c -> %r)`; empty where the new value took the old one's name."""
    scope: str
    """Where it is: `""` in the main graph, `"%y.then_branch"` in a body of the node that computes `%y`."""

    @property
    def anchor(self) -> str:
        """A name to find the place by: the first node's own name, or that of its first output."""
        node = (self.removed or self.added)[0]
        return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type

    def to_json(self) -> dict[str, Any]:
        """Plain data: anchor, scope, and the lines."""
        return {
            "anchor": self.anchor,
            "scope": self.scope,
            "removed": [node_text(node) for node in self.removed],
            "added": [node_text(node) for node in self.added],
            "rewired": list(self.rewired),
        }


@dataclass(frozen=True)
class Totals:
    """One graph in four numbers. Parameters count the elements of all weights; bytes are theirs as stored."""

    nodes: int
    parameters: int
    weight_bytes: int
    ops: Counter[str]


@dataclass(frozen=True)
class GraphDiff:
    """What differs between two models; falsy where nothing does.

    `str`, rich's `print`, `to_json` and `to_html` show it.

    Names do not count, except those of the model's inputs and outputs; nor does the order of nodes or weights.

    Attributes:
        groups: the hunks; those of equal shape (the same operators connected alike, whatever the names, sizes and
            list attributes such as pads) are in one group, in the order of the graph.
        interface: changed inputs, outputs and opsets, one sentence each.
        weights_changed: weights of one name whose dtype, shape or content differ.
        weights_removed, weights_added: names of weights without a partner of equal content or equal name.
        before, after: totals of the two models.
    """

    groups: tuple[tuple[Hunk, ...], ...]
    interface: tuple[str, ...]
    weights_changed: tuple[WeightPair, ...]
    weights_removed: tuple[tuple[str, ir.Value], ...]
    weights_added: tuple[tuple[str, ir.Value], ...]
    before: Totals
    after: Totals
    correspondence: Correspondence = field(repr=False, compare=False)

    @property
    def hunks(self) -> list[Hunk]:
        """All hunks, group by group."""
        return [hunk for group in self.groups for hunk in group]

    def __bool__(self) -> bool:
        return bool(self.groups or self.interface or self.weights_changed or self.weights_removed or self.weights_added)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; the same in every process. Nothing is left out."""
        ops = {op: [self.before.ops[op], self.after.ops[op]] for op in sorted({*self.before.ops, *self.after.ops})}
        return {
            "equal": not self,
            "nodes": [self.before.nodes, self.after.nodes],
            "ops": ops,
            "parameters": [self.before.parameters, self.after.parameters],
            "weight_bytes": [self.before.weight_bytes, self.after.weight_bytes],
            "interface": list(self.interface),
            "weights": {
                "changed": [{"name": pair.name, "change": weight_change(pair)} for pair in self.weights_changed],
                "removed": [{"name": name, "type": weight_type(value)} for name, value in self.weights_removed],
                "added": [{"name": name, "type": weight_type(value)} for name, value in self.weights_added],
            },
            "groups": [{"count": len(group), "hunks": [hunk.to_json() for hunk in group]} for group in self.groups],
        }

    def text(self, *, full: bool = False) -> str:
        """The plain printed form; `full` shows every hunk and every weight instead of one of each shape."""
        return "\n".join(line for _, line in self._lines(full))

    def to_html(self, *, title: str = "graphopt diff") -> str:
        """One self-contained page: both graphs side by side, with their edges, changed nodes marked.

        Opens without a server or a network. Every string of the models is escaped.
        """
        from graphopt.ir.diff_html import render  # a page of templates that only this call needs

        return render(self, title)

    def __str__(self) -> str:
        return self.text()

    def __rich__(self) -> Text:
        styles = {"-": "red", "+": "green", "~": "yellow", "@": "bold cyan", " ": ""}
        return Text("\n").join(Text(line, style=styles[kind]) for kind, line in self._lines(full=False))

    def _lines(self, full: bool) -> Iterator[tuple[str, str]]:
        """The printed lines, each with what it is: `-`, `+`, `~`, `@` (a hunk's head) or a blank."""
        if not self:
            yield " ", f"   no difference ({self.after.nodes} nodes)"
            return
        for line in self._totals():
            yield " ", f"   {line}"
        limit = None if full else _LISTED
        for line in self.interface:
            yield "~", f" ~   {line}"
        changed = [f"weight %{pair.name}: {weight_change(pair)}" for pair in self.weights_changed[:limit]]
        yield from _listing("~", changed, len(self.weights_changed))
        if not self.groups or full:
            for sign, weights in (("-", self.weights_removed), ("+", self.weights_added)):
                lines = [f"weight %{name}: {weight_type(value)}" for name, value in weights[:limit]]
                yield from _listing(sign, lines, len(weights))
        for group in self.groups:
            for hunk in group if full else group[:1]:
                yield " ", ""
                yield "@", f"   @@ {hunk.anchor}{f' in {hunk.scope}' if hunk.scope else ''} @@"
                for node in hunk.removed:
                    yield "-", f" -   {node_text(node)}"
                for node in hunk.added:
                    yield "+", f" +   {node_text(node)}"
                yield from _listing("~", list(hunk.rewired[:limit]), len(hunk.rewired))
            if len(group) > 1 and not full:
                yield " ", f"   ... {len(group) - 1} more of the same shape"

    def _totals(self) -> Iterator[str]:
        a, b = self.before, self.after
        ops = sorted(
            {op for op in (*a.ops, *b.ops) if a.ops[op] != b.ops[op]}, key=lambda op: (b.ops[op] - a.ops[op], op)
        )
        changes = "      ".join(f"{op} {a.ops[op]} -> {b.ops[op]}" for op in ops)
        yield f"nodes    {_arrow(a.nodes, b.nodes)}" + (f"        {changes}" if changes else "")
        yield f"weights  {_arrow(a.parameters, b.parameters)}      bytes {_arrow(a.weight_bytes, b.weight_bytes)}" + (
            f"      tensors -{len(self.weights_removed)} +{len(self.weights_added)} ~{len(self.weights_changed)}"
        )


def diff(a: Source, b: Source) -> GraphDiff:
    """What differs between two models, given as for `graphopt.load`. Neither is changed.

    Nodes correspond by what they compute (`graphopt.ir.correspondence`): renamed values and reordered nodes are no
    difference, and it is none which of several equal values is read. Bodies of If, Loop and Scan and model functions
    are compared too. Shapes noted on inner values do not count: they follow from the rest.

    Example:
        >>> head = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y)'
        >>> a = ir.from_onnx_text(head + ' { h = Identity(x)  y = Relu(h) }')
        >>> b = ir.from_onnx_text(head + ' { y = Relu(x) }')
        >>> print(diff(a, b))
           nodes    2 -> 1        Identity 1 -> 0
           weights  0 =      bytes 0 =      tensors -0 +0 ~0
        <BLANKLINE>
           @@ h @@
         -   %h = Identity(%x)
         ~   %y = Relu(%h -> %x)
    """
    a, b = (model if isinstance(model, ir.Model) else read(model) for model in (a, b))
    correspondence = correspond(a, b)
    return GraphDiff(
        groups=_grouped(_hunks(correspondence), correspondence),
        interface=tuple(_interface_changes(a, b)),
        weights_changed=tuple(correspondence.weights.changed),
        weights_removed=tuple(correspondence.weights.removed),
        weights_added=tuple(correspondence.weights.added),
        before=_totals(correspondence.a),
        after=_totals(correspondence.b),
        correspondence=correspondence,
    )


def _totals(side: Side) -> Totals:
    tensors = [value.const_value for value in side.weights.values() if value.const_value is not None]
    return Totals(
        nodes=len(side.position),
        parameters=sum(tensor.size for tensor in tensors),
        weight_bytes=sum(tensor_bytes(tensor) for tensor in tensors),
        ops=Counter(op_text(node) for node in side.position),
    )


def _arrow(a: int, b: int) -> str:
    return f"{a:,} =" if a == b else f"{a:,} -> {b:,}"


def _listing(sign: str, lines: list[str], total: int) -> Iterator[tuple[str, str]]:
    yield from ((sign, f" {sign}   {line}") for line in lines)
    if total > len(lines):
        yield " ", f"     ... {total - len(lines)} more"


def _interface_changes(a: ir.Model, b: ir.Model) -> Iterator[str]:
    for kind, before, after in (
        ("input", list(a.graph.inputs), list(b.graph.inputs)),
        ("output", list(a.graph.outputs), list(b.graph.outputs)),
    ):
        pairs = dict(paired_by_name(before, after))
        for value in before:
            partner = pairs.get(value)
            if partner is None:
                yield f"{kind} {value_text(value)}: {type_text(value)} is gone"
                continue
            if value.name != partner.name:
                yield f"{kind} {value_text(value)} is now called {value_text(partner)}"
            if type_text(value) != type_text(partner):
                yield f"{kind} {value_text(partner)}: {type_text(value)} -> {type_text(partner)}"
        partners = set(pairs.values())
        yield from (f"{kind} {value_text(v)}: {type_text(v)} is new" for v in after if v not in partners)
        kept = [pairs[value] for value in before if value in pairs]
        if kept != [value for value in after if value in partners]:
            yield f"{kind}s in another order: {', '.join(value_text(value) for value in after)}"
    for domain in sorted({*a.opset_imports, *b.opset_imports}):
        old, new = a.opset_imports.get(domain), b.opset_imports.get(domain)
        if old != new:
            yield f"opset{f' of {domain}' if domain else ''} {old or 'none'} -> {new or 'none'}"


# --- hunks ---


def _hunks(correspondence: Correspondence) -> list[Hunk]:
    """The changed nodes, joined where one reads another or both stand for one value."""
    a, b = correspondence.a, correspondence.b
    removed = [node for node in a.position if node not in correspondence.nodes]
    added = [node for node in b.position if node not in correspondence.partner]
    order = {node: index for index, node in enumerate((*removed, *added))}
    joined: networkx.Graph[ir.Node] = networkx.Graph()
    joined.add_nodes_from(order)
    for side in (a, b):
        for node in side.position:
            if node in order:
                sources = [value.producer() for value in node.inputs if value is not None]
                joined.add_edges_from((source, node) for source in (*sources, side.owner[node]) if source in order)
    names = {value.name: value for node in added for value in node.outputs if value.name}
    for node in removed:
        for value in node.outputs:
            other = correspondence.values.get(value) or names.get(value.name or "")
            producer = other.producer() if other is not None else None
            if producer in order and (value in correspondence.values or other not in correspondence.origin):
                joined.add_edge(node, producer)
    rewired = _rewired(correspondence)
    hunks: list[tuple[float, Hunk]] = []
    place = correspondence.places()
    for component in networkx.connected_components(joined):
        nodes = sorted(component, key=lambda node: order[node])
        out = tuple(node for node in nodes if node in a.position)
        into = tuple(node for node in nodes if node in b.position)
        readers = dict.fromkeys(line for node in nodes for line in rewired.get(node, ()))
        scope = a.scope[out[0]] if out else b.scope[into[0]]
        hunks.append((min(place[node] for node in nodes), Hunk(out, into, tuple(readers), scope)))
    return [hunk for _, hunk in sorted(hunks, key=lambda pair: pair[0])]


def _rewired(correspondence: Correspondence) -> dict[ir.Node, list[str]]:
    """For each changed node, the lines of kept nodes that read another name now because of it."""
    lines: dict[ir.Node, list[str]] = defaultdict(list)
    for a, b in correspondence.nodes.items():
        moves: list[str] = []
        causes: list[ir.Node] = []
        for before, after in zip(a.inputs, b.inputs, strict=False):
            producers = [
                value.producer() if value is not None and correspondence.changed(value, side) else None
                for value, side in ((before, correspondence.a), (after, correspondence.b))
            ]
            found = [producer for producer in producers if producer is not None]
            if found and value_text(before) != value_text(after):
                moves.append(f"{value_text(before)} -> {value_text(after)}")
                causes += found
            else:
                moves.append(value_text(after))
        line = f"{', '.join(value_text(value) for value in b.outputs)} = {op_text(b)}({', '.join(moves)})"
        for cause in dict.fromkeys(causes):
            lines[cause].append(line)
    return lines


def _grouped(hunks: Iterable[Hunk], correspondence: Correspondence) -> tuple[tuple[Hunk, ...], ...]:
    groups: dict[Hashable, list[Hunk]] = defaultdict(list)
    for hunk in hunks:
        groups[_shape(hunk, correspondence)].append(hunk)
    return tuple(tuple(group) for group in groups.values())


def _shape(hunk: Hunk, correspondence: Correspondence) -> Hashable:
    """What a hunk does, without names and sizes: values and lists (pads, strides) are numbered as they appear."""
    numbers: dict[Hashable, int] = {}
    kinds: dict[Hashable, str] = {}

    def number(key: Hashable, kind: str) -> tuple[str, int]:
        kinds.setdefault(key, kind)
        return kinds[key], numbers.setdefault(key, len(numbers))

    def operand(value: ir.Value | None) -> Hashable:
        if value is None:
            return None
        weight = correspondence.weights.key.get(value)
        if weight is not None:
            return number(weight, "weight")
        return number(correspondence.origin.get(value, value), "value")

    def attribute(name: str, value: ir.Attr) -> Hashable:
        if value.is_ref() or value.type in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
            return name, str(value.value)
        if value.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS):
            return name, number((name, tuple(value.value)), "list")
        return name, str(value.type)

    def row(node: ir.Node) -> Hashable:
        attributes = tuple(attribute(name, value) for name, value in sorted(node.attributes.items()))
        return op_text(node), attributes, tuple(map(operand, node.inputs)), tuple(map(operand, node.outputs))

    return tuple(map(row, hunk.removed)), tuple(map(row, hunk.added))
