"""From ONNX nodes to FX nodes: one call a node, weights as attributes, sizes on the host, subgraphs as modules."""

from __future__ import annotations

import builtins
import functools
import inspect
import keyword
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx

from graphopt.errors import LiftError
from graphopt.ir.channel_analysis import nodes_below, subgraphs_of
from graphopt.ir.lifted import ANCHOR, NODE, VALUE, LiftedModule
from graphopt.ir.ops.row import OpRow, OpTable, TorchFunction
from graphopt.ir.ops.torch import sizes
from graphopt.ir.ops.torch.dtypes import following, torch_dtype
from graphopt.ir.ops.torch.unsigned import PLAIN

_LARGEST_HOST_VECTOR = 256
"""Elements of the longest vector that takes part in shape arithmetic on the host."""
_HOST_TYPES = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}
_WIDENED = {*_HOST_TYPES, ir.DataType.FLOAT, ir.DataType.DOUBLE}
"""What a size may be cast to and still be a size: the bounds of a Range of floats."""
_WIDE_UNSIGNED = {ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64, None}
"""Types that torch's own functions do not compute in, and types that are not known."""
_SAFE_PART = re.compile(r"[^A-Za-z0-9_/:$@+-]")
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "precision")
"""Attributes whose value is an element type."""
_WORDS_OF_THE_CODE = {"self", "torch", "device", "getattr", "inf", "nan", "__debug__"}
"""Identifiers that mean something in generated code."""
_SAME_BITS = "BitCast"
"""The operator whose `to` stays as it is, because the number of bits must."""


@dataclass
class GraphPlan:
    """A lifted graph before it has weights.

    Attributes:
        graph: the FX graph.
        bodies: plans of the subgraphs by attribute path.
        initializers: attribute path of each initializer that the graph reads, by ONNX name.
        captured: values of outer graphs that the graph reads, in the order of its first placeholders.
    """

    graph: fx.Graph
    bodies: dict[str, GraphPlan] = field(default_factory=dict)
    initializers: dict[str, str] = field(default_factory=dict)
    captured: tuple[ir.Value, ...] = ()


def plan_graph(model: ir.Model, table: OpTable) -> GraphPlan:
    """The FX graph of a canonical model, and of its subgraphs. No weight is read.

    Raises:
        LiftError: an operator has no torch function, or a node cannot be called.
    """
    _refuse_unknown(model, table)
    return _GraphLift(model, table, model.graph, Paths(), ()).run()


def float_type(model: ir.Model) -> ir.DataType:
    """The float type that most weights of the model have; float32 where there are none."""
    counted: Counter[ir.DataType] = Counter()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.dtype.bitwidth >= 16:
            counted[tensor.dtype] += tensor.size
    if not counted:
        declared = [value.dtype for value in model.graph.inputs if value.dtype is not None]
        counted.update(dtype for dtype in declared if dtype.is_floating_point() and dtype.bitwidth >= 16)
    return counted.most_common(1)[0][0] if counted else ir.DataType.FLOAT


class Paths:
    """Attribute paths for ONNX names: the name itself wherever Python and torch allow it."""

    def __init__(self) -> None:
        self._reserved = {*dir(LiftedModule), "interface", "insertions", "training", "meta", ANCHOR}
        self._modules: set[str] = set()
        self._leaves: set[str] = set()

    def new(self, name: str) -> str:
        """A free path; parts that are empty, taken or not safe in generated code are changed."""
        parts = [_SAFE_PART.sub("_", part) or "_" for part in name.split(".")]
        parts = [f"{part}_" if part in self._reserved or keyword.iskeyword(part) else part for part in parts]
        path: list[str] = []
        for part in parts[:-1]:
            while ".".join([*path, part]) in self._leaves:
                part += "_"
            path.append(part)
            self._modules.add(".".join(path))
        leaf = parts[-1]
        while ".".join([*path, leaf]) in self._leaves | self._modules:
            leaf += "_"
        self._leaves.add(".".join([*path, leaf]))
        return ".".join([*path, leaf])


