"""Linear operators on integers as the float operators that they stand for.

    QLinearConv, QLinearMatMul, QGemm           s_y (q_y - z_y) = s_a s_b sum (q_a - z_a) (q_b - z_b) + s_a s_b q_bias
    MatMulInteger, ConvInteger                  sum (q_a - z_a) (q_b - z_b), scaled by what stands behind it
    MatMulIntegerToFloat, DynamicQuantizeMatMul the same with the scales inside
    MatMulNBits, GatherBlockQuantized           integers packed in bytes, one scale a block
    DynamicQuantizeLSTM                         weights transposed, one scale a direction or a column

ONNX operator versions 10 and 21, and the operators of the com.microsoft domain of onnxruntime 1.31.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.rewrite import DeclinedError, constant, constant_tensor, is_op, sole_consumer
from graphopt.passes.dequantize_builder import Builder, Rule, operand_of
from graphopt.passes.dequantize_values import Parameters, derived, read_parameters, unpacked

_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_LSTM = ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget")
_PACKED = (2, 4, 8)
"""Widths of packed integers that are read."""


def qlinear_conv(builder: Builder, node: ir.Node) -> None:
    """QLinearConv (x, x_s, x_z, w, w_s, w_z, y_s, y_z, bias), scales of w by output channel."""
    _forbid(node, "channels_last")
    data = builder.operand(node, 0, 1, 2)
    weight = builder.operand(node, 3, 4, 5, axis=0)
    operands = [data, weight]
    if operand_of(node, 8) is not None:
        operands.append(_bias(builder, node, 8, _scales(node, 1) * _scales(node, 4), 0))
    real = _emit(builder, node, "Conv", operands, _attributes(node, _CONV), data)
    builder.publish(node, node.outputs[0], real, 6, 7)


def qlinear_matmul(builder: Builder, node: ir.Node) -> None:
    """QLinearMatMul (a, a_s, a_z, b, b_s, b_z, y_s, y_z), scales of a by row and of b by column."""
    operands = [builder.operand(node, 0, 1, 2, axis=-2), builder.operand(node, 3, 4, 5, axis=-1)]
    builder.publish(node, node.outputs[0], _emit(builder, node, "MatMul", operands, [], operands[0]), 6, 7)


def qgemm(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.QGemm (a, a_s, a_z, b, b_s, b_z, c, y_s, y_z); c in units of alpha a_s b_s, y optional."""
    transposed = node.attributes.get("transB")
    axis = 0 if transposed is not None and transposed.as_int() else 1
    operands = [builder.operand(node, 0, 1, 2), builder.operand(node, 3, 4, 5, axis=axis)]
    if operand_of(node, 6) is not None:
        alpha = node.attributes.get("alpha")
        scale = _scales(node, 1) * _scales(node, 4) * np.float32(1.0 if alpha is None else alpha.as_float())
        operands.append(_bias(builder, node, 6, scale, -1))
    real = _emit(builder, node, "Gemm", operands, _attributes(node, ("alpha", "transA", "transB")), operands[0])
    if operand_of(node, 7) is None:
        builder.replace(node.outputs[0], real)
    else:
        builder.publish(node, node.outputs[0], real, 7, 8)


