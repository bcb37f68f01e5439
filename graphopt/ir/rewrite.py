"""The mechanics that every rewrite shares: read constants, swap weights, move names, repeat until stable.

This module knows how a graph is edited without breaking its promises (interface names, tensors shared with
clones, unique names). It knows no rewrite and no operator besides Constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.row import tensor_shape

FLOATING = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE})
"""Element types that rewrites may compute with: through float64 and back."""


class DeclinedError(Exception):
    """A rewrite that nearly applied and was refused. Raised by a rule before it has changed anything.

    Attributes:
        why: the reason, one clause, as it stands in the remark.
        where: node or value to blame; None for the node that the rule was asked about.
    """

    def __init__(self, why: str, where: ir.Node | ir.Value | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.where = where


Rule = Callable[["Rewriter", ir.Node], bool]
"""One local rewrite: True when it changed the graph, False where it does not apply, raises for a near miss."""

Missed = Callable[[str, str, "ir.Node | ir.Value | str"], None]
"""`Context.missed`: what, why, where."""


# Reading ----------------------------------------------------------------------------------------------------


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of these operators of the standard ONNX domain."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node, None for everything that a caller may still change.

    Initializers that are also graph inputs are not constant: the caller of the model may override them.
    """
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer() or is_op(value.producer(), "Constant"):
        return ir.convenience.get_const_tensor(value)
    return None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """`constant_tensor` as an array of its own dtype (ml_dtypes for bfloat16), or None. Read only."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def let_go(tensor: ir.TensorProtocol | None) -> None:
    """Unmap a tensor that lies in a file, unless somebody reads it: mapped pages count as memory in use."""
    if isinstance(tensor, ir.ExternalTensor):
        try:
            tensor.release()
        except BufferError:  # an array of it is alive, and keeps the mapping
            tensor.raw = None


def constant_float64(value: ir.Value | None) -> np.ndarray | None:
    """The constant as float64, or None where there is none or its elements are not floating point."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype not in FLOATING:
        return None
    return tensor.numpy().astype(np.float64)