def identifier(name: str) -> str:
    """A Python identifier that resembles an ONNX name.

    Example:
        >>> identifier("onnx::Conv_12"), identifier("2nd"), identifier("in")
        ('onnx__Conv_12', '_2nd', 'in_')
    """
    word = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
    word = f"_{word}" if word[0].isdigit() else word
    return f"{word}_" if keyword.iskeyword(word) or word in _WORDS_OF_THE_CODE else word


def _refuse_unknown(model: ir.Model, table: OpTable) -> None:
    """Name every operator that has no torch function, not only the first."""
    missing: dict[str, str] = {}
    for node in nodes_below(model.graph):
        row = table.row(node.domain, node.op_type, model.opset_imports.get(node.domain, 1))
        if row is None or row.torch is None:
            missing.setdefault(f"{node.domain or 'ai.onnx'}::{node.op_type}", node.name or "")
    if missing:
        raise LiftError(
            f"no torch function for {', '.join(missing)}",
            where=", ".join(missing.values()),
            help="pass a table with rows for them: default_table().with_rows([OpRow('Name', domain, torch=function)])",
        )


class _GraphLift:
    """Lifts one graph: the main graph, or the body of a node."""

    def __init__(
        self, model: ir.Model, table: OpTable, source: ir.Graph, paths: Paths, host_captures: Iterable[ir.Value]
    ) -> None:
        self._model, self._table, self._source, self._paths = model, table, source, paths
        self._plan = GraphPlan(fx.Graph())
        self._graph = self._plan.graph
        self._nodes: dict[ir.Value, fx.Node] = {}
        self._host: set[ir.Value] = set(host_captures)
        self._outer = frozenset(self._host)
        self._float = float_type(model)
        self._shared: dict[str, fx.Node] = {}
        self._bodies = 0

    def run(self) -> GraphPlan:
        if self._source is not self._model.graph:
            self._plan.captured = captured_values(self._source)
        self._placeholders((*self._plan.captured, *self._source.inputs))
        for node in self._source:
            self._call(node)
        returned = tuple(self._tensor(value) for value in self._source.outputs)
        single = len(returned) == 1 and self._source is self._model.graph
        self._graph.output(returned[0] if single else returned)
        return self._plan

    def _placeholders(self, values: Iterable[ir.Value]) -> None:
        """Parameters of `forward`. Inside they keep their names, so that no assignment to one overwrites another."""
        names: dict[str, ir.Value] = {}
        for value in values:
            name = identifier(value.name or "")
            while name in names:
                name += "_"
            names[name] = value
        for name, value in names.items():
            inside = name
            while hasattr(builtins, inside) or (inside != name and inside in names):
                inside += "_"
            self._set(value, self._graph.create_node("placeholder", name, name=inside))

    def _call(self, node: ir.Node) -> None:
        if self._on_host(node):
            function: Callable[..., Any] = sizes.HOST[node.op_type]
            read = self._tensor if node.op_type in ("Shape", "Size") else self._host_operand
            inputs = [None if value is None else read(value) for value in _inputs(node)]
            self._host.update(node.outputs)
            keywords = self._attributes(node)
        else:
            row = self._table.row(node.domain, node.op_type, self._model.opset_imports.get(node.domain, 1))
            assert row is not None
            assert row.torch is not None
            function = row.torch.load() if isinstance(row.torch, TorchFunction) else row.torch
            if not any(value is not None and value.dtype in _WIDE_UNSIGNED for value in node.inputs):
                function = getattr(function, PLAIN, function)
            inputs = [self._operand(value, index, row) for index, value in enumerate(_inputs(node))]
            keywords = {**self._attributes(node), **self._context(node, function)}
        _check_call(node, function, len(inputs), keywords)
        outputs = list(node.outputs)
        name = identifier(outputs[0].name or node.name or node.op_type)
        call = self._graph.create_node("call_function", function, tuple(inputs), keywords, name=name)
        call.meta[NODE] = node.name
        if len(outputs) == 1:
            self._set(outputs[0], call)
            return
        for index, value in enumerate(outputs):
            if value.uses() or value.is_graph_output():
                item = self._graph.create_node(
                    "call_function", operator.getitem, (call, index), name=identifier(value.name or name)
                )
                self._set(value, item)

    def _set(self, value: ir.Value, node: fx.Node) -> None:
        node.meta[VALUE] = value.name
        self._nodes[value] = node

    def _on_host(self, node: ir.Node) -> bool:
        """Whether the node is shape arithmetic that needs no tensor."""
        if node.domain != "" or node.op_type not in sizes.HOST or len(node.outputs) != 1:
            return False
        if not _small_integers(node.outputs[0], _WIDENED if node.op_type == "Cast" else _HOST_TYPES):
            return False
        if node.op_type in ("Shape", "Size"):
            return True
        inputs = [value for value in node.inputs if value is not None]
        return any(value in self._host for value in inputs) and all(map(self._can_be_host, inputs))

    def _can_be_host(self, value: ir.Value) -> bool:
        if value in self._host:
            return True
        return value.is_initializer() and value.const_value is not None and _small_integers(value)

    def _host_operand(self, value: ir.Value) -> Any:
        return self._value(value) if value in self._host else _plain(value)

    def _operand(self, value: ir.Value | None, index: int, row: OpRow) -> Any:
        if value is None:
            return None
        if index in row.structural:
            if value in self._host:
                return self._value(value)
            if value.is_initializer() and value.const_value is not None and value.dtype != ir.DataType.STRING:
                return _plain(value)
        return self._tensor(value)

    def _tensor(self, value: ir.Value) -> fx.Node:
        """The FX node of a value as a tensor, also where it lives on the host."""
        node = self._value(value)
        if value not in self._host:
            return node
        key = f"tensor of {value.name}"
        if key not in self._shared:
            element_type = self._element_type(value.dtype or ir.DataType.INT64)
            call = self._graph.call_function(sizes.to_tensor, (node, element_type, self._device()))
            call.meta[VALUE] = value.name
            self._shared[key] = call
        return self._shared[key]

    def _value(self, value: ir.Value) -> fx.Node:
        if value not in self._nodes:
            name = value.name or ""
            if not value.is_initializer():
                raise LiftError(f"value {name!r} is read before it is computed", help="sort the graph: graphopt.load")
            path = self._paths.new(name)
            self._plan.initializers[name] = path
            self._set(value, self._graph.create_node("get_attr", path, name=identifier(name)))
        return self._nodes[value]

    def _attributes(self, node: ir.Node) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, attribute in node.attributes.items():
            if not name.isidentifier() or keyword.iskeyword(name):  # it becomes a keyword in generated code
                raise LiftError(f"an attribute of {node.op_type} is named {name!r}", where=node.name)
            if attribute.type == ir.AttributeType.GRAPH:
                found[name] = self._body(node, name, attribute.as_graph())
            elif name in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT and node.op_type != _SAME_BITS:
                found[name] = self._element_type(ir.DataType(attribute.value))
            else:
                found[name] = _attribute_value(node, attribute)
        return found

    def _context(self, node: ir.Node, function: Callable[..., Any]) -> dict[str, Any]:
        """What the function asks for beside inputs and attributes (`row.TorchRule`)."""
        names = _keywords(function)
        found: dict[str, Any] = {}
        if "outputs" in names:
            found["outputs"] = len(node.outputs)
        if "training" in names:
            found["training"] = self._attribute_node("training")
        if "device" in names:
            found["device"] = self._device()
        if "results" in names:
            found["results"] = [self._described(value) for value in node.outputs]
        dtype = node.outputs[0].dtype if node.outputs else None
        if "element_type" in names and dtype is not None:
            found["element_type"] = self._element_type(dtype)
        return found

    def _described(self, value: ir.Value) -> tuple[Any, list[int]]:
        """Element type and shape of a value, as `row.TorchRule` has it."""
        sizes_known = [size if isinstance(size, int) else 0 for size in value.shape or ()]
        return self._element_type(value.dtype or ir.DataType.FLOAT), sizes_known

    def _element_type(self, dtype: ir.DataType) -> Any:
        if dtype == self._float:
            return self._of_anchor("dtype")
        if not dtype.is_floating_point() or dtype.bitwidth < 16:
            return int(dtype)
        key = f"following {dtype.name}"
        if key not in self._shared:
            types = torch_dtype(self._float), torch_dtype(dtype)
            self._shared[key] = self._graph.call_function(following, (self._of_anchor("dtype"), *types))
        return self._shared[key]

    def _device(self) -> fx.Node:
        return self._of_anchor("device")

    def _of_anchor(self, name: str) -> fx.Node:
        if name not in self._shared:
            self._shared[name] = self._graph.call_function(getattr, (self._attribute_node(ANCHOR), name))
        return self._shared[name]

    def _attribute_node(self, path: str) -> fx.Node:
        if path not in self._shared:
            self._shared[path] = self._graph.create_node("get_attr", path)
        return self._shared[path]

    def _body(self, node: ir.Node, attribute: str, body: ir.Graph) -> fx.Node:
        """The subgraph as a callable: a child module, with the values that it captures bound to it."""
        inner = _GraphLift(self._model, self._table, body, Paths(), self._host)
        plan = inner.run()
        path = self._paths.new(f"{identifier(node.name or node.op_type)}_{attribute}")
        self._plan.bodies[path] = plan
        module = self._graph.create_node("get_attr", path)
        if not plan.captured:
            return module
        captured = [self._value(value) for value in plan.captured]
        return self._graph.call_function(functools.partial, (module, *captured))


