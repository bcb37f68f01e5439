"""Which node of one graph is which node of another, by what they compute and not by what they are called.

Four kinds of evidence, the strongest first:

1. *Forward*: equal operator, attributes and operands, all the way up to the inputs (value numbering over both graphs
   at once). This settles everything above the first change.
2. *Backward* from the outputs, which have the same names: the producers of two corresponding values correspond when
   operator and attributes agree. This settles everything below the last change.
3. Between two changes: equal weights, equal names (of outputs, then of nodes), and being the only such reader of
   corresponding values.
4. The same once more, where a weight may now come out of a node (a DequantizeLinear, say).

No evidence may contradict what is settled: two nodes with an operand that belongs elsewhere never correspond.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.ir.text import subgraphs, tensor_digest, topological
from graphopt.ir.weight_pairs import Weights, match_weights

Signature = tuple[Hashable, ...]


class Side:
    """One model of the two: all its nodes in one order, bodies and functions included, and who reads what.

    Attributes:
        nodes: every node, a node before the nodes of its bodies; the position is its place in the listing.
        scope: where a node stands: `""` in the main graph, `"%y.then_branch"` in a body.
        place: the same without names, so that it is comparable between two models.
        owner: the node whose body holds this node, or None.
        readers: the nodes that read a value, with the operand's number.
        weights: every initializer that is no input, under its name (with its scope, inside bodies).
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.position: dict[ir.Node, int] = {}
        self.scope: dict[ir.Node, str] = {}
        self.place: dict[ir.Node, Hashable] = {}
        self.owner: dict[ir.Node, ir.Node | None] = {}
        self.readers: dict[ir.Value, list[tuple[ir.Node, int]]] = defaultdict(list)
        self.weights: dict[str, ir.Value] = {}
        self.roots: dict[Hashable, ir.Graph | ir.Function] = {"main": model.graph}
        self.roots.update({("function", *name): function for name, function in model.functions.items()})
        for place, root in self.roots.items():
            self._walk(root, "" if place == "main" else f"function {root.name}", place, None)

    @property
    def nodes(self) -> list[ir.Node]:
        """All nodes in the order of the listing."""
        return list(self.position)

    def _walk(self, graph: ir.Graph | ir.Function, scope: str, place: Hashable, owner: ir.Node | None) -> None:
        if isinstance(graph, ir.Graph):
            inputs = set(graph.inputs)
            for name, value in graph.initializers.items():
                if value not in inputs and value.const_value is not None:
                    self.weights[f"{scope}/{name}" if scope else name] = value
        for node in topological(graph):
            self.position[node] = len(self.position)
            self.scope[node], self.place[node], self.owner[node] = scope, place, owner
            for slot, value in enumerate(node.inputs):
                if value is not None:
                    self.readers[value].append((node, slot))
            for name, body in subgraphs(node):
                first = f"%{node.outputs[0].name}" if node.outputs else node.op_type
                inner = f"{scope}/{first}.{name}" if scope else f"{first}.{name}"
                self._walk(body, inner, (place, node.op_type, name), node)


@dataclass
class Correspondence:
    """What corresponds between two models. Nodes that are neither key nor value of `nodes` are removed or added."""

    a: Side
    b: Side
    weights: Weights
    nodes: dict[ir.Node, ir.Node] = field(default_factory=dict)
    partner: dict[ir.Node, ir.Node] = field(default_factory=dict)
    """The inverse of `nodes`."""
    values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """Values that correspond, between changed nodes too: what the same operand of corresponding nodes reads."""
    origin: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """The inverse of `values`."""
    classes: dict[ir.Value, int] = field(default_factory=dict)
    """Values of one class compute the same from the inputs, so that it is no difference which of them is read."""

    def pair_values(self, before: ir.Value, after: ir.Value) -> None:
        """Note that two values correspond, unless one of them is taken."""
        if before not in self.values and after not in self.origin:
            self.values[before], self.origin[after] = after, before

    def changed(self, value: ir.Value | None, side: Side) -> bool:
        """Whether the value comes out of a removed or added node."""
        producer = value.producer() if value is not None else None
        return producer is not None and producer not in (self.nodes if side is self.a else self.partner)

    def settled(self, value: ir.Value, side: Side) -> bool:
        """Whether it is known which value of the other side this one is, or that there is none."""
        producer = value.producer()
        return producer is None or producer in (self.nodes if side is self.a else self.partner)

    def same(self, before: ir.Value | None, after: ir.Value | None) -> bool:
        """Whether two values are known to correspond, or to be equal to values that do."""
        if before is None or after is None:
            return before is after
        if before in self.weights.key:
            return self.weights.key[before] == self.weights.key.get(after)
        partner = self.values.get(before)
        return partner is not None and (partner is after or self.classes.get(partner) == self.classes.get(after, -1))

    def places(self) -> dict[ir.Node, float]:
        """A place in the listing of the first model for every node of both, to show them together.

        An added node comes right after what it reads, or right before its first reader where it reads no node.
        """
        places: dict[ir.Node, float] = dict(self.a.position.items())
        places.update({after: places[before] for before, after in self.nodes.items()})
        for node in self.b.position:
            sources = [value.producer() for value in node.inputs if value is not None]
            found = [places[source] for source in sources if source in places]
            if node not in places and found:
                places[node] = max(found) + 1e-3
        for node in reversed(self.b.position):
            if node not in places:
                readers = [reader for value in node.outputs for reader, _ in self.b.readers.get(value, ())]
                places[node] = min((places[reader] - 1e-3 for reader in readers), default=float(len(self.a.position)))
        return places


