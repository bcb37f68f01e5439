"""Concrete shapes and known constants of every value, for one choice of the symbolic dimensions.

Symbolic shape inference loses the shape behind every `Shape -> Gather -> Concat -> Reshape` chain. With numbers in
place of symbols there is nothing to lose: each node is inferred alone, from the shapes before it and from the small
constants that shape arithmetic produces. What two choices of the symbols (two probes) agree on is static.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.ir.dimensions import concrete_shape
from graphopt.ir.inference import Inference
from graphopt.ir.ops import default_table
from graphopt.ir.ops.row import OpTable, Shape, Site, UnknownShapeError, tensor_shape

MAXIMUM_CONSTANT_ELEMENTS = 4096
"""Larger values are data, not shape arithmetic, and are not tracked."""
_MOST_FLOATS = 64
"""Floats that a size may depend on are scales of a Resize and bounds of a Range; larger constants are weights."""
LITERAL = "graphopt.literal"
"""Key in the `meta` of an initializer that came from a Constant node: a number in the code, not a parameter."""
BUFFER = "graphopt.buffer"
"""Key in `ir.Value.meta` of an initializer that was a buffer, or a frozen parameter, of the traced module."""
_NOT_DETERMINISTIC = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
}


@dataclass
class Facts:
    """What is true about a graph at one choice of its symbolic dimensions.

    Attributes:
        shapes: concrete shape of every value whose shape could be inferred.
        dtypes: element type of every value whose type could be inferred.
        constants: value of everything that is known before run time and small, weights excluded
            (ask `constant`, which looks at them too).
        from_weights: values computed from float weights; they are known, yet must not be folded away before
            pruning, because that would tear the weight from its name.
        from_scalars: values computed from float parameters of one element.
        sizes: values computed from a shape (of anything, the shape itself included).
        unknown: nodes with an output of unknown shape.
        conflicts: nodes that shape inference rejects, with its message.
    """

    shapes: dict[ir.Value, Shape] = field(default_factory=dict)
    dtypes: dict[ir.Value, ir.DataType] = field(default_factory=dict)
    constants: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    from_weights: set[ir.Value] = field(default_factory=set)
    from_scalars: set[ir.Value] = field(default_factory=set)
    sizes: set[ir.Value] = field(default_factory=set)
    unknown: list[ir.Node] = field(default_factory=list)
    conflicts: list[tuple[ir.Node, str]] = field(default_factory=list)

    def shape(self, value: ir.Value | None) -> Shape | None:
        """Concrete shape of a value, None where it is unknown."""
        return None if value is None else self.shapes.get(value)

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The value before run time, weights included, or None where it depends on the inputs."""
        if value is None:
            return None
        found = self.constants.get(value)
        if found is None and value.is_initializer() and value.const_value is not None:
            return value.const_value.numpy()
        return found

    def site(self, node: ir.Node) -> Site:
        """The node with the shapes and constants around it, as the columns of the op table read it."""
        return Site(
            node,
            tuple(self.shape(value) for value in node.inputs),
            tuple(self.shape(value) for value in node.outputs),
            tuple(self._small_constant(value) for value in node.inputs),
        )

    def _small_constant(self, value: ir.Value | None) -> np.ndarray | None:
        shape = self.shape(value)
        if shape is None or math.prod(shape) > MAXIMUM_CONSTANT_ELEMENTS:
            return None
        return self.constant(value)


def propagate(
    model: ir.Model,
    sizes: Mapping[str, int] | None = None,
    *,
    table: OpTable | None = None,
    before: BeforeNode | None = None,
    inference: Inference | None = None,
) -> Facts:
    """Infer concrete shapes and known constants, node by node, subgraphs included.

    Args:
        model: any model whose nodes are sorted; it is not changed.
        sizes: elements of each symbolic input dimension by name (see `dimension_name`); 2 where not given.
        table: op rows whose `shape` column fills in what `onnx.shape_inference` cannot infer.
        before: called with each node before it is inferred. It may change the node, and insert nodes before it,
            which it infers by itself.
        inference: what is known about nodes of this very model from earlier propagations.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[n,6] x) => (float[a,b] y) '
        ...     '{ s = Shape (x) two = Constant <value = int64[1] {2}> () r = Div (s, two) y = Reshape (x, r) }')
        >>> facts = propagate(model, {"n": 8})
        >>> {value.name: array.tolist() for value, array in facts.constants.items()}
        {'s': [8, 6], 'two': [2], 'r': [4, 3]}
        >>> facts.shape(model.graph.outputs[0])
        (4, 3)
    """
    inference = inference or Inference(model.opset_imports, model.ir_version)
    return Propagation(model, dict(sizes or {}), table or default_table(), inference, before).run()


