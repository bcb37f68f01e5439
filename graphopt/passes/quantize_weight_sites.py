"""Where weights alone can be integers: products and table look-ups whose weight onnxruntime reads as integers.

Measured on onnxruntime 1.31.1 (the graphs that it saves): a MatMul, or a Gemm without transposes, factors and with a
bias of one axis, becomes MatMulNBits when its second operand is a DequantizeLinear of a constant matrix [K, N] of 2, 4
or 8 bits, along axis 0 in blocks of 16, 32, 64, 128 or 256, or along axis 1 with one scale a column. Integers and
scales must have no other reader. Everything else (left operands, batches of matrices, convolutions, blocks of another
size) would be dequantized as a whole in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.ir.ops.row import tensor_shape
from graphopt.ir.rewrite import constant_tensor, integers, is_op, let_go
from graphopt.passes.quantize_placement import attribute, node_name

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Blocks for which onnxruntime has a kernel."""
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Element types of weights that onnxruntime's CPU provider dequantizes."""
_SMALLEST_TABLE = 4096
"""Elements from which a matrix whose rows are picked counts as a table."""
_NO_KERNEL = {
    "Conv": "onnxruntime has no Conv with integers as weights alone: all of them would be dequantized in every run",
    "ConvTranspose": "onnxruntime has no ConvTranspose with integers as weights alone",
    "Einsum": "onnxruntime has no Einsum with integers as weights",
    "LSTM": "recurrent layers stay float",
    "GRU": "recurrent layers stay float",
    "RNN": "recurrent layers stay float",
}
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Concat", "Gather", "Expand")


@dataclass(frozen=True)
class WeightSite:
    """One reader of a weight.

    Attributes:
        node: MatMul, Gemm or Gather of the main graph.
        stored: the initializer, a matrix.
        input_axis: its axis that counts inputs, along which blocks run: what a product sums over, the columns of a
            table.
    """

    node: ir.Node
    stored: ir.Value
    input_axis: int

    @property
    def is_table(self) -> bool:
        """Whether rows are picked."""
        return is_op(self.node, "Gather")

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The stored floats."""
        found = constant_tensor(self.stored)
        assert found is not None
        return found

    @property
    def dtype(self) -> ir.DataType:
        """Element type of the weight."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs K and outputs N."""
        shape = tensor_shape(self.tensor)
        return shape[self.input_axis], shape[1 - self.input_axis]

    @property
    def factor(self) -> float:
        """`alpha` of a Gemm, with which the weight is multiplied; 1 for the others."""
        return float(attribute(self.node, "alpha", 1.0)) if is_op(self.node, "Gemm") else 1.0

    def is_finite(self) -> bool:
        """Whether the weight holds neither NaN nor infinity. It is read."""
        array = self.tensor.numpy()
        return bool(np.isfinite(array.max()) and np.isfinite(array.min()))

    def release(self) -> None:
        """Let the mapping of a weight in a file go."""
        let_go(self.stored.const_value)

    def matrix(self) -> np.ndarray:
        """The floats as [K, N], a view of what is stored; `factor` left out."""
        array = self.tensor.numpy()
        return array if self.input_axis == 0 else array.T


def weight_sites(model: ir.Model) -> dict[ir.Node, WeightSite | str]:
    """Every operator with a weight, in graph order: where its weight is, or why that stays float.

    No weight is read; see `WeightSite.is_finite`.
    """
    found: dict[ir.Node, WeightSite | str] = {}
    inside = set(model.graph)
    for node in model.graph.all_nodes():
        site = _site(node)
        if site is not None and node not in inside:
            site = "it stands in a subgraph (If, Loop, Scan)"
        if site is not None:
            found[node] = site
    # A weight that somebody else reads as floats would be stored twice.
    while True:
        readable = {site.node for site in found.values() if isinstance(site, WeightSite)}
        torn = {
            node: reason
            for node, site in found.items()
            if isinstance(site, WeightSite) and (reason := _other_reader(site.stored, readable)) is not None
        }
        if not torn:
            return found
        found |= torn


def weight_names(node: ir.Node) -> Iterator[str]:
    """Names by which an operator may be excluded: its type, its own, those of its constants (also behind Transpose)."""
    yield from (node.op_type, node_name(node))
    for value in node.inputs:
        source = _behind_transpose(value)[0]
        if source is not None and source.const_value is not None:
            yield source.name or ""


