"""GroupNormalization in the form that onnxruntime runs fastest: part of pass fuse-normalization."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.rewrite import DeclinedError, Rewriter, constant_float64, is_op, to_tensor


def spread_group_normalization(rewriter: Rewriter, node: ir.Node) -> bool:
    """Write GroupNormalization-21 of x [N, C, ...] as instances [N, groups, rest], each normalized by itself.

        y = Reshape(InstanceNormalization(Reshape(x, [N, groups, -1]), 1, 0), shape of x) * scale + bias

    Raises:
        DeclinedError: x is no float32, has no known rank, or scale and bias are computed at run time.
    """
    if not is_op(node, "GroupNormalization"):
        return False
    data, result = node.inputs[0], node.outputs[0]
    scale, bias = (constant_float64(value) for value in node.inputs[1:3])
    if data is None or data.shape is None:
        raise DeclinedError("the rank of its operand is not known")
    if data.dtype != ir.DataType.FLOAT:
        raise DeclinedError("its operand is no float32, in which the operator itself keeps the statistics")
    if scale is None or bias is None:
        raise DeclinedError("its scale or bias is computed at run time")
    of_rank, groups = len(data.shape), node.attributes["num_groups"].as_int()
    graph, last = node.graph, node
    assert isinstance(graph, ir.Graph)

    def weight(role: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array) if array.dtype == np.int64 else to_tensor(array, ir.DataType.FLOAT)
        return rewriter.initializer(graph, f"{result.name}_{role}", tensor)

    def add(op_type: str, *operands: ir.Value, shape: ir.Shape, **attributes: float) -> ir.Value:
        nonlocal last
        last = rewriter.insert(last, op_type, operands, attributes=attributes, like=result, suffix=op_type.lower())
        last.outputs[0].shape = shape
        return last.outputs[0]

    of_groups = ir.Shape([data.shape[0], groups, None])
    value = add("Reshape", data, weight("groups", np.array([0, groups, -1])), shape=of_groups)
    epsilon = node.attributes.get("epsilon")
    value = add(
        "InstanceNormalization",
        value,
        weight("ones", np.ones(groups)),
        weight("zeros", np.zeros(groups)),
        shape=of_groups,
        epsilon=1e-5 if epsilon is None else epsilon.as_float(),
    )
    sizes = [size if isinstance(size, int) else -1 for size in list(data.shape)[1:]]
    if sizes.count(-1) <= 1:
        target = weight("sizes", np.array([0, *sizes]))
    else:
        target = add("Shape", data, shape=ir.Shape([of_rank]))
        target.type = ir.TensorType(ir.DataType.INT64)
    value = add("Reshape", value, target, shape=data.shape)
    for op_type, role, array in (("Mul", "scale", scale), ("Add", "bias", bias)):
        value = add(op_type, value, weight(role, array.reshape(-1, *[1] * (of_rank - 2))), shape=data.shape)
    rewriter.supersede(result, value)
    return True