class Propagation:
    """One propagation under way.

    Attributes:
        model: the model.
        sizes: elements of the symbolic dimensions.
        table: op rows.
        facts: what is known so far.
    """

    def __init__(
        self,
        model: ir.Model,
        sizes: Mapping[str, int],
        table: OpTable,
        inference: Inference,
        before: BeforeNode | None = None,
    ) -> None:
        self.model, self.sizes, self.table = model, sizes, table
        self.inference, self.before = inference, before
        self.facts = Facts()
        self.opsets = dict(model.opset_imports)

    def run(self) -> Facts:
        """Infer everything."""
        for value in self.model.graph.inputs:
            if value.dtype is not None:
                self.facts.dtypes[value] = value.dtype
            shape = concrete_shape(value, self.sizes)
            if shape is not None:
                self.facts.shapes[value] = shape
        self._graph(self.model.graph)
        return self.facts

    def _graph(self, graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            self.initializer(value)
        for node in graph:
            if self.before is not None:
                self.before(node, self)
            self.node(node)

    def initializer(self, value: ir.Value) -> None:
        """Take note of an initializer."""
        if value.const_value is None:
            return
        self.facts.shapes[value] = tensor_shape(value.const_value)
        self.facts.dtypes[value] = value.const_value.dtype
        if value.const_value.dtype.is_floating_point():
            if value.const_value.size > 1:
                self.facts.from_weights.add(value)
            elif not value.meta.get(LITERAL):
                self.facts.from_scalars.add(value)

    def node(self, node: ir.Node) -> None:
        """Infer one node, its inputs being known."""
        facts = self.facts
        self._descend(node)
        subgraphs = [attribute for attribute in node.attributes.values() if _holds_graphs(attribute)]
        if subgraphs:
            self._control_flow(node)
        else:
            self._constants(node)
            if any(value not in facts.shapes for value in node.outputs):
                self._shapes(node)
        if any(value not in facts.shapes for value in node.outputs if value.name and value.uses()):
            facts.unknown.append(node)

    def _descend(self, node: ir.Node) -> None:
        """What the outputs are computed from."""
        if node.op_type in ("Shape", "Size"):
            self.facts.sizes.update(node.outputs)
            return
        operands = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
        for origin in (self.facts.from_weights, self.facts.from_scalars, self.facts.sizes):
            if any(value in origin for value in operands if value is not None):
                origin.update(node.outputs)

    def _constants(self, node: ir.Node) -> None:
        """Evaluate a node whose inputs are all known and small, and the shape queries."""
        facts = self.facts
        results: Sequence[Any] | None = None
        if node.domain in ("", "ai.onnx"):
            shape = facts.shape(node.inputs[0]) if node.inputs else None
            if node.op_type == "Shape" and shape is not None:
                start, end = (_integer(node, "start") or 0), _integer(node, "end")
                results = [np.array(shape[start:end], np.int64)]
            elif node.op_type == "Size" and shape is not None:
                results = [np.array(math.prod(shape), np.int64)]
            elif node.op_type == "Constant":
                results = _constant_value(node)
            elif node.op_type == "CastLike":
                results = self._cast_like(node)
            elif node.op_type not in _NOT_DETERMINISTIC and self._is_small_arithmetic(node):
                results = self._evaluate(node)
        if results is None:
            return
        for value, result in zip(node.outputs, results, strict=False):
            if result is None or isinstance(result, (list, tuple, dict)):
                continue  # sequences, maps and absent optionals are no tensors
            array = np.asarray(result)
            facts.shapes[value] = array.shape
            facts.dtypes.setdefault(value, ir.DataType.from_numpy(array.dtype))
            if array.size <= MAXIMUM_CONSTANT_ELEMENTS:
                facts.constants[value] = array

    def _cast_like(self, node: ir.Node) -> list[np.ndarray] | None:
        """The second operand gives only its type, so the first alone must be known."""
        value, like = node.inputs
        array = self.facts.constant(value) if value is not None and self._is_small(value) else None
        dtype = None if like is None else self.facts.dtypes.get(like, like.dtype)
        return None if array is None or dtype is None else [array.astype(dtype.numpy())]

    def _is_small_arithmetic(self, node: ir.Node) -> bool:
        facts = self.facts
        known = [value for value in node.inputs if value is not None]
        if not known:
            return False
        for value in known:
            shape = facts.shape(value)
            if shape is None or math.prod(shape) > MAXIMUM_CONSTANT_ELEMENTS or facts.constant(value) is None:
                return False
        if node.op_type in ("ConstantOfShape", "Expand", "Tile", "Range"):
            self._shapes(node)
            shape = facts.shape(node.outputs[0])
            return shape is not None and math.prod(shape) <= MAXIMUM_CONSTANT_ELEMENTS
        return True

    def _evaluate(self, node: ir.Node) -> Sequence[Any] | None:
        known = [(index, self.facts.constant(value)) for index, value in enumerate(node.inputs) if value is not None]
        return self.inference.evaluate(node, [(index, np.asarray(array)) for index, array in known])

    def _shapes(self, node: ir.Node) -> None:
        """Shapes by the row where it has a rule, else by onnx, else as declared; element types likewise."""
        inferred = self._infer(node)
        row = self.table.row(node.domain, node.op_type, self.opsets.get(node.domain, 1))
        for index, value in enumerate(node.outputs):
            if value in self.facts.shapes or not value.name:
                continue
            shape = None
            if row is not None and row.shape is not None:
                shape = self._by_row(row.shape, node, index)
            if shape is None:
                shape = inferred.get(index)
            if shape is None:
                shape = self._declared(value)
            if shape is not None:
                self.facts.shapes[value] = shape
        first = node.outputs[0] if node.outputs else None
        if first is not None and first not in self.facts.dtypes and row is not None and row.shape is not None:
            dtype = row.output_element_type(node, self.facts.dtypes)
            if dtype is not None:
                self.facts.dtypes[first] = dtype

    def _declared(self, value: ir.Value) -> Shape | None:
        """The shape written in the model, where each of its symbols is one that has a size."""
        if value.shape is None:
            return None
        symbols = [dimension.value for dimension in value.shape if not isinstance(dimension, int)]
        if any(symbol is None or symbol not in self.sizes for symbol in symbols):
            return None
        return concrete_shape(value, self.sizes)

    def _by_row(self, rule: Any, node: ir.Node, index: int) -> Shape | None:
        try:
            shapes = rule(self.facts.site(node))
        except UnknownShapeError:
            return None
        return tuple(int(size) for size in shapes[index]) if index < len(shapes) else None

    def _infer(self, node: ir.Node) -> dict[int, Shape]:
        """Shapes that `onnx.shape_inference` finds for the outputs of one node, by output index."""
        operands: list[tuple[int, ir.DataType, Shape | None, np.ndarray | None]] = []
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            dtype = self.facts.dtypes.get(value, value.dtype)
            if dtype is None or (value.type is not None and not isinstance(value.type, ir.TensorType)):
                return {}
            operands.append((index, dtype, self.facts.shape(value), self._decides_shape(value)))
        found = self.inference.infer(node, operands)
        if found.error is not None:
            self.facts.conflicts.append((node, found.error))
        for index, dtype in found.dtypes.items():
            self.facts.dtypes[node.outputs[index]] = dtype
        return found.shapes

    def _decides_shape(self, value: ir.Value) -> np.ndarray | None:
        """The constant behind an operand, where it may be one that sizes depend on: integers, and a few floats."""
        shape = self.facts.shape(value)
        dtype = self.facts.dtypes.get(value, value.dtype)
        if shape is None or dtype is None:
            return None
        most = MAXIMUM_CONSTANT_ELEMENTS if dtype.is_integer() else _MOST_FLOATS
        constant = self.facts.constant(value) if math.prod(shape) <= most else None
        return constant if constant is not None and constant.dtype.kind in "iufb" else None

    def _is_small(self, value: ir.Value) -> bool:
        shape = self.facts.shape(value)
        return shape is not None and math.prod(shape) <= MAXIMUM_CONSTANT_ELEMENTS

    def _control_flow(self, node: ir.Node) -> None:
        """If: where the branches agree. Loop and Scan: the body once, for carried values whose shape is stable."""
        graphs = {name: attribute.as_graph() for name, attribute in node.attributes.items() if _holds_graphs(attribute)}
        if node.op_type == "If":
            for graph in graphs.values():
                self._graph(graph)
            outputs = [[self.facts.shape(value) for value in graph.outputs] for graph in graphs.values()]
            self._agree(node.outputs, outputs)
            for graph in graphs.values():
                self._pass_types(graph.outputs, node.outputs)
            return
        body = graphs.get("body")
        if body is None:
            return
        self._bind_body(node, body)
        self._graph(body)
        found = [self.facts.shape(value) for value in body.outputs]
        self._pass_types(body.outputs[1:] if node.op_type == "Loop" else body.outputs, node.outputs)
        if node.op_type == "Loop":
            carried = len(node.inputs) - 2
            trip = self.facts.constant(node.inputs[0])
            count = None if trip is None else int(np.asarray(trip).reshape(()))
            stacked = [None if shape is None or count is None else (count, *shape) for shape in found[1 + carried :]]
            self._agree(node.outputs, [[*found[1 : 1 + carried], *stacked]])
        elif node.op_type == "Scan":
            scans = _integer(node, "num_scan_inputs") or 0
            states = len(node.inputs) - scans
            first = self.facts.shape(node.inputs[states]) if scans else None
            length = None if first is None else first[self._scan_axes(node, "scan_input_axes", scans)[0]]
            axes = self._scan_axes(node, "scan_output_axes", len(found) - states)
            stacked = [
                None if shape is None or length is None else _inserted(shape, axis, length)
                for shape, axis in zip(found[states:], axes, strict=True)
            ]
            self._agree(node.outputs, [[*found[:states], *stacked]])

    def _pass_types(self, sources: Sequence[ir.Value | None], values: Sequence[ir.Value]) -> None:
        """Element types of values that enter or leave a subgraph, where the model does not declare them."""
        for source, value in zip(sources, values, strict=False):
            dtype = None if source is None else self.facts.dtypes.get(source, source.dtype)
            if dtype is not None:
                self.facts.dtypes.setdefault(value, dtype)

    def _bind_body(self, node: ir.Node, body: ir.Graph) -> None:
        if node.op_type == "Loop":
            sources: list[Shape | None] = [(), ()]
            sources += [self.facts.shape(value) for value in node.inputs[2:]]
        else:
            scans = _integer(node, "num_scan_inputs") or 0
            states = len(node.inputs) - scans
            sources = [self.facts.shape(value) for value in node.inputs[:states]]
            axes = self._scan_axes(node, "scan_input_axes", scans)
            for value, axis in zip(node.inputs[states:], axes, strict=True):
                shape = self.facts.shape(value)
                sources.append(None if shape is None else tuple(np.delete(shape, axis).tolist()))
        self._pass_types(node.inputs, body.inputs)
        for value, shape in zip(body.inputs, sources, strict=False):
            if value.dtype is not None:
                self.facts.dtypes[value] = value.dtype
            if shape is not None:
                self.facts.shapes[value] = shape

    @staticmethod
    def _scan_axes(node: ir.Node, name: str, count: int) -> Sequence[int]:
        attribute = node.attributes.get(name)
        return [0] * count if attribute is None else list(attribute.as_ints())

    def _agree(self, values: Sequence[ir.Value], alternatives: Sequence[Sequence[Shape | None]]) -> None:
        for index, value in enumerate(values):
            shapes = {alternative[index] for alternative in alternatives if index < len(alternative)}
            if len(shapes) == 1:
                shape = shapes.pop()
                if shape is not None:
                    self.facts.shapes[value] = shape
            if value not in self.facts.shapes:
                declared = self._declared(value)
                if declared is not None:
                    self.facts.shapes[value] = declared


BeforeNode = Callable[[ir.Node, Propagation], None]
"""Called with a node that is about to be inferred."""


def _inserted(shape: Shape, axis: int, size: int) -> Shape:
    """The shape with one more axis, `axis` counted in the result."""
    position = axis if axis >= 0 else axis + len(shape) + 1
    return (*shape[:position], size, *shape[position:])


def _holds_graphs(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _integer(node: ir.Node, name: str) -> int | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else attribute.as_int()


def _constant_value(node: ir.Node) -> list[np.ndarray] | None:
    for name, attribute in node.attributes.items():
        if name == "value":
            return [attribute.as_tensor().numpy()]
        if name in ("value_int", "value_ints"):
            return [np.array(attribute.value, np.int64)]
        if name in ("value_float", "value_floats"):
            return [np.array(attribute.value, np.float32)]
    return None
