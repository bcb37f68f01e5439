"""Pass fuse-pad: Pad disappears into the padding of the convolution or pooling behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir.linear import Spatial, set_spatial, spatial
from graphopt.ir.rewrite import (
    DeclinedError,
    Rewriter,
    constant,
    constant_tensor,
    integers,
    is_op,
    rank,
    require_sole_consumer,
    set_attributes,
    static_shape,
)
from graphopt.passes.contract import Context, Pass, Semantics

_NEVER_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Abs", "Exp", "Softmax")


@dataclass(frozen=True)
class FusePad(Pass):
    """Fuse a constant Pad of the spatial axes into the `pads` of Conv, AveragePool or MaxPool.

    Conv pads with zeros of its own, so padding with 0 just adds up::

        Conv[p](Pad[q, 0](x))  =  Conv[p + q](x)

    AveragePool does the same where it counts its padding (`count_include_pad`, set here when the pool had no
    padding of its own). MaxPool pads with -inf: exact for Pad of -inf, and for Pad of 0 behind an operator
    whose results are never negative, since each window holds at least one real element.

    Before::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,1,4,4] x, float[2,1,3,3] w_conv) => (float[N,2,5,5] y)
          <int64[4] pads = {1, 1, 2, 2}, float zero = {0}, int64[2] axes = {2, 3}> {
          p = Pad (x, pads, zero, axes)
          y = Conv (p, w_conv)
        }

    After::

        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,1,4,4] x, float[2,1,3,3] w_conv) => (float[N,2,5,5] y) {
          y = Conv <kernel_shape = [3, 3], pads = [1, 1, 2, 2]> (x, w_conv)
        }
    """

    name: ClassVar[str] = "fuse-pad"
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def rewrite(self, model: ir.Model, context: Context) -> None:
        """Fuse every Pad whose only reader pads by itself."""
        Rewriter(model).until_stable(_fuse, "fuse Pad", context.missed)


def _fuse(rewriter: Rewriter, node: ir.Node) -> bool:
    if not is_op(node, "Conv", "AveragePool", "MaxPool"):
        return False
    padded = node.inputs[0]
    assert padded is not None
    pad = padded.producer()
    if pad is None or not is_op(pad, "Pad"):
        return False
    require_sole_consumer(padded, node)
    data = pad.inputs[0]
    assert data is not None
    begins, ends = _spatial_pads(pad, data)
    kernel = _kernel(node, len(begins))
    place = spatial(node, kernel)
    _require_same_fill(node, pad, data, place)
    added = replace(
        place,
        begins=tuple(a + b for a, b in zip(place.begins, begins, strict=True)),
        ends=tuple(a + b for a, b in zip(place.ends, ends, strict=True)),
    )
    if not is_op(node, "Conv"):
        _require_pool_takes(node, kernel, added)
    set_spatial(node, added, kernel=kernel)
    if is_op(node, "AveragePool"):
        set_attributes(node, count_include_pad=1)
    rewriter.redirect(node, 0, data)
    return True


def _spatial_pads(pad: ir.Node, data: ir.Value) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Begins and ends of the axes from 2 on."""
    mode = pad.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        raise DeclinedError(f"it pads in mode {mode.as_string()}", pad)
    amounts = integers(pad, "pads")
    if amounts is None:
        array = constant(pad.inputs[1]) if len(pad.inputs) > 1 else None
        if array is None:
            raise DeclinedError("its amounts are computed at run time", pad)
        amounts = tuple(int(amount) for amount in array)
    listed = pad.inputs[3] if len(pad.inputs) > 3 else None
    axes = range(len(amounts) // 2)
    if listed is not None:
        found, of_rank = constant(listed), rank(data)
        if found is None or of_rank is None:
            raise DeclinedError("its axes or the rank of its operand are not known", pad)
        axes = [int(axis) % of_rank for axis in found]
        total = of_rank
    else:
        total = len(amounts) // 2
    begins, ends = [0] * total, [0] * total
    for position, axis in enumerate(axes):
        begins[axis], ends[axis] = amounts[position], amounts[position + len(amounts) // 2]
    if any(begins[:2]) or any(ends[:2]):
        raise DeclinedError("it pads the batch or the channels", pad)
    if min(*begins, *ends) < 0:
        raise DeclinedError("it crops", pad)
    return tuple(begins[2:]), tuple(ends[2:])


def _kernel(node: ir.Node, axes: int) -> tuple[int, ...]:
    listed = integers(node, "kernel_shape")
    if listed is not None:
        return listed
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    shape = None if weight is None else static_shape(weight)
    if shape is None or len(shape) != axes + 2:
        raise DeclinedError("its kernel shape is not known", node)
    return shape[2:]


def _require_same_fill(node: ir.Node, pad: ir.Node, data: ir.Value, place: Spatial) -> None:
    """Raise `DeclinedError` unless `node` fills its border with what `pad` fills it with."""
    fill = _fill_value(pad)
    if is_op(node, "MaxPool"):
        if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            raise DeclinedError("MaxPool also returns indices", node)
        if fill == float("-inf") or (fill == 0.0 and _never_negative(data)):
            return
        raise DeclinedError("MaxPool pads with -inf, and its operand may be negative", node)
    if fill != 0.0:
        raise DeclinedError(f"{node.op_type} pads with 0, not with {fill}", node)
    if is_op(node, "AveragePool"):
        counts = node.attributes.get("count_include_pad")
        if (any(place.begins) or any(place.ends)) and (counts is None or not counts.as_int()):
            raise DeclinedError("AveragePool does not count its own padding, but counts that of Pad", node)


def _fill_value(pad: ir.Node) -> float:
    if "value" in pad.attributes:
        return pad.attributes["value"].as_float()
    fill = pad.inputs[2] if len(pad.inputs) > 2 else None
    if fill is None:
        return 0.0
    array = constant(fill)
    if array is None:
        raise DeclinedError("its fill value is computed at run time", pad)
    return float(array.reshape(-1)[0])


def _never_negative(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is None:
        return False
    if is_op(producer, "Clip"):
        low = producer.inputs[1] if len(producer.inputs) > 1 else None
        bound = constant(low) if constant_tensor(low) is not None else None
        return bound is not None and float(bound.reshape(-1)[0]) >= 0.0
    return is_op(producer, *_NEVER_NEGATIVE)


def _require_pool_takes(node: ir.Node, kernel: tuple[int, ...], place: Spatial) -> None:
    """Pooling needs a real element in every window: pads smaller than the kernel, no further rounding."""
    ceil_mode = node.attributes.get("ceil_mode")
    if ceil_mode is not None and ceil_mode.as_int():
        raise DeclinedError("the pooling rounds its output size up", node)
    if any(dilation != 1 for dilation in place.dilations):
        raise DeclinedError("the pooling is dilated", node)
    if any(pad >= size for pad, size in zip((*place.begins, *place.ends), kernel * 2, strict=True)):
        raise DeclinedError("the padding is as wide as the kernel", node)
