"""Whether a graph is a valid ONNX graph: names, order, types. Weights are not read."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.passes import PassError

from graphopt.errors import InvalidGraphError
from graphopt.ir.ops.row import tensor_bytes, tensor_shape
from graphopt.ir.session import open_session

_LARGE = 1024
"""Bytes from which a weight is declared instead of copied: checks need its type, not its content."""

_WITHOUT_INITIALIZER_INPUTS = 4
"""First ir_version in which initializers need not be inputs; onnxruntime writes such files with version 3 too."""


def check_structure(model: ir.Model) -> None:
    """Raise `InvalidGraphError` where the graph is not valid ONNX; the message names the node.

    onnx's checker and its strict type inference judge first. Many working files carry wrong shape annotations, so
    what type inference rejects is put to onnxruntime, and only what both reject is an error.
    """
    _check_names(model)
    _check_pads(model)
    try:
        proto = declared_proto(model)
    except Exception as error:  # onnx_ir raises many types on what it can hold but not write
        raise InvalidGraphError(
            f"the model is malformed: {_summary(_root(error))}", where=model.graph.name, help="export the model again"
        ) from error
    try:
        onnx.checker.check_model(_with_shapes(proto))
    except onnx.checker.ValidationError as error:
        raise InvalidGraphError(
            f"the graph is not valid ONNX: {_summary(error)}",
            where=model.graph.name,
            help="export the model again",
        ) from error
    try:
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except Exception as error:  # InferenceError is not exported under one stable name
        try:
            open_session(model, optimized=False)
        except InvalidGraphError as refused:
            raise InvalidGraphError(
                f"the types or shapes of the graph contradict each other: {_summary(error)}",
                where=model.graph.name,
                help="export the model again",
            ) from refused


def sort_nodes(model: ir.Model) -> None:
    """Sort nodes in place so that each stands behind what it reads. Raises `InvalidGraphError` for a cycle."""
    try:
        common.TopologicalSortPass()(model)
    except (PassError, ValueError) as error:
        raise InvalidGraphError(
            f"the graph has a cycle: {_summary(error)}", where=model.graph.name, help="export the model again"
        ) from error


def unsorted_nodes(graphs: Iterable[ir.Graph]) -> list[ir.Node]:
    """Nodes that read a value of their own graph before it is produced."""
    late: list[ir.Node] = []
    for graph in graphs:
        seen: set[ir.Value] = set()
        for node in graph:
            if any(
                value is not None and value.producer() is not None and value.graph is graph and value not in seen
                for value in node.inputs
            ):
                late.append(node)
            seen.update(node.outputs)
    return late


def declared_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a proto in which large weights are declared as graph inputs, so that it is small and complete."""
    shell = model.clone()
    graph = shell.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor_bytes(tensor) <= _LARGE:
            continue
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor_shape(tensor))
        del graph.initializers[name]
        value.const_value = None
        if not value.is_graph_input():
            graph.inputs.append(value)
    graph.name = graph.name or "graph"  # which the checker wants and onnxruntime does not
    shell.ir_version = max(shell.ir_version, _WITHOUT_INITIALIZER_INPUTS)
    return ir.to_proto(shell)


def _with_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The proto with a shape on every input and output, as the checker wants; its value is not looked at.

    onnxruntime runs models whose inputs or outputs declare no shape, and there are many.
    """
    interface = (*proto.graph.input, *proto.graph.output)
    if all(not value.type.HasField("tensor_type") or value.type.tensor_type.HasField("shape") for value in interface):
        return proto
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for value in (*result.graph.input, *result.graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    return result


_LARGEST_PAD = 2**30
"""Elements of padding beyond which onnx's own shape inference aborts the process instead of raising."""


def _check_pads(model: ir.Model) -> None:
    """Refuse Pad amounts that nobody means: onnx's C++ inference ends the process on some of them."""
    for node in model.graph.all_nodes():
        if node.op_type != "Pad":
            continue
        worst = max(_pad_amounts(node), key=abs, default=0)
        if abs(worst) > _LARGEST_PAD:
            raise InvalidGraphError(
                f"Pad asks for {worst} elements on one side",
                where=node.name or node.op_type,
                help="the file is damaged; export the model again",
            )


def _pad_amounts(node: ir.Node) -> list[int]:
    """The constant amounts of a Pad: an attribute before opset 11, an operand since."""
    attribute = node.attributes.get("pads")
    if attribute is not None:
        return list(attribute.as_ints())
    amounts = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = None if amounts is None else ir.convenience.get_const_tensor(amounts)
    if tensor is None or tensor.dtype != ir.DataType.INT64 or tensor.size > _LARGE:
        return []
    return [int(amount) for amount in tensor.numpy().reshape(-1)]


def _check_names(model: ir.Model) -> None:
    """Every operand must be produced, an input, an initializer, or captured from the graph around."""
    known: set[ir.Value] = set()
    for graph in model.graphs():
        known.update(graph.inputs)
        known.update(graph.initializers.values())
        for node in graph:
            known.update(node.outputs)
    for graph in model.graphs():
        for node in graph:
            for index, value in enumerate(node.inputs):
                if value is not None and value not in known:
                    raise InvalidGraphError(
                        f"input {index} of {node.op_type} reads {value.name!r}, which nothing produces",
                        where=node.name or node.op_type,
                        help="the file is damaged or was edited; export the model again",
                    )
        for value in graph.outputs:
            if value not in known:
                raise InvalidGraphError(
                    f"graph output {value.name!r} is not produced by any node",
                    where=graph.name,
                    help="the file is damaged or was edited; export the model again",
                )


def _root(error: BaseException) -> BaseException:
    """What started a chain of exceptions: onnx_ir wraps the reason once a level of the graph."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _summary(error: BaseException) -> str:
    """The first sentence of onnx's message, without its C++ source location."""
    text = re.sub(r"^\[[A-Za-z]+Error\]\s*", "", str(error).strip())
    return " ".join(text.split())[:400]
