"""Pass pad-channels: convolutions on integers get channels of zeros where onnxruntime's kernels want multiples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.ir.rewrite import (
    Missed,
    Rewriter,
    constant,
    discard_if_dead,
    is_op,
    known_dim,
    set_attributes,
    sole_consumer,
)
from graphopt.passes.contract import Context, Pass, Semantics

_WHAT = "pad channels"
INPUTS, OUTPUTS, DEPTHWISE = 4, 16, 16
"""Multiples that the kernels want: channels read; channels written, where there are fewer; channels of a depthwise."""
_LEAST_POSITIONS = 196
"""Smaller maps (14 x 14) gain less than the operators that pad them cost."""
_TOO_WIDE = 1.25
"""A convolution reads channels of zeros that are there anyway up to this ratio, else the slice without them."""


@dataclass(frozen=True)
class PadChannels(Pass):
    """Add channels of zeros to static int8 convolutions, up to the multiples that onnxruntime's CPU kernels want.

    The kernel for uint8 activations and symmetric int8 weights reads channels in fours and writes them in fours, at
    least 16; that for depthwise convolutions takes 16 at a time. Elsewhere onnxruntime falls back to slower ones. One
    thread of an AMD EPYC with AVX512-VNNI, onnxruntime 1.31.1, microseconds at the count and at the next multiple::

        3x3, 64 x 64, to 32    from 3: 123, 4: 62      from 18: 214, 20: 142     from 62: 529, 64: 363
        3x3, 64 x 64, from 64  to 3: 333, 16: 199      to 18: 500, 20: 364       to 63: 910, 64: 695
        1x1, 64 x 64, to 32    from 3: 54, 4: 19       from 62: 88, 64: 52
        depthwise 3x3, 56x56   72: 197, 80: 110        120: 297, 128: 155        200: 469, 208: 241

    Zeros are exact: they are read with weights of zero, and what is written besides is cut off::

        QLinearConv(x, w)  =  Slice(QLinearConv(Pad(x), w with zeros))

    Between two convolutions neither Pad nor Slice is needed: the first writes channels of zeros that the second reads.
    MobileNetV2 runs 1.07 times as fast so (its first layer, 3 channels), an EDSR 1.05 times (its last, 3 channels).

    Left alone: other integers than uint8 activations and int8 weights around zero, grouped convolutions, maps below
    14 x 14, weights that something else reads, and every other target than the CPU.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[1,3,16,16] x, int8[16,3,1,1] w_c) => (float[1,16,16,16] y)
          <float s = {0.1}, uint8 z = {128}, float v = {0.01}> {
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          f = DequantizeLinear (w_c, v)
          c = Conv (d, f)
          r = QuantizeLinear (c, s, z)
          y = DequantizeLinear (r, s, z)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[1,3,16,16] x, int8[16,4,1,1] w_c) => (float[1,16,16,16] y)
          <float s = {0.1}, uint8 z = {128}, float v = {0.01}, int64[8] q_pads = {0, 0, 0, 0, 0, 1, 0, 0}> {
          q = QuantizeLinear (x, s, z)
          f = DequantizeLinear (w_c, v)
          q_padded = Pad (q, q_pads)
          d_padded = DequantizeLinear (q_padded, s, z)
          c = Conv (d_padded, f)
          r = QuantizeLinear (c, s, z)
          y = DequantizeLinear (r, s, z)
        }
    """

    name: ClassVar[str] = "pad-channels"
    semantics: ClassVar[Semantics] = Semantics.EXACT
    runs_after: ClassVar[tuple[str, ...]] = ("quantize", "train-quantized", "fold-reconstruction")

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Pad every convolution that gains."""
        if context.target == "cpu":
            pad_channels(model, context.missed)


def pad_channels(model: ir.Model, missed: Missed) -> None:
    """Pad the convolutions of a quantized model in place.

    Args:
        model: with convolutions between DequantizeLinear and QuantizeLinear.
        missed: called with what is not padded though its channels are no such multiples, why, and where.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ... g (float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }''')
        >>> pad_channels(model, print)
        >>> len(model.graph)
        1
    """
    _Padding(model).run(missed)


