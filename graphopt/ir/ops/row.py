"""The shape of op knowledge: one row an operator, one column a question (design.md D3, ADR 0003).

This module knows no operator and no analysis. It fixes what a row is, what each column promises, and what
an empty column means: `channels` empty freezes every axis that the op touches, `cost` empty counts as zero
and is listed as unknown, `torch` empty makes `lift` refuse, `repair` empty says that nothing needs repair.
"""

from __future__ import annotations

import builtins
import importlib
import keyword
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from graphopt.ir.ops.flow import ChannelSite, RepairSite

Shape = tuple[int, ...]
"""A concrete shape: every dimension is a known number of elements."""


def tensor_shape(tensor: ir.TensorProtocol) -> Shape:
    """Shape of a stored tensor, whose dimensions are all known."""
    return tuple(int(size) for size in tensor.shape.numpy())


def tensor_bytes(tensor: ir.TensorProtocol) -> int:
    """Bytes of a stored tensor: sub-byte types packed, of strings their characters."""
    if tensor.dtype == ir.DataType.STRING:
        return sum(len(entry) for entry in tensor.numpy().reshape(-1).tolist())
    return tensor.nbytes


@dataclass(frozen=True)
class Site:
    """One node with the concrete shapes and known constants around it: what every column function reads.

    Attributes:
        node: the node itself.
        inputs: shape of each input, None for an absent optional input or an unknown shape.
        outputs: shape of each output, None where unknown.
        constants: value of each input that is known before run time, else None.
    """

    node: ir.Node
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape | None, ...]
    constants: tuple[np.ndarray | None, ...]

    def attribute(self, name: str, default: Any = None) -> Any:
        """The Python value of an attribute of the node, or `default` where the node has none."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def input_shape(self, index: int) -> Shape:
        """Shape of input `index`. Raises `UnknownShapeError` where it is absent or unknown."""
        shape = self.inputs[index] if index < len(self.inputs) else None
        if shape is None:
            raise UnknownShapeError(self.node, f"input {index}")
        return shape

    def output_shape(self, index: int = 0) -> Shape:
        """Shape of output `index`. Raises `UnknownShapeError` where it is unknown."""
        shape = self.outputs[index] if index < len(self.outputs) else None
        if shape is None:
            raise UnknownShapeError(self.node, f"output {index}")
        return shape


class UnknownShapeError(Exception):
    """A column function needs a shape that is not known; the caller reports the node as unknown."""

    def __init__(self, node: ir.Node, what: str) -> None:
        super().__init__(f"shape of {what} of {node.op_type} {node.name!r} is unknown")


CostRule = Callable[[Site], int]
"""Multiply-accumulate operations (MACs) of one run of the node, subgraphs not counted.

MACs count the products of *linear* operators: every term of a contraction of two operands (convolution,
matrix product, attention product, recurrence) is one, border padding included. Everything else (elementwise,
normalisation, pooling, interpolation, softmax) is 0 by convention: its price is the bytes that it moves.
A rule reads shapes, attributes, and constants of `structural` inputs only.
"""
ShapeRule = Callable[[Site], Sequence[Shape]]
"""Shapes of the outputs, for the ops that `onnx.shape_inference` cannot infer node by node."""
ChannelsRule = Callable[["ChannelSite"], None]
"""Says which positions of the axes around a node are the same channel, and gives its results their axes.

Axes of inputs that the rule does not take are frozen. A rule that cannot account for a node raises `OpaqueError`.
"""
RepairRule = Callable[["RepairSite"], None]
"""Rewrites the attributes and size operands of a node once axes around it have shrunk."""


@dataclass(frozen=True)
class TorchFunction:
    """A function of `graphopt.ir.ops.torch`, named but not imported: torch is loaded when something is lifted.

    Attributes:
        module: name of the file in `graphopt/ir/ops/torch`.
        op_type: the operator; its function has the same name in snake case (`function_name`).
    """

    module: str
    op_type: str

    def load(self) -> Callable[..., Any]:
        """The function itself. Imports torch."""
        return getattr(importlib.import_module(f"graphopt.ir.ops.torch.{self.module}"), function_name(self.op_type))


def function_name(op_type: str) -> str:
    """The name of the function of an operator: snake case, with a trailing underscore where Python has the word.

    Example:
        >>> function_name("BatchNormalization"), function_name("MatMul"), function_name("Not"), function_name("LRN")
        ('batch_normalization', 'mat_mul', 'not_', 'lrn')
    """
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", op_type).lower()
    return f"{name}_" if keyword.iskeyword(name) or hasattr(builtins, name) else name


TorchRule = Callable[..., Any] | TorchFunction
"""The differentiable torch function of the op, `function(*inputs, **attributes)`.

* Inputs are positional, in the order of ONNX, None where an optional one is absent. They are tensors, but for
  `structural` inputs that are known when the model is lifted, or computed from sizes alone: those are numbers or flat
  lists of numbers. A structural input that waits for run time is a tensor. Types that torch lacks (int4, uint4, int2,
  uint2) are held in int8 or uint8.
* Attributes that the node has are keywords of the same name; the signature holds the defaults of ONNX. Tensor
  attributes arrive as (nested) lists, subgraphs as callables that take the values of the body's inputs.
