"""From the trained module back to the ONNX graph: weights under their names, insertions folded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from graphopt.errors import LiftError
from graphopt.ir.channel_analysis import nodes_below
from graphopt.ir.check import check_structure
from graphopt.ir.lift_graph import GraphPlan, plan_graph
from graphopt.ir.lifted import INSERTIONS, NODE, VALUE, LiftedModule, as_array
from graphopt.ir.ops.row import OpTable, tensor_shape

_LIFT_AGAIN = "lift the model again and train that; change a lifted module by insertions only"


def lower_module(module: torch.nn.Module, model: ir.Model, table: OpTable) -> ir.Model:
    """See `graphopt.lower`."""
    module = getattr(module, "module", module)  # out of DataParallel and DistributedDataParallel
    module = getattr(module, "_orig_mod", module)  # out of torch.compile
    if not isinstance(module, LiftedModule):
        raise LiftError(f"a {type(module).__name__} was not lifted", help="pass what graphopt.lift returned")
    check_fit(module, model, table)
    result = model.clone()
    for name, path in module.interface.initializers.items():
        _write(result.graph.initializers[name], attribute(module, path), path)
    folding = Folding(result, module.interface.initializers)
    waiting = list(module.insertions.items())
    while waiting:
        _, insertion = waiting.pop(0)
        folding.later = _places(module, [name for name, _ in waiting])
        insertion.fold(folding)  # pyright: ignore[reportCallIssue]
    return folding.finish()


def _places(module: LiftedModule, insertions: Sequence[str]) -> frozenset[str]:
    """The values at which some insertions stand."""
    prefixes = tuple(f"{INSERTIONS}.{name}." for name in insertions)
    return frozenset(
        node.meta[VALUE]
        for node in module.graph.nodes
        if node.op == "call_module" and f"{node.target}.".startswith(prefixes)
    )


def check_fit(module: LiftedModule, model: ir.Model, table: OpTable) -> None:
    """Raise `LiftError` unless the module is the lifted `model`, insertions apart."""
    plan = plan_graph(model, table)
    _check_graph(module.graph, plan, dict(module.named_modules()), "")
    expected = {name: tensor_shape(_stored(model, name)) for name in plan.initializers}
    for name, path in module.interface.initializers.items():
        found = tuple(attribute(module, path).shape)
        if found != expected.get(name):
            raise LiftError(
                f"parameter {path!r} has the shape {list(found)}, the model's {name!r} {list(expected.get(name, ()))}",
                help=_LIFT_AGAIN,
            )


def attribute(module: torch.nn.Module, path: str) -> torch.Tensor:
    """The parameter or buffer at a path."""
    parent, _, leaf = path.rpartition(".")
    try:
        found = getattr(module.get_submodule(parent), leaf)
    except AttributeError as error:
        raise LiftError(f"the module has no {path!r} any more", help=_LIFT_AGAIN) from error
    if not isinstance(found, torch.Tensor):
        raise LiftError(f"{path!r} of the module is no tensor any more", help=_LIFT_AGAIN)
    return found


def _stored(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def _check_graph(graph: fx.Graph, plan: GraphPlan, modules: Mapping[str, Any], prefix: str) -> None:
    for found, expected in zip(described(graph), [*described(plan.graph), None], strict=False):
        if expected is None or found[:-1] != expected[:-1]:
            raise LiftError(
                "the module's graph is not that of the model: it was edited, or lifted from another model",
                where=str(found[-1] or (expected and expected[-1])),
                help=_LIFT_AGAIN,
            )
    if len(described(graph)) != len(described(plan.graph)):
        raise LiftError("the module's graph has lost nodes of the model", help=_LIFT_AGAIN)
    for path, body in plan.bodies.items():
        inner = modules.get(f"{prefix}{path}")
        if not isinstance(inner, fx.GraphModule):
            raise LiftError(f"the subgraph {path!r} is gone from the module", help=_LIFT_AGAIN)
        _check_graph(inner.graph, body, modules, f"{prefix}{path}.")


def described(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What every node does, on which earlier ones, and at last its name; insertions are looked through."""
    numbers: dict[fx.Node, int] = {}
    entries: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.op == "call_module" and str(node.target).startswith(f"{INSERTIONS}."):
            numbers[node] = numbers[node.args[0]]
            continue
        arguments = fx.map_arg((node.args, node.kwargs), lambda argument: f"%{numbers[argument]}")
        numbers[node] = len(entries)
        entries.append((node.op, node.target, repr(arguments), node.meta.get(NODE) or node.meta.get(VALUE)))
    return entries