@dataclass(eq=False)
class _Convolution:
    """A static int8 convolution, the nodes around it, and how many channels it has and wants.

    Attributes:
        node: the Conv.
        source: DequantizeLinear of what it reads.
        weight: DequantizeLinear of its weight.
        bias: the same of its bias; None where there is none.
        quantize: QuantizeLinear of its result.
        channels: that it read at first.
        written: channels that it writes by now.
        depthwise: whether each channel is convolved by itself.
        narrow: its integers without those that were added, once there are any.
        is_read: whether another convolution reads those that were added, so that there must not be more.
    """

    node: ir.Node
    source: ir.Node
    weight: ir.Node
    bias: ir.Node | None
    quantize: ir.Node
    channels: int
    written: int
    depthwise: bool
    narrow: ir.Value | None = None
    is_read: bool = False

    @property
    def integers(self) -> ir.Value:
        """The integers of its result, added ones included."""
        return self.quantize.outputs[0]

    @property
    def is_own(self) -> bool:
        """Whether nothing else reads its weight and bias."""
        operands = [self.weight] if self.bias is None else [self.weight, self.bias]
        return all(sole_consumer(operand.outputs[0]) is self.node for operand in operands)

    def wanted(self) -> tuple[int, int]:
        """How many channels its kernel wants to read and to write."""
        sizes = [known_dim(self.node.outputs[0], axis) for axis in (2, 3)]
        if all(size is not None for size in sizes) and math.prod(size or 0 for size in sizes) < _LEAST_POSITIONS:
            return self.channels, self.written
        if self.depthwise:
            width = _multiple(self.channels, DEPTHWISE)
            return width, width
        return _multiple(self.channels, INPUTS), max(_multiple(self.written, INPUTS), OUTPUTS)

    def takes(self, width: int, wanted: int) -> bool:
        """Whether it is fast on so many channels that are there already."""
        if self.depthwise:
            return width == wanted
        return width % INPUTS == 0 and width <= max(wanted, _TOO_WIDE * self.channels)