def rank(value: ir.Value) -> int | None:
    """Number of axes of `value`, None where unknown."""
    return None if value.shape is None else len(value.shape)


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape where every dimension is a number, else None."""
    if value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(dim) for dim in value.shape.numpy())


def known_dim(value: ir.Value, axis: int) -> int | None:
    """Number of elements along `axis`, None where the rank or the dimension is not known."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def integers(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """An INTS attribute, None where the node has none."""
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(attribute.as_ints())


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, once, in the graph that computes it; None where there is no such node.

    A graph output also counts as a reader, and so does a subgraph.
    """
    uses = tuple(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    consumer = uses[0].node
    producer = value.producer()
    if producer is not None and producer.graph is not consumer.graph:
        return None
    return consumer


def require_sole_consumer(value: ir.Value, node: ir.Node) -> None:
    """Raise `DeclinedError` unless `node` is the only reader of `value`."""
    if sole_consumer(value) is node:
        return
    producer = value.producer()
    name = value.name if producer is None else f"the result of {producer.op_type}"
    if value.is_graph_output():
        raise DeclinedError(f"{name} is also a graph output")
    if len(value.uses()) > 1:
        raise DeclinedError(f"{name} is read {len(value.uses())} times")
    raise DeclinedError(f"{name} is computed outside the subgraph that reads it")


def to_tensor(array: np.ndarray, dtype: ir.DataType) -> ir.Tensor:
    """A new tensor of `dtype`. Raises `DeclinedError` where a number is not finite in `dtype`."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        cast = np.ascontiguousarray(array.astype(dtype.numpy()))
    if dtype in FLOATING and not np.isfinite(cast.astype(np.float64)).all():
        raise DeclinedError(f"a folded weight is not finite in {dtype.name.lower()}")
    return ir.Tensor(cast, dtype=dtype)


# Editing ----------------------------------------------------------------------------------------------------


class Rewriter:
    """One run of rewrites over one model: hands out unique names and edits without touching the interface.

    Tensors are never written to, since clones that serve as rollback share them: a changed weight is a new
    tensor. Names of graph inputs and outputs never change.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y)'
        ...     '{ a = Neg(x) b = Neg(a) y = Relu(b) }')
        >>> def double_negation(rewriter, node):
        ...     inner = node.inputs[0].producer()
        ...     if not (is_op(node, "Neg") and is_op(inner, "Neg")):
        ...         return False
        ...     return rewriter.bypass(node.outputs[0], inner.inputs[0])
        >>> Rewriter(model).until_stable(double_negation, "cancel Neg", lambda what, why, where: None)
        >>> [node.op_type for node in model.graph]
        ['Relu']
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._names: set[str] | None = None

    def until_stable(self, rule: Rule, what: str, missed: Missed) -> None:
        """Apply `rule` to every node of every graph, again and again until it applies nowhere.

        Each application must bring the graph closer to a form where the rule does not apply (fewer nodes,
        say), or this does not end. `missed` hears the refusals of the last round, which are those that stand.
        """
        while True:
            changed = False
            refusals: list[tuple[str, ir.Node | ir.Value]] = []
            for graph in tuple(self.model.graphs()):
                for node in graph:
                    if node.graph is not graph:
                        continue
                    try:
                        changed |= rule(self, node)
                    except DeclinedError as refusal:
                        refusals.append((refusal.why, refusal.where or node))
            if not changed:
                break
        for why, where in refusals:
            missed(what, why, where)

    def unique_name(self, wanted: str) -> str:
        """`wanted`, or `wanted` with the first number that makes it new in the model, subgraphs included."""
        if self._names is None:
            self._names = {named.name for named in _values_and_nodes(self.model) if named.name}
        name, number = wanted, 1
        while name in self._names:
            name, number = f"{wanted}_{number}", number + 1
        self._names.add(name)
        return name

    def initializer(self, graph: ir.Graph, wanted_name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A new initializer of `graph`."""
        value = ir.Value(
            name=self.unique_name(wanted_name),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor_shape(tensor)),
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    def replace_constant(self, node: ir.Node, index: int, tensor: ir.Tensor, *, wanted_name: str = "") -> None:
        """Make input `index` of `node` the constant `tensor`; other readers of the old constant keep theirs.

        The name stays where the old constant was an initializer for this use alone. Otherwise the new one is
        called `wanted_name`, or after the old one.
        """
        node_graph = _graph_of(node)
        old = node.inputs[index] if index < len(node.inputs) else None
        if old is not None and old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output():
            old.const_value = tensor
            old.shape = ir.Shape(tensor_shape(tensor))
            old.type = ir.TensorType(tensor.dtype)
            return
        name = wanted_name or (old.name if old is not None and old.name else f"{node.name}.constant")
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, self.initializer(node_graph, name, tensor))
        if old is not None:
            discard_if_unread(old)

    def insert(
        self,
        after: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        like: ir.Value,
        suffix: str,
        attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
        outputs: int = 1,
    ) -> ir.Node:
        """A new node behind `after`; its outputs are named `like` + `suffix` and have the type of `like`."""
        base = like.name or after.name or op_type
        names = [self.unique_name(f"{base}_{suffix}") for _ in range(outputs)]
        results = [ir.Value(name=name, type=like.type) for name in names]
        node = ir.node(op_type, list(inputs), attributes=attributes or {}, outputs=results)
        node.name = self.unique_name(f"{base}_{op_type}")
        node.metadata_props.update(after.metadata_props)
        _graph_of(after).insert_after(after, node)
        return node

    def interpose(self, value: ir.Value, node: ir.Node) -> None:
        """Put `node`, which reads `value`, between `value` and all its other readers, graph outputs included.

        The output of `node` takes the name, type and shape of `value`, which gets the name of that output.
        """
        result = node.outputs[0]
        for use in tuple(value.uses()):
            if use.node is not node:
                use.node.replace_input_with(use.idx, result)
        graph = _graph_of(node)
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = result
        result.name, value.name = value.name, result.name
        result.type, result.shape = value.type, value.shape

    def redirect(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Make `node` read `value`; what computes the operand it read before goes when nothing else reads it."""
        old = node.inputs[index]
        node.replace_input_with(index, value)
        producer = None if old is None else old.producer()
        if producer is not None:
            discard_if_dead(producer)

    def supersede(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` stand for `old` everywhere: uses, graph output, name, type, shape and `meta`.

        `new` must be the result of a node of the same graph that is not itself a graph output and has no
        further readers besides the nodes that the caller is about to remove. The producer of `old` is removed
        when nothing reads its other outputs.
        """
        is_interface = old.is_graph_output()  # then also what it leaves undeclared is kept
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        name = old.name
        if old.type is not None or is_interface:
            new.type = old.type
        if old.shape is not None or is_interface:
            new.shape = old.shape
        new.meta.clear()  # what was known of the value that `new` computed before no longer holds
        new.meta.update(old.meta)
        producer = old.producer()
        old.name = None
        new.name = name
        if producer is not None:
            discard_if_dead(producer)

    def bypass(self, old: ir.Value, new: ir.Value) -> bool:
        """Let readers of `old` read the equal value `new`; the name of `new` stays unless `old` is an output.

        Returns False, with nothing changed, where `old` is a graph output and `new` cannot take its name
        (an input, an initializer, another output, or a value of another graph).
        """
        producer = old.producer()
        if old.is_graph_output():
            source = new.producer()
            if source is None or new.is_graph_output() or producer is None or source.graph is not producer.graph:
                return False
            self.supersede(old, new)
            return True
        old.replace_all_uses_with(new)
        if new.shape is None and not new.is_graph_input():
            new.shape = old.shape
        if producer is not None:
            discard_if_dead(producer)
        return True


def discard_if_dead(node: ir.Node) -> bool:
    """Remove `node` when nothing reads its outputs, and then what only it read. True if removed."""
    if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return False
    pending = [node]
    while pending:
        dead = pending.pop()
        if dead.graph is None or any(output.uses() or output.is_graph_output() for output in dead.outputs):
            continue
        inputs = [value for value in dead.inputs if value is not None]
        dead.graph.remove(dead, safe=True)
        pending.extend(source for value in inputs if (source := value.producer()) is not None)
        for value in inputs:
            discard_if_unread(value)
    return True


def discard_if_unread(value: ir.Value) -> None:
    """Remove an initializer, or the Constant node behind `value`, that nothing reads any more."""
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    producer = value.producer()
    if value.is_initializer() and value.graph is not None and value.name:
        value.graph.initializers.pop(value.name, None)
    elif producer is not None and is_op(producer, "Constant"):
        discard_if_dead(producer)


def set_attributes(node: ir.Node, **attributes: int | float | str | Sequence[int] | None) -> None:
    """Set attributes of `node`; None removes one."""
    for name, value in attributes.items():
        if value is None:
            node.attributes.pop(name, None)
        else:
            kept = list(value) if isinstance(value, (tuple, list)) else value
            node.attributes[name] = ir.convenience.convert_attribute(name, kept)


def _graph_of(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise TypeError(f"node {node.name!r} is in no graph")
    return node.graph


def _values_and_nodes(model: ir.Model) -> Sequence[ir.Value | ir.Node]:
    found: list[ir.Value | ir.Node] = []
    for graph in model.graphs():
        found.extend(graph.inputs)
        found.extend(graph.initializers.values())
        for node in graph:
            found.append(node)
            found.extend(node.outputs)
    return found
