"""One multiplication and one addition a channel, and how it moves into the linear operators beside it.

    behind a linear op:     s (W x + b) + t  =  (s W) x + (s b + t)
    before linear ops:      W (s x + t) + b  =  (W s) x + (b + W t)

BatchNormalization and elementwise ops with constants are both such a map; what they have in common is here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.ir.linear import LINEAR_OPS, Linear, channel_axis, is_padded, linear_at, linear_producing
from graphopt.ir.rewrite import DeclinedError, Rewriter, constant_float64, integers, is_op, require_sole_consumer

Affine = Callable[[int, int, "int | None"], tuple[np.ndarray, np.ndarray]]
"""Scale and shift, each float64 [channels], of x -> s x + t, from number of channels, channel axis and rank.

The axis is counted from the front, or is negative where the rank is None. Raises `DeclinedError` where the
map is not one number a channel along that axis.
"""


def absorb_behind(rewriter: Rewriter, node: ir.Node, data: ir.Value, affine: Affine) -> bool:
    """Fold `node`, the map `affine` of `data`, into the linear op that computes `data`.

    Returns False where no linear op does.

    Raises:
        DeclinedError: one does, but another node reads `data`, or the map does not fit its channels.
    """
    linear = linear_producing(data)
    if linear is None or linear.bias_node is node:
        return False
    require_sole_consumer(data, node)
    axis = linear.out_axis if linear.rank is None else channel_axis(linear.out_axis, linear.rank)
    scale, shift = affine(linear.out_channels, axis, linear.rank)
    weight = linear.weight()
    by_row = scale.reshape((-1,) + (1,) * (weight.ndim - 1))
    with np.errstate(over="ignore", invalid="ignore"):
        folded = linear.store(rewriter, weight * by_row, linear.bias() * scale + shift)
    rewriter.supersede(node.outputs[0], folded)
    return True


def absorb_before(rewriter: Rewriter, node: ir.Node, data: ir.Value, affine: Affine) -> bool:
    """Fold `node`, the map `affine` of `data`, into all the linear ops that read its result.

    Returns False where no linear op reads it.

    Raises:
        DeclinedError: some do, but not all readers are, or the map does not fit one of them.
    """
    result = node.outputs[0]
    readers = list(dict.fromkeys(use.node for use in result.uses()))
    linears = [linear for linear in map(linear_at, readers) if linear is not None and linear.data is result]
    if not linears:
        return False
    if result.is_graph_output():
        raise DeclinedError(f"its result is read by {linears[0].node.op_type} and is also a graph output")
    others = [reader for reader in readers if not is_op(reader, *LINEAR_OPS) or reader.graph is not node.graph]
    if others or len(linears) != len(readers):
        other = (others or readers)[0]
        raise DeclinedError(f"{linears[0].node.op_type} reads its result, but {other.op_type} reads it too")
    maps = [_map_for(linear, affine) for linear in linears]
    for linear, (scale, shift) in zip(linears, maps, strict=True):
        _scale_inputs(rewriter, linear, scale, shift, data)
    return True


def _map_for(linear: Linear, affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    axis = linear.in_axis if linear.rank is None else channel_axis(linear.in_axis, linear.rank)
    scale, shift = affine(linear.in_channels, axis, linear.rank)
    if shift.any():
        spread = (*linear.kernel, *(integers(linear.node, "strides") or ()))
        if is_op(linear.node, "ConvTranspose") and any(step != 1 for step in spread):
            raise DeclinedError("each output of ConvTranspose sees another part of the shift")
        if is_padded(linear.node):
            raise DeclinedError(f"{linear.node.op_type} pads with zeros, which the shift does not reach")
    return scale, shift


def _scale_inputs(rewriter: Rewriter, linear: Linear, scale: np.ndarray, shift: np.ndarray, data: ir.Value) -> None:
    weight = linear.weight()
    spatial = tuple(range(2, weight.ndim))
    rows = linear.out_channels // linear.groups

    def by_row(vector: np.ndarray) -> np.ndarray:
        """One number an input channel as [M, C / groups]: what each output channel sees."""
        return np.repeat(vector.reshape(linear.groups, -1), rows, axis=0)

    with np.errstate(over="ignore", invalid="ignore"):
        offset = (weight.sum(axis=spatial) * by_row(shift)).sum(axis=1)
        scaled = weight * by_row(scale).reshape(weight.shape[:2] + (1,) * len(spatial))
        linear.store(rewriter, scaled, linear.bias() + offset)
    rewriter.redirect(linear.node, linear.data_index, data)


def batchnorm_affine(node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift, each float64 [channels], of an inference BatchNormalization (opset 15).

    Raises:
        DeclinedError: it is in training mode, its running statistics are read, or its parameters are computed or
            not finite.
    """
    training = node.attributes.get("training_mode")
    if training is not None and training.as_int():
        raise DeclinedError("it is in training mode")
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise DeclinedError("its running statistics are read")
    parameters = [constant_float64(value) for value in node.inputs[1:5]]
    if any(parameter is None for parameter in parameters):
        raise DeclinedError("its parameters are not constant")
    gamma, beta, mean, variance = (np.asarray(parameter) for parameter in parameters)
    epsilon = node.attributes.get("epsilon")
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + (1e-5 if epsilon is None else epsilon.as_float()))
        shift = beta - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise DeclinedError("its parameters are not finite, or a variance is negative")
    return scale, shift