def correspond(a: ir.Model, b: ir.Model) -> Correspondence:
    """The correspondence of two models; neither is changed. Linear in nodes but for a few rounds over the unmatched."""
    side_a, side_b = Side(a), Side(b)
    return _Matcher(Correspondence(side_a, side_b, match_weights(side_a.weights, side_b.weights))).run()


def paired_by_name(a: list[ir.Value], b: list[ir.Value]) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Inputs or outputs that correspond: by name, what is left by position."""
    names_a, names_b = {value.name for value in a}, {value.name for value in b}
    by_name = {value.name: value for value in b}
    yield from ((value, by_name[value.name]) for value in a if value.name in by_name)
    rest = (value for value in b if value.name not in names_a)
    yield from zip((value for value in a if value.name not in names_b), rest, strict=False)


Pairs = list[tuple[ir.Value, ir.Value]]


def _interfaces(a: Side, b: Side) -> Iterator[tuple[Pairs, Pairs]]:
    """Inputs and outputs that correspond: of the model by name, of the functions of one name by position."""
    for place, root in a.roots.items():
        other = b.roots.get(place)
        if other is None:
            continue
        pair = paired_by_name if place == "main" else _paired_by_position
        yield list(pair(list(root.inputs), list(other.inputs))), list(pair(list(root.outputs), list(other.outputs)))


def _paired_by_position(a: list[ir.Value], b: list[ir.Value]) -> Iterator[tuple[ir.Value, ir.Value]]:
    return zip(a, b, strict=False)


class _Matcher:
    def __init__(self, correspondence: Correspondence) -> None:
        self.found = correspondence
        self.signatures: dict[ir.Node, Signature] = {}
        self.loose = False
        self.rivals: dict[Hashable, tuple[list[ir.Node], list[ir.Node]]] = {}

    def run(self) -> Correspondence:
        found = self.found
        interfaces = list(_interfaces(found.a, found.b))
        for inputs, _ in interfaces:
            for before, after in inputs:
                found.pair_values(before, after)
        self.forward()
        for self.loose in (False, True):
            for _, outputs in interfaces:
                for before, after in outputs:
                    self.unify(before, after)
            self.follow_operands()
            self.pair_classes(even=False)
            for evidence in (self._by_weights, self._by_output_name, self._by_node_name):
                self.pair_unique(evidence)
            self.follow_readers()
            self.follow_operands()
        self.demote()
        return found

    # --- forward: value numbering over both graphs ---

    def forward(self) -> None:
        classes: dict[Hashable, int] = {}
        rows_a = self._classes(self.found.a, classes, {})
        seeds = {after: before for before, after in self.found.values.items()}
        rows_b = self._classes(self.found.b, classes, seeds)
        self.rivals = {}
        for index, (side, rows) in enumerate(((self.found.a, rows_a), (self.found.b, rows_b))):
            for node, row in rows.items():
                self.rivals.setdefault((row, side.place[node]), ([], []))[index].append(node)
        self.pair_classes(even=True)

    def pair_classes(self, *, even: bool) -> None:
        """Pair nodes of one class, those of one name first.

        Which of several equal nodes was changed and which one was left can be told only by who reads them, so that
        classes of another size on each side (`even=False`) wait until the readers have been followed.
        """
        for left, right in self.rivals.values():
            if even and len(left) != len(right):
                continue
            left = [node for node in left if node not in self.found.nodes]
            right = [node for node in right if node not in self.found.partner]
            named = {_first_name(node): node for node in left}
            rest: list[ir.Node] = []
            for node in right:
                same = named.pop(_first_name(node), None)
                if same is None:
                    rest.append(node)
                else:
                    self._record(same, node)
            for before, after in zip((node for node in left if node not in self.found.nodes), rest, strict=False):
                self._record(before, after)

    def _classes(self, side: Side, classes: dict[Hashable, int], seeds: dict[ir.Value, ir.Value]) -> dict[ir.Node, int]:
        """The class of each node: equal classes compute equal values from equal inputs, in whichever model."""
        of_value: dict[ir.Value | None, int] = {None: -1}
        of_node: dict[ir.Node, int] = {}

        def number(key: Hashable) -> int:
            return classes.setdefault(key, len(classes))

        def lookup(value: ir.Value | None) -> int:
            if value not in of_value:
                assert value is not None
                key = self.found.weights.key.get(value)
                of_value[value] = number(key if key is not None else ("source", id(seeds.get(value, value))))
            return of_value[value]

        def visit(graph: ir.Graph | ir.Function) -> None:
            for node in topological(graph):
                operator = (self.signature(node), tuple(lookup(value) for value in node.inputs))
                bodies: list[Hashable] = []
                for name, body in subgraphs(node):
                    for index, value in enumerate(body.inputs):
                        of_value[value] = number(("parameter", name, index, operator))
                    visit(body)
                    bodies.append((name, tuple(lookup(value) for value in body.outputs)))
                of_node[node] = number((operator, tuple(bodies)))
                for index, value in enumerate(node.outputs):
                    of_value[value] = self.found.classes[value] = number(("output", of_node[node], index))

        for root in side.roots.values():
            visit(root)
        return of_node

    def signature(self, node: ir.Node) -> Signature:
        """Operator, attributes and number of outputs: what two corresponding nodes always share."""
        if node not in self.signatures:
            attributes = tuple(sorted((name, _attribute_key(value)) for name, value in node.attributes.items()))
            self.signatures[node] = (node.op_identifier(), attributes, len(node.outputs))
        return self.signatures[node]

    # --- the other evidence ---

    def compatible(self, a: ir.Node, b: ir.Node) -> bool:
        """Whether two unmatched nodes may correspond: nothing that is settled speaks against it."""
        found = self.found
        if a in found.nodes or b in found.partner or self.signature(a) != self.signature(b):
            return False
        if found.a.place[a] != found.b.place[b]:
            return False
        for before, after in zip(_operands(a, b), _operands(b, a), strict=True):
            if found.same(before, after):
                continue
            if before is None or after is None:
                if not self.loose:
                    return False
                continue
            weights = (before in found.weights.key) + (after in found.weights.key)
            if weights == 2 or (weights == 1 and not self.loose):
                return False
            if weights == 0 and found.settled(before, found.a) and found.settled(after, found.b):
                return False
        return True

    def _record(self, a: ir.Node, b: ir.Node) -> None:
        found = self.found
        found.nodes[a], found.partner[b] = b, a
        for before, after in zip(a.outputs, b.outputs, strict=False):
            # A match is stronger than what an operand suggested before.
            if (old := found.values.pop(before, None)) is not None:
                found.origin.pop(old, None)
            if (old := found.origin.pop(after, None)) is not None:
                found.values.pop(old, None)
            found.pair_values(before, after)
        for (_, body_a), (_, body_b) in zip(subgraphs(a), subgraphs(b), strict=False):
            for before, after in zip(body_a.inputs, body_b.inputs, strict=False):
                found.pair_values(before, after)

    def unify(self, before: ir.Value | None, after: ir.Value | None) -> None:
        """Two values are read in the same place: they correspond, and so do their producers, up to the first change."""
        stack = [(before, after)]
        while stack:
            before, after = stack.pop()
            if before is None or after is None or before in self.found.weights.key or after in self.found.weights.key:
                continue
            if not self.found.settled(before, self.found.a) and not self.found.settled(after, self.found.b):
                self.found.pair_values(before, after)
            a, b = before.producer(), after.producer()
            if a is None or b is None or before.index() != after.index() or not self.compatible(a, b):
                continue
            self._record(a, b)
            stack += zip(a.inputs, b.inputs, strict=False)
            for (_, body_a), (_, body_b) in zip(subgraphs(a), subgraphs(b), strict=False):
                stack += zip(body_a.outputs, body_b.outputs, strict=False)

    def follow_operands(self) -> None:
        """Unify what the matched nodes read: what was matched by other evidence has not been followed up yet."""
        for a, b in list(self.found.nodes.items()):
            for before, after in zip(a.inputs, b.inputs, strict=False):
                self.unify(before, after)

    def unify_nodes(self, a: ir.Node, b: ir.Node) -> None:
        if self.compatible(a, b):
            for before, after in zip(a.outputs, b.outputs, strict=False):
                self.unify(before, after)

    def pair_unique(self, evidence: Callable[[ir.Node], Hashable | None]) -> None:
        """Pair nodes that are alone in their graph with some evidence."""
        tables: list[dict[Hashable, list[ir.Node]]] = []
        for side, taken in ((self.found.a, self.found.nodes), (self.found.b, self.found.partner)):
            table: dict[Hashable, list[ir.Node]] = defaultdict(list)
            for node in side.position:
                if node not in taken and (key := evidence(node)) is not None:
                    table[key].append(node)
            tables.append(table)
        for key, (first, *others) in tables[0].items():
            rivals = tables[1].get(key, [])
            if not others and len(rivals) == 1:
                self.unify_nodes(first, rivals[0])

    def _by_weights(self, node: ir.Node) -> Hashable | None:
        weights = tuple(self.found.weights.key.get(value) for value in node.inputs if value is not None)
        return (self.signature(node), weights) if any(key is not None for key in weights) else None

    def _by_output_name(self, node: ir.Node) -> Hashable | None:
        name = _first_name(node)
        return (self.signature(node), name) if name else None

    def _by_node_name(self, node: ir.Node) -> Hashable | None:
        return (self.signature(node), node.name) if node.name else None

    def follow_readers(self) -> None:
        """Pair readers of corresponding values where each side has just one of the kind, again and again."""
        queue = list(self.found.values.items())
        while queue:
            before, after = queue.pop()
            rivals: dict[Hashable, list[ir.Node]] = defaultdict(list)
            for node, slot in self.found.b.readers.get(after, ()):
                if node not in self.found.partner:
                    rivals[self.signature(node), slot].append(node)
            mine: dict[Hashable, list[ir.Node]] = defaultdict(list)
            for node, slot in self.found.a.readers.get(before, ()):
                if node not in self.found.nodes:
                    mine[self.signature(node), slot].append(node)
            for key, nodes in mine.items():
                if len(nodes) == 1 and len(rivals[key]) == 1:
                    self.unify_nodes(nodes[0], rivals[key][0])
                    if self.found.nodes.get(nodes[0]) is rivals[key][0]:
                        queue += zip(nodes[0].outputs, rivals[key][0].outputs, strict=False)

    # --- the last word ---

    def demote(self) -> None:
        """Give up pairs that now read something else, or stand elsewhere, where no other change explains it."""
        found = self.found
        for a, b in sorted(found.nodes.items(), key=lambda pair: found.a.position[pair[0]]):
            owner = found.a.owner[a]
            moved = (found.nodes.get(owner) if owner else None) is not found.b.owner[b]
            slots = list(zip(_operands(a, b), _operands(b, a), strict=True))
            for (_, body_a), (_, body_b) in zip(subgraphs(a), subgraphs(b), strict=False):
                slots += zip(body_a.outputs, body_b.outputs, strict=False)
            if moved or any(not self._explained(before, after) for before, after in slots):
                self._give_up(a)
        for _, outputs in _interfaces(found.a, found.b):
            for before, after in outputs:
                self._check_output(before, after)

    def _check_output(self, before: ir.Value, after: ir.Value) -> None:
        found = self.found
        if not self._explained(before, after):
            producer = after.producer()
            for node in (before.producer(), found.partner.get(producer) if producer else None):
                if node is not None and node in found.nodes:
                    self._give_up(node)

    def _explained(self, before: ir.Value | None, after: ir.Value | None) -> bool:
        found = self.found
        return found.same(before, after) or found.changed(before, found.a) or found.changed(after, found.b)

    def _give_up(self, a: ir.Node) -> None:
        del self.found.partner[self.found.nodes.pop(a)]


def _operands(node: ir.Node, other: ir.Node) -> list[ir.Value | None]:
    """The inputs, filled up to the length of the other's: an operand left out at the end is an operand left out."""
    return [*node.inputs, *[None] * (len(other.inputs) - len(node.inputs))]


def _first_name(node: ir.Node) -> str | None:
    return node.outputs[0].name if node.outputs else node.name


def _attribute_key(attribute: ir.Attr) -> str:
    """The value as text, exact; the content of bodies does not count, their nodes are matched on their own."""
    if attribute.is_ref():
        return f"{attribute.type} @{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.GRAPH:
        return "graph"
    if attribute.type == ir.AttributeType.GRAPHS:
        return f"graphs {len(attribute.as_graphs())}"
    if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        single = attribute.type == ir.AttributeType.TENSOR
        tensors = [attribute.as_tensor()] if single else attribute.as_tensors()
        return " ".join(f"{tensor.dtype}{tensor.shape}#{tensor_digest(tensor)}" for tensor in tensors)
    return f"{attribute.type} {attribute.value!r}"