def _write(value: ir.Value, tensor: torch.Tensor, path: str) -> None:
    """Put a trained tensor in place of an initializer, in the initializer's own type."""
    old = value.const_value
    assert old is not None
    array = as_array(tensor)
    previous = old.numpy()
    if array.dtype == previous.dtype and np.array_equal(array, previous, equal_nan=array.dtype.kind == "f"):
        return
    array = array.astype(previous.dtype)
    if array.dtype.kind not in "iub" and _finite(previous) and not _finite(array):
        raise LiftError("the parameter holds NaN or infinity", where=path, help="go back to the last good weights")
    value.const_value = ir.Tensor(array, dtype=old.dtype, name=value.name)


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array.astype(np.float64)).all())


@dataclass(frozen=True)
class Link:
    """One operator of a chain that `Folding.insert_after` writes.

    Attributes:
        op_type: ONNX operator.
        operands: its inputs after the first.
        attributes: its attributes.
        dtype: element type of its output; None for that of the value that the chain stands behind.
    """

    op_type: str
    operands: Sequence[ir.Value | None] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    dtype: ir.DataType | None = None


class Folding:
    """The ONNX graph while insertions are folded into it, and the few edits that they need.

    Attributes:
        model: the graph, with the trained weights in it.
        later: values and weights at which insertions stand that are folded after the present one.
        origins: name of the initializer that each one stands for which took its place (integers of a weight).
    """

    later: frozenset[str] = frozenset()

    def __init__(self, model: ir.Model, initializers: Mapping[str, str]) -> None:
        self.model = model
        self._lifted = initializers
        self.origins: dict[str, str] = {}
        self._values = {value.name: value for node in model.graph for value in node.outputs}
        self._values.update({value.name: value for value in model.graph.inputs})
        self._initializers = dict(model.graph.initializers)
        self._taken: set[str | None] = set()  # names of values and nodes, subgraphs included
        for graph in model.graphs():
            self._taken.update(value.name for value in graph.inputs)
            self._taken.update(part.name for node in graph for part in (node, *node.outputs))
        self._ends: dict[str, ir.Value] = {}
        self._changes: list[Callable[[ir.Model], ir.Model]] = []

    def constant(self, name: str) -> np.ndarray:
        """The initializer of that name, as trained and as earlier insertions left it."""
        return self._initializer(name).numpy()

    def set_constant(self, name: str, array: np.ndarray) -> None:
        """Give an initializer other values of the same shape; the element type stays.

        Raises:
            LiftError: another shape, or an earlier insertion has put operators behind the initializer.
        """
        old = self._initializer(name)
        if not self.is_constant(name):
            raise LiftError(f"{name!r} has operators behind it by now", help="fold to operators: insert_after")
        if tensor_shape(old) != array.shape:
            raise LiftError(f"{list(array.shape)} is not the shape of {name!r}", help="fold to the shape of the weight")
        value = self._initializers[name]
        value.const_value = ir.Tensor(array.astype(old.numpy().dtype), dtype=old.dtype, name=name)

    def is_constant(self, name: str) -> bool:
        """Whether this is an initializer, and no earlier insertion has put operators behind it."""
        return name in self._initializers and name not in self._ends

    def element_type(self, name: str) -> ir.DataType:
        """Element type of a value; float32 where it is unknown."""
        return self._end(name).dtype or ir.DataType.FLOAT

    def value(self, name: str) -> ir.Value:
        """A value, or what earlier insertions put behind it."""
        return self._end(name)

    def add_constant(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """A new initializer; the name is made unique."""
        unique = self._free(name)
        tensor = ir.Tensor(array, dtype=dtype or ir.DataType.from_numpy(array.dtype), name=unique)
        value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.model.graph.register_initializer(value)
        self._initializers[unique] = value
        return value

    def insert_after(
        self,
        name: str,
        chain: Sequence[Link],
        *,
        consumers: Collection[str] | None = None,
        source: ir.Value | None = None,
    ) -> ir.Value:
        """Put a chain of operators between a value (or initializer) and its consumers.

        Args:
            name: the value; what earlier calls put behind it stays before the new chain.
            chain: the operators; input 0 of each is the one before it.
            consumers: names of the nodes that are to read the end of the chain, None for all, graph outputs included.
            source: what the chain starts from in place of the value itself, such as the integers of a weight.

        Returns:
            The end of the chain.
        """
        start = self._end(name)
        if source is not None:
            self.origins[source.name or ""] = self.origins.get(name, name)
        readers = [use for use in start.uses() if consumers is None or self._is_one_of(use.node, consumers)]
        running = source or start
        nodes: list[ir.Node] = []
        for link in chain:
            node = ir.node(link.op_type, [running, *link.operands], dict(link.attributes))
            running = node.outputs[0]
            node.name = running.name = self._free(f"{name}_{link.op_type}")
            dtype = link.dtype or start.dtype
            running.shape, running.type = start.shape, None if dtype is None else ir.TensorType(dtype)
            self._taken.add(running.name)
            nodes.append(node)
        graph, produced = self.model.graph, start.producer()
        if produced is not None:
            graph.insert_after(produced, nodes)
        elif len(graph):
            graph.insert_before(graph[0], nodes)
        else:
            graph.extend(nodes)
        for use in readers:
            use.node.replace_input_with(use.idx, running)
        if consumers is None and not start.is_graph_input():
            self._move_outputs(start, running)
        # As `LiftedModule.place`: what all consumers read is what the next insertion stands behind.
        left = {use.node for use in start.uses()} - set(nodes)
        if consumers is None or not (left or start.is_graph_output()):
            self._ends[name] = running
        return running

    def _is_one_of(self, node: ir.Node, consumers: Collection[str]) -> bool:
        """Whether a node of the main graph is named; those of subgraphs may have the same names."""
        return node.graph is self.model.graph and (node.name or "") in consumers

    def _move_outputs(self, start: ir.Value, end: ir.Value) -> None:
        """The end of the chain becomes the graph output, under its name."""
        outputs = self.model.graph.outputs
        places = [index for index, value in enumerate(outputs) if value is start]
        if not places:
            return
        name = start.name
        start.name = self._free(f"{name}_float")
        self._taken.add(start.name)
        end.name, end.type, end.shape = name, start.type, start.shape
        for index in places:
            outputs[index] = end

    def at_end(self, change: Callable[[ir.Model], ir.Model]) -> None:
        """Have the whole graph rewritten (units removed, say) after all insertions are folded."""
        self._changes.append(change)

    def finish(self) -> ir.Model:
        """The folded graph, checked; initializers that nothing reads any more are gone."""
        read = {value for node in nodes_below(self.model.graph) for value in node.inputs}
        read.update(value for graph in self.model.graphs() for value in graph.outputs)
        for value in map(self._initializers.__getitem__, self._lifted):
            if value not in read:
                del self.model.graph.initializers[value.name or ""]
        check_structure(self.model)
        for change in self._changes:
            self.model = change(self.model)
        return self.model

    def _free(self, name: str) -> str:
        number, unique = 1, name
        while unique in self._taken or unique in self.model.graph.initializers:
            number += 1
            unique = f"{name}_{number}"
        return unique

    def _initializer(self, name: str) -> ir.TensorProtocol:
        value = self._initializers.get(name)
        if value is None or value.const_value is None:
            raise LiftError(f"there is no initializer {name!r} in the model", help=_LIFT_AGAIN)
        return value.const_value

    def _end(self, name: str) -> ir.Value:
        found = self._ends.get(name) or self._values.get(name) or self._initializers.get(name)
        if found is None:
            raise LiftError(f"there is no value {name!r} in the model", help=_LIFT_AGAIN)
        return found
