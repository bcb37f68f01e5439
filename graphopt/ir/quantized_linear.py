"""The view of a linear operator whose weight is stored as integers: DequantizeLinear of a constant in front of it.

    w = s (q - z),    b = s_x s (q_b)

with one scale s and zero point z for the tensor or for each output channel, and the bias as int32 in units of the
accumulator, s_x being the scale of the data (Jacob et al. 2018), or as floats. Everything that works on
`graphopt.ir.linear.Linear` reads and writes this one too; rounding is left to whoever writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.ir.linear import LINEAR_OPS, Linear, channel_vector, linear_at, linear_view
from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.rewrite import (
    DeclinedError,
    Rewriter,
    constant,
    constant_float64,
    constant_tensor,
    discard_if_dead,
    is_op,
    set_attributes,
    to_tensor,
)

INTEGER_LIMITS: dict[ir.DataType, tuple[int, int]] = {
    ir.DataType.INT2: (-2, 1),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
}
"""Smallest and largest integer of the types that weights are stored in."""
BIAS_HEADROOM = 2.0**30
"""Largest magnitude of an int32 bias in units of the accumulator: the products need the rest."""
_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Dequantized:
    """A constant behind a DequantizeLinear.

    Attributes:
        node: the DequantizeLinear.
        tensor: the stored integers.
        scale: float64, () or [n] along `axis`.
        zero: int64 of the shape of `scale`.
        axis: axis of the stored integers along which scales differ, None for one scale.
    """

    node: ir.Node
    tensor: ir.TensorProtocol
    scale: np.ndarray
    zero: np.ndarray
    axis: int | None

    def along_axis(self, parameter: np.ndarray) -> np.ndarray:
        """A scale or zero point as it broadcasts against the integers."""
        if self.axis is None:
            return parameter.reshape(())
        return parameter.reshape([-1 if axis == self.axis else 1 for axis in range(len(tensor_shape(self.tensor)))])

    def centred(self) -> np.ndarray:
        """q - z: int64 of the stored shape."""
        return self.tensor.numpy().astype(np.int64) - self.along_axis(self.zero)

    def array(self) -> np.ndarray:
        """s (q - z): float64 of the stored shape."""
        return self.centred() * self.along_axis(self.scale)

    def limits(self) -> tuple[int, int]:
        """The smallest and largest q in use: of the narrowest integers that hold those stored, never beyond the type.

        Integers narrower than the type in which they are stored cannot be told in another way. Signed ones without
        zero point that leave out -2^(bits - 1) go on leaving it out.
        """
        low, high = INTEGER_LIMITS[self.tensor.dtype]
        stored = self.tensor.numpy().astype(np.int64)
        if not stored.size:
            return low, high
        least, most = int(stored.min()), int(stored.max())
        if low == 0:
            return 0, min(high, 2 ** max(most.bit_length(), 1) - 1)
        if not self.zero.any():
            largest = 2 ** max(most.bit_length(), (-least).bit_length(), 1) - 1
            if -largest <= least:
                return -min(high, largest), min(high, largest)
        largest = 2 ** max(most.bit_length(), (-least - 1).bit_length(), 1) - 1
        return max(low, -largest - 1), min(high, largest)


@dataclass(frozen=True)
class QuantizedLinear(Linear):
    """A linear node whose weight is a DequantizeLinear of constant integers.

    Attributes:
        weights: the weight's integers.
        biases: the bias's integers; None where the bias is float or there is none.
        input_scale: the scale s_x of the data where it arrives through a DequantizeLinear with one scale, else None.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ... g (float[n, 2] x) => (float[n, 1] y) <int8[2, 1] q = {3, -2}, float s = {0.5}>
        ... { w = DequantizeLinear (q, s) y = Gemm (x, w) }''')
        >>> linear = quantized_linear_at(model.graph[1])
        >>> linear.weight().tolist(), linear.weights.limits()
        ([[1.5, -1.0]], (-3, 3))
        >>> linear.store(Rewriter(model), np.array([[0.6, 0.9]]), np.zeros(1)).name
        'y'
        >>> linear_view_at(model.graph[1]).weight().tolist()
        [[0.5, 1.0]]
    """

    weights: Dequantized
    biases: Dequantized | None
    input_scale: float | None

    @property
    def has_bias(self) -> bool:
        """Whether a bias can be stored without an operator more in the graph."""
        return not is_op(self.node, "MatMul") or self.bias_node is not None

    @property
    def scales(self) -> np.ndarray:
        """s, float64 [M]."""
        return np.broadcast_to(self.weights.scale.reshape(-1), (self.out_channels,))

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest q - z in use: float64 [M] each."""
        zero = np.broadcast_to(self.weights.zero.reshape(-1), (self.out_channels,)).astype(np.float64)
        low, high = self.weights.limits()
        return low - zero, high - zero

    def weight(self) -> np.ndarray:
        """The weight as float64 [M, C / groups, *kernel]."""
        return self.arranged(self.weights.array())

    def integers(self) -> np.ndarray:
        """q - z as int64 [M, C / groups, *kernel]."""
        return self.arranged(self.weights.centred())

    def bias(self) -> np.ndarray:
        """The bias as float64 [M]; zeros where the node has none."""
        if self.biases is not None:
            return channel_vector(self.biases.array(), 1, self.out_channels, 2)
        return super().bias()

    def smallest_scales(self, bias: np.ndarray) -> np.ndarray:
        """Scales [M] below which a bias [M] would not fit in int32; zeros where it is stored as floats."""
        if self.input_scale is None or is_op(self.node, "MatMul") or self._float_bias() is not None:
            return np.zeros(self.out_channels)
        return np.abs(bias) / (self.input_scale * BIAS_HEADROOM)

    def store(self, rewriter: Rewriter, weight: np.ndarray, bias: np.ndarray) -> ir.Value:
        """Write the integers nearest to a weight [M, C / groups, *kernel], in the scales as they are, and a bias [M].

        Raises:
            DeclinedError: the graph has no place for the bias, see `has_bias`. Nothing has changed then.
        """
        low, high = (self._by_channel(limit) for limit in self.limits())
        integers = np.clip(np.rint(weight / self._by_channel(self.scales)), low, high)
        return self.store_integers(rewriter, integers, self.scales, bias)

    def store_integers(
        self, rewriter: Rewriter, integers: np.ndarray, scales: np.ndarray, bias: np.ndarray
    ) -> ir.Value:
        """Write integers, scales and bias back into the graph, in the types in which they were stored.

        Args:
            rewriter: of the model.
            integers: q - z, [M, C / groups, *kernel].
            scales: [M], all > 0; all the same where the tensor has one scale.
            bias: float64 [M]; a node without a bias gets one where it is not zero.

        Returns:
            The result of the operator.

        Raises:
            DeclinedError: the graph has no place for the bias, or a number does not fit. Nothing has changed then.
        """
        if bias.any() and not self.has_bias:
            raise DeclinedError("there is no place for a bias behind a quantized MatMul", self.node)
        weights, scale = self.weights, self._stored_scale(scales)
        low, high = INTEGER_LIMITS[weights.tensor.dtype]
        stored = np.rint(self.as_read(integers)).astype(np.int64) + weights.along_axis(weights.zero)
        if stored.size and (stored.min() < low or stored.max() > high):
            raise DeclinedError(f"its weight does not fit in {weights.tensor.dtype.name.lower()}", self.node)
        scale_tensor = to_tensor(scale, self.dtype)
        rewriter.replace_constant(weights.node, 0, to_tensor(stored, weights.tensor.dtype))
        rewriter.replace_constant(weights.node, 1, scale_tensor)
        if is_op(self.node, "MatMul"):
            if self.bias_node is not None:
                self.store_matmul_bias(rewriter, to_tensor(self._column(bias), self.dtype), True, "")
            return self.result
        self._store_bias(rewriter, scale_tensor.numpy().astype(np.float64), bias)
        return self.result

    def _store_bias(self, rewriter: Rewriter, scale: np.ndarray, bias: np.ndarray) -> None:
        old = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        stem = old.name if old is not None and old.name else f"{self.node.name}.bias"
        if self._float_bias() is not None or (self.biases is None and self.input_scale is None):
            if old is not None or bias.any():
                rewriter.replace_constant(self.node, 2, to_tensor(bias, self.dtype), wanted_name=stem)
            return
        if self.biases is None and not bias.any():
            return
        if self.input_scale is not None:
            unit = scale * self.input_scale
        else:
            assert self.biases is not None
            fitting = np.abs(bias).max() / BIAS_HEADROOM  # a scale of its own, since the data has none
            unit = np.maximum(self.biases.scale, fitting)
        unit_tensor = to_tensor(unit, self.dtype)
        stored = unit_tensor.numpy().astype(np.float64)
        integers = np.clip(np.rint(bias / stored), -_INT32, _INT32).astype(np.int32)
        self._write_bias(rewriter, stem, to_tensor(integers, ir.DataType.INT32), unit_tensor)

    def _write_bias(self, rewriter: Rewriter, stem: str, integers: ir.Tensor, scale: ir.Tensor) -> None:
        """A DequantizeLinear of the bias: the one that is there where nothing else reads it, else a new one."""
        graph, old = self.node.graph, self.node.inputs[2] if len(self.node.inputs) > 2 else None
        assert isinstance(graph, ir.Graph)
        if self.biases is not None and len(self.biases.node.outputs[0].uses()) == 1:
            node = self.biases.node
            rewriter.replace_constant(node, 0, integers)
            rewriter.replace_constant(node, 1, scale)
            if self.biases.zero.any():
                rewriter.replace_constant(node, 2, to_tensor(np.zeros(tensor_shape(scale)), ir.DataType.INT32))
            set_attributes(node, axis=0)
            return
        result = ir.Value(name=rewriter.unique_name(f"{stem}/dequantizelinear"), type=ir.TensorType(self.dtype))
        result.shape = ir.Shape(tensor_shape(integers))
        operands = [
            rewriter.initializer(graph, f"{stem}.quantized", integers),
            rewriter.initializer(graph, f"{stem}.scale", scale),
        ]
        node = ir.node("DequantizeLinear", operands, attributes={"axis": 0}, outputs=[result])
        node.name = result.name
        graph.insert_before(self.node, node)
        if old is None:
            self.node.resize_inputs(3)
        self.node.replace_input_with(2, result)
        producer = None if old is None else old.producer()
        if producer is not None:
            discard_if_dead(producer)

    def _float_bias(self) -> np.ndarray | None:
        """The constant floats of the bias operand, None where it is integers or absent."""
        return constant_float64(self.node.inputs[2]) if len(self.node.inputs) > 2 else None

    def _stored_scale(self, scales: np.ndarray) -> np.ndarray:
        stored = self.weights.scale
        return scales[0].reshape(stored.shape) if stored.size == 1 else scales.reshape(stored.shape)

    def _by_channel(self, vector: np.ndarray) -> np.ndarray:
        return vector.reshape(-1, *(1,) * (1 + len(self.kernel)))

    def _column(self, bias: np.ndarray) -> np.ndarray:
        return bias[:, None] if self.out_axis == -2 else bias


def quantized_linear_at(node: ir.Node) -> QuantizedLinear | None:
    """The view of a linear node whose weight is a DequantizeLinear of a constant; None where it is no such node.

    Raises:
        DeclinedError: it is one, in a form that is not read here (scales in blocks or along an input axis, float8).
    """
    if not is_op(node, *LINEAR_OPS):
        return None
    index = next((i for i in _weight_indices(node) if _is_stored(node.inputs[i])), None)
    if index is None:
        return None
    weights = _dequantized(node.inputs[index], node)
    shape, dtype = tensor_shape(weights.tensor), _float_type(weights)
    if is_op(node, "MatMul") and len(shape) != 2:
        raise DeclinedError("the weight of MatMul is not a matrix", node)
    if is_op(node, "Gemm") and any(a.as_float() != 1.0 for n in ("alpha", "beta") if (a := node.attributes.get(n))):
        raise DeclinedError("its alpha or beta is not 1", node)
    view = linear_view(node, index, shape, dtype)
    if is_op(node, "MatMul") and index == 0 and (view.rank is None or view.rank < 2):
        raise DeclinedError("MatMul multiplies its weight with a vector or a tensor of unknown rank", node)
    _check_axis(weights, view)
    biases = None
    if not is_op(node, "MatMul") and len(node.inputs) > 2 and _is_stored(node.inputs[2]):
        biases = _dequantized(node.inputs[2], node, bias=True)
    elif view.bias_node is None:
        view.bias()  # declines where it is computed
    linear = QuantizedLinear(**vars(view), weights=weights, biases=biases, input_scale=_scale_of(view.data))
    linear.bias()
    return linear


def linear_view_at(node: ir.Node) -> Linear | None:
    """The view of a linear node, its weight stored as floats or as integers; None and refusals as in `linear_at`."""
    return quantized_linear_at(node) or linear_at(node)


def _weight_indices(node: ir.Node) -> tuple[int, ...]:
    """Where a weight may stand; of two stored operands of a MatMul the second is."""
    return (1, 0) if is_op(node, "MatMul") else (1,)


def _is_stored(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return (
        producer is not None and is_op(producer, "DequantizeLinear") and constant_tensor(producer.inputs[0]) is not None
    )


def _dequantized(value: ir.Value | None, reader: ir.Node, *, bias: bool = False) -> Dequantized:
    node = None if value is None else value.producer()
    assert node is not None
    tensor, scale = constant_tensor(node.inputs[0]), constant_float64(node.inputs[1])
    assert tensor is not None
    known = tensor.dtype == ir.DataType.INT32 if bias else tensor.dtype in INTEGER_LIMITS
    if not known:
        raise DeclinedError(f"its {'bias' if bias else 'weight'} is stored as {tensor.dtype.name.lower()}", reader)
    if scale is None:
        raise DeclinedError("the scale of its weight is not constant", reader)
    block = node.attributes.get("block_size")
    if scale.ndim > 1 or (block is not None and block.as_int()):
        raise DeclinedError("its weight has scales in blocks", reader)
    zero = np.zeros(scale.shape, np.int64)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        stored = constant(node.inputs[2])
        if stored is None:
            raise DeclinedError("the zero point of its weight is not constant", reader)
        zero = stored.astype(np.int64).reshape(scale.shape)
    attribute = node.attributes.get("axis")
    axis = 1 if attribute is None else attribute.as_int()
    rank = len(tensor_shape(tensor))
    return Dequantized(node, tensor, scale, zero, None if scale.size == 1 else axis + rank if axis < 0 else axis)


def _float_type(weights: Dequantized) -> ir.DataType:
    scale = constant_tensor(weights.node.inputs[1])
    assert scale is not None
    return scale.dtype


def _check_axis(weights: Dequantized, view: Linear) -> None:
    """Scales must differ by output channel, or not at all."""
    if weights.axis is None:
        return
    node = view.node
    transposed = node.attributes.get("transB")
    if is_op(node, "ConvTranspose"):
        expected = 1
        if view.groups > 1:
            raise DeclinedError("the groups of a ConvTranspose share their scales", node)
    elif is_op(node, "Gemm"):
        expected = 0 if transposed is not None and transposed.as_int() else 1
    else:
        expected = 0 if is_op(node, "Conv") or view.weight_index == 0 else 1
    if weights.axis != expected:
        raise DeclinedError("the scales of its weight differ along an input axis", node)


def _scale_of(data: ir.Value) -> float | None:
    """The one scale of the DequantizeLinear that makes `data`."""
    producer = data.producer()
    if producer is None or not is_op(producer, "DequantizeLinear"):
        return None
    scale = constant_float64(producer.inputs[1])
    return float(scale.reshape(())) if scale is not None and scale.size == 1 else None