def reaches_product(value: ir.Value) -> ir.Node | None:
    """A product that reads a value directly, or moved: there onnxruntime takes its DequantizeLinear for an activation.

    Of two operands behind DequantizeLinear onnxruntime makes a kernel of integers, which refuses blocks and narrow
    types: a model that is valid ONNX then fails to load or to run.
    """
    waiting, seen = [value], {value}
    while waiting:
        for node in waiting.pop().consumers():
            if is_op(node, "MatMul", "Gemm"):
                return node
            moved = [one for one in node.outputs if one not in seen] if is_op(node, *_MOVES) else []
            seen.update(moved)
            waiting += moved
    return None


def _arrives_quantized(value: ir.Value | None) -> bool:
    """Whether a value is a DequantizeLinear's, or moved from one: see `reaches_product`."""
    producer = None if value is None else value.producer()
    while producer is not None and is_op(producer, *_MOVES) and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return is_op(producer, "DequantizeLinear")


def is_transposition(node: ir.Node | None) -> bool:
    """Whether a Transpose swaps the axes of a matrix."""
    return node is not None and is_op(node, "Transpose") and (integers(node, "perm") or (1, 0)) == (1, 0)


def _site(node: ir.Node) -> WeightSite | str | None:
    """Where the weight is, why it stays float, or None where the node has none."""
    if node.domain != "":
        return None
    if node.op_type in _NO_KERNEL:
        weighted = any(constant_tensor(value) is not None for value in node.inputs)
        return _NO_KERNEL[node.op_type] if weighted else None
    if is_op(node, "Gather"):
        return _table(node)
    if not is_op(node, "MatMul", "Gemm"):
        return None
    left, right = (_behind_transpose(value) for value in node.inputs[:2])
    if right[0] is None:
        return "its weight is the left operand, and onnxruntime fuses right ones" if left[0] is not None else None
    if left[0] is not None:
        return "both of its operands are constant"
    if _arrives_quantized(node.inputs[0]):
        return "its data input is quantized already: with its weight onnxruntime would take both for integers"
    stored, transposed = right[0], right[1]
    if is_op(node, "Gemm") and attribute(node, "transB", 0):
        transposed = not transposed
    site = WeightSite(node, stored, 1 if transposed else 0)
    return _gemm_reason(site) or _reason(site) or site


def _table(node: ir.Node) -> WeightSite | str | None:
    stored = node.inputs[0]
    tensor = constant_tensor(stored)
    if stored is None or tensor is None or len(tensor_shape(tensor)) != 2 or attribute(node, "axis", 0) != 0:
        return None
    if not tensor.dtype.is_floating_point() or tensor.size < _SMALLEST_TABLE:
        return None
    site = WeightSite(node, stored, 1)
    return _reason(site) or site


def _behind_transpose(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The initializer that an operand is, and whether it is read transposed; None where it is computed."""
    producer = None if value is None else value.producer()
    transposed = is_transposition(producer)
    source = producer.inputs[0] if transposed and producer is not None else value
    return (source if source is not None and constant_tensor(source) is not None else None), transposed


def _gemm_reason(site: WeightSite) -> str | None:
    node = site.node
    if not is_op(node, "Gemm"):
        return None
    if attribute(node, "transA", 0):
        return "its data input is transposed (transA=1)"
    if not np.isfinite(site.factor) or site.factor == 0.0:
        return f"its alpha is {site.factor}"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    if constant_tensor(bias) is None:
        shape = bias.shape
        plain = shape is not None and len(shape) == 1 and shape[0] == site.shape[1]
        return None if plain and attribute(node, "beta", 1.0) == 1.0 else "its bias is computed at run time"
    shape = tensor_shape(bias.const_value) if bias.const_value is not None else ()
    return None if len(shape) < 2 or shape[0] == 1 else "its bias differs by row"


def _reason(site: WeightSite) -> str | None:
    tensor = site.tensor
    shape = tensor_shape(tensor)
    if not tensor.dtype.is_floating_point():
        return f"its weight is {tensor.dtype.name.lower()}"
    if len(shape) != 2:
        return f"its weight has {len(shape)} axes, and onnxruntime fuses matrices only"
    if tensor.dtype not in FLOATS:
        return f"its weight is {tensor.dtype.name.lower()}, onnxruntime dequantizes to float32 and float16"
    if tensor.size == 0:
        return "its weight is empty"
    if site.stored.is_graph_output():
        return "its weight is also a graph output"
    return None


def _other_reader(stored: ir.Value, readable: set[ir.Node]) -> str | None:
    """Why a weight is needed as floats as well, None where it is not."""
    waiting = [stored]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return "its weight is also a graph output"
        for use in value.uses():
            if is_transposition(use.node) and use.node.graph is stored.graph:
                waiting.append(use.node.outputs[0])
            elif use.node not in readable or (is_op(use.node, "Gemm") and use.idx == 2):
                return f"its weight is read by {use.node.op_type} {node_name(use.node)!r} in float too"
    return None
