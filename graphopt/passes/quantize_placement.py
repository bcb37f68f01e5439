"""Which operators run on integers: those that onnxruntime's CPU provider fuses, in regions worth the border.

Measured on onnxruntime 1.31.1 (`ort-performance.md`, and the graphs that it saves): a node becomes an int8 kernel
when each input comes from DequantizeLinear and each output goes to QuantizeLinear and nowhere else. The tables
below say which operators have such a kernel; everything else stays float.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from graphopt.ir.linear import linear_at
from graphopt.ir.rewrite import DeclinedError, constant, integers, is_op, rank
from graphopt.passes.dequantize_model import quantized_nodes
from graphopt.passes.quantize_plan import OperatorPlan
from graphopt.passes.quantize_products import is_product, may_be_signed, moves_before_scores


class Role(enum.Enum):
    """What an operator is to quantization."""

    LINEAR = "linear"
    """A product with a constant weight: where the time goes and int8 pays."""
    KERNEL = "kernel"
    """Has an int8 kernel that rescales: its output needs its own quantizer."""
    INTEGER = "integer"
    """Moves, selects or scales elements: runs on the integers themselves, exactly, and needs no new range."""
    CLAMP = "clamp"
    """Relu and Clip: done by the saturation of the quantizer, or exactly on the integers."""


_LINEAR = {"Conv", "Gemm", "MatMul"}
_KERNEL = {"Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "LeakyRelu", "Sigmoid"}
_INTEGER = {
    "MaxPool", "ReduceMax", "Resize", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split",
    "Pad", "DepthToSpace", "SpaceToDepth", "Expand", "Gather", "Tile",
}  # fmt: skip
_CLAMP = {"Relu", "Clip"}
_NO_KERNEL = {
    "ConvTranspose": "onnxruntime has no int8 kernel for it, unless windows do not overlap and all around is int8",
    "Einsum": "onnxruntime has no int8 kernel for Einsum",
    "LSTM": "recurrent layers stay float",
    "GRU": "recurrent layers stay float",
    "RNN": "recurrent layers stay float",
}


OPERANDS = "operands"
"""The form for compilers that place quantizers themselves behind the products."""
WIDE = 16
"""Bits of activations beyond 8."""
_MOVES = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Gather", "Tile"}
"""What onnxruntime moves in integers of 16 bits."""
_SMALLEST_TABLE = 4096
"""Elements from which a constant matrix whose rows are picked counts as an embedding table."""


@dataclass
class Placement:
    """The chosen form of each operator of the main graph.

    Attributes:
        forms: node to "static", "integer", "folded", "dynamic" or "table"; what is absent stays float.
        operators: the same for the plan, with the reasons of what was declined, in graph order.
        quantized: float values that get a quantizer of their own, in graph order.
        constants: constant operands of KERNEL nodes.
        balanced: names of what stands right in a product of activations; its zero point is to be in the middle, since
            OpenVINO computes in floats otherwise.
        signed: names of what stands on either side, form "operands": signed integers where any is negative.
    """

    forms: dict[ir.Node, str] = field(default_factory=dict)
    operators: list[OperatorPlan] = field(default_factory=list)
    quantized: list[ir.Value] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)
    balanced: set[str] = field(default_factory=set)
    signed: set[str] = field(default_factory=set)


def already_quantized(model: ir.Model) -> ir.Node | None:
    """A node of the model that computes on quantized tensors, or None."""
    return next(quantized_nodes(model), None)


def node_name(node: ir.Node) -> str:
    """The name that plans know a node by: its own, else that of its first output."""
    return node.name or node.outputs[0].name or node.op_type


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The Python value of an attribute, or `default`."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs that hold activations or their constant counterparts, without sizes, axes, weights and biases."""
    if scaling_factor(node) is not None:
        return [value for value in node.inputs if value is not None and constant(value) is None]
    if node.op_type in ("Add", "Mul", "Concat") or is_product(node):
        return [value for value in node.inputs if value is not None]
    return [value for value in node.inputs[:1] if value is not None]


def scaling_factor(node: ir.Node) -> float | None:
    """The factor of a Mul by a positive scalar: the same integers in a quantizer of another scale, so free."""
    if not is_op(node, "Mul"):
        return None
    factors = [array for array in map(constant, node.inputs) if array is not None and array.size == 1]
    if len(factors) != 1 or not 0.0 < float(factors[0].reshape(())) < float("inf"):
        return None
    of_rank = [rank(value) for value in node.inputs if value is not None and constant(value) is None]
    return float(factors[0].reshape(())) if of_rank and (of_rank[0] or 0) >= factors[0].ndim else None


