"""Pass fold-affine: arithmetic with constants disappears into the linear operator beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.affine import Affine, absorb_before, absorb_behind
from graphopt.ir.linear import channel_vector
from graphopt.ir.rewrite import (
    DeclinedError,
    Rewriter,
    constant_float64,
    constant_tensor,
    is_op,
    known_dim,
    rank,
    require_sole_consumer,
    sole_consumer,
    to_tensor,
)
from graphopt.passes.contract import Context, Pass, Semantics


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold Mul, Add, Sub, Div and Neg with constants into Conv, ConvTranspose, Gemm or MatMul beside them.

    Each is x -> s x + t with constant s and t. Where they are one number a channel, they move into a linear op::

        behind it:     s (W x + b) + t  =  (s W) x + (s b + t)
        before it:     W (s x + t) + b  =  (W s) x + (b + W t)      no padding, or t = 0

    Behind a BatchNormalization they go into its scale and bias in the same way (converters from Caffe leave
    such pairs), and a chain of them that stands alone becomes one Mul and one Add at most::

        s2 (s1 x + t1) + t2  =  (s2 s1) x + (s2 t1 + t2)

    The Add behind a MatMul that holds one number an output channel is the bias of that MatMul and stays.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3,4,4] x, float[2,3,1,1] w_conv, float[2] w_bias, float[1,3,1,1] w_mean,
           float[2,1,1] w_gain) => (float[N,2,4,4] y) {
          centred = Sub (x, w_mean)
          c = Conv (centred, w_conv, w_bias)
          y = Mul (c, w_gain)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,3,4,4] x, float[2,3,1,1] w_conv, float[2] w_bias) => (float[N,2,4,4] y) {
          y = Conv (x, w_conv, w_bias)
        }
    """

    name: ClassVar[str] = "fold-affine"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("fuse-activations", "fuse-normalization")

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Fold into linear operators first, then collapse the chains that are left."""
        rewriter = Rewriter(model)
        rewriter.until_stable(_fold_into_linear, "fold affine", context.missed)
        rewriter.until_stable(_collapse_chain, "collapse affine chain", context.missed)


@dataclass(frozen=True)
class _Step:
    """x -> scale · x + shift with constants that broadcast against x."""

    data: ir.Value
    scale: np.ndarray
    shift: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the constant as it stands in the graph."""
        return np.broadcast_shapes(self.scale.shape, self.shift.shape)


def _read_step(node: ir.Node) -> _Step | None:
    one, zero = np.ones(()), np.zeros(())
    if is_op(node, "Neg"):
        (data,) = node.inputs
        floating = data is not None and data.dtype is not None and data.dtype.is_floating_point()
        return _Step(data, -one, zero) if floating and data is not None else None
    if not is_op(node, "Mul", "Add", "Sub", "Div"):
        return None
    left, right = node.inputs
    index = 1 if constant_tensor(right) is not None else 0
    data, array = node.inputs[1 - index], constant_float64(node.inputs[index])
    if array is None or data is None or constant_tensor(data) is not None:
        return None
    assert left is not None
    assert right is not None
    if is_op(node, "Mul"):
        return _Step(data, array, zero)
    if is_op(node, "Add"):
        return _Step(data, one, array)
    if is_op(node, "Sub"):
        return _Step(data, one, -array) if index == 1 else _Step(data, -one, array)
    if index == 0 or not array.all():
        return None
    return _Step(data, 1.0 / array, zero)


def _fold_into_linear(rewriter: Rewriter, node: ir.Node) -> bool:
    step = _read_step(node)
    if step is None:
        return False

    def behind(channels: int, axis: int, of_rank: int | None) -> tuple[np.ndarray, np.ndarray]:
        return (
            channel_vector(step.scale, axis, channels, of_rank),
            channel_vector(step.shift, axis, channels, of_rank),
        )

    def before(channels: int, axis: int, of_rank: int | None) -> tuple[np.ndarray, np.ndarray]:
        if step.shape and (of_rank is None or rank(step.data) != of_rank):
            raise DeclinedError("its constant may add axes to the other operand")
        if np.prod(step.shape) > 1 and known_dim(step.data, axis) != channels:
            raise DeclinedError("its constant may repeat the channels of the other operand")
        return behind(channels, axis, of_rank)

    refusal: DeclinedError | None = None
    choices = (
        (absorb_behind, behind),
        (_absorb_behind_batchnorm, behind),
        (absorb_before, before),
    )
    for absorb, affine in choices:
        try:
            if absorb(rewriter, node, step.data, affine):
                return True
        except DeclinedError as reason:
            refusal = refusal or reason
    if refusal is not None:
        raise refusal
    return False


