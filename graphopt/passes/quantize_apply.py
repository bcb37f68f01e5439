"""Write a `QuantizePlan` into a graph: QuantizeLinear and DequantizeLinear around kernels, integers in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir.linear import linear_at
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.rewrite import Rewriter, constant, discard_if_dead, discard_if_unread, is_op, rank
from graphopt.passes.quantize_placement import (
    attribute,
    clamp_bounds,
    data_inputs,
    node_name,
    scaling_factor,
)
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.passes.quantize_products import is_product

INT32_LIMIT = 2**31 - 1
"""Largest magnitude of an int32 bias."""


def apply_plan(model: ir.Model, plan: QuantizePlan) -> None:
    """Rewrite `model`, already legalized, as the plan says.

    Raises:
        GraphoptError: the plan names a node or tensor that this model does not have: it was made for another.
    """
    _Writer(model, plan).write()


class _Writer:
    """One application of a plan. Nodes are visited in graph order, so every input is done before its readers."""

    def __init__(self, model: ir.Model, plan: QuantizePlan) -> None:
        self.model = model
        self.rewriter = Rewriter(model)
        self.operators = {operator.node: operator for operator in plan.operators if operator.form != "float"}
        self.activations = {tensor.name: tensor for tensor in plan.tensors if tensor.role != "weight"}
        self.weights = {(tensor.name, tensor.axis): tensor for tensor in plan.tensors if tensor.role == "weight"}
        self.integers: dict[ir.Value, ir.Value] = {}
        """A float value whose integers exist to the integers."""
        self.plans: dict[ir.Value, TensorPlan] = {}
        """A float value whose integers exist to the quantizer that they are in."""
        self.floats: dict[ir.Value, ir.Value] = {}
        """A float value from outside a region to the dequantized one that kernels read instead."""
        self.parameters: dict[tuple[object, ...], ir.Value] = {}
        self.dynamic: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def write(self) -> None:
        nodes = list(self.model.graph)
        unknown = set(self.operators) - {node_name(node) for node in nodes}
        if unknown:
            raise GraphoptError(
                "the quantization plan was made for another model",
                where=f"node {sorted(unknown)[0]!r} of the plan is not in the model",
                help="apply a plan to the very model that it was made from",
            )
        for node in nodes:
            operator = self.operators.get(node_name(node))
            if operator is None:
                continue
            if operator.op_type != node.op_type:
                raise GraphoptError(
                    f"the quantization plan was made for another model: it takes {node_name(node)!r} for "
                    f"{operator.op_type}, which is {node.op_type}"
                )
            write = {
                "static": self._static,
                "integer": self._integer,
                "folded": self._folded,
                "dynamic": self._dynamic,
                "table": self._table,
            }
            write[operator.form](node)
        for dequantized in set(self.integers):
            producer = dequantized.producer()
            if producer is not None and is_op(producer, "DequantizeLinear"):
                discard_if_dead(producer)
        for value in list(self.model.graph.initializers.values()):
            discard_if_unread(value)

    # Static: DequantizeLinear -> operator -> QuantizeLinear, the form that onnxruntime turns into one int8 kernel.

    def _static(self, node: ir.Node) -> None:
        readable = {value: self._dequantized(value, node) for value in data_inputs(node)}
        for index, value in enumerate(node.inputs):
            if value in readable and not (index > 0 and linear_operator(node)):
                node.replace_input_with(index, readable[value])
        if linear_operator(node):
            self._static_weight(node)
        output = node.outputs[0]
        readers = output.consumers()
        clamp = readers[0] if len(readers) == 1 else None
        folded = clamp is not None and self._form(clamp) == "folded"
        planned = self.activations.get((clamp.outputs[0].name if folded and clamp else output.name) or "")
        if planned is None:
            self._part_from_bias(node)
            return
        quantized = self._saturated(self._quantize_linear(output, planned, after=node), planned)
        self._publish(output, quantized, planned)

    def _part_from_bias(self, node: ir.Node) -> None:
        """Give the bias behind a MatMul as many axes as the product has.

        onnxruntime makes a Gemm between two Reshapes of MatMul and a bias of one axis, before a provider sees either.
        """
        product = node.outputs[0]
        readers, of_rank = product.consumers(), rank(product)
        if not is_op(node, "MatMul") or len(readers) != 1 or not is_op(readers[0], "Add") or of_rank is None:
            return
        index = 1 if readers[0].inputs[0] is product else 0
        bias, array = readers[0].inputs[index], constant(readers[0].inputs[index])
        if bias is not None and array is not None and array.ndim == 1 < of_rank:
            readers[0].replace_input_with(
                index, self._parameter(bias, "bias", array.reshape(*[1] * (of_rank - 1), -1), None)
            )
            discard_if_unread(bias)

    def _static_weight(self, node: ir.Node) -> None:
        linear = linear_at(node)
        value = node.inputs[1]
        assert linear is not None
        assert value is not None
        bias = linear.bias() if not is_op(node, "MatMul") else np.zeros(0)
        source = node.inputs[0]
        assert source is not None
        scale_of_data = self.plans[source].scale[0]
        planned = self._weight_plan(value, weight_axis(node))
        axis = planned.axis
        integers = self._parameter(value, "quantized", planned.quantize(_array(value)), planned.axis)
        scale = np.asarray(planned.scale, np.float32)
        operands = [integers, self._parameter(value, "scale", scale, axis)]
        operands.append(self._parameter(value, "zero_point", np.zeros(scale.size, np.int8), axis))
        dequantize = self._before(node, "DequantizeLinear", operands, value, ir.DataType.FLOAT, {"axis": axis or 0})
        dequantize.shape = value.shape
        node.replace_input_with(1, dequantize)
        discard_if_unread(value)
        if bias.any():
            self._static_bias(node, bias, scale.astype(np.float64) * scale_of_data)

    def _static_bias(self, node: ir.Node, bias: np.ndarray, scale: np.ndarray) -> None:
        """int32 bias in the scale of the accumulator, input scale times weight scale, so that it just adds."""
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        old = node.inputs[2]
        stem = f"{old.name if old is not None else node_name(node)}"
        stored = scale.astype(np.float32)
        integers = np.clip(np.rint(bias / stored), -INT32_LIMIT, INT32_LIMIT).astype(np.int32)
        like = node.outputs[0]
        operands = [self._initializer(f"{stem}.quantized", integers), self._initializer(f"{stem}.scale", stored)]
        value = self._before(node, "DequantizeLinear", operands, like, ir.DataType.FLOAT, {"axis": 0}, name=stem)
        value.shape = ir.Shape(bias.shape)
        node.replace_input_with(2, value)
        if old is not None:
            discard_if_unread(old)

    # Integer: the operator itself, on integers.

    def _integer(self, node: ir.Node) -> None:
        data = data_inputs(node)[0]
        dequantized = self._dequantized(data, node)
        integers = self.integers[dequantized]
        planned = self.plans[dequantized]
        factor = scaling_factor(node)
        if factor is not None:
            name, scale = node.outputs[0].name or "", planned.scale[0] * factor
            self._publish(node.outputs[0], integers, replace(planned, name=name, scale=(scale,)))
            return
        operands = [integers, *node.inputs[1:]]
        operator, attributes = node.op_type, list(node.attributes.values())
        if is_op(node, "Relu", "Clip"):
            operator, attributes = "Clip", []
            operands = [integers, *self._integer_bounds(node, planned)]
        elif is_op(node, "Pad") and attribute(node, "mode", "constant") == "constant":
            operands = [integers, node.inputs[1], self._scalar(planned.zero_point[0], planned), *node.inputs[3:]]
        outputs = [ir.Value(name=self.rewriter.unique_name(f"{v.name}.quantized"), shape=v.shape) for v in node.outputs]
        for value in outputs:
            value.type = integers.type
        moved = ir.Node("", operator, operands, attributes, outputs=outputs)
        moved.name = self.rewriter.unique_name(f"{node_name(node)}.integer")
        self.model.graph.insert_after(node, moved)
        for old, new in zip(node.outputs, outputs, strict=True):
            self._publish(old, new, planned)

    def _integer_bounds(self, node: ir.Node, planned: TensorPlan) -> list[ir.Value]:
        bounds = clamp_bounds(node)
        assert bounds is not None
        zero, (low, high) = planned.zero_point[0], planned.limits
        return [
            self._scalar(int(np.clip(np.rint(np.clip(bound / planned.scale[0], -1e6, 1e6)) + zero, low, high)), planned)
            for bound in bounds
        ]

    def _folded(self, node: ir.Node) -> None:
        """A clamp that the quantizer before it has done: its readers read what it reads."""
        source = node.inputs[0]
        assert source is not None
        integers = self.integers[source]
        self._publish(node.outputs[0], integers, self.plans[source])

    # Dynamic: the range of the input is taken at run time; fuses to DynamicQuantizeMatMul or MatMulIntegerToFloat.

    def _dynamic(self, node: ir.Node) -> None:
        data, value, result = node.inputs[0], node.inputs[1], node.outputs[0]
        assert data is not None
        assert value is not None
        linear = linear_at(node)
        assert linear is not None
        if data not in self.dynamic:
            self.dynamic[data] = self._quantize_dynamically(node, data)
        integers, scale, zero = self.dynamic[data]
        axis = weight_axis(node)
        planned = self._weight_plan(value, axis)
        stored = planned.quantize(_array(value))
        weight = self._parameter(value, "quantized", stored if axis == 1 else stored.T, axis, "columns")
        weight_scale = self._parameter(value, "scale", np.asarray(planned.scale, np.float32), axis)
        name = node_name(node)
        product = self._before(node, "MatMulInteger", [integers, weight, zero], result, ir.DataType.INT32, name=name)
        cast = self._before(node, "Cast", [product], result, ir.DataType.FLOAT, {"to": 1}, name=name)
        scales = self._before(node, "Mul", [scale, weight_scale], result, ir.DataType.FLOAT, name=f"{name}.scale")
        scaled = self._before(node, "Mul", [cast, scales], result, ir.DataType.FLOAT, name=name)
        for value_of_result in (product, cast, scaled):
            value_of_result.shape = result.shape
        if is_op(node, "Gemm") and linear.bias().any():
            bias = self._initializer(f"{name}.bias", linear.bias().astype(np.float32))
            scaled = self._before(node, "Add", [scaled, bias], result, ir.DataType.FLOAT, name=name)
        self.rewriter.supersede(result, scaled)
        for operand in (value, *node.inputs[2:]):
            if operand is not None:
                discard_if_unread(operand)

    def _quantize_dynamically(self, node: ir.Node, data: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        names = [self.rewriter.unique_name(f"{data.name}.{part}") for part in ("quantized", "scale", "zero_point")]
        values = [ir.Value(name=name) for name in names]
        for value, dtype in zip(values, (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8), strict=True):
            value.dtype = dtype
            value.shape = ir.Shape(())
        values[0].shape = data.shape
        quantize = ir.Node("", "DynamicQuantizeLinear", [data], outputs=values)
        quantize.name = names[0]
        self.model.graph.insert_before(node, quantize)
        return values[0], values[1], values[2]

    def _table(self, node: ir.Node) -> None:
        """Rows of an embedding: picked as integers, dequantized behind."""
        table, result = node.inputs[0], node.outputs[0]
        assert table is not None
        planned = self._weight_plan(table, 1)
        integers = self._parameter(table, "quantized", planned.quantize(_array(table)), 1)
        scale = self._parameter(table, "scale", np.asarray(planned.scale, np.float32), 1)
        zero = self._parameter(table, "zero_point", np.zeros(len(planned.scale), np.int8), 1)
        rows = self._before(node, "Gather", [integers, node.inputs[1]], result, ir.DataType.INT8, {"axis": 0})
        rows.shape = result.shape
        dequantized = self._before(
            node, "DequantizeLinear", [rows, scale, zero], result, ir.DataType.FLOAT, {"axis": -1}
        )
        self.rewriter.supersede(result, dequantized)
        discard_if_unread(table)

    # Values.

    def _dequantized(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """The value as kernels read it: behind DequantizeLinear. Made here where it comes from outside a region."""
        if value in self.integers:
            return value
        if value in self.floats:
            return self.floats[value]
        planned = self.activations.get(value.name or "")
        if planned is None:
            raise GraphoptError(
                "the quantization plan was made for another model", where=f"no range for {value.name!r}"
            )
        array = constant(value)
        if array is None:
            quantized = self._saturated(self._quantize_linear(value, planned, before=reader), planned)
        else:
            quantized = self._parameter(value, "quantized", planned.quantize(array), None)
        dequantized = self._before(
            reader, "DequantizeLinear", [quantized, *self._quantizer(planned)], value, ir.DataType.FLOAT
        )
        dequantized.shape = value.shape
        self.integers[dequantized], self.plans[dequantized] = quantized, planned
        self.floats[value] = dequantized
        return dequantized

    def _publish(self, value: ir.Value, quantized: ir.Value, planned: TensorPlan) -> None:
        """Let every reader of `value` read the dequantized `quantized` instead, and remember the integers."""
        producer = quantized.producer()
        assert producer is not None
        dequantize = self.rewriter.insert(
            producer,
            "DequantizeLinear",
            [quantized, *self._quantizer(planned)],
            like=quantized,
            suffix="dequantized",
        )
        result = dequantize.outputs[0]
        result.type = ir.TensorType(ir.DataType.FLOAT)
        result.shape = value.shape
        writer = value.producer()
        before = {producer, *(operand.producer() for operand in producer.inputs if operand is not None)}
        for use in tuple(value.uses()):
            if use.node not in before:
                use.node.replace_input_with(use.idx, result)
        graph = self.model.graph
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = result
                result.name, value.name = value.name, result.name
        self.integers[result], self.plans[result] = quantized, planned
        if writer is not None and writer is not producer:
            discard_if_dead(writer)

    def _quantize_linear(
        self, value: ir.Value, planned: TensorPlan, *, before: ir.Node | None = None, after: ir.Node | None = None
    ) -> ir.Value:
        result = ir.Value(name=self.rewriter.unique_name(f"{planned.name}.quantized"), shape=value.shape)
        result.dtype = ir.DataType.from_numpy(planned.dtype)
        node = ir.Node("", "QuantizeLinear", [value, *self._quantizer(planned)], outputs=[result])
        node.name = result.name
        if after is not None:
            self.model.graph.insert_after(after, node)
        elif before is not None:
            self.model.graph.insert_before(before, node)
        return result

    def _saturated(self, quantized: ir.Value, planned: TensorPlan) -> ir.Value:
        """The integers kept in fewer bits than they are stored in: QuantizeLinear saturates at 8 only.

        On the integers, behind QuantizeLinear, so that the kernel before it stays an int8 kernel.
        """
        stored, (low, high) = np.iinfo(planned.dtype), planned.limits
        producer = quantized.producer()
        assert producer is not None
        if planned.bits >= stored.bits:
            return quantized
        bounds = [None if low == stored.min else self._scalar(low, planned), self._scalar(high, planned)]
        clip = self.rewriter.insert(producer, "Clip", [quantized, *bounds], like=quantized, suffix="saturated")
        clip.outputs[0].type, clip.outputs[0].shape = quantized.type, quantized.shape
        return clip.outputs[0]

    def _before(
        self,
        reader: ir.Node,
        op_type: str,
        operands: Sequence[ir.Value | None],
        like: ir.Value,
        dtype: ir.DataType,
        attributes: dict[str, int] | None = None,
        name: str | None = None,
    ) -> ir.Value:
        """A new node in front of `reader`; its only output, of `dtype` and unknown shape."""
        result = ir.Value(name=self.rewriter.unique_name(f"{name or like.name}/{op_type.lower()}"))
        result.dtype = dtype
        node = ir.node(op_type, list(operands), attributes=attributes or {}, outputs=[result])
        node.name = result.name
        self.model.graph.insert_before(reader, node)
        return result

    # Parameters: shared by all that need the same.

    def _quantizer(self, planned: TensorPlan) -> tuple[ir.Value, ir.Value]:
        scale, zero = np.float32(planned.scale[0]), planned.dtype.type(planned.zero_point[0])
        key = ("quantizer", planned.name)
        if key not in self.parameters:
            self.parameters[key] = self._initializer(f"{planned.name}.scale", np.asarray(scale))
            self.parameters[("zero", *key)] = self._initializer(f"{planned.name}.zero_point", np.asarray(zero))
        return self.parameters[key], self.parameters[("zero", *key)]

    def _parameter(self, value: ir.Value, part: str, array: np.ndarray, axis: int | None, *more: str) -> ir.Value:
        key = (value, part, axis, *more)
        if key not in self.parameters:
            self.parameters[key] = self._initializer(f"{value.name}.{part}", array)
        return self.parameters[key]

    def _scalar(self, integer: int, planned: TensorPlan) -> ir.Value:
        key = ("scalar", integer, planned.signed)
        if key not in self.parameters:
            self.parameters[key] = self._initializer(f"integer.{integer}", np.asarray(integer, planned.dtype))
        return self.parameters[key]

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        return self.rewriter.initializer(self.model.graph, name, ir.tensor(array.copy()))

    def _weight_plan(self, value: ir.Value, axis: int) -> TensorPlan:
        planned = self.weights.get((value.name or "", axis))
        if planned is None:
            raise GraphoptError(
                "the quantization plan was made for another model", where=f"no scales for weight {value.name!r}"
            )
        return planned

    def _form(self, node: ir.Node) -> str:
        operator = self.operators.get(node_name(node))
        return "float" if operator is None else operator.form


def linear_operator(node: ir.Node) -> bool:
    """Whether input 1 of the node is a weight."""
    return is_op(node, "Conv", "Gemm", "MatMul") and not is_product(node)


def weight_axis(node: ir.Node) -> int:
    """The axis of the stored weight that counts output channels."""
    if is_op(node, "Conv"):
        return 0
    return 0 if is_op(node, "Gemm") and attribute(node, "transB", 0) else 1


def _array(value: ir.Value) -> np.ndarray:
    array = constant(value)
    assert array is not None
    return array
