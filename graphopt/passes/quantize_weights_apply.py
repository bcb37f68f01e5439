"""Write weights as integers into a graph: DequantizeLinear in the form that onnxruntime fuses, or its own operators.

Weights are read one at a time and let go; what is new are the integers. A table is stored so that rows are picked
before they are widened. onnxruntime picks no rows of 4-bit types, so they lie packed in bytes, the first half of a row
in the low bits:

    row = Gather (bytes, ids);  q = Concat (BitwiseAnd (row, 15), BitShift (row, 4))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir.linear import channel_vector
from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.opset import lift_opset
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.rewrite import (
    Rewriter,
    constant_float64,
    constant_tensor,
    discard_if_dead,
    discard_if_unread,
    is_op,
    set_attributes,
    sole_consumer,
    to_tensor,
)
from graphopt.passes.contract import Context
from graphopt.passes.quantize_blocks import Blocks, Grid, block_scales, pack, pack_bytes
from graphopt.passes.quantize_placement import attribute, node_name
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.passes.quantize_weight_sites import WeightSite, weight_sites
from graphopt.passes.quantize_weights_feedback import Feedback

_MICROSOFT = "com.microsoft"
_BYTE = 8


def storage_opset(storage: ir.DataType, block_size: int) -> int:
    """The first opset whose DequantizeLinear takes integers of this type, in blocks of this size (0: none)."""
    if storage in (ir.DataType.INT2, ir.DataType.UINT2):
        return 25
    return 21 if block_size or storage in (ir.DataType.INT4, ir.DataType.UINT4) else 13


def is_packable(site: WeightSite, storage: ir.DataType) -> bool:
    """Whether a weight can have a type narrower than a byte: rows of tables must fill whole bytes."""
    readers = (use.node for use in site.stored.uses())
    columns = tensor_shape(site.tensor)[1]
    return not any(is_op(node, "Gather") for node in readers) or columns % (_BYTE // storage.bitwidth) == 0


def apply_weights(
    model: ir.Model, plan: QuantizePlan, context: Context, *, contrib: bool = False, accuracy_level: int = 4
) -> set[str]:
    """Rewrite `model` in place as the plan says of weights that are integers alone, and of nothing else.

    Args:
        model: the model that the plan was made from. Its opset is lifted to what the storage needs.
        plan: see `graphopt.passes.quantize_weights.plan_weights`.
        context: where inputs come from for rounding with error feedback.
        contrib: MatMulNBits and GatherBlockQuantized of com.microsoft instead of standard operators.
        accuracy_level: attribute of MatMulNBits.

    Returns:
        Names of the operators that were rewritten.

    Raises:
        GraphoptError: the plan was made for another model. The model may then be half rewritten.
    """
    tensors = {tensor.name: tensor for tensor in plan.tensors if is_weight_alone(tensor)}
    done: set[str] = set()
    if not tensors:
        return done
    wanted = max(storage_opset(_storage(tensor), tensor.block_size) for tensor in tensors.values())
    if not contrib and model.opset_imports.get("", 0) < wanted and lift_opset(model, wanted) < wanted:
        raise GraphoptError(
            f"the model cannot be lifted to opset {wanted}, which its plan needs", help="apply it with contrib=True"
        )
    feedback = Feedback(model, context) if any(one.rounding != "nearest" for one in tensors.values()) else None
    writer = _ContribWriter(model, feedback, accuracy_level) if contrib else _Writer(model, feedback)
    sites = {node_name(node): site for node, site in weight_sites(model).items()}
    for operator in plan.operators:
        if operator.form not in ("weights", "table"):
            continue
        site = sites.get(operator.node)
        planned = None if site is None or isinstance(site, str) else tensors.get(site.stored.name or "")
        if operator.form == "table" and site is not None and planned is None:
            continue  # a table with one scale a column, which is written with the activations
        if isinstance(site, str) or site is None or planned is None or site.node.op_type != operator.op_type:
            raise GraphoptError(
                "the quantization plan was made for another model",
                where=f"{operator.op_type} {operator.node!r} of the plan has no such weight in the model",
                help="apply a plan to the very model that it was made from",
            )
        writer.write(site, planned)
        done.add(operator.node)
    return done


def is_weight_alone(tensor: TensorPlan) -> bool:
    """Whether a plan is of a weight that is stored as integers while its operator computes in floats."""
    return tensor.role == "weight" and bool(tensor.storage)


def _storage(planned: TensorPlan) -> ir.DataType:
    return ir.DataType[planned.storage.upper()]


@dataclass(frozen=True)
class _Found:
    """The integers of a weight [K, N] and the type that they are stored in."""

    blocks: Blocks
    storage: ir.DataType

    @property
    def signed(self) -> bool:
        return self.blocks.integers.dtype == np.int8

    def unsigned(self) -> np.ndarray:
        """q + 2^(width-1) for signed ones: what kernels with an implied zero point read. uint8 [K, N]."""
        integers = self.blocks.integers
        return integers.view(np.uint8) + np.uint8(self.implied_zero) if self.signed else integers

    @property
    def implied_zero(self) -> int:
        return 2 ** (self.storage.bitwidth - 1)


class _Writer:
    """One application of a plan in standard operators. Readers of one weight share its tensors, in memory."""

    def __init__(self, model: ir.Model, feedback: Feedback | None) -> None:
        self.model = model
        self.feedback = feedback
        self.rewriter = Rewriter(model)
        self._tensors: dict[tuple[object, ...], tuple[ir.TensorProtocol, ...]] = {}

    def write(self, site: WeightSite, planned: TensorPlan) -> None:
        """Let one operator read its weight as integers; what only it has read of the floats goes."""
        old = site.node.inputs[0 if site.is_table else 1]
        fed_back = self.feedback is not None and planned.rounding != "nearest" and not site.is_table
        key = (site.stored, site.is_table, site.input_axis, site.factor, site.node if fed_back else None)
        if key not in self._tensors:
            self._tensors[key] = self.tensors(site, self._integers(site, planned, self.feedback if fed_back else None))
        if site.is_table:
            self.table(site, planned, self._tensors[key])
        else:
            self.product(site, planned, self._tensors[key])
        site.release()
        producer = None if old is None else old.producer()
        if producer is not None:
            discard_if_dead(producer)
        discard_if_unread(site.stored)

    def _integers(self, site: WeightSite, planned: TensorPlan, feedback: Feedback | None) -> _Found:
        matrix = site.matrix() if site.factor == 1.0 else site.matrix() * site.dtype.numpy().type(site.factor)
        grid, scale_type = Grid(planned.bits, planned.signed, planned.block_size), np.dtype(site.dtype.numpy())
        if planned.scale and planned.axis == (site.input_axis if planned.block_size else 1 - site.input_axis):
            return _Found(_in_given_scales(site, planned), _storage(planned))
        if feedback is not None:
            return _Found(feedback.rounded(site.node, matrix, grid, scale_type), _storage(planned))
        return _Found(block_scales(matrix, grid, scale_type), _storage(planned))

    # What is stored: integers, scale, and where there are any zero points.

    def tensors(self, site: WeightSite, found: _Found) -> tuple[ir.TensorProtocol, ...]:
        """The tensors of a weight in the layout of its reader."""
        blocks, zero_points = found.blocks, () if found.signed else (found.blocks.zero_point,)
        if not site.is_table:
            packed = [pack(one, found.storage) for one in (blocks.integers, *zero_points)]
            return packed[0], ir.Tensor(blocks.scale), *packed[1:]
        rows = blocks.integers.T
        if found.storage.bitwidth < _BYTE:
            each = _BYTE // found.storage.bitwidth
            parts = found.unsigned().T.reshape(len(rows), each, -1).swapaxes(1, 2)
            rows = pack_bytes(parts, found.storage.bitwidth)[:, :, 0]
        return tuple(
            ir.Tensor(np.ascontiguousarray(one)) for one in (rows, blocks.scale.T, *(z.T for z in zero_points))
        )

    # How it is read.

    def product(self, site: WeightSite, planned: TensorPlan, tensors: Sequence[ir.TensorProtocol]) -> None:
        """MatMul or Gemm of a DequantizeLinear, which onnxruntime makes one node of."""
        node, name = site.node, site.stored.name or "weight"
        attributes = {"axis": 0, "block_size": planned.block_size} if planned.block_size else {"axis": 1}
        if not planned.block_size:
            tensors = (tensors[0], *(_row(tensor) for tensor in tensors[1:]))
        operands = self.initializers(name, tensors)
        weight = self.before(node, "DequantizeLinear", operands, name, site.dtype, attributes)
        weight.shape = ir.Shape(site.shape)
        node.replace_input_with(1, weight)
        if is_op(node, "Gemm"):
            self._plain_bias(node, site)
            set_attributes(node, alpha=None, beta=None, transB=None)
        self._unclamped(node)

    def _unclamped(self, node: ir.Node) -> None:
        """Relu and Clip behind a product as Max and Min.

        With a clamp behind it onnxruntime takes a product for one of integers, which the clamp's QuantizeLinear ends;
        it finds none, and leaves the product alone.
        """
        clamp = sole_consumer(node.outputs[0])
        if (
            clamp is not None
            and is_op(clamp, "Add")
            and any(constant_tensor(value) is not None for value in clamp.inputs)
        ):
            clamp = sole_consumer(clamp.outputs[0])  # onnxruntime makes a Gemm of a product and its bias first
        if clamp is None or not is_op(clamp, "Relu", "Clip") or clamp.inputs[0] is None:
            return
        value, result, dtype = clamp.inputs[0], clamp.outputs[0], clamp.inputs[0].dtype or ir.DataType.FLOAT
        name = result.name or node_name(clamp)
        least, most = ([*clamp.inputs[1:], None, None][:2]) if is_op(clamp, "Clip") else (None, None)
        if is_op(clamp, "Relu"):
            zero = ir.Tensor(np.zeros((), dtype.numpy()), dtype=dtype)
            least = self.rewriter.initializer(self.model.graph, f"{name}.least", zero)
        for op_type, bound in (("Max", least), ("Min", most)):
            if bound is not None:
                value = self.before(clamp, op_type, [value, bound], name, dtype)
                value.shape = result.shape
        if value is clamp.inputs[0]:
            self.rewriter.bypass(result, value)  # a Clip without bounds
        else:
            self.rewriter.supersede(result, value)

    def _plain_bias(self, node: ir.Node, site: WeightSite) -> None:
        """The bias as a vector, `beta` included: with any other onnxruntime does not fuse."""
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        stored, beta = constant_float64(bias), float(attribute(node, "beta", 1.0))
        outputs = site.shape[1]
        if stored is not None and (beta != 1.0 or stored.shape != (outputs,)):
            vector = beta * channel_vector(stored, 1, outputs, 2)
            self.rewriter.replace_constant(node, 2, to_tensor(vector, site.dtype))

    def table(self, site: WeightSite, planned: TensorPlan, tensors: Sequence[ir.TensorProtocol]) -> None:
        """Rows are picked as integers, unpacked where they are narrower than bytes, and dequantized."""
        node, name, width = site.node, site.stored.name or "table", _storage(planned).bitwidth
        ids, inputs = node.inputs[1], site.shape[0]
        operands = self.initializers(name, tensors)
        picked = [
            self.before(node, "Gather", [operand, ids], operand.name or name, operand.dtype, {"axis": 0})
            for operand in operands
        ]
        if width < _BYTE:
            picked[0] = self._unpacked(node, picked[0], width, name)
            if len(picked) < 3:  # signed ones, stored with an offset
                picked.append(self._filled_like(node, picked[1], 2 ** (width - 1), name))
        attributes = {"axis": -1, "block_size": planned.block_size or inputs}
        result = self.before(node, "DequantizeLinear", picked, name, site.dtype, attributes)
        self.rewriter.supersede(node.outputs[0], result)

    def _unpacked(self, node: ir.Node, row: ir.Value, width: int, name: str) -> ir.Value:
        parts: list[ir.Value] = []
        for shift in range(0, _BYTE, width):
            part = row
            if shift:
                part = self.before(
                    node, "BitShift", [row, self._byte(shift)], name, ir.DataType.UINT8, {"direction": "RIGHT"}
                )
            if shift + width < _BYTE:
                part = self.before(node, "BitwiseAnd", [part, self._byte(2**width - 1)], name, ir.DataType.UINT8)
            parts.append(part)
        return self.before(node, "Concat", parts, name, ir.DataType.UINT8, {"axis": -1})

    def _filled_like(self, node: ir.Node, like: ir.Value, number: int, name: str) -> ir.Value:
        shape = self.before(node, "Shape", [like], name, ir.DataType.INT64)
        filling = ir.Tensor(np.array([number], np.uint8))
        return self.before(node, "ConstantOfShape", [shape], name, ir.DataType.UINT8, {"value": filling})

    # Mechanics.

    def _byte(self, number: int) -> ir.Value:
        return self.rewriter.initializer(self.model.graph, f"byte.{number}", ir.Tensor(np.array(number, np.uint8)))

    def initializers(self, name: str, tensors: Sequence[ir.TensorProtocol]) -> list[ir.Value]:
        """Values of their own: onnxruntime fuses none that has another reader."""
        parts = ("quantized", "scale", "zero_point")
        return [
            self.rewriter.initializer(self.model.graph, f"{name}.{part}", tensor)
            for part, tensor in zip(parts, tensors, strict=False)
        ]

    def before(
        self,
        reader: ir.Node,
        op_type: str,
        operands: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType | None,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """A new node in front of `reader`; its only output, of `dtype` and unknown shape."""
        result = ir.Value(name=self.rewriter.unique_name(f"{name}/{op_type.lower()}"))
        result.type = None if dtype is None else ir.TensorType(dtype)
        node = ir.node(op_type, list(operands), attributes=dict(attributes or {}), outputs=[result], domain=domain)
        node.name = result.name
        self.model.graph.insert_before(reader, node)
        return result


class _ContribWriter(_Writer):
    """The same in operators of com.microsoft, which are what onnxruntime makes of the standard ones."""

    def __init__(self, model: ir.Model, feedback: Feedback | None, accuracy_level: int) -> None:
        super().__init__(model, feedback)
        self.accuracy_level = accuracy_level
        model.opset_imports.setdefault(_MICROSOFT, 1)

    def tensors(self, site: WeightSite, found: _Found) -> tuple[ir.TensorProtocol, ...]:
        """Bytes [N, blocks, block_size * width / 8] (a table: [N, K * width / 8]), scale [N, blocks], zero points."""
        blocks, width = found.blocks, found.storage.bitwidth
        rows, (inputs, outputs) = found.unsigned().T, site.shape
        if not site.is_table:
            missing = len(blocks.scale) * blocks.block_size - inputs
            rows = np.pad(rows, ((0, 0), (0, missing))).reshape(outputs, len(blocks.scale), blocks.block_size)
        arrays = [pack_bytes(rows, width), blocks.scale.T]
        if not found.signed:
            arrays.append(pack_bytes(blocks.zero_point.T, width))
        return tuple(ir.Tensor(np.ascontiguousarray(array)) for array in arrays)

    def product(self, site: WeightSite, planned: TensorPlan, tensors: Sequence[ir.TensorProtocol]) -> None:
        """MatMulNBits; the bias of a Gemm is its sixth input."""
        node, (inputs, outputs) = site.node, site.shape
        operands: list[ir.Value | None] = [node.inputs[0], *self.initializers(site.stored.name or "weight", tensors)]
        if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2] is not None:
            self._plain_bias(node, site)
            operands += [None] * (5 - len(operands)) + [node.inputs[2]]
        attributes = {
            "K": inputs, "N": outputs, "bits": _storage(planned).bitwidth, "block_size": planned.block_size,
            "accuracy_level": self.accuracy_level,
        }  # fmt: skip
        name, result = node.outputs[0].name or node_name(node), node.outputs[0]
        product = self.before(node, "MatMulNBits", operands, name, site.dtype, attributes, domain=_MICROSOFT)
        self.rewriter.supersede(result, product)

    def table(self, site: WeightSite, planned: TensorPlan, tensors: Sequence[ir.TensorProtocol]) -> None:
        """GatherBlockQuantized."""
        node, name = site.node, site.stored.name or "table"
        integers, *others = self.initializers(name, tensors)
        attributes = {
            "gather_axis": 0, "quantize_axis": 1, "bits": _storage(planned).bitwidth, "block_size": planned.block_size,
        }  # fmt: skip
        operands = [integers, node.inputs[1], *others]
        rows = self.before(node, "GatherBlockQuantized", operands, name, site.dtype, attributes, domain=_MICROSOFT)
        self.rewriter.supersede(node.outputs[0], rows)


def _in_given_scales(site: WeightSite, planned: TensorPlan) -> Blocks:
    """The integers nearest to a weight in the scales that a plan lists (those that training has learned)."""
    inputs, outputs = site.shape
    count = Grid(planned.bits, planned.signed, planned.block_size).blocks(inputs)
    if len(planned.scale) != count * outputs:
        raise GraphoptError(
            f"the plan has {len(planned.scale)} scales for {count * outputs} blocks", where=planned.name
        )
    by_output = bool(planned.block_size) and site.input_axis == 1
    scale, zero = (
        np.asarray(one, np.float32).reshape((outputs, count) if by_output else (count, outputs))
        for one in (planned.scale, planned.zero_point)
    )
    scale, zero = (scale.T, zero.T) if by_output else (scale, zero)
    stored = planned.quantize(site.tensor.numpy())
    integers = stored if site.input_axis == 0 else stored.T
    scale = (scale * np.float32(site.factor)).astype(site.dtype.numpy())
    return Blocks(integers, scale, zero.astype(integers.dtype), planned.block_size or inputs)


def _row(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor [1, N] as [N]."""
    if tensor.dtype.bitwidth < _BYTE:
        array = tensor.numpy().reshape(-1)
        return pack(array.astype(np.int8 if tensor.dtype.name.startswith("INT") else np.uint8), tensor.dtype)
    return ir.Tensor(tensor.numpy().reshape(-1), dtype=tensor.dtype)