def _absorb_behind_batchnorm(rewriter: Rewriter, node: ir.Node, data: ir.Value, affine: Affine) -> bool:
    """Fold the map of `data` into the scale and bias of the BatchNormalization that computes `data`."""
    normalization = data.producer()
    if normalization is None or not is_op(normalization, "BatchNormalization"):
        return False
    gamma, beta = (constant_float64(value) for value in normalization.inputs[1:3])
    if gamma is None or beta is None:
        raise DeclinedError("the scale or bias of BatchNormalization is not constant")
    require_sole_consumer(data, node)
    scale, shift = affine(gamma.size, 1, rank(data))
    tensors = []
    for index, array in ((1, gamma * scale), (2, beta * scale + shift)):
        stored = constant_tensor(normalization.inputs[index])
        assert stored is not None
        tensors.append((index, to_tensor(array, stored.dtype)))
    for index, tensor in tensors:
        rewriter.replace_constant(normalization, index, tensor)
    rewriter.supersede(node.outputs[0], data)
    return True


def _collapse_chain(rewriter: Rewriter, node: ir.Node) -> bool:
    """Replace a chain of affine nodes that ends in `node` by fewer nodes of the same map."""
    chain: list[tuple[ir.Node, _Step]] = []
    current: ir.Node | None = node
    while current is not None and (step := _read_step(current)) is not None:
        chain.insert(0, (current, step))
        source = step.data.producer()
        current = source if source is not None and sole_consumer(step.data) is current else None
    if len(chain) < 2:
        return False
    scale, shift = np.ones(()), np.zeros(())
    for _, step in chain:
        scale, shift = scale * step.scale, shift * step.scale + step.shift
    scale, shift = _drop_neutral(scale, 1.0, shift), _drop_neutral(shift, 0.0, scale)
    nodes = [
        (op, array) for op, array, neutral in (("Mul", scale, 1.0), ("Add", shift, 0.0)) if not _is(array, neutral)
    ]
    if len(nodes) >= len(chain):
        return False
    largest = max(step.scale.size + step.shift.size for _, step in chain)
    if any(array.size > largest for _, array in nodes):
        raise DeclinedError("the product of the constants is larger than they are")
    _emit_chain(rewriter, node, chain[0][1].data, nodes)
    return True


def _is(array: np.ndarray, neutral: float) -> bool:
    return array.ndim == 0 and float(array) == neutral


def _drop_neutral(array: np.ndarray, neutral: float, other: np.ndarray) -> np.ndarray:
    """The scalar `neutral` where `array` is neutral everywhere and `other` alone gives the result shape."""
    if not (array == neutral).all():
        return array
    same_shape = np.broadcast_shapes(array.shape, other.shape) == other.shape
    return np.full((), neutral) if same_shape else array


def _emit_chain(rewriter: Rewriter, node: ir.Node, data: ir.Value, steps: list[tuple[str, np.ndarray]]) -> None:
    dtype = data.dtype or node.outputs[0].dtype
    if dtype is None:
        raise DeclinedError("the element type is unknown")
    tensors = [(op_type, to_tensor(array, dtype)) for op_type, array in steps]
    if not tensors:
        if not rewriter.bypass(node.outputs[0], data):
            raise DeclinedError("it is the identity, but its result is a graph output")
        return
    assert node.graph is not None
    last, current = node, data
    for op_type, tensor in tensors:
        name = "scale" if op_type == "Mul" else "shift"
        constant = rewriter.initializer(node.graph, f"{node.outputs[0].name}_{name}", tensor)
        last = rewriter.insert(last, op_type, [current, constant], like=node.outputs[0], suffix=op_type.lower())
        current = last.outputs[0]
        current.shape = node.outputs[0].shape if data.shape == node.outputs[0].shape else None
    rewriter.supersede(node.outputs[0], current)
