"""One view of the four operators that compute y = W·x + b with constant W: Conv, ConvTranspose, Gemm, MatMul.

Folding, merging and cutting all need the same three things: the weight with its axes in one known order, the
bias as one number a channel, and a way to write both back. `linear_at` gives the view or says why there is
none; layouts, `alpha`, `beta`, `transB` and the side on which MatMul holds its weight are known only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.rewrite import (
    FLOATING,
    DeclinedError,
    Rewriter,
    constant_float64,
    constant_tensor,
    integers,
    is_op,
    rank,
    set_attributes,
    sole_consumer,
    to_tensor,
)

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Spatial:
    """Where a Conv or pooling node puts its kernel: one entry a spatial axis."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """A linear node with constant weight and bias.

    Attributes:
        node: the Conv, ConvTranspose, Gemm or MatMul.
        bias_node: the Add that holds the bias of a MatMul, or None.
        data_index: index of the operand that is not the weight.
        weight_index: index of the weight operand.
        groups: number of groups; out and in channels split into as many blocks.
        out_channels: number of output channels M.
        in_channels: number of input channels C.
        out_axis: channel axis of the result (negative for MatMul, whose rank is free).
        in_axis: channel axis of the data operand.
        kernel: spatial kernel shape, () for Gemm and MatMul.
        dtype: element type of the weight.
    """

    node: ir.Node
    bias_node: ir.Node | None
    data_index: int
    weight_index: int
    groups: int
    out_channels: int
    in_channels: int
    out_axis: int
    in_axis: int
    kernel: tuple[int, ...]
    dtype: ir.DataType

    @property
    def data(self) -> ir.Value:
        """The operand that is not the weight."""
        value = self.node.inputs[self.data_index]
        assert value is not None
        return value

    @property
    def result(self) -> ir.Value:
        """The value of W·x + b."""
        return (self.bias_node or self.node).outputs[0]

    @property
    def rank(self) -> int | None:
        """Number of axes of the result (and of the data operand), None where unknown."""
        if is_op(self.node, "Gemm"):
            return 2
        if not is_op(self.node, "MatMul"):
            return len(self.kernel) + 2
        of_data = rank(self.data)
        return rank(self.node.outputs[0]) if of_data is None else of_data

    def weight(self) -> np.ndarray:
        """The weight as float64 [M, C / groups, *kernel], `alpha` included."""
        stored = constant_float64(self.node.inputs[self.weight_index])
        assert stored is not None
        return self.arranged(stored)

    def arranged(self, stored: np.ndarray) -> np.ndarray:
        """A weight laid out as the node reads it, as [M, C / groups, *kernel], times `alpha`."""
        if is_op(self.node, "Conv"):
            return stored
        if is_op(self.node, "ConvTranspose"):
            return _swap_blocks(stored, self.groups)
        if is_op(self.node, "Gemm"):
            alpha = _float(self.node, "alpha", 1.0)
            return alpha * (stored if _int(self.node, "transB", 0) else stored.T)
        return stored if self.weight_index == 0 else stored.T

    def as_read(self, weight: np.ndarray) -> np.ndarray:
        """[M, C / groups, *kernel] laid out as the node reads it, for an `alpha` of 1."""
        if is_op(self.node, "Conv"):
            return weight
        if is_op(self.node, "ConvTranspose"):
            return _swap_blocks(weight, self.groups)
        transposed = _int(self.node, "transB", 0) if is_op(self.node, "Gemm") else self.weight_index == 0
        return weight if transposed else weight.T

    def bias(self) -> np.ndarray:
        """The bias as float64 [M], `beta` included; zeros where the node has none."""
        return _bias_vector(self.node, self.bias_node, self.out_channels, self.out_axis, self.rank)

    def store(self, rewriter: Rewriter, weight: np.ndarray, bias: np.ndarray) -> ir.Value:
        """Write weight [M, C / groups, *kernel] and bias [M] back into the graph; returns the new result.

        The number of channels and the kernel may differ from those of the view. A MatMul that had no bias
        gets an Add where `bias` is not zero; the Add then produces what was called the result before.

        Raises:
            DeclinedError: a value is not finite in the element type of the weight. Nothing has changed then.
        """
        bias_tensor = to_tensor(self._stored_bias(bias), self.dtype)
        weight_tensor = to_tensor(self.as_read(weight), self.dtype)
        bias_name = _bias_name(self.node.inputs[self.weight_index])
        rewriter.replace_constant(self.node, self.weight_index, weight_tensor)
        if is_op(self.node, "Gemm"):
            set_attributes(self.node, alpha=None, beta=None)
        if is_op(self.node, "MatMul"):
            return self.store_matmul_bias(rewriter, bias_tensor, bool(bias.any()), bias_name)
        if bias.any() or constant_tensor(_operand(self.node, 2)) is not None:
            rewriter.replace_constant(self.node, 2, bias_tensor, wanted_name=bias_name)
        return self.result

    def _stored_bias(self, bias: np.ndarray) -> np.ndarray:
        return bias[:, None] if self.out_axis == -2 else bias

    def store_matmul_bias(self, rewriter: Rewriter, bias: ir.Tensor, needed: bool, wanted_name: str) -> ir.Value:
        """Write the constant of the Add behind a MatMul, which is inserted where it is `needed`; returns the result."""
        if self.bias_node is not None:
            index = 0 if constant_tensor(self.bias_node.inputs[0]) is not None else 1
            rewriter.replace_constant(self.bias_node, index, bias)
            return self.result
        product = self.node.outputs[0]
        if not needed:
            return product
        assert self.node.graph is not None
        constant = rewriter.initializer(self.node.graph, wanted_name, bias)
        add = rewriter.insert(self.node, "Add", [product, constant], like=product, suffix="product")
        rewriter.interpose(product, add)
        return add.outputs[0]


def linear_at(node: ir.Node) -> Linear | None:
    """The linear view of `node`, None where it is no linear operator or multiplies two computed values.

    Raises:
        DeclinedError: it is one, but its weight or bias is not a floating-point constant of the needed form.
    """
    if not is_op(node, *LINEAR_OPS):
        return None
    weight_index = _weight_index(node)
    if weight_index is None:
        if is_op(node, "MatMul", "Gemm"):
            return None
        raise DeclinedError(f"the weight of {node.op_type} is not constant", node)
    tensor = constant_tensor(node.inputs[weight_index])
    assert tensor is not None
    shape = tensor_shape(tensor)
    if tensor.dtype not in FLOATING:
        raise DeclinedError(f"the weight of {node.op_type} is {tensor.dtype.name.lower()}", node)
    if is_op(node, "MatMul") and len(shape) != 2:
        raise DeclinedError("the weight of MatMul is not a matrix", node)
    linear = linear_view(node, weight_index, shape, tensor.dtype)
    if is_op(node, "MatMul") and weight_index == 0 and (linear.rank is None or linear.rank < 2):
        raise DeclinedError("MatMul multiplies its weight with a vector or a tensor of unknown rank", node)
    _bias_vector(node, linear.bias_node, linear.out_channels, linear.out_axis, linear.rank)
    return linear


def linear_producing(value: ir.Value) -> Linear | None:
    """The linear view whose result is `value`: a linear node, or the Add that holds the bias of a MatMul."""
    producer = value.producer()
    if producer is None:
        return None
    if is_op(producer, "Add"):
        for operand in producer.inputs:
            source = None if operand is None else operand.producer()
            if source is not None and is_op(source, "MatMul"):
                linear = linear_at(source)
                if linear is not None and linear.bias_node is producer:
                    return linear
        return None
    linear = linear_at(producer)
    return linear if linear is not None and linear.result is value else None


def channel_axis(axis: int, of_rank: int | None) -> int:
    """`axis` counted from the front. Raises `DeclinedError` where it is negative and the rank is unknown."""
    if axis >= 0:
        return axis
    if of_rank is None:
        raise DeclinedError("the rank of its operand is unknown")
    return axis + of_rank


def spatial(node: ir.Node, kernel: Sequence[int]) -> Spatial:
    """How a Conv places its kernel, defaults filled in.

    Raises:
        DeclinedError: `auto_pad` leaves the padding to the size of the input.
    """
    axes = len(kernel)
    auto_pad = node.attributes.get("auto_pad")
    mode = "NOTSET" if auto_pad is None else auto_pad.as_string()
    if mode not in ("NOTSET", "VALID"):
        raise DeclinedError(f"auto_pad is {mode}", node)
    pads = (integers(node, "pads") if mode == "NOTSET" else None) or (0,) * (2 * axes)
    return Spatial(
        strides=integers(node, "strides") or (1,) * axes,
        dilations=integers(node, "dilations") or (1,) * axes,
        begins=pads[:axes],
        ends=pads[axes:],
    )


def set_spatial(node: ir.Node, place: Spatial, *, kernel: Sequence[int]) -> None:
    """Write the placement back as explicit attributes; values that are ONNX defaults are left out."""
    set_attributes(
        node,
        auto_pad=None,
        kernel_shape=tuple(kernel),
        strides=None if all(stride == 1 for stride in place.strides) else place.strides,
        dilations=None if all(dilation == 1 for dilation in place.dilations) else place.dilations,
        pads=(*place.begins, *place.ends) if any(place.begins) or any(place.ends) else None,
    )


def is_padded(node: ir.Node) -> bool:
    """Whether a Conv, ConvTranspose or pooling node may read beyond the border of its input."""
    auto_pad = node.attributes.get("auto_pad")
    if auto_pad is not None and auto_pad.as_string() not in ("NOTSET", "VALID"):
        return True
    explicit = auto_pad is None or auto_pad.as_string() == "NOTSET"
    pads = integers(node, "pads") or ()
    sized = any(integers(node, "output_padding") or ()) or "output_shape" in node.attributes
    return sized or (explicit and any(pads))


def channel_vector(array: np.ndarray, axis: int, channels: int, of_rank: int | None) -> np.ndarray:
    """A constant that broadcasts against a tensor of `of_rank` axes, as one number a channel: [channels].

    Raises:
        DeclinedError: it varies along another axis, adds axes, or has another number of channels.
    """
    if array.ndim == 0:
        return np.full(channels, float(array))
    if of_rank is None:
        if array.ndim != 1 or axis != -1:
            raise DeclinedError("the rank of its operand is unknown")
        of_rank = 1
    if array.ndim > of_rank:
        raise DeclinedError("its constant has more axes than the other operand")
    shape = (1,) * (of_rank - array.ndim) + array.shape
    front = channel_axis(axis, of_rank)
    if any(dim != 1 for position, dim in enumerate(shape) if position != front):
        raise DeclinedError("its constant varies along another axis than the channels")
    if shape[front] not in (1, channels):
        raise DeclinedError(f"its constant has {shape[front]} channels where {channels} are needed")
    return np.broadcast_to(array.reshape(-1), (channels,)).astype(np.float64)


def _weight_index(node: ir.Node) -> int | None:
    if not is_op(node, "MatMul"):
        return 1 if constant_tensor(_operand(node, 1)) is not None else None
    if constant_tensor(node.inputs[1]) is not None:
        return None if constant_tensor(node.inputs[0]) is not None else 1
    return 0 if constant_tensor(node.inputs[0]) is not None else None


def linear_view(node: ir.Node, weight_index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Linear:
    """The view of a linear node whose operand `weight_index` is a weight of this shape; nothing is checked."""
    groups = _int(node, "group", 1)
    kernel: tuple[int, ...] = ()
    out_axis = in_axis = 1
    if is_op(node, "Conv"):
        out_channels, in_channels, kernel = shape[0], shape[1] * groups, shape[2:]
    elif is_op(node, "ConvTranspose"):
        out_channels, in_channels, kernel = shape[1] * groups, shape[0], shape[2:]
    elif is_op(node, "Gemm"):
        out_channels, in_channels = shape if _int(node, "transB", 0) else shape[::-1]
        in_axis = 0 if _int(node, "transA", 0) else 1
    elif weight_index == 0:
        (out_channels, in_channels), out_axis, in_axis = shape, -2, -2
    else:
        (in_channels, out_channels), out_axis, in_axis = shape, -1, -1
    bias_node = _matmul_bias_node(node, out_channels, out_axis) if is_op(node, "MatMul") else None
    return Linear(
        node, bias_node, 1 - weight_index, weight_index, groups, out_channels, in_channels,
        out_axis, in_axis, kernel, dtype,
    )  # fmt: skip


def _matmul_bias_node(node: ir.Node, channels: int, axis: int) -> ir.Node | None:
    """The Add behind a MatMul whose constant is one number an output channel, or None."""
    consumer = sole_consumer(node.outputs[0])
    if not is_op(consumer, "Add"):
        return None
    assert consumer is not None
    try:
        _bias_vector(node, consumer, channels, axis, rank(node.outputs[0]))
    except DeclinedError:
        return None
    return consumer


def _bias_vector(node: ir.Node, bias_node: ir.Node | None, channels: int, axis: int, of_rank: int | None) -> np.ndarray:
    if bias_node is not None:
        operand = next(value for value in bias_node.inputs if value is not node.outputs[0])
        factor = 1.0
    elif is_op(node, "MatMul"):
        return np.zeros(channels)
    else:
        operand = _operand(node, 2)
        factor = _float(node, "beta", 1.0) if is_op(node, "Gemm") else 1.0
        axis, of_rank = (1, 2) if is_op(node, "Gemm") else (-1, 1)
    if operand is None:
        return np.zeros(channels)
    array = constant_float64(operand)
    if array is None:
        raise DeclinedError(f"the bias of {node.op_type} is not constant", node)
    return factor * channel_vector(array, axis, channels, of_rank)


def _swap_blocks(weight: np.ndarray, groups: int) -> np.ndarray:
    """[groups · a, b, *kernel] as [groups · b, a, *kernel]: between the layouts of Conv and ConvTranspose."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).swapaxes(1, 2)
    return blocks.reshape(groups * blocks.shape[1], *blocks.shape[2:])


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _float(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def _bias_name(weight: ir.Value | None) -> str:
    name = (weight.name if weight is not None else None) or "weight"
    for ending in (".weight", "_weight", "/weight"):
        if name.endswith(ending):
            return name.removesuffix("weight") + "bias"
    return f"{name}_bias"