def place(
    model: ir.Model,
    *,
    form: str,
    exclude: tuple[str, ...],
    kept_float: Mapping[str, str] | None = None,
    wide: bool = False,
) -> Placement:
    """Choose the form of every operator.

    Args:
        model: canonical model, `graphopt.passes.quantize_legalize` done.
        form: "static", "dynamic", "operands" (what a product reads, and nothing else), or "auto": Conv static, Gemm
            and MatMul static where their input arrives on integers anyway and dynamic where it does not.
        exclude: names of nodes or weights, or operator types, to leave in float; shell patterns.
        kept_float: names of nodes to leave in float, with the reason.
        wide: whether activations have 16 bits.
    """
    return _Placer(model, form, exclude, kept_float or {}, wide).run()


class _Placer:
    def __init__(
        self, model: ir.Model, form: str, exclude: tuple[str, ...], kept_float: Mapping[str, str], wide: bool
    ) -> None:
        self.wide = wide
        self.graph = model.graph
        self.nodes = list(model.graph)
        self.form = form
        self.exclude = exclude
        self.kept_float = kept_float
        self.roles: dict[ir.Node, Role] = {}
        self.declined: dict[ir.Node, str] = {}
        self.static: set[ir.Node] = set()
        self.dynamic: set[ir.Node] = set()
        self.tables: set[ir.Node] = set()

    def run(self) -> Placement:
        for node in self.nodes:
            self._classify(node)
        if self.form != "dynamic":
            self._grow()
            self._trim()
        self._choose_dynamic()
        self._choose_tables()
        return self._placement()

    def _classify(self, node: ir.Node) -> None:
        role = role_of(node)
        if role is None:
            if node.op_type in _NO_KERNEL and node.domain == "":
                self.declined[node] = _NO_KERNEL[node.op_type]
            return
        operands = self.form == OPERANDS
        if operands and role is not Role.LINEAR:
            return
        check = _accept if operands and is_product(node) else _CHECKS.get(node.op_type, _accept)
        reason = self._excluded(node) or check(node)
        if reason is None and any(value.dtype not in (None, ir.DataType.FLOAT) for value in data_inputs(node)):
            reason = f"computes in {data_inputs(node)[0].dtype}, int8 kernels replace float32 only"
        if self.wide and role is Role.INTEGER and node.op_type not in _MOVES and scaling_factor(node) is None:
            reason = reason or f"onnxruntime has no kernel for it on integers of {WIDE} bits"
        reason = reason or _constant_operands(node)
        if reason is None:
            self.roles[node] = role
        elif role is Role.LINEAR or reason.startswith("excluded") or node_name(node) in self.kept_float:
            self.declined[node] = reason

    def _excluded(self, node: ir.Node) -> str | None:
        if node_name(node) in self.kept_float:
            return self.kept_float[node_name(node)]
        names = [node.op_type, node_name(node)]
        names += [value.name or "" for value in node.inputs if value is not None and value.const_value is not None]
        for pattern in self.exclude:
            if any(fnmatchcase(name, pattern) for name in names):
                return f"excluded by {pattern!r}"
        return None

    # Growth: linear operators that pay alone are the seeds; what lies on integers anyway joins them.

    def _grow(self) -> None:
        self.static = {node for node, role in self.roles.items() if role is Role.LINEAR and self._is_seed(node)}
        if self.form == OPERANDS:
            moved = moves_before_scores([node for node in self.nodes if not self._excluded(node)], self.static)
            self.roles.update(dict.fromkeys(moved, Role.INTEGER))
            self.static |= moved
            return
        grown = True
        while grown:
            boundary = {v for node in self.static if self.roles[node] is Role.LINEAR for v in data_inputs(node)}
            joining = {
                node
                for node in self.nodes
                if node in self.roles and node not in self.static and self._joins(node, boundary)
            }
            self.static |= joining
            grown = bool(joining)

    def _is_seed(self, node: ir.Node) -> bool:
        if node.op_type == "Conv":
            return self.form == OPERANDS or not is_depthwise(node)
        return self.form in ("static", OPERANDS)

    def _joins(self, node: ir.Node, boundary: set[ir.Value]) -> bool:
        activations = [value for value in data_inputs(node) if constant(value) is None]
        if self.roles[node] is Role.CLAMP or node.op_type == "Mul":
            large = [value for value in activations if not _is_gate(value)]
            activations = large or activations
        return bool(activations) and all(value in boundary or value.producer() in self.static for value in activations)

    # Trimming: an int8 kernel that feeds no linear operator only costs precision. What goes may leave a clamp behind it
    # that was folded into it.

    def _trim(self) -> None:
        before = -1
        while before != len(self.static):
            before = len(self.static)
            self._trim_once()

    def _trim_once(self) -> None:
        for node in reversed(self.nodes):
            if node not in self.static or self.roles[node] is Role.LINEAR or self._folds(node):
                continue
            clamps = self.wide and self.roles[node] is Role.CLAMP  # there is none of integers of 16 bits
            if clamps or not any(self._is_read_on_integers(value) for value in node.outputs):
                self.static.discard(node)

    def _is_read_on_integers(self, value: ir.Value) -> bool:
        return any(
            user in self.static and (not self._folds(user) or any(self._is_read_on_integers(v) for v in user.outputs))
            for user in value.consumers()
        )

    def _folds(self, node: ir.Node) -> bool:
        """Whether a clamp is the only reader of an int8 kernel's output, so that the quantizer does it."""
        if node not in self.static or self.roles[node] is not Role.CLAMP:
            return False
        source = node.inputs[0]
        producer = None if source is None else source.producer()
        return (
            source is not None
            and producer in self.static
            and self.roles[producer] in (Role.LINEAR, Role.KERNEL)
            and not source.is_graph_output()
            and len(source.uses()) == 1
            and (self._needs_quantizer(producer) or self._has_integer_reader(node.outputs[0]))
        )

    def _needs_quantizer(self, node: ir.Node) -> bool:
        """QLinear kernels write integers; only Gemm and MatMul have a kernel that writes float instead.

        Not so a MatMul with a bias behind it: onnxruntime makes a float Gemm of the two first.
        """
        if self.form == OPERANDS:
            return False
        if is_op(node, "MatMul"):
            return any(is_op(user, "Add") for user in node.outputs[0].consumers())
        return not is_op(node, "Gemm")

    def _has_integer_reader(self, value: ir.Value) -> bool:
        return any(user in self.static for user in value.consumers())

    def _choose_dynamic(self) -> None:
        for node, role in self.roles.items():
            if role is not Role.LINEAR or node in self.static:
                continue
            if node.op_type == "Conv":
                self.declined[node] = (
                    "no fast dynamic form of Conv exists (ConvInteger is slower than float)"
                    if self.form == "dynamic"
                    else "depthwise, and its input does not arrive on integers: slower than float alone"
                )
            elif self.form in ("auto", "dynamic"):
                self.dynamic.add(node)

    def _choose_tables(self) -> None:
        """Embedding tables: rows are picked as integers and dequantized behind; smaller, and as fast."""
        for node in self.nodes:
            if not is_table_lookup(node):
                continue
            reason = self._excluded(node) or _table(node)
            if reason is None:
                self.tables.add(node)
            else:
                self.declined[node] = reason

    def _placement(self) -> Placement:
        placement = Placement()
        quantized: dict[ir.Value, None] = {}
        constants: dict[ir.Value, None] = {}
        for node in self.nodes:
            form = self._form(node)
            if form is not None:
                placement.forms[node] = form
                placement.operators.append(OperatorPlan(node_name(node), node.op_type, form))
                if is_product(node):
                    sides = [self._origin(value) for value in node.inputs]
                    placement.balanced.add(sides[1].name or "")
                    if self.form == OPERANDS:
                        placement.signed |= {value.name or "" for value in sides if may_be_signed(value, self.static)}
            elif node in self.declined:
                placement.operators.append(OperatorPlan(node_name(node), node.op_type, "float", self.declined[node]))
            if form in ("static", "integer"):
                for value in data_inputs(node):
                    if constant(value) is not None:
                        constants[value] = None
                    elif value.producer() not in self.static:
                        quantized[value] = None
            if form == "static" and self._writes_integers(node):
                quantized[self._clamped(node)] = None
        placement.quantized, placement.constants = list(quantized), list(constants)
        return placement

    def _origin(self, value: ir.Value | None) -> ir.Value:
        """The value whose quantizer another one is moved with."""
        assert value is not None
        producer = value.producer()
        while producer in self.static and self.roles[producer] is Role.INTEGER:
            value = data_inputs(producer)[0]
            producer = value.producer()
        return value

    def _form(self, node: ir.Node) -> str | None:
        if node in self.dynamic:
            return "dynamic"
        if node in self.tables:
            return "table"
        if node not in self.static:
            return None
        if self._folds(node):
            return "folded"
        return "static" if self.roles[node] in (Role.LINEAR, Role.KERNEL) else "integer"

    def _writes_integers(self, node: ir.Node) -> bool:
        return self._needs_quantizer(node) or self._is_read_on_integers(node.outputs[0])

    def _clamped(self, node: ir.Node) -> ir.Value:
        """The value whose range the quantizer after `node` has: its output, or that of the clamp folded into it."""
        output = node.outputs[0]
        users = output.consumers()
        return users[0].outputs[0] if len(users) == 1 and self._folds(users[0]) else output


