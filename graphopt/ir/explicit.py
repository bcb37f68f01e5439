"""Defaults that hide a size, written out, so that analyses and repairs see them (dependency.md 2.7)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.propagate import Facts


def write_defaults_out(model: ir.Model, facts: Facts) -> None:
    """Write the axes of Squeeze, the sizes of Split and the scale of Attention explicitly, where they are known."""
    for graph in model.graphs():
        for node in graph:
            if node.domain != "":
                continue
            if node.op_type == "Squeeze":
                _squeeze_axes(model.graph, node, facts)
            elif node.op_type == "Split":
                _split_sizes(model.graph, node, facts)
            elif node.op_type == "Attention":
                _attention_scale(node, facts)


def _squeeze_axes(graph: ir.Graph, node: ir.Node, facts: Facts) -> None:
    data = node.inputs[0]
    if (len(node.inputs) > 1 and node.inputs[1] is not None) or data is None or data.shape is None:
        return
    shape = facts.shape(data)
    if shape is None or not all(isinstance(size, int) for size in data.shape):
        return
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    _append_input(graph, node, 1, np.array(axes, np.int64), "axes")


def _split_sizes(graph: ir.Graph, node: ir.Node, facts: Facts) -> None:
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    data = node.inputs[0]
    shape = facts.shape(data)
    if shape is None or data is None or data.shape is None or not isinstance(data.shape[axis], int):
        return
    count = node.attributes["num_outputs"].as_int() if "num_outputs" in node.attributes else len(node.outputs)
    step = -(-shape[axis] // count)
    sizes = [step] * (count - 1) + [shape[axis] - step * (count - 1)]
    _append_input(graph, node, 1, np.array(sizes, np.int64), "split")
    node.attributes.pop("num_outputs", None)


def _attention_scale(node: ir.Node, facts: Facts) -> None:
    shape = facts.shape(node.inputs[0])
    if "scale" in node.attributes or shape is None:
        return
    if len(shape) == 4:
        width = shape[3]
    else:
        heads = node.attributes["q_num_heads"].as_int() if "q_num_heads" in node.attributes else 0
        if not heads:
            return
        width = shape[2] // heads
    node.attributes["scale"] = ir.AttrFloat32("scale", float(1.0 / np.sqrt(width)))


def _append_input(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray, suffix: str) -> None:
    name = f"{node.outputs[0].name}.{suffix}"
    while name in graph.initializers:
        name = f"{name}_"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.INT64
    graph.register_initializer(value)
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