class _Padding:
    """One application. Convolutions are visited in graph order, so what one reads has been padded before."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.rewriter = Rewriter(model)
        self.writers: dict[ir.Value, _Convolution] = {}
        """Integers, with added channels and without them, to the convolution that makes them."""

    def run(self, missed: Missed) -> None:
        for node in list(self.graph):
            convolution = _read(node)
            if convolution is None:
                continue
            inputs, outputs = convolution.wanted()
            if convolution.is_own:
                self.writers[convolution.integers] = convolution
                if outputs != convolution.written:
                    self.widen_output(convolution, outputs)
                self.widen_input(convolution, inputs)
            elif (inputs, outputs) != (convolution.channels, convolution.written):
                missed(_WHAT, "something else reads its weight or bias", node)
        for convolution in set(self.writers.values()):
            cut = None if convolution.narrow is None else convolution.narrow.producer()
            if cut is not None:
                discard_if_dead(cut)

    def widen_output(self, convolution: _Convolution, width: int) -> None:
        """Let it write `width` channels; its readers so far read those that it had."""
        value = convolution.integers
        if convolution.narrow is None:
            bounds = [self._initializer(value, what, [number]) for what, number in
                      (("begin", 0), ("end", convolution.written), ("axis", 1))]  # fmt: skip
            cut = self.rewriter.insert(convolution.quantize, "Slice", [value, *bounds], like=value, suffix="padded")
            self.rewriter.interpose(value, cut)
            convolution.narrow = cut.outputs[0]
            self.writers[cut.outputs[0]] = convolution
        for operand in (convolution.weight, convolution.bias):
            if operand is not None:
                self._lengthen(operand, 0, convolution.written, width)
        if convolution.depthwise:
            set_attributes(convolution.node, group=width)
        convolution.written = width
        for result in (convolution.node.outputs[0], value):
            _set_channels(result, width)

    def widen_input(self, convolution: _Convolution, wanted: int) -> None:
        """Let it read so many channels: those that its producer writes or could write, else a Pad."""
        integers = convolution.source.inputs[0]
        assert integers is not None
        producer = self.writers.get(integers)
        if producer is not None:
            if producer.written < wanted and not producer.depthwise and not producer.is_read:
                self.widen_output(producer, wanted)
            if producer.narrow is not None and convolution.takes(producer.written, wanted):
                self._reads(convolution, producer.integers, producer.written)
                producer.is_read = True
                return
        if wanted != convolution.channels:
            integers = convolution.source.inputs[0]
            assert integers is not None
            self._reads(convolution, self._padded(convolution, integers, wanted), wanted)

    def _reads(self, convolution: _Convolution, integers: ir.Value, width: int) -> None:
        """Let it read `width` channels of `integers`; the weights of those that are new are zeros."""
        old = convolution.source
        result = self._before(convolution.node, "DequantizeLinear", [integers, *old.inputs[1:]], like=old.outputs[0])
        _set_channels(result, width)
        self.rewriter.redirect(convolution.node, 0, result)
        if not convolution.depthwise:
            self._lengthen(convolution.weight, 1, convolution.channels, width)

    def _padded(self, convolution: _Convolution, integers: ir.Value, width: int) -> ir.Value:
        pads = [0, 0, 0, 0, 0, width - convolution.channels, 0, 0]
        amounts = self._initializer(integers, "pads", pads)
        result = self._before(convolution.node, "Pad", [integers, amounts], like=integers)
        _set_channels(result, width)
        return result

    def _before(
        self, reader: ir.Node, op_type: str, operands: Sequence[ir.Value | None], *, like: ir.Value
    ) -> ir.Value:
        name = self.rewriter.unique_name(f"{like.name}_padded")
        result = ir.Value(name=name, type=like.type, shape=like.shape)
        node = ir.node(op_type, list(operands), outputs=[result], name=self.rewriter.unique_name(f"{name}_{op_type}"))
        node.metadata_props.update(reader.metadata_props)
        self.graph.insert_before(reader, node)
        return result

    def _initializer(self, like: ir.Value, what: str, numbers: list[int]) -> ir.Value:
        return self.rewriter.initializer(self.graph, f"{like.name}_{what}", ir.tensor(np.array(numbers, np.int64)))

    def _lengthen(self, dequantize: ir.Node, axis: int, count: int, width: int) -> None:
        """Give integers zeros along an axis from `count` to `width`, in the scale of the last ones."""
        for index in range(len(dequantize.inputs)):
            array = constant(dequantize.inputs[index])
            if array is None or (index > 0 and (axis > 0 or array.shape != (count,))):
                continue
            pads = [(0, width - count if position == axis else 0) for position in range(array.ndim)]
            longer = np.pad(array, pads, mode="edge") if index == 1 else np.pad(array, pads)
            self.rewriter.replace_constant(dequantize, index, ir.Tensor(longer))
            if index == 0:
                dequantize.outputs[0].shape = ir.Shape(longer.shape)


def _read(node: ir.Node) -> _Convolution | None:
    """A two-dimensional convolution that onnxruntime computes on uint8 and int8 around zero; None for all else."""
    reads = [None if value is None else value.producer() for value in node.inputs] if is_op(node, "Conv") else []
    quantize = sole_consumer(node.outputs[0])
    if not reads or not is_op(quantize, "QuantizeLinear") or quantize is None:
        return None
    if not all(is_op(read, "DequantizeLinear") for read in reads):
        return None
    source, weight, bias = (*reads, None)[:3]
    assert source is not None
    assert weight is not None
    stored, integers = constant(weight.inputs[0]), source.inputs[0]
    scale, zero = constant(weight.inputs[1]), constant(weight.inputs[2]) if len(weight.inputs) > 2 else np.zeros(())
    if stored is None or stored.dtype != np.int8 or stored.ndim != 4 or scale is None or zero is None or zero.any():
        return None
    axis = weight.attributes.get("axis")
    if scale.ndim > 1 or (scale.ndim and (axis is None or axis.as_int() != 0)):
        return None
    if integers is None or integers.dtype != ir.DataType.UINT8 or constant(integers) is not None:
        return None
    steps = [constant(one.inputs[1]) for one in (source, quantize)]
    if any(step is None or step.size != 1 for step in steps):  # a scale for each channel would not fit
        return None
    if bias is not None and constant(bias.inputs[0]) is None:
        return None
    group = node.attributes.get("group")
    groups = 1 if group is None else group.as_int()
    outputs, inner = stored.shape[:2]
    if groups > 1 and (groups != outputs or inner != 1):
        return None
    channels = outputs if groups > 1 else inner
    return _Convolution(node, source, weight, bias, quantize, channels, outputs, depthwise=groups > 1)


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def _set_channels(value: ir.Value, width: int) -> None:
    if value.shape is not None:
        dims = list(value.shape)
        value.shape = ir.Shape([*dims[:1], width, *dims[2:]])