def role_of(node: ir.Node) -> Role | None:
    """The role of an operator by its type alone, None for one without an int8 form."""
    if node.domain != "":
        return None
    if scaling_factor(node) is not None:
        return Role.INTEGER
    for role, operators in (
        (Role.LINEAR, _LINEAR),
        (Role.KERNEL, _KERNEL),
        (Role.INTEGER, _INTEGER),
        (Role.CLAMP, _CLAMP),
    ):
        if node.op_type in operators:
            return role
    return None


def is_table_lookup(node: ir.Node) -> bool:
    """Whether a Gather picks rows of a constant float matrix: an embedding, not the scales of one that is quantized."""
    if any(reader.op_type == "DequantizeLinear" for reader in node.outputs[0].consumers()):
        return False
    table = constant(node.inputs[0]) if is_op(node, "Gather") and attribute(node, "axis", 0) == 0 else None
    return table is not None and table.ndim == 2 and table.dtype == np.float32 and table.size >= _SMALLEST_TABLE


def is_depthwise(node: ir.Node) -> bool:
    """Whether a Conv has one input channel a group: memory-bound, so int8 gains little on its own."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    shape = None if weight is None else weight.shape
    return shape is not None and shape[1] == 1 and attribute(node, "group", 1) != 1


def _is_gate(value: ir.Value) -> bool:
    """Whether a value is one number a channel ([n, c, 1, 1]): cheap to quantize wherever it comes from."""
    shape = value.shape
    return shape is not None and len(shape) >= 3 and all(size == 1 for size in list(shape)[2:])


def _constant_operands(node: ir.Node) -> str | None:
    """Why a constant operand has no range, as that of a mask of infinities; None where all have one."""
    for value in data_inputs(node):
        array = constant(value)
        if array is not None and (array.size == 0 or not np.isfinite(array).all()):
            return f"its operand {value.name!r} is empty or holds NaN or infinity"
    return None


def _accept(node: ir.Node) -> str | None:
    return None


def _linear(node: ir.Node) -> str | None:
    try:
        linear = linear_at(node)
    except DeclinedError as refusal:
        return refusal.why
    if linear is None or (len(node.inputs) > 2 and node.inputs[2] is not None and constant(node.inputs[2]) is None):
        return "its weight or bias is computed at run time"
    if linear.weight_index != 1:
        return "its weight is the left operand"
    if linear.dtype != ir.DataType.FLOAT:
        return f"its weight is {linear.dtype.name.lower()}, int8 kernels replace float32 only"
    if is_op(node, "Gemm") and attribute(node, "transA", 0):
        return "its data input is transposed (transA=1)"
    weight = constant(node.inputs[1])
    if weight is None or weight.size == 0:
        return "its weight is empty"
    if not np.isfinite(weight).all() or not np.isfinite(linear.bias()).all():
        return "its weight or bias holds NaN or infinity"
    return None


def _table(node: ir.Node) -> str | None:
    value = node.inputs[0]
    assert value is not None
    others = [use.node for use in value.uses() if not is_table_lookup(use.node)]
    if others or value.is_graph_output():
        return f"its table is read by {others[0].op_type if others else 'a graph output'} in float too"
    table = constant(value)
    return None if table is not None and np.isfinite(table).all() else "its table holds NaN or infinity"


def _max_pool(node: ir.Node) -> str | None:
    return "its second output (indices) is used" if len(node.outputs) > 1 else None


def _average_pool(node: ir.Node) -> str | None:
    return "it is dilated" if any(size != 1 for size in integers(node, "dilations") or ()) else None


def _resize(node: ir.Node) -> str | None:
    if attribute(node, "mode", "nearest") != "nearest":
        return "it interpolates"
    return None


def _space_to_depth(node: ir.Node) -> str | None:
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 29):
        return None
    return f"onnxruntime {onnxruntime.__version__} has no integer kernel for it, 1.29 has"


def _pad(node: ir.Node) -> str | None:
    if attribute(node, "mode", "constant") != "constant" or len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    filler = constant(node.inputs[2])
    return None if filler is not None and not np.any(filler) else "it pads with something else than 0"


def _clip(node: ir.Node) -> str | None:
    return None if clamp_bounds(node) is not None else "its bounds are computed at run time"


_CHECKS: Mapping[str, Callable[[ir.Node], str | None]] = {
    "Conv": _linear, "Gemm": _linear, "MatMul": _linear, "MaxPool": _max_pool, "AveragePool": _average_pool,
    "Resize": _resize, "Pad": _pad, "Clip": _clip, "SpaceToDepth": _space_to_depth,
}  # fmt: skip
"""Why a node of this type has no int8 form, or None; `_accept` where every node has one."""


def clamp_bounds(node: ir.Node) -> tuple[float, float] | None:
    """The interval that a Relu or Clip keeps, None where it is not constant or leaves 0 out."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = [float("-inf"), float("inf")]
    for index in (1, 2):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None:
            array = constant(value)
            if array is None:
                return None
            bounds[index - 1] = float(array.reshape(()))
    return (bounds[0], bounds[1]) if bounds[0] <= 0.0 <= bounds[1] else None
