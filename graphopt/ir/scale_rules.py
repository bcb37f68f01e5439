"""How positive factors pass through operators: one rule an operator, and what has none keeps its factor 1."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt.ir.linear import channel_axis, linear_at
from graphopt.ir.match import axes_of, clip_bounds
from graphopt.ir.rewrite import (
    FLOATING,
    DeclinedError,
    constant,
    constant_tensor,
    integers,
    is_op,
    known_dim,
    rank,
    static_shape,
)
from graphopt.ir.scale_flow import MOST_MADE, Rule, ScaledLinear, ScaleFlow, number, padded
from graphopt.ir.scale_labels import dimensions

# One element to one element ---------------------------------------------------------------------------------


def _same(flow: ScaleFlow, node: ir.Node) -> None:
    """f(s x) = s f(x) for s > 0, each element by itself."""
    flow.give(node, flow.of(node))


def _clip(flow: ScaleFlow, node: ir.Node) -> None:
    bounds = clip_bounds(node)
    if bounds is None or any(bounds):
        raise DeclinedError("Clip has one bound for all channels")
    _same(flow, node)


def _cast(flow: ScaleFlow, node: ir.Node) -> None:
    types = [node.outputs[0].dtype, None if node.inputs[0] is None else node.inputs[0].dtype]
    if any(dtype not in FLOATING for dtype in types):
        raise DeclinedError("it is cast to or from integers")
    _same(flow, node)


def _prelu(flow: ScaleFlow, node: ir.Node) -> None:
    if constant_tensor(node.inputs[1]) is None:
        raise DeclinedError("the slope is computed at run time")
    _same(flow, node)


def _sum(flow: ScaleFlow, node: ir.Node) -> None:
    """Add, Sub, Sum, Mean, Max, Min: all operands share the factor of the result, constants take it up."""
    computed, constants = flow.operands(node)
    if not computed:
        raise DeclinedError("all operands are constant")
    labels = computed[0][1]
    for _, other in computed[1:]:
        flow.labels.unify(labels, other)
        labels = np.broadcast_arrays(labels, other)[0]
    for index in constants:
        flow.scale(node, index, labels)
    flow.give(node, labels)


def _product(flow: ScaleFlow, node: ir.Node) -> None:
    """s x * c = s (x * c); of two computed operands one passes its factor on, the other, a gate, has none."""
    computed, constants = flow.operands(node)
    if len(computed) == 1:
        (index, labels), other = computed[0], constants[0]
        if is_op(node, "Div") and index == 1:
            raise DeclinedError("it is divided by")
        tensor = constant_tensor(node.inputs[other])
        shape = () if tensor is None else tuple(tensor.shape.numpy())
        if tensor is None or tensor.dtype not in FLOATING or is_op(node, "Div") or tensor.size == 1:
            flow.give(node, labels)
            return
        # a constant for each channel may scale what it makes anew, as a normalisation does
        outs = flow.labels.fresh((*(1,) * (labels.ndim - len(shape)), *shape)) if tensor.size <= MOST_MADE else labels
        if outs is labels or any(
            known != 1 and wide == 1 for known, wide in zip(labels.shape, outs.shape, strict=True)
        ):
            flow.give(node, labels)
            return
        flow.scale(node, other, outs, labels)
        flow.give(node, outs)
        return
    if len(computed) != 2:
        raise DeclinedError("all operands are constant")
    (_, a), (second, b) = computed
    if is_op(node, "Div") or not flow.labels.is_fixed(a).all():
        flow.fix_inputs(node, "another value is multiplied with it or divided by it", [node.inputs[second]])
        kept, gate = a, b
    else:
        kept, gate = b, a
    flow.give(node, np.broadcast_arrays(kept, np.zeros((1,) * gate.ndim))[0])


def _where(flow: ScaleFlow, node: ir.Node) -> None:
    of_rank = rank(node.outputs[0]) or 0
    parts = [padded(flow.of(node, index), of_rank) for index in (1, 2)]
    flow.labels.unify(*parts)
    flow.give(node, np.broadcast_arrays(*parts)[0])


# Windows and sums over axes ---------------------------------------------------------------------------------


def _pool(flow: ScaleFlow, node: ir.Node) -> None:
    labels = flow.of(node)
    flow.give(node, flow.labels.collapse(labels, range(2, labels.ndim)))


def _reduce(flow: ScaleFlow, node: ir.Node) -> None:
    labels, axes = flow.of(node), axes_of(node)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        raise DeclinedError("its axes are computed at run time")
    if axes is None and number(node, "noop_with_empty_axes", 0):
        flow.give(node, labels)
        return
    gone = {axis % labels.ndim for axis in (axes if axes else range(labels.ndim))}
    labels = flow.labels.collapse(labels, gone)
    if not number(node, "keepdims", 1):
        labels = labels.reshape([size for axis, size in enumerate(labels.shape) if axis not in gone])
    flow.give(node, labels)


def _resize(flow: ScaleFlow, node: ir.Node) -> None:
    data = node.inputs[0]
    labels, result = flow.of(node), node.outputs[0]
    assert data is not None
    moved = [axis for axis in range(labels.ndim) if known_dim(data, axis) != (known_dim(result, axis) or -1)]
    mode = node.attributes.get("coordinate_transformation_mode")
    if mode is not None and mode.as_string() == "tf_crop_and_resize":
        raise DeclinedError("it fills in a value from outside")
    flow.give(node, flow.labels.collapse(labels, moved))


# Moving elements --------------------------------------------------------------------------------------------


def _reshape(flow: ScaleFlow, node: ir.Node) -> None:
    data, result = node.inputs[0], node.outputs[0]
    labels = flow.of(node)
    assert data is not None
    before, after = dimensions(data), dimensions(result)
    assert before is not None
    assert after is not None
    flow.give(node, flow.labels.reshaped(labels, before, after))


def _transpose(flow: ScaleFlow, node: ir.Node) -> None:
    labels = flow.of(node)
    flow.give(node, labels.transpose(integers(node, "perm") or tuple(range(labels.ndim))[::-1]))


def _expand(flow: ScaleFlow, node: ir.Node) -> None:
    of_rank, tensor = rank(node.outputs[0]) or 0, constant_tensor(node.inputs[0])
    if tensor is not None and tensor.size <= MOST_MADE:
        outs = flow.labels.fresh(tensor.shape.numpy())
        flow.scale(node, 0, outs)
        flow.give(node, padded(outs, of_rank))
        return
    flow.give(node, padded(flow.of(node), of_rank))


def _concat(flow: ScaleFlow, node: ir.Node) -> None:
    """Parts keep their factors; constant ones get factors of their own wherever those of the others vary."""
    of_rank = rank(node.outputs[0]) or 0
    axis = number(node, "axis", 0) % of_rank
    sizes = [None if value is None else known_dim(value, axis) for value in node.inputs]
    if 0 in sizes:
        raise DeclinedError("a part of it is empty")
    told_apart = all(size is not None for size in sizes)
    computed = {
        index: flow.of(node, index)
        for index, value in enumerate(node.inputs)
        if value is not None and value in flow.labels
    }
    if not told_apart:
        computed = {index: flow.labels.collapse(labels, [axis]) for index, labels in computed.items()}
    across = np.broadcast_shapes(*((*of.shape[:axis], 1, *of.shape[axis + 1 :]) for of in computed.values()))
    parts: list[np.ndarray] = []
    for index, size in enumerate(sizes):
        shape = (*across[:axis], size if told_apart and size else 1, *across[axis + 1 :])
        if index in computed:
            parts.append(np.broadcast_to(computed[index], shape))
            continue
        if np.prod(shape) > MOST_MADE:
            raise DeclinedError("a constant of it is too large to be scaled")
        parts.append(flow.labels.fresh(shape))
        flow.scale(node, index, parts[-1])
    if not told_apart:
        for part in parts[1:]:
            flow.labels.unify(parts[0], part)
        flow.give(node, parts[0])
        return
    flow.give(node, np.concatenate(parts, axis=axis))


def _split(flow: ScaleFlow, node: ir.Node) -> None:
    labels = flow.of(node)
    axis = number(node, "axis", 0) % labels.ndim
    if labels.shape[axis] > 1:
        sizes = [known_dim(value, axis) for value in node.outputs]
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes) and sum(known) == labels.shape[axis]:
            for index, part in enumerate(np.split(labels, np.cumsum(known)[:-1], axis=axis)):
                flow.give(node, part, index)
            return
        labels = flow.labels.collapse(labels, [axis])
    for index in range(len(node.outputs)):
        flow.give(node, labels, index)


def _slice(flow: ScaleFlow, node: ir.Node) -> None:
    labels = flow.of(node)
    given = [constant(node.inputs[index]) if index < len(node.inputs) else None for index in range(1, 5)]
    starts, ends, axes, steps = given
    if starts is None or ends is None or (axes is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        flow.give(node, flow.labels.collapse(labels, range(labels.ndim)))
        return
    chosen = range(len(starts)) if axes is None else [int(axis) for axis in axes]
    by = np.ones(len(starts), np.int64) if steps is None else steps
    for axis, start, end, step in zip(chosen, starts, ends, by, strict=True):
        if labels.shape[axis % labels.ndim] > 1:
            window: list[slice] = [slice(None)] * labels.ndim
            last = None if step < 0 and end < -labels.shape[axis % labels.ndim] else int(end)
            window[axis % labels.ndim] = slice(int(start), last, int(step))
            labels = labels[tuple(window)]
    flow.give(node, labels)


def _gather(flow: ScaleFlow, node: ir.Node) -> None:
    """Channels picked by constant indices, rows by any; the columns of a constant table have factors of their own."""
    table, indices = node.inputs[:2]
    assert table is not None
    assert indices is not None
    axis = number(node, "axis", 0)
    of_indices = rank(indices)
    if of_indices is None:
        raise DeclinedError("the rank of its indices is unknown")
    if table not in flow.labels:
        shape = static_shape(table)
        if axis or shape is None or len(shape) != 2 or len(table.uses()) > 1:
            raise DeclinedError("it picks from a constant that something else reads, or that is no table")
        columns = flow.labels.fresh((1, shape[1]))
        flow.scale(node, 0, columns)
        flow.give(node, columns.reshape((1,) * of_indices + (-1,)))
        return
    labels = flow.of(node)
    axis %= labels.ndim
    picked = constant(indices)
    if labels.shape[axis] > 1 and picked is not None:
        flow.give(node, np.take(labels, picked.astype(np.int64), axis=axis))
        return
    labels = flow.labels.collapse(labels, [axis])
    flow.give(node, labels.reshape(labels.shape[:axis] + (1,) * of_indices + labels.shape[axis + 1 :]))


def _pad(flow: ScaleFlow, node: ir.Node) -> None:
    """Zeros have every factor; what is padded along the channels gets a new one."""
    labels = flow.of(node)
    mode = node.attributes.get("mode")
    filler = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(())
    plain = (mode is None or mode.as_string() == "constant") and (filler is None or np.any(filler))
    if plain:
        raise DeclinedError("it pads with something else than 0")
    pads = constant(node.inputs[1])
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else np.arange(labels.ndim)
    zeros = mode is None or mode.as_string() == "constant"
    if pads is None or axes is None or not zeros:
        flow.give(node, flow.labels.collapse(labels, range(labels.ndim)))
        return
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        at = int(axis) % labels.ndim
        if labels.shape[at] > 1 and (before or after):
            kept = np.take(labels, range(max(-int(before), 0), labels.shape[at] + min(int(after), 0)), axis=at)
            shapes = [[max(int(n), 0) if i == at else s for i, s in enumerate(kept.shape)] for n in (before, after)]
            labels = np.concatenate([flow.labels.fresh(shapes[0]), kept, flow.labels.fresh(shapes[1])], axis=at)
    flow.give(node, labels)


def _blocks_to_space(flow: ScaleFlow, node: ir.Node) -> None:
    """DepthToSpace: the channels that become one channel share a factor."""
    labels = flow.labels.collapse(flow.of(node), (0, 2, 3))
    block, mode = number(node, "blocksize", 1) ** 2, node.attributes.get("mode")
    if labels.shape[1] > 1:
        crd = mode is not None and mode.as_string() == "CRD"
        square = labels.reshape((-1, block) if crd else (block, -1))
        labels = flow.labels.collapse(square, [1 if crd else 0]).reshape(1, -1, 1, 1)
    flow.give(node, labels)


# Linear operators -------------------------------------------------------------------------------------------


def _linear(flow: ScaleFlow, node: ir.Node) -> None:
    linear = linear_at(node)
    if linear is None:
        if is_op(node, "MatMul"):
            _attention_product(flow, node)
            return
        raise DeclinedError("its weight is computed at run time")
    labels = flow.of(node, linear.data_index)
    of_rank = labels.ndim
    if of_rank < 2:
        raise DeclinedError("it multiplies a vector")
    weight = node.inputs[linear.weight_index]
    assert weight is not None
    if not np.isfinite(linear.weight()).all():
        raise DeclinedError("its weight is not finite")
    axis = channel_axis(linear.in_axis, of_rank)
    labels = flow.labels.collapse(labels, [at for at in range(of_rank) if at != axis])
    ins = np.broadcast_to(labels.reshape(-1), (linear.in_channels,))
    outs = flow.labels.fresh((linear.out_channels,))
    if any(_reading(use.node, use.idx) != _reading(node, linear.weight_index) for use in weight.uses()):
        raise DeclinedError("its weight is read in another way too")
    if weight.is_graph_output() or any(use.node.graph is not node.graph for use in weight.uses()):
        raise DeclinedError("its weight is read from outside of the graph too")
    readers = {use.node for use in weight.uses()} - {node}
    for one in [one for one in flow.linears if one.linear.node in readers][:1]:
        flow.labels.unify(ins, one.ins)
        flow.labels.unify(outs, one.outs)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        flow.scale(node, 2, outs if not is_op(node, "Gemm") else outs.reshape(1, -1))
    flow.linears.append(ScaledLinear(linear, ins, outs))
    place = channel_axis(linear.out_axis, of_rank)
    flow.give(node, outs.reshape([-1 if at == place else 1 for at in range(of_rank)]))


def _reading(node: ir.Node, index: int) -> tuple[object, ...]:
    """How a node lays out the weight that is its operand `index`."""
    return node.op_type, node.domain, index, *(number(node, name, 0) for name in ("transB", "group"))


def _attention_product(flow: ScaleFlow, node: ir.Node) -> None:
    """Of two computed matrices one passes on the factors of the axis that is not summed over, the other has none."""
    of_rank = rank(node.outputs[0]) or 0
    sides = [flow.of(node, index) for index in (0, 1)]
    if min(side.ndim for side in sides) < 2:
        raise DeclinedError("it multiplies a vector")
    summed = (-1, -2)
    for index, (side, axis) in enumerate(zip(sides, summed, strict=True)):
        other = sides[1 - index]
        if flow.labels.is_fixed(other).all() and side.shape[axis] == 1:
            flow.give(node, padded(side, of_rank))
            return
    raise DeclinedError("both factors of the product are computed")


def _attention(flow: ScaleFlow, node: ir.Node) -> None:
    """softmax(q k^T) (s v) = s softmax(q k^T) v, with as many heads of values as of queries, and no cache."""
    others = [value for index, value in enumerate(node.inputs) if index != 2]
    heads = [number(node, name, 0) for name in ("q_num_heads", "kv_num_heads")]
    labels = flow.of(node, 2)
    cached = any(value is not None for value in node.inputs[4:6]) or len(node.outputs) > 1
    if cached or heads[0] != heads[1] or node.inputs[2] in others:
        raise DeclinedError("its values are cached, shared by heads, or read as keys too")
    if labels.ndim == 4 and (known_dim(node.outputs[0], 1) != labels.shape[1] > 1):
        raise DeclinedError("its values are shared by heads")
    flow.fix_inputs(node, "attention is no positively homogeneous function of it", others)
    flow.give(node, flow.labels.collapse(labels, [labels.ndim - 2]))


# Normalisations: what they read has factor 1, what they make is scaled by their own constants ------------------


def _normalization(flow: ScaleFlow, node: ir.Node) -> None:
    flow.fix_inputs(node, f"{node.op_type} does not pass a factor on", node.inputs[:1])
    data = node.inputs[0]
    of_rank = None if data is None else rank(data)
    scale = constant_tensor(node.inputs[1])
    if of_rank is None or scale is None:
        raise DeclinedError("its scale is computed at run time")
    shape = tuple(scale.shape.numpy())
    last = is_op(node, "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
    if not last and (len(shape) != 1 or any(value.uses() for value in node.outputs[1:])):
        raise DeclinedError("its scale is not one number a channel")
    if is_op(node, "GroupNormalization") and known_dim(node.outputs[0], 1) != shape[0]:
        raise DeclinedError("its scale is one number a group")
    outs = flow.labels.fresh(shape)
    for index in (1, 2):
        if index < len(node.inputs) and node.inputs[index] is not None:
            flow.scale(node, index, outs)
    flow.give(node, padded(outs, of_rank) if last else outs.reshape((1, -1) + (1,) * (of_rank - 2)))


def _batch_normalization(flow: ScaleFlow, node: ir.Node) -> None:
    if number(node, "training_mode", 0):
        raise DeclinedError("it is in training mode")
    _normalization(flow, node)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Relu", "LeakyRelu", "Identity", "Neg", "Abs"), _same),
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean", "Max", "Min"), _sum),
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _pool),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"), _reduce),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _linear),
    **dict.fromkeys(
        ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "InstanceNormalization",
         "GroupNormalization"), _normalization
    ),
    "Attention": _attention, "BatchNormalization": _batch_normalization, "Cast": _cast, "Clip": _clip,
    "Concat": _concat, "DepthToSpace": _blocks_to_space, "Expand": _expand, "Gather": _gather, "PRelu": _prelu,
    "Pad": _pad, "Resize": _resize, "Slice": _slice, "Split": _split, "Transpose": _transpose, "Where": _where,
}  # fmt: skip
"""Rules by operator of the standard domain."""
