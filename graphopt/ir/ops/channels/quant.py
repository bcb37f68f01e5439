"""Channels through the ops between real and quantized numbers.

A masked integer weight holds its zero point, which stands for 0; scales and zero points are never masked.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.axes import Axis
from graphopt.ir.ops.flow import ChannelSite, OpaqueError, Track


def quantization(site: ChannelSite) -> None:
    """QuantizeLinear, DequantizeLinear (10 to 25): one scale for all, one a channel, or one a block of channels."""
    tracks = site.take_all(0)
    if not _same_zero_point(site):
        tracks = [track.nonzero() for track in tracks]
    scale = site.take_all(1)
    zero_point = site.take_all(2) if site.given(2) else []
    if len(scale) == 1 and scale[0].axis.size > 1:
        axis = int(site.attribute("axis", 1)) % len(tracks)
        site.unify(tracks[axis], scale[0], *zero_point)
    elif len(scale) > 1:
        _blocked(site, tracks, scale, zero_point)
    site.emit(0, tracks)


def _same_zero_point(site: ChannelSite) -> bool:
    """Whether a DequantizeLinear reads codes of 0 as 0: those of a weight, or of a quantizer with its zero point."""
    value = site.node.inputs[0]
    if site.node.op_type != "DequantizeLinear" or value is None or site.is_weight(0):
        return True
    producer = value.producer()
    while producer is not None and producer.op_type in _MOVES:
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    if producer is None or producer.op_type not in _QUANTIZERS:
        return False
    index = _QUANTIZERS[producer.op_type]
    written = producer.outputs[2] if producer.op_type == "DynamicQuantizeLinear" else _operand(producer, index)
    read = _operand(site.node, 2)
    return written is read or np.array_equal(_point(written), _point(read))


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _point(value: ir.Value | None) -> np.ndarray:
    """A constant zero point; 0 for an absent one, NaN for one that is not known."""
    if value is None:
        return np.zeros(())
    return np.full((), np.nan) if value.const_value is None else value.const_value.numpy().astype(np.float64)


def _blocked(site: ChannelSite, tracks: list[Track], scale: list[Track], zero_point: list[Track]) -> None:
    """Whole blocks may go along `axis`; all other axes of data and scales meet."""
    axis = int(site.attribute("axis", 1)) % len(tracks)
    block = int(site.attribute("block_size", 0))
    others: list[Axis] = []
    for position, track in enumerate(tracks):
        if position != axis:
            others.append(track.axis)
        elif block and track.axis.static and track.axis.size % block == 0:
            blocks, within = site.split(track, (-1, block))
            site.freeze(within, "its positions share a scale")
            others.append(blocks)
        else:
            raise OpaqueError("its last block is not full")
    for vectors in (scale, zero_point):
        for mine, theirs in zip(vectors, others, strict=False):
            site.unify(mine, theirs)


def dynamic_quantization(site: ChannelSite) -> None:
    """DynamicQuantizeLinear: the range of all elements and 0 sets the scale, so that masked zeros do not count."""
    tracks = site.take_all(0)
    for track in tracks:
        if not track.zero and not site.store.is_fixed(track.axis):
            site.inexact(track, "the scale comes from all elements, and it is not 0 where masked")
    site.emit(0, tracks)
    site.emit(1, [])
    site.emit(2, [])


_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "MaxPool", "Identity"}
"""Operators that hand quantized values on as they are, from their first input."""
_QUANTIZERS = {"QuantizeLinear": 2, "DynamicQuantizeLinear": -1, "QLinearConv": 7, "QLinearMatMul": 7}
"""Operators that write quantized values, and which input is their zero point."""
_ZERO_POINTS = {
    ("DequantizeLinear", 0): 2,
    ("QLinearConv", 3): 5,
    ("ConvInteger", 1): 3,
    ("MatMulInteger", 0): 2,
    ("MatMulInteger", 1): 3,
    ("QLinearMatMul", 0): 2,
    ("QLinearMatMul", 3): 5,
}
"""Operator and index of a quantized weight to the index of its zero point."""


def zero_points_of(value: ir.Value) -> list[ir.Value | None]:
    """The zero points that the readers of a quantized weight have for it, None for an absent one."""
    indices = [(use.node, _ZERO_POINTS.get((use.node.op_type, use.idx))) for use in value.uses()]
    return [None if index is None else _operand(node, index) for node, index in indices]


def zero_point_of(value: ir.Value, array: np.ndarray) -> np.ndarray:
    """What stands for 0 in a weight, in the shape of the weight: its zero point where it is quantized, else 0."""
    for use in value.uses():
        index = _ZERO_POINTS.get((use.node.op_type, use.idx))
        operand = None if index is None else _operand(use.node, index)
        if operand is None or operand.const_value is None:
            continue
        points = operand.const_value.numpy()
        if points.size == 1:
            return np.broadcast_to(points.reshape(()), array.shape)
        if points.ndim == array.ndim:  # one a block
            for axis, (blocks, size) in enumerate(zip(points.shape, array.shape, strict=True)):
                points = np.repeat(points, size // blocks, axis=axis)
            return points
        attribute = use.node.attributes.get("axis")
        default = 1 if use.node.op_type == "DequantizeLinear" else -1 if "MatMul" in use.node.op_type else 0
        axis = (attribute.as_int() if attribute is not None else default) % array.ndim
        shape = [points.size if position == axis else 1 for position in range(array.ndim)]
        return np.broadcast_to(points.reshape(shape), array.shape)
    return np.zeros_like(array)