* A signature that names them is also given `outputs` (number of outputs of the node), `training` (whether the
  module is in training mode), `device` (where the module is; for ops that make tensors out of nothing),
  `element_type` (`onnx_ir.DataType` of output 0, as a number) and `results` (a pair of element type and shape for each
  output; sizes that are not known are 0).
* Where an element type of these, or an attribute `to` or `dtype`, is the float type that the weights of the model
  have, the function is given the `torch.dtype` that the module has now instead of the number: a model cast to bfloat16
  computes in bfloat16 throughout. `dtypes.torch_dtype` takes both.
* Returns the tensor of a node with one output, else a tuple with an entry an output. dtypes are those of ONNX.
* Nothing is changed in place, but for running statistics while `training`. New tensors live on the inputs' device.
"""


@dataclass(frozen=True)
class OpRow:
    """All that graphopt knows about one operator from one opset version on.

    Attributes:
        op_type: ONNX operator name.
        domain: ONNX operator domain, "" for the standard one.
        since: first opset version that the row describes.
        reads_all: False where the op reads no more elements of input 0 than it writes (Gather, Slice ...),
            so that bytes moved are not overstated.
        structural: indices of the inputs that say *how* (axes, target shapes, scales), not *what*.
        quantization: indices of the inputs that are quantization scales or zero points. They are cut with the
            channels, unlike structural ones, and like them they are no parameters of the network.
        statistics: indices of the inputs that are statistics of data (mean and variance of BatchNormalization):
            updated while training, never by gradient.
        element_type: where the element type of output 0 comes from, for ops that `onnx.shape_inference` does not
            know: index of the input that has the same, or the type itself. See `output_element_type`.
        cost: see `CostRule`; None means unknown.
        shape: see `ShapeRule`; None means that `onnx.shape_inference` knows.
        channels: see `ChannelsRule`; None freezes every axis that the op touches.
        frozen: why there is no `channels` rule, one clause that a reader of the frozen groups understands.
        repair: see `RepairRule`; None means nothing to repair.
        torch: see `TorchRule`; None makes `lift` refuse the op by name.
    """

    op_type: str
    domain: str = ""
    since: int = 1
    reads_all: bool = True
    structural: tuple[int, ...] = ()
    cost: CostRule | None = None
    shape: ShapeRule | None = None
    channels: ChannelsRule | None = None
    repair: RepairRule | None = None
    torch: TorchRule | None = None
    quantization: tuple[int, ...] = ()
    statistics: tuple[int, ...] = ()
    element_type: int | ir.DataType = 0
    frozen: str = ""

    @property
    def why_frozen(self) -> str:
        """The reason that channels around an op without a `channels` rule are given for staying."""
        if self.frozen or not self.domain:
            return self.frozen or "no rule says how channels pass it"
        return f"no rule says how channels pass {self.domain} operators: analyse the model before they are put in"

    def output_element_type(
        self, node: ir.Node, known: Mapping[ir.Value, ir.DataType] | None = None
    ) -> ir.DataType | None:
        """Element type of output 0 of a node of this op, None where that of the deciding input is unknown.

        `known` holds element types that are inferred but not written on the values.

        An absent deciding input stands for float32: QGemm without an output zero point gives floats.
        """
        if isinstance(self.element_type, ir.DataType):
            return self.element_type
        source = node.inputs[self.element_type] if self.element_type < len(node.inputs) else None
        return ir.DataType.FLOAT if source is None else (known or {}).get(source) or source.dtype


class OpTable:
    """Rows by (domain, op, since-version). A value: `with_rows` returns a copy, nothing is registered.

    Example:
        >>> table = OpTable([OpRow("Relu", cost=lambda site: 0)])
        >>> table.row("", "Relu", 21).op_type
        'Relu'
        >>> table.row("com.acme", "Warp", 1) is None
        True
    """

    def __init__(self, rows: Iterable[OpRow]) -> None:
        by_operator: dict[tuple[str, str], dict[int, OpRow]] = {}
        for row in rows:
            versions = by_operator.setdefault((row.domain, row.op_type), {})
            if row.since in versions:
                raise GraphoptError(
                    f"two rows for {row.domain or 'ai.onnx'}::{row.op_type} since version {row.since}",
                    help="merge them into one row, or give one of them another `since`",
                )
            versions[row.since] = row
        self._rows: Mapping[tuple[str, str], dict[int, OpRow]] = by_operator

    def row(self, domain: str, op_type: str, opset: int) -> OpRow | None:
        """The row with the highest `since` not above `opset`, or None where the op is unknown."""
        versions = self._rows.get(("" if domain == "ai.onnx" else domain, op_type))
        if not versions:
            return None
        eligible = [since for since in versions if since <= opset]
        return versions[max(eligible)] if eligible else None

    def with_rows(self, rows: Iterable[OpRow]) -> OpTable:
        """A copy in which `rows` replace or extend the rows of this table."""
        merged = {(row.domain, row.op_type, row.since): row for row in self}
        merged.update({(row.domain, row.op_type, row.since): row for row in rows})
        return OpTable(merged.values())

    def __iter__(self) -> Any:
        for versions in self._rows.values():
            yield from versions.values()

    def __len__(self) -> int:
        return sum(len(versions) for versions in self._rows.values())