def matmul_integer_to_float(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.MatMulIntegerToFloat (a, b, a_s, b_s, a_z, b_z, bias)."""
    operands = [builder.operand(node, 0, 2, 4), builder.operand(node, 1, 3, 5, axis=-1)]
    _replace_product(builder, node, operands, operand_of(node, 6))


def dynamic_quantize_matmul(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.DynamicQuantizeMatMul (a, b, b_s, b_z, bias), a in float."""
    data = operand_of(node, 0)
    assert data is not None
    _replace_product(builder, node, [data, builder.operand(node, 1, 2, 3, axis=-1)], operand_of(node, 4))


def matmul_nbits(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.MatMulNBits (a, b, s, z, g_idx, bias): b [N, blocks, bytes], unpacked to a weight [K, N]."""
    data, packed = operand_of(node, 0), operand_of(node, 1)
    stored, scales = constant_tensor(packed), constant(operand_of(node, 2))
    assert data is not None
    if packed is None or stored is None or scales is None:
        raise DeclinedError("its weight or scale is computed at run time", node)
    depth, channels, bits, block = (_integer(node, name, default) for name, default in _NBITS_ATTRIBUTES)
    if bits not in _PACKED:
        raise DeclinedError(f"its weight has {bits} bits", node)
    if min(depth, channels, block) < 1:
        raise DeclinedError(f"its weight is {depth} x {channels} in blocks of {block}", node)
    blocks = -(-depth // block)
    if stored.size != channels * blocks * block * bits // 8 or scales.size != channels * blocks:
        raise DeclinedError("its weight does not have the size that its attributes say", node)
    zeros = _packed_zeros(node, 3, bits, channels, blocks)
    groups = np.arange(depth) // block
    given = operand_of(node, 4)
    if given is not None:
        order = constant(given)
        if order is None or order.size < depth:
            raise DeclinedError("its groups (g_idx) are computed at run time", node)
        groups = order.reshape(-1)[:depth].astype(np.int64)
        if groups.size and not 0 <= groups.min() <= groups.max() < blocks:
            raise DeclinedError("its groups (g_idx) lie outside of its scales", node)
    scales = scales.astype(np.float32).reshape(channels, blocks)

    def weight(array: np.ndarray) -> np.ndarray:
        integers = unpacked(array.reshape(channels, -1), bits, depth).astype(np.float32)
        return ((integers - zeros[:, groups]) * scales[:, groups]).T.astype(dtype.numpy())

    dtype = data.dtype or ir.DataType.FLOAT
    made = builder.weight(packed, derived(stored, weight, dtype, (depth, channels)))
    _replace_product(builder, node, [data, made], operand_of(node, 5))


_NBITS_ATTRIBUTES = (("K", 0), ("N", 0), ("bits", 4), ("block_size", 0))


def _packed_zeros(node: ir.Node, index: int, bits: int, channels: int, blocks: int) -> np.ndarray:
    """Zero points as float32 [channels, blocks]: half of the range where absent, packed like the integers or floats."""
    value = operand_of(node, index)
    if value is None:
        return np.full((channels, blocks), 2 ** (bits - 1), np.float32)
    stored = constant(value)
    if stored is None:
        raise DeclinedError("its zero points are computed at run time", node)
    if stored.dtype == np.uint8:
        if stored.size % channels or stored.size // channels * 8 // bits < blocks:
            raise DeclinedError("its zero points do not fit its scales", node)
        stored = unpacked(stored.reshape(channels, -1), bits, blocks)
    if stored.size != channels * blocks:
        raise DeclinedError("its zero points do not fit its scales", node)
    return stored.astype(np.float32).reshape(channels, blocks)


def gather_block_quantized(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.GatherBlockQuantized (data, indices, s, z): a Gather of the float table."""
    table, scale, zero = (operand_of(node, index) for index in (0, 2, 3))
    stored, scales = constant_tensor(table), constant(scale)
    if table is None or stored is None or scales is None:
        raise DeclinedError("its table or scale is computed at run time", node)
    shape = tensor_shape(stored)
    bits = _integer(node, "bits", 4)
    packed = stored.dtype == ir.DataType.UINT8 and bits < 8
    if packed:
        shape = (*shape[:-1], shape[-1] * 8 // bits)
    axis = _integer(node, "quantize_axis", 1) % len(shape)
    zeros = None if zero is None else constant(zero)
    if zero is not None and zeros is None:
        raise DeclinedError("its zero points are computed at run time", node)
    if zeros is None:
        zeros = np.full(scales.shape, 2 ** (bits - 1) if stored.dtype == ir.DataType.UINT8 else 0, np.int32)
    elif packed:
        zeros = unpacked(zeros, bits, scales.shape[-1])
    if zeros.shape != scales.shape:
        raise DeclinedError("its zero points do not fit its scales", node)
    block, dtype = _integer(node, "block_size", 128), ir.DataType.from_numpy(scales.dtype)
    p = Parameters(scales.astype(np.float32), zeros.astype(np.int32), axis, block, ir.DataType.INT32, dtype)
    p.check(shape)

    def weight(array: np.ndarray) -> np.ndarray:
        return p.real(unpacked(array, bits, shape[-1]) if packed else array)

    made = builder.weight(table, derived(stored, weight, dtype, shape))
    attributes = {"axis": _integer(node, "gather_axis", 0)}
    result = builder.emit(node, "Gather", [made, node.inputs[1]], like=node.outputs[0], attributes=attributes)
    builder.replace(node.outputs[0], result)


def dynamic_quantize_lstm(builder: Builder, node: ir.Node) -> None:
    """com.microsoft.DynamicQuantizeLSTM: W [directions, inputs, 4 hidden], scales by direction, or by column too."""
    weights: list[ir.Value | None] = []
    for index, scale, zero in ((1, 8, 9), (2, 10, 11)):
        value = operand_of(node, index)
        stored, scales, zeros = (
            constant_tensor(value), constant(operand_of(node, scale)), constant(operand_of(node, zero)),
        )  # fmt: skip
        if value is None or stored is None or scales is None or zeros is None:
            raise DeclinedError("its weights or scales are computed at run time", node)
        directions, rows, columns = tensor_shape(stored)
        if scales.size not in (directions, directions * columns) or zeros.size not in (1, directions, scales.size):
            raise DeclinedError("its scales do not fit its weights", node)
        spread = scales.reshape(directions, 1, -1)
        offset = zeros.astype(np.int32).reshape(1 if zeros.size == 1 else directions, 1, -1)

        def weight(array: np.ndarray, spread: np.ndarray = spread, offset: np.ndarray = offset) -> np.ndarray:
            real = (array.astype(np.int32) - offset).astype(np.float32) * spread
            return real.transpose(0, 2, 1)

        weights.append(builder.weight(value, derived(stored, weight, ir.DataType.FLOAT, (directions, columns, rows))))
    results = builder.emit_several(
        node,
        "LSTM",
        [operand_of(node, 0), *weights, *(operand_of(node, index) for index in range(3, 8))],
        like=node.outputs,
        dtypes=[value.dtype for value in node.outputs],
        attributes=_attributes(node, _LSTM),
    )
    for old, new in zip(node.outputs, results, strict=True):
        builder.replace(old, new)


def integer_product(builder: Builder, node: ir.Node) -> None:
    """MatMulInteger (a, b, a_z, b_z) and ConvInteger, with the Cast and the Muls by scales behind them.

    An operand is constant, static (its scale is a number) or dynamic (its scale is a value, by which something behind
    the product multiplies; where nothing does, the float product is divided by it).
    """
    convolution = node.op_type == "ConvInteger"
    cast = sole_consumer(node.outputs[0])
    if cast is None or not is_op(cast, "Cast") or cast.attributes["to"].as_int() != ir.DataType.FLOAT:
        raise DeclinedError("its int32 result is read by something else than a Cast to float", node)
    pending: list[ir.Value] = []
    factor = np.ones((), np.float64)
    sides: list[tuple[ir.Value, Parameters] | ir.Value] = []
    for index in (0, 1):
        value = operand_of(node, index)
        assert value is not None
        if constant_tensor(value) is not None:
            axis = 0 if convolution else (-1 if index else -2)
            sides.append((value, _integers(node, value, index + 2, axis)))
        elif value in builder.dynamic:
            made_by = builder.dynamic[value]
            if operand_of(node, index + 2) is not made_by.zero:
                raise DeclinedError("it reads integers of DynamicQuantizeLinear with another zero point", node)
            pending.append(made_by.scale)
            sides.append(made_by.real)
        else:
            real, scale = _static_operand(builder, node, value, index)
            factor = factor / scale
            sides.append(real)
    result, known, absorbed = _scaled_result(cast, pending)
    factor = factor * known
    taker = next((index for index, side in enumerate(sides) if _takes(side, index, factor, convolution)), None)
    operands = [
        side if isinstance(side, ir.Value) else builder.folded(side[0], _scaled(side[1], factor, index == taker))
        for index, side in enumerate(sides)
    ]
    operator, attributes = ("Conv", _attributes(node, _CONV)) if convolution else ("MatMul", [])
    made = _emit(builder, node, operator, operands, attributes, result)
    if taker is None and not (factor.size == 1 and float(factor.reshape(())) == 1.0):
        made = builder.emit(node, "Mul", [made, builder.constant(factor, ir.DataType.FLOAT, "scale")], like=result)
    for scale in () if absorbed else pending:
        made = builder.emit(node, "Div", [made, scale], like=result)
    builder.replace(result, made)


def _takes(side: tuple[ir.Value, Parameters] | ir.Value, index: int, factor: np.ndarray, convolution: bool) -> bool:
    """Whether a constant operand takes the factor: one number, or of a MatMul's right side one a column."""
    if isinstance(side, ir.Value):
        return False
    if factor.size == 1:
        return True
    stored = constant_tensor(side[0])
    assert stored is not None
    columns = factor.shape[-1:] == (factor.size,) and tensor_shape(stored)[-1:] == (factor.size,)
    return index == 1 and not convolution and columns


def _scaled(parameters: Parameters, factor: np.ndarray, takes: bool) -> Parameters:
    """The parameters of a constant operand, the factor in its scale where it takes that."""
    p = parameters
    if not takes:
        return p
    scale = p.scale * factor.reshape(-1 if factor.size > 1 else ()).astype(np.float32)
    if scale.ndim == 0:
        return Parameters(scale, p.zero, None, 0, p.integers, p.floats)
    axis = -1 if p.axis is None else p.axis
    return Parameters(scale, np.broadcast_to(p.zero, scale.shape), axis, 0, p.integers, p.floats)


def _integers(node: ir.Node, value: ir.Value, zero: int, axis: int) -> Parameters:
    """A constant operand of an integer product: scale 1, zero points by tensor or channel."""
    stored = operand_of(node, zero)
    zeros = np.zeros((), np.int32) if stored is None else constant(stored)
    if zeros is None or value.dtype is None:
        raise DeclinedError("the zero point of its weight is computed at run time", node)
    zeros = zeros.astype(np.int32).reshape(() if zeros.size == 1 else -1)
    p = Parameters(
        np.ones(zeros.shape, np.float32), zeros, axis if zeros.ndim else None, 0, value.dtype, ir.DataType.FLOAT
    )
    tensor = constant_tensor(value)
    assert tensor is not None
    p.check(tensor_shape(tensor))
    return p


def _static_operand(builder: Builder, node: ir.Node, value: ir.Value, index: int) -> tuple[ir.Value, np.ndarray]:
    """An operand that was quantized with a known scale: the float value, and the scale."""
    quantity = builder.quantities.get(value)
    zero = operand_of(node, index + 2)
    zeros = np.zeros(()) if zero is None else constant(zero)
    if quantity is None or quantity.parameters.axis is not None:
        raise DeclinedError("nothing is known of its integers", node)
    if zeros is None or zeros.size != 1 or int(zeros.reshape(())) != int(quantity.parameters.zero):
        raise DeclinedError("it reads integers with another zero point than they were made with", node)
    return quantity.real, quantity.parameters.scale.astype(np.float64)


def _scaled_result(cast: ir.Node, scales: Sequence[ir.Value]) -> tuple[ir.Value, np.ndarray, bool]:
    """The value behind the Muls that multiply by all of `scales`, the constants among the factors, and whether so."""
    value, pending, factor = cast.outputs[0], list(scales), np.ones(())
    while pending:
        product = sole_consumer(value)
        if not is_op(product, "Mul"):
            break
        assert product is not None
        others = [operand for operand in product.inputs if operand is not value]
        if len(others) != 1 or others[0] is None:
            break
        values, known = _factors(others[0])
        if any(values.count(one) > pending.count(one) for one in values):
            break
        for one in values:
            pending.remove(one)
        factor, value = factor * known, product.outputs[0]
    if pending:
        return cast.outputs[0], np.ones(()), False
    return value, factor, True


def _factors(value: ir.Value, depth: int = 4) -> tuple[list[ir.Value], np.ndarray]:
    """A value as a product of values and a constant."""
    array, node = constant(value), value.producer()
    if array is not None:
        return [], array.astype(np.float64)
    if depth == 0 or not is_op(node, "Mul"):
        return [value], np.ones(())
    assert node is not None
    values: list[ir.Value] = []
    known = np.ones(())
    for operand in node.inputs:
        assert operand is not None
        inner, factor = _factors(operand, depth - 1)
        values, known = values + inner, known * factor
    return values, known


def _replace_product(builder: Builder, node: ir.Node, operands: list[ir.Value], bias: ir.Value | None) -> None:
    result = node.outputs[0]
    made = _emit(builder, node, "MatMul", operands, [], result)
    if bias is not None:
        made = builder.emit(node, "Add", [made, bias], like=result)
    builder.replace(result, made)


def _emit(
    builder: Builder,
    node: ir.Node,
    op_type: str,
    operands: Sequence[ir.Value],
    attributes: Sequence[ir.Attr],
    typed: ir.Value,
) -> ir.Value:
    dtype = typed.dtype or ir.DataType.FLOAT
    return builder.emit(node, op_type, operands, like=node.outputs[0], dtype=dtype, attributes=attributes)


def _bias(builder: Builder, node: ir.Node, index: int, scale: np.ndarray, axis: int) -> ir.Value:
    """An int32 bias in units of the accumulator."""
    value = operand_of(node, index)
    assert value is not None
    scale = np.asarray(scale, np.float32).reshape(() if scale.size == 1 else -1)
    of = axis if scale.ndim else None
    zero = np.zeros(scale.shape, np.int32)
    return builder.real(value, Parameters(scale, zero, of, 0, ir.DataType.INT32, ir.DataType.FLOAT), node)


def _scales(node: ir.Node, index: int) -> np.ndarray:
    return read_parameters(operand_of(node, index), None, ir.DataType.INT32).scale


def _attributes(node: ir.Node, names: Sequence[str]) -> list[ir.Attr]:
    return [attribute for name in names if (attribute := node.attributes.get(name)) is not None]


def _integer(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def _forbid(node: ir.Node, name: str) -> None:
    if _integer(node, name, 0):
        raise DeclinedError(f"its {name} is {_integer(node, name, 0)}", node)


LINEAR_RULES: Mapping[tuple[str, str], Rule] = {
    ("", "QLinearConv"): qlinear_conv,
    ("com.microsoft", "QLinearConv"): qlinear_conv,
    ("", "QLinearMatMul"): qlinear_matmul,
    ("com.microsoft", "QGemm"): qgemm,
    ("com.microsoft", "MatMulIntegerToFloat"): matmul_integer_to_float,
    ("com.microsoft", "DynamicQuantizeMatMul"): dynamic_quantize_matmul,
    ("com.microsoft", "MatMulNBits"): matmul_nbits,
    ("com.microsoft", "GatherBlockQuantized"): gather_block_quantized,
    ("com.microsoft", "DynamicQuantizeLSTM"): dynamic_quantize_lstm,
    ("", "MatMulInteger"): integer_product,
    ("", "ConvInteger"): integer_product,
}
"""The rule of each linear operator, by domain and name."""
