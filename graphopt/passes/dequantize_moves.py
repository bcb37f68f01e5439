"""What lies between the linear operators of a quantized graph: quantizers, element-wise kernels, moves of integers.

A move (Reshape, MaxPool, Gather, ...) of integers with one scale is the same move of the numbers that they stand for,
since x = s (q - z) grows with q. Constants that are put in on the way (padding, bounds) are translated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.rewrite import DeclinedError, constant, constant_tensor, integers, is_op, rank
from graphopt.passes.dequantize_builder import MOVES, Builder, Dynamic, Quantity, Rule, operand_of
from graphopt.passes.dequantize_values import Parameters, derived, read_parameters

_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")


def quantize_linear(builder: Builder, node: ir.Node) -> None:
    """QuantizeLinear (x, s, z): the integers stand for x."""
    data, result = node.inputs[0], node.outputs[0]
    assert data is not None
    builder.quantize(node, result, data, _parameters(node, result.dtype or _output_type(node), data.dtype))


def dequantize_linear(builder: Builder, node: ir.Node) -> None:
    """DequantizeLinear (q, s, z): the numbers that q stands for; constants become float weights."""
    data = node.inputs[0]
    assert data is not None
    made_by = builder.dynamic.get(data)
    if made_by is not None:
        if operand_of(node, 1) is not made_by.scale or operand_of(node, 2) is not made_by.zero:
            raise DeclinedError("it reads integers of DynamicQuantizeLinear with another scale", node)
        builder.replace(node.outputs[0], made_by.real)
        return
    if _looked_up(builder, node):
        return
    quantity = builder.quantities.get(data)
    integers_type = data.dtype if quantity is None else quantity.parameters.integers
    parameters = _parameters(node, integers_type, node.outputs[0].dtype)
    real = builder.known(data, parameters, node)
    if real is None:
        producer = data.producer()
        raise DeclinedError(
            f"its integers come from {'an input of the model' if producer is None else producer.op_type}", node
        )
    builder.replace(node.outputs[0], real)


def dynamic_quantize_linear(builder: Builder, node: ir.Node) -> None:
    """DynamicQuantizeLinear (x): its integers stand for x, in a scale that is known at run time."""
    data, (quantized, scale, zero) = node.inputs[0], node.outputs
    assert data is not None
    builder.dynamic[quantized] = Dynamic(data, scale, zero)


def move(builder: Builder, node: ir.Node) -> None:
    """The same operator on the numbers that its integers stand for."""
    data = node.inputs[0] if node.inputs else None
    if data is None:
        return
    made_by, quantity = builder.dynamic.get(data), builder.quantities.get(data)
    if quantity is not None and quantity.parameters.axis is not None:
        raise DeclinedError("it moves integers that have a scale for each channel", node)
    if made_by is None and quantity is None:
        return
    source = made_by or quantity
    assert source is not None
    results = _moved(builder, node, [source.real, *node.inputs[1:]])
    for old, new in zip(node.outputs, results, strict=True):
        if old.dtype is not None and data.dtype is not None and old.dtype != data.dtype:
            builder.replace(old, new)  # indices: the order of integers is that of the numbers
        elif made_by is not None:
            builder.dynamic[old] = Dynamic(new, made_by.scale, made_by.zero)
        elif quantity is not None:
            builder.quantities[old] = Quantity(new, quantity.parameters)


def pad(builder: Builder, node: ir.Node) -> None:
    """Pad of integers: the filling is translated; 0, its default, stands for -s z."""
    quantity = _one_scale(builder, node)
    if quantity is None:
        return
    operands: list[ir.Value | None] = [quantity.real, *node.inputs[1:]]
    mode = node.attributes.get("mode")
    if mode is None or mode.as_string() == "constant":
        operands += [None] * (3 - len(operands))
        operands[2] = _translated(builder, node, 2, quantity, 0)
    (result,) = _moved(builder, node, operands)
    builder.quantities[node.outputs[0]] = Quantity(result, quantity.parameters)


def clip(builder: Builder, node: ir.Node) -> None:
    """Clip and Relu of integers: the bounds are translated."""
    quantity = _one_scale(builder, node)
    if quantity is None:
        return
    result = node.outputs[0]
    if is_op(node, "Relu"):
        bounds: list[ir.Value | None] = [_translated(builder, node, 1, quantity, 0), None]
    else:
        bounds = [
            None if operand_of(node, index) is None else _translated(builder, node, index, quantity, 0)
            for index in (1, 2)
        ]
    array = constant(bounds[0])
    if bounds[1] is None and array is not None and float(array.reshape(())) == 0.0:
        made = builder.emit(node, "Relu", [quantity.real], like=result, dtype=quantity.real.dtype)
    else:
        made = builder.emit(node, "Clip", [quantity.real, *bounds], like=result, dtype=quantity.real.dtype)
    builder.quantities[result] = Quantity(made, quantity.parameters)


def several(builder: Builder, node: ir.Node) -> None:
    """Concat, Where, Max and Min of integers that all have the same scale."""
    known = [builder.quantities[value] for value in node.inputs if value is not None and value in builder.quantities]
    if not known:
        return
    parameters = known[0].parameters
    operands: list[ir.Value | None] = list(node.inputs)
    for index, value in enumerate(node.inputs):
        if value is None or (is_op(node, "Where") and index == 0):
            continue
        if parameters.axis is not None or (constant_tensor(value) is None and value not in builder.quantities):
            raise DeclinedError("its integers do not all have one scale", node)
        operands[index] = builder.real(value, parameters, node)
    (result,) = _moved(builder, node, operands)
    builder.quantities[node.outputs[0]] = Quantity(result, parameters)


def elementwise(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.QLinearAdd and QLinearMul (a, a_s, a_z, b, b_s, b_z, y_s, y_z)."""
    operands = [builder.operand(node, 0, 1, 2), builder.operand(node, 3, 4, 5)]
    _publish(builder, node, node.op_type.removeprefix("QLinear"), operands, (), 6)


