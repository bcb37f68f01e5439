"""Which kernel of onnxruntime computes which node of a graph, found by names that say where they come from.

onnxruntime fuses, splits, folds and re-orders nodes, and says nowhere what became of which. But it builds the names of
what it makes from the names that it found. So every node and every value of a clone gets a name that occurs nowhere
else (`mark`), and what onnxruntime runs is read off the names that are left: of the kernels, and of the values between
them in the graph that it saves. Nodes whose names are gone were fused into a neighbour; the values that survived say
into which (`attribute`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

LAYOUT_OPERATORS = frozenset(
    {"ReorderInput", "ReorderOutput", "MemcpyFromHost", "MemcpyToHost", "Transpose", "Reshape", "Cast"}
)
"""What onnxruntime puts between kernels of different layouts, devices and types. Some are operators of models too."""
_LONGEST = 64
"""Characters of the value of an attribute that are kept as text."""


@dataclass(frozen=True)
class Marked:
    """A clone whose names are tokens.

    Attributes:
        model: the clone.
        nodes: the nodes of the original, in the order of their numbers, those of subgraphs included.
        names: what each is called: see `node_names`.
        values: name of each marked value of the original, by number of the node and of the output.
        producers: for each node, the nodes of the same graph that make its inputs, each with the token of the value.
        mark: what encloses a token.
    """

    model: ir.Model
    nodes: tuple[ir.Node, ...]
    names: tuple[str, ...]
    values: Mapping[tuple[int, int], str]
    producers: tuple[tuple[tuple[int, str], ...], ...]
    mark: str

    def tokens(self, text: str) -> list[int]:
        """The numbers of the nodes that a name was built from."""
        return [int(found[2]) for found in self._pattern.finditer(text)]

    def value_of(self, name: str) -> int | None:
        """The number of the node that makes the value of exactly this name, None where it is no marked value."""
        found = self._pattern.fullmatch(name)
        return int(found[2]) if found is not None and found[1] == "v" else None

    def readable(self, text: str) -> str:
        """The text with the original names in the place of the tokens."""

        def original(found: re.Match[str]) -> str:
            if found[1] == "n":
                return self.names[int(found[2])]
            return self.values[int(found[2]), int(found[3])]

        return self._pattern.sub(original, text)

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"{self.mark}([nv])([0-9]+)(?:_([0-9]+))?{self.mark}")


@dataclass
class Placed:
    """A kernel in the graph that onnxruntime runs.

    Attributes:
        name: as onnxruntime calls it, with tokens.
        operator: for instance "FusedMatMul".
        inputs: names of the values that it reads; empty where the graph is not known.
        outputs: names of the values that it makes.
        holder: name of the kernel in whose subgraph it runs, None in the main graph.
        attributes: "name=value" of each, in order of their names, subgraphs left out; see `attribute_text`.
        constants: element type and shape of its inputs that are weights, by their place among those that are given.
        nodes: numbers of the nodes that it computes; filled by `attribute`.
        serves: for a change of layout, the node that it is for; filled by `attribute`.
    """

    name: str
    operator: str
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    holder: str | None = None
    attributes: str = ""
    constants: Mapping[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict[int, tuple[str, tuple[int, ...]]])
    nodes: list[int] = field(default_factory=list[int])
    serves: int | None = None


def node_names(model: ir.Model) -> tuple[str, ...]:
    """What the nodes are called here, no two alike.

    The name of the node, else of its first output. Nodes of subgraphs follow their holder. In canonical form
    no two nodes of a graph share a name; where a node of a subgraph has the name of another, the name of its holder
    stands before, and a number behind where that does not help.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) '
        ...     '{ [a] h = Relu (x) [a] i = Neg (h) y = Exp (i) }')
        >>> node_names(model)
        ('a', 'a#2', 'y')
    """
    found: dict[str, None] = {}
    for node, holder in all_nodes(model.graph):
        name = node.name or next((value.name for value in node.outputs if value.name), node.op_type)
        if name in found and holder is not None:
            name = f"{holder.name or holder.op_type}/{name}"
        number, unique = 1, name
        while unique in found:
            number, unique = number + 1, f"{name}#{number + 1}"
        found[unique] = None
    return tuple(found)


def mark(model: ir.Model) -> Marked:
    """A clone of a model whose nodes, and the values that they make, have names that say which they are.

    The names of inputs and initializers stay, and feeds fit the clone.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) '
        ...     '{ [first] h = Relu (x) [second] y = Neg (h) }')
        >>> marked = mark(model)
        >>> [node.name for node in marked.model.graph], marked.readable("@n1@/@v0_0@_fused")
        (['@n0@', '@n1@'], 'second/h_fused')
    """
    clone = model.clone()
    sign = "@"
    while any(f"{sign}n" in name or f"{sign}v" in name for name in _names(model)):
        sign += "@"
    nodes = tuple(node for node, _ in all_nodes(model.graph))
    copies = tuple(node for node, _ in all_nodes(clone.graph))
    values: dict[tuple[int, int], str] = {}
    for number, node in enumerate(copies):
        node.name = f"{sign}n{number}{sign}"
        for index, value in enumerate(node.outputs):
            if value.name:
                values[number, index] = value.name
                value.name = f"{sign}v{number}_{index}{sign}"
    place = {node: number for number, node in enumerate(copies)}
    return Marked(
        clone,
        nodes,
        node_names(model),
        values,
        tuple(tuple(_producers(node, place)) for node in copies),
        sign,
    )


def _producers(node: ir.Node, place: Mapping[ir.Node, int]) -> Iterator[tuple[int, str]]:
    for value in node.inputs:
        producer = None if value is None else value.producer()
        if value is not None and producer is not None and producer.graph is node.graph:
            yield place[producer], value.name or ""


def all_nodes(graph: ir.Graph, holder: ir.Node | None = None) -> Iterator[tuple[ir.Node, ir.Node | None]]:
    """Each node of a graph, those of its subgraphs behind it, and the node in whose subgraph it is."""
    for node in graph:
        yield node, holder
        for attribute_ in node.attributes.values():
            if attribute_.type == ir.AttributeType.GRAPH:
                yield from all_nodes(attribute_.as_graph(), node)
            elif attribute_.type == ir.AttributeType.GRAPHS:
                for body in attribute_.as_graphs():
                    yield from all_nodes(body, node)


def _names(model: ir.Model) -> Iterator[str]:
    for graph in model.graphs():
        yield from (value.name or "" for value in graph.inputs)
        yield from graph.initializers


def placed_kernels(
    graph: onnx.GraphProto, holder: str | None = None, weights: Mapping[str, onnx.TensorProto] | None = None
) -> list[Placed]:
    """Every kernel of a graph that onnxruntime saved, those of subgraphs after the one that holds them."""
    known = {**(weights or {}), **{tensor.name: tensor for tensor in graph.initializer}}
    found: list[Placed] = []
    for node in graph.node:
        constants = {
            place: (onnx.TensorProto.DataType.Name(tensor.data_type).lower(), tuple(tensor.dims))
            for place, name in enumerate(name for name in node.input if name)
            if (tensor := known.get(name)) is not None
        }
        inputs, outputs = tuple(node.input), tuple(node.output)
        found.append(Placed(node.name, node.op_type, inputs, outputs, holder, attribute_text(node), constants))
        for one in node.attribute:
            for body in (one.g, *one.graphs):
                found += placed_kernels(body, node.name, known)
    return found


def attribute_text(node: onnx.NodeProto) -> str:
    """The attributes of a node as text, by which two nodes are compared: a digest of what is long.

    Example:
        >>> attribute_text(onnx.helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], auto_pad="VALID"))
        'auto_pad=VALID strides=2,2'
    """
    entries: list[str] = []
    for one in sorted(node.attribute, key=lambda one: one.name):
        if one.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            continue
        value: object = onnx.helper.get_attribute_value(one)
        if isinstance(value, bytes):
            text = value.decode("utf-8", "replace")
        elif isinstance(value, (int, float)):
            text = f"{value:g}"
        elif one.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
            text = ",".join(f"{number:g}" for number in (*one.ints, *one.floats))
        else:
            text = hashlib.sha256(one.SerializeToString(deterministic=True)).hexdigest()[:16]
        entries.append(
            f"{one.name}={text if len(text) <= _LONGEST else hashlib.sha256(text.encode()).hexdigest()[:16]}"
        )
    return " ".join(entries)


def attribute(marked: Marked, kernels: Sequence[Placed], work: Sequence[tuple[int, int]]) -> list[int]:
    """Fill in which nodes each kernel computes, the main one first, and which node a change of layout is for.

    The main node is the one with the most multiply-accumulates; of those without any, one that the kernel is named
    after, then the one that moves the most bytes.

    A kernel computes the nodes that its name, or the values that it makes, come from. Of the nodes that are nowhere
    named: what lies behind a kernel whose result is no value of the model any more (an activation, a sum, a
    QuantizeLinear fused into a convolution of a blocked layout) belongs to it, as far as the next DequantizeLinear or
    product; what lies before a kernel, back to the results of others, belongs to that kernel. Nodes are given to one
    of the kernels that they were fused into, and to every kernel that is named after them.

    Args:
        marked: what onnxruntime was given.
        kernels: what it runs, in order.
        work: multiply-accumulates and bytes of each node.

    Returns:
        Numbers of the nodes that no kernel computes: onnxruntime has folded them, or they are never run.
    """
    owners: dict[int, int] = {}  # of a node, the kernel that has computed it last
    exact = {name for kernel in kernels for name in kernel.outputs if marked.value_of(name) is not None}
    layouts: list[int] = []
    for place, kernel in enumerate(kernels):
        named = marked.tokens(kernel.name)
        made = [number for name in kernel.outputs for number in marked.tokens(name)]
        operators = {marked.nodes[number].op_type for number in named or made}
        if not named and kernel.operator in LAYOUT_OPERATORS and kernel.operator not in operators:
            layouts.append(place)
            continue
        for number in dict.fromkeys((*named, *made)):
            kernel.nodes.append(number)
            owners[number] = place
    _fused_behind(marked, kernels, owners, exact, work)
    for place in layouts:  # what nothing before it computes is the last part of an operator without a kernel of its own
        for number in (one for name in kernels[place].outputs for one in marked.tokens(name)):
            if number not in owners:
                _give(number, place, kernels, owners)
    layouts = [place for place in layouts if not kernels[place].nodes]
    _fused_before(marked, kernels, owners)
    for number in range(len(marked.nodes)):
        if number not in owners and (known := [owners[one] for one, _ in marked.producers[number] if one in owners]):
            _give(number, max(known), kernels, owners)
    lost = [number for number in range(len(marked.nodes)) if number not in owners]
    rest = [place for place, kernel in enumerate(kernels) if not kernel.nodes and place not in layouts]
    whole = [place for place in rest if not kernels[place].outputs]  # the saved graph does not show them
    if len(whole) == 1 and lost:  # a provider that compiles a part of the graph, or all of it, into one kernel
        for number in lost:
            _give(number, whole[0], kernels, owners)
        lost = []
    for kernel in kernels:
        named = {*marked.tokens(kernel.name), *(one for name in kernel.outputs for one in marked.tokens(name))}
        kernel.nodes.sort(key=lambda one: (-work[one][0], one not in named, -work[one][1], one))
    parts = [place for place in rest if not kernels[place].nodes]
    _serve(marked, kernels, owners, [*layouts, *parts])
    for place in parts:  # parts of an operator that has no kernel of its own; the last of them makes its result
        kernel = kernels[place]
        if kernel.serves is not None and kernel.operator not in LAYOUT_OPERATORS:
            kernel.nodes, kernel.serves = [kernel.serves], None
    return lost


def _give(number: int, place: int, kernels: Sequence[Placed], owners: dict[int, int]) -> None:
    kernels[place].nodes.append(number)
    owners[number] = place


def _fused_behind(
    marked: Marked,
    kernels: Sequence[Placed],
    owners: dict[int, int],
    exact: set[str],
    work: Sequence[tuple[int, int]],
) -> None:
    """Give nodes to the kernel before them, where its result has no name of the model: what it ends with is unknown."""
    for number, node in enumerate(marked.nodes):
        if number in owners or node.op_type == "DequantizeLinear" or work[number][0]:
            continue
        known = [(owners[one], value) for one, value in marked.producers[number] if one in owners]
        if not known:
            continue
        place, value = max(known)  # the last to run is the one that has all inputs
        if value not in exact and kernels[place].outputs and not any(map(marked.value_of, kernels[place].outputs)):
            _give(number, place, kernels, owners)


def _fused_before(marked: Marked, kernels: Sequence[Placed], owners: dict[int, int]) -> None:
    for place, kernel in enumerate(kernels):
        stack = list(kernel.nodes)
        while stack:
            for number, _ in marked.producers[stack.pop()]:
                if number not in owners:
                    _give(number, place, kernels, owners)
                    stack.append(number)


def _serve(marked: Marked, kernels: Sequence[Placed], owners: Mapping[int, int], layouts: Iterable[int]) -> None:
    """A change of layout is for the kernel before it where it makes a value of the model, else for the one behind."""
    makers = {name: place for place, kernel in enumerate(kernels) for name in kernel.outputs}
    readers: dict[str, int] = {}
    for place, kernel in enumerate(kernels):
        for name in kernel.inputs:
            readers.setdefault(name, place)
    for place in sorted(layouts, reverse=True):  # a chain of them is for the same kernel
        kernel = kernels[place]
        made = [number for name in kernel.outputs if (number := marked.value_of(name)) is not None]
        near = [owners[number] for number in made if number in owners]
        near += [readers[name] for name in kernel.outputs if name in readers]
        near += [makers[name] for name in kernel.inputs if name in makers]
        for other in near:
            served = kernels[other].nodes[0] if kernels[other].nodes else kernels[other].serves
            if served is not None:
                kernel.serves = served
                break