def captured_values(graph: ir.Graph) -> tuple[ir.Value, ...]:
    """Values of outer graphs that a subgraph, or one inside it, reads; in the order of first use."""
    inside: set[ir.Value] = set()
    read: dict[ir.Value, None] = {}

    def walk(current: ir.Graph) -> None:
        inside.update(current.inputs)
        for node in current:
            read.update(dict.fromkeys(value for value in node.inputs if value is not None))
            for inner in subgraphs_of(node):
                walk(inner)
            inside.update(node.outputs)
        read.update(dict.fromkeys(current.outputs))

    walk(graph)
    return tuple(value for value in read if value not in inside)


def _inputs(node: ir.Node) -> list[ir.Value | None]:
    """The inputs without absent ones at the end."""
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _small_integers(value: ir.Value, types: Collection[ir.DataType] = _HOST_TYPES) -> bool:
    """Whether a value is a scalar or a vector of known length, of a type that sizes have."""
    shape = value.shape
    if value.dtype not in types or shape is None or len(shape) > 1:
        return False
    return all(isinstance(size, int) and size <= _LARGEST_HOST_VECTOR for size in shape)


def _plain(value: ir.Value) -> Any:
    """A constant as a Python number or a flat list of numbers."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    if array.dtype.kind not in "fiub":
        array = array.astype(np.float64)  # bfloat16 and the like
    return array.item() if array.ndim == 0 else array.reshape(-1).tolist()


def _attribute_value(node: ir.Node, attribute: ir.Attr) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        array = attribute.as_tensor().numpy()
        return (array if array.dtype.kind in "fiub" else array.astype(np.float64)).tolist()
    if attribute.type in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
        return attribute.value
    if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return list(attribute.value)
    if attribute.type == ir.AttributeType.TYPE_PROTO:
        return str(attribute.value)
    raise LiftError(f"attribute {attribute.name!r} of {node.op_type} has no torch counterpart", where=node.name)


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except ValueError:  # torch's own functions in C
        return None


def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    signature = _signature(function)
    return frozenset() if signature is None else frozenset(signature.parameters)


def _check_call(node: ir.Node, function: Callable[..., Any], inputs: int, keywords: dict[str, Any]) -> None:
    """Refuse a call that the function cannot take when it is lifted, not when it runs."""
    signature = _signature(function)
    if signature is None:
        return
    try:
        signature.bind(*range(inputs), **keywords)
    except TypeError as error:
        raise LiftError(
            f"the torch function of {node.op_type} does not take this node: {error}",
            where=node.name,
            help="the op row is for another version of the operator, or the node is not valid",
        ) from error