def where(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.QLinearWhere (condition, a, a_s, a_z, b, b_s, b_z, y_s, y_z)."""
    operands = [node.inputs[0], builder.operand(node, 1, 2, 3), builder.operand(node, 4, 5, 6)]
    _publish(builder, node, "Where", operands, (), 7)


def concat(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.QLinearConcat (y_s, y_z, a, a_s, a_z, b, b_s, b_z, ...)."""
    operands = [builder.operand(node, index, index + 1, index + 2) for index in range(2, len(node.inputs), 3)]
    _publish(builder, node, "Concat", operands, ("axis",), 0)


def unary(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.QLinearSigmoid, QLinearLeakyRelu, QLinearSoftmax, pooling (x, x_s, x_z, y_s, y_z)."""
    channels_last = node.attributes.get("channels_last")
    if channels_last is not None and channels_last.as_int():
        raise DeclinedError("its channels come last", node)
    op_type = node.op_type.removeprefix("QLinear")
    opset = node.attributes.get("opset")
    if op_type == "Softmax" and opset is not None and opset.as_int() < 13:
        raise DeclinedError("its Softmax flattens, as before opset 13", node)
    data = builder.operand(node, 0, 1, 2)
    _publish(builder, node, op_type, [data], ("alpha", "axis", *_POOL), 3)


def reduce_mean(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.QLinearReduceMean (x, x_s, x_z, y_s, y_z), its axes as an attribute."""
    axes = integers(node, "axes")
    operands: list[ir.Value | None] = [builder.operand(node, 0, 1, 2)]
    if axes is not None:
        operands.append(builder.constant(np.asarray(axes), ir.DataType.INT64, f"{node.outputs[0].name}.axes"))
    _publish(builder, node, "ReduceMean", operands, ("keepdims",), 3)


def _publish(
    builder: Builder,
    node: ir.Node,
    op_type: str,
    operands: Sequence[ir.Value | None],
    attributes: Sequence[str],
    scale: int,
) -> None:
    kept = [attribute for name in attributes if (attribute := node.attributes.get(name)) is not None]
    typed = operands[-1] if op_type == "Where" else operands[0]
    assert typed is not None
    real = builder.emit(node, op_type, operands, like=node.outputs[0], dtype=typed.dtype, attributes=kept)
    builder.publish(node, node.outputs[0], real, scale, scale + 1)


def _moved(builder: Builder, node: ir.Node, operands: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
    """The results of the same operator on other operands; those of the moved type have that of operand 0."""
    source = node.inputs[1] if is_op(node, "Where") else node.inputs[0]
    typed = operands[1] if is_op(node, "Where") else operands[0]
    assert source is not None
    assert typed is not None
    moved_type = source.dtype
    dtypes = [typed.dtype if value.dtype in (None, moved_type) else value.dtype for value in node.outputs]
    return builder.emit_several(
        node, node.op_type, operands, like=node.outputs, dtypes=dtypes, attributes=list(node.attributes.values())
    )


def _one_scale(builder: Builder, node: ir.Node) -> Quantity | None:
    data = node.inputs[0]
    quantity = None if data is None else builder.quantities.get(data)
    if quantity is not None and quantity.parameters.axis is not None:
        raise DeclinedError("it moves integers that have a scale for each channel", node)
    return quantity


def _translated(builder: Builder, node: ir.Node, index: int, quantity: Quantity, default: int) -> ir.Value:
    """The number that an integer scalar operand stands for."""
    p = quantity.parameters
    value = operand_of(node, index) if not is_op(node, "Relu") else None
    array = np.full((), default, np.int32) if value is None else constant(value)
    if array is None:
        raise DeclinedError(f"its input {index} is computed at run time", node)
    number = float(p.real(array.reshape(())))
    return builder.scalar(number, quantity.real.dtype or p.floats, f"{node.outputs[0].name}.bound")


def _parameters(node: ir.Node, integer_type: ir.DataType | None, floats: ir.DataType | None) -> Parameters:
    axis, block = (
        default if (found := node.attributes.get(name)) is None else found.as_int()
        for name, default in (("axis", 1), ("block_size", 0))
    )
    return read_parameters(
        operand_of(node, 1), operand_of(node, 2), integer_type, axis=axis, block=block, floats=floats
    )


def _output_type(node: ir.Node) -> ir.DataType | None:
    zero, found = operand_of(node, 2), node.attributes.get("output_dtype")
    if zero is not None:
        return zero.dtype
    return ir.DataType.UINT8 if found is None or not found.as_int() else ir.DataType(found.as_int())


@dataclass(frozen=True)
class _Rows:
    """Rows of a constant table that are picked and then changed one by one: rows of the changed table.

    Attributes:
        table: a constant.
        indices: of the rows.
        changed: what happens to any number of rows, [n, ...] to [n, ...]; None for nothing.
    """

    table: ir.Value
    indices: ir.Value
    changed: Callable[[np.ndarray], np.ndarray] | None = None

    def then(self, change: Callable[[np.ndarray], np.ndarray]) -> _Rows:
        """The same rows with one more change."""
        before = self.changed
        return replace(self, changed=change if before is None else lambda rows: change(before(rows)))

    def whole(self, builder: Builder) -> ir.Value:
        """The changed table, a constant."""
        tensor = constant_tensor(self.table)
        assert tensor is not None
        if self.changed is None:
            return self.table
        sample = self.changed(tensor.numpy()[:1])
        dtype = ir.DataType.from_numpy(sample.dtype)
        return builder.weight(
            self.table, derived(tensor, self.changed, dtype, (tensor_shape(tensor)[0], *sample.shape[1:]))
        )


def _looked_up(builder: Builder, node: ir.Node) -> bool:
    """DequantizeLinear (q[i], s[i], z[i]): rows of a table with scales in rows or blocks, packed or not."""
    read = [None if value is None else _rows(value) for value in node.inputs]
    rows, result = read[0], node.outputs[0]
    if rows is None or len(read) < 2:
        return False
    for value, one in zip(node.inputs[1:], read[1:], strict=True):
        if value is not None and (one is None or one.indices is not rows.indices):
            return False
    table, scale, zero = [*(None if one is None else one.whole(builder) for one in read), None][:3]
    assert table is not None
    axis, block = node.attributes.get("axis"), node.attributes.get("block_size")
    gathered = rank(result)
    if gathered is None or block is None:
        raise DeclinedError("its rows are picked from a table whose scales are not in blocks", node)
    position = 1 if axis is None else axis.as_int()
    parameters = read_parameters(
        scale,
        zero,
        table.dtype,
        axis=position - gathered if position >= 0 else position,
        block=block.as_int(),
        floats=result.dtype,
    )
    weight = builder.folded(table, parameters)
    builder.replace(result, builder.emit(node, "Gather", [weight, rows.indices], like=result, attributes={"axis": 0}))
    return True


def _rows(value: ir.Value) -> _Rows | None:
    """The rows that a value is made of, None where it is not known to be rows of one constant."""
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    if is_op(node, "Gather"):
        table, indices = node.inputs
        stored = table is not None and constant_tensor(table) is not None and not _axis(node)
        return _Rows(table, indices) if stored and table is not None and indices is not None else None
    if is_op(node, "Concat"):
        return _joined_rows(node)
    if is_op(node, "ConstantOfShape"):  # a number for each
        shape, filling = node.inputs[0].producer(), node.attributes.get("value")
        if not is_op(shape, "Shape") or shape is None or shape.attributes or shape.inputs[0] is None or filling is None:
            return None
        rows, number = _rows(shape.inputs[0]), filling.as_tensor().numpy().reshape(())
        return None if rows is None else rows.then(lambda found: np.full(found.shape, number))
    if not is_op(node, "BitShift", "BitwiseAnd"):
        return None
    rows, operand = _rows(node.inputs[0]), constant(node.inputs[1])
    if rows is None or operand is None or operand.size != 1:
        return None
    operate: np.ufunc = np.bitwise_and
    if is_op(node, "BitShift"):
        operate = np.left_shift if node.attributes["direction"].as_string() == "LEFT" else np.right_shift
    return rows.then(lambda found: operate(found, operand.reshape(())))


def _joined_rows(node: ir.Node) -> _Rows | None:
    """Concat along the last axis of the same rows, each changed in its own way (the bits of packed integers)."""
    parts = [None if value is None else _rows(value) for value in node.inputs]
    found, first = [part for part in parts if part is not None], parts[0]
    axes = {-1, (rank(node.outputs[0]) or 0) - 1}
    if first is None or len(found) < len(parts) or node.attributes["axis"].as_int() not in axes:
        return None
    if any(part.table is not first.table or part.indices is not first.indices for part in found):
        return None
    changes = [part.changed for part in found]
    return replace(
        first,
        changed=lambda rows: np.concatenate([rows if one is None else one(rows) for one in changes], axis=-1),
    )


def _axis(gather: ir.Node) -> int:
    found = gather.attributes.get("axis")
    return 0 if found is None else found.as_int()


MOVE_RULES: Mapping[tuple[str, str], Rule] = {
    ("", "QuantizeLinear"): quantize_linear,
    ("", "DequantizeLinear"): dequantize_linear,
    ("com.microsoft", "QuantizeLinear"): quantize_linear,
    ("com.microsoft", "DequantizeLinear"): dequantize_linear,
    ("", "DynamicQuantizeLinear"): dynamic_quantize_linear,
    ("", "Pad"): pad,
    ("", "Clip"): clip,
    ("", "Relu"): clip,
    **{("", name): several for name in ("Concat", "Where", "Max", "Min")},
    **{("", name): move for name in MOVES},
    ("com.microsoft", "QLinearAdd"): elementwise,
    ("com.microsoft", "QLinearMul"): elementwise,
    ("com.microsoft", "QLinearWhere"): where,
    ("com.microsoft", "QLinearConcat"): concat,
    ("com.microsoft", "QLinearReduceMean"): reduce_mean,
    **{
        ("com.microsoft", f"QLinear{name}"): unary
        for name in ("Sigmoid", "LeakyRelu", "Softmax", "GlobalAveragePool", "AveragePool")
    },
}
"""The rule of each operator that is not linear, by domain and name."""
