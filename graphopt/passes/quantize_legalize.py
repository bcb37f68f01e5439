"""Exact rewrites that bring operators into the form for which onnxruntime has int8 kernels.

Done on the model before a quantization is planned and again before the plan is applied, so they must be
deterministic: the same model gives the same names.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.linear import linear_at, spatial
from graphopt.ir.rewrite import (
    DeclinedError,
    Rewriter,
    constant_float64,
    constant_tensor,
    integers,
    is_op,
    rank,
    to_tensor,
)
from graphopt.ir.statistics import BATCHNORM_STATISTICS


def legalize(model: ir.Model, *, static: bool = True) -> None:
    """Rewrite in place what has an int8 kernel under another name. The function that is computed stays the same.

    * Sum becomes Add, twice for three terms and so on.
    * ConvTranspose whose kernel equals its stride becomes a 1x1 Conv and DepthToSpace: no two windows overlap,
      so each input pixel makes its own block of the output.
    * HardSigmoid and HardSwish behind a Conv become Add, Clip and Mul: the Clip is the saturation of a quantizer
      and the Mul by a scalar only another scale, so one or two int8 kernels do the work.
    * BatchNormalization that could not be folded (it stands behind a sum or a concatenation) becomes a 1x1
      depthwise Conv, which takes the Relu behind it along.
    * `alpha` and `beta` of Gemm go into its constants.

    The last is all that dynamic quantization needs: `static=False` leaves the others out.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ... g (float[2] x, float[2] y, float[2] z) => (float[2] s) { s = Sum (x, y, z) }''')
        >>> legalize(model)
        >>> [node.op_type for node in model.graph]
        ['Add', 'Add']
    """
    rewriter = Rewriter(model)
    for_kernels = (_sum_to_adds, _transposed_to_depth_to_space, _hard_gate, _lone_batchnorm)
    for rule in (*(for_kernels if static else ()), _plain_gemm):
        rewriter.until_stable(rule, "legalize", lambda what, why, where: None)


def _sum_to_adds(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "Sum") or len(node.inputs) < 2 or any(value is None for value in node.inputs):
        return False
    result, last = node.outputs[0], node
    total = node.inputs[0]
    for value in node.inputs[1:]:
        last = rewriter.insert(last, "Add", [total, value], like=result, suffix="add")
        total = last.outputs[0]
    assert total is not None
    rewriter.supersede(result, total)
    return True


def _transposed_to_depth_to_space(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "ConvTranspose"):
        return False
    linear = linear_at(node)
    if linear is None or linear.groups != 1 or linear.dtype != ir.DataType.FLOAT or len(linear.kernel) != 2:
        return False
    place = spatial(node, linear.kernel)
    plain = not any(place.begins + place.ends + (integers(node, "output_padding") or ()))
    block = linear.kernel[0]
    if not plain or set(place.dilations) != {1} or set(place.strides + linear.kernel) != {block}:
        return False
    if node.attributes.get("output_shape") is not None:
        return False
    # [M, C, block, block] as one 1x1 filter for each position in the block, positions first (mode DCR).
    weight = linear.weight().transpose(2, 3, 0, 1).reshape(-1, linear.in_channels, 1, 1)
    bias = np.tile(linear.bias(), block * block)
    graph, name = _graph(node), (node.inputs[1].name if node.inputs[1] is not None else None) or "weight"
    operands: list[ir.Value | None] = [linear.data]
    operands.append(rewriter.initializer(graph, f"{name}.blocks", to_tensor(weight, linear.dtype)))
    if bias.any():
        operands.append(rewriter.initializer(graph, f"{name}.blocks.bias", to_tensor(bias, linear.dtype)))
    result = node.outputs[0]
    conv = rewriter.insert(node, "Conv", operands, attributes={"kernel_shape": [1, 1]}, like=result, suffix="blocks")
    shape = linear.data.shape
    if shape is not None:
        conv.outputs[0].shape = ir.Shape([shape[0], weight.shape[0], *list(shape)[2:]])
    spread = rewriter.insert(
        conv,
        "DepthToSpace",
        conv.outputs,
        attributes={"blocksize": block, "mode": "DCR"},
        like=result,
        suffix="spread",
    )
    rewriter.supersede(result, spread.outputs[0])
    return True


def _hard_gate(rewriter: Rewriter, node: ir.Node) -> bool:
    """HardSigmoid(x) = clip(a x + b, 0, 1) = a clip(x + b / a, 0, 1 / a), and HardSwish is x times that."""
    if not is_op(node, "HardSigmoid", "HardSwish"):
        return False
    data, result = node.inputs[0], node.outputs[0]
    if data is None or data.dtype != ir.DataType.FLOAT or not is_op(data.producer(), "Conv"):
        return False
    alpha, beta = 1 / 6, 0.5
    if is_op(node, "HardSigmoid"):
        given = [node.attributes.get(name) for name in ("alpha", "beta")]
        alpha, beta = (d if a is None else a.as_float() for a, d in zip(given, (0.2, 0.5), strict=True))
    if not (alpha > 0.0 and 0.0 <= beta <= 1.0):
        return False
    graph = _graph(node)

    def scalar(name: str, number: float) -> ir.Value:
        return rewriter.initializer(graph, f"{result.name}.{name}", to_tensor(np.array(number), ir.DataType.FLOAT))

    def after(last: ir.Node, op_type: str, *operands: ir.Value) -> ir.Node:
        made = rewriter.insert(last, op_type, operands, like=result, suffix=op_type.lower())
        made.outputs[0].shape = result.shape
        return made

    shifted = after(node, "Add", data, scalar("offset", beta / alpha))
    clipped = after(shifted, "Clip", shifted.outputs[0], scalar("low", 0.0), scalar("high", 1 / alpha))
    last = after(clipped, "Mul", clipped.outputs[0], scalar("slope", alpha))
    if is_op(node, "HardSwish"):
        last = after(last, "Mul", data, last.outputs[0])
    rewriter.supersede(result, last.outputs[0])
    return True


def _lone_batchnorm(rewriter: Rewriter, node: ir.Node) -> bool:
    """y = s x + t a channel, s = gamma / sqrt(var + epsilon), t = beta - mean s, as a depthwise Conv of one tap."""
    if not is_op(node, "BatchNormalization") or len(node.outputs) > 1:
        return False
    data, result = node.inputs[0], node.outputs[0]
    arrays = [constant_float64(value) for value in node.inputs[1:5]]
    of_rank = None if data is None else rank(data)
    source = None if data is None else data.producer()
    if data is None or of_rank != 4 or data.dtype != ir.DataType.FLOAT or any(a is None for a in arrays):
        return False
    if not is_op(source, "Concat", "Add", "MaxPool", "AveragePool", "Relu", "Clip"):
        return False
    gamma, beta, mean, variance = (np.asarray(array) for array in arrays)
    epsilon = node.attributes.get("epsilon")
    scale = gamma / np.sqrt(variance + (1e-5 if epsilon is None else epsilon.as_float()))
    shift = beta - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return False
    graph = _graph(node)
    weight = rewriter.initializer(
        graph, f"{result.name}.weight", to_tensor(scale.reshape(-1, 1, 1, 1), ir.DataType.FLOAT)
    )
    bias = rewriter.initializer(graph, f"{result.name}.bias", to_tensor(shift, ir.DataType.FLOAT))
    attributes = {"group": scale.size, "kernel_shape": [1, 1]}
    conv = rewriter.insert(node, "Conv", [data, weight, bias], attributes=attributes, like=result, suffix="conv")
    result.meta[BATCHNORM_STATISTICS] = (beta, np.abs(gamma))
    rewriter.supersede(result, conv.outputs[0])
    return True


def _plain_gemm(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "Gemm"):
        return False
    factors = [node.attributes.get(name) for name in ("alpha", "beta")]
    if all(factor is None or factor.as_float() == 1.0 for factor in factors):
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None and constant_tensor(node.inputs[2]) is None:
        raise DeclinedError("its bias is computed at run time")
    linear = linear_at(node)
    if linear is None:
        return False
    linear.store(rewriter, linear.weight(), linear.bias())
    return True


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph
