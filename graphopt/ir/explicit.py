"""Defaults that hide a size, written out, so that analyses and repairs see them (dependency.md 2.7)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.propagate import Facts

_WINDOWS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "MaxPool": None, "AveragePool": None, "LpPool": None}
"""Operators with windows that slide, and which of their inputs is the weight."""


def write_defaults_out(model: ir.Model, facts: Facts) -> None:
    """Write out axes of Squeeze, sizes of Split, scale of Attention and `auto_pad` of windows, where they are known."""
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
            elif node.op_type in _WINDOWS:
                _pads(node)


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


def _pads(node: ir.Node) -> None:
    """`auto_pad` as pads: SAME needs the size of the input only where windows move by more than one.

    onnxruntime does not run SAME with dilations, so that stays as it is.
    """
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    weight_index, data = _WINDOWS[node.op_type], node.inputs[0]
    weight = None if weight_index is None else node.inputs[weight_index]
    shape = weight.shape if weight is not None and weight.shape is not None else None
    kernel = list(shape)[2:] if shape is not None else []
    if "kernel_shape" in node.attributes:
        kernel = list(node.attributes["kernel_shape"].as_ints())
    steps, gaps = (
        list(node.attributes[name].as_ints()) if name in node.attributes else [1] * len(kernel)
        for name in ("strides", "dilations")
    )
    rounds_up = "ceil_mode" in node.attributes and node.attributes["ceil_mode"].as_int()
    if auto == "NOTSET" or rounds_up or not kernel or data is None or any(gap != 1 for gap in gaps):
        return
    begins, ends = [0] * len(kernel), [0] * len(kernel)
    sizes = [None] * len(kernel) if data.shape is None else list(data.shape)[2:]
    for axis, (width, step, size) in enumerate(zip(kernel, steps, sizes, strict=True) if auto != "VALID" else ()):
        if not isinstance(width, int) or not (step == 1 or isinstance(size, int)):
            return
        total = width - 1
        if step != 1 and isinstance(size, int):
            total = max((-(-size // step) - 1) * step + width - size, 0)
        first, second = total // 2, total - total // 2
        begins[axis], ends[axis] = (first, second) if auto == "SAME_UPPER" else (second, first)
    node.attributes.pop("auto_pad", None)
    node.attributes["pads"] = ir.AttrInt64s("pads", begins + ends)
