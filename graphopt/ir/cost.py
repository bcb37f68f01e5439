"""What a graph costs to run once: MACs, parameters and bytes moved, per node and in total.

Convention: MACs count the multiply-accumulates of linear operators only (see `ops.row.CostRule`). Bytes are
those of the operands of every node, as if nothing stayed in a cache and no op were a view: an upper bound,
equal for two graphs that move the same tensors. What the op table does not know counts as 0 and is listed,
never guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.ir.ops import default_table
from graphopt.ir.ops.control import trip_count
from graphopt.ir.ops.families import elements
from graphopt.ir.ops.row import OpRow, OpTable, Shape, Site, UnknownShapeError
from graphopt.ir.propagate import Facts, propagate


@dataclass(frozen=True)
class NodeCost:
    """The share of one node in one inference.

    Attributes:
        node: the node.
        runs: how often it runs: the product of the trip counts around it, 0 in the branch of an If not
        counted.
        macs: multiply-accumulates of all its runs.
        parameters: elements of the weights that no earlier node reads.
        weight_bytes: storage of the initializers, of any kind, that no earlier node reads.
        bytes_read: bytes of its distinct inputs, over all its runs.
        bytes_written: bytes of its outputs that are used, over all its runs.
        unknown: why a figure is missing (then counted as 0), or None where all are known.
    """

    node: ir.Node
    runs: int
    macs: int = 0
    parameters: int = 0
    weight_bytes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    unknown: str | None = None

    @property
    def known(self) -> bool:
        """Whether every figure of the node is known."""
        return self.unknown is None

    @property
    def operator(self) -> str:
        """See `operator_name`."""
        return operator_name(self.node)


@dataclass(frozen=True)
class OperatorCost:
    """The sum over all nodes of one operator. The figures are those of `NodeCost`."""

    operator: str
    nodes: int
    macs: int
    parameters: int
    weight_bytes: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class ModelCost:
    """The cost of one inference; totals are sums over `nodes`, which include the nodes of subgraphs.

    Attributes:
        nodes: one entry a node, in graph order, a node that holds subgraphs before the nodes inside.
        assumed: nodes whose number of iterations is decided at run time and was taken as one.
    """

    nodes: tuple[NodeCost, ...]
    assumed: tuple[ir.Node, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference, unknown nodes counted as 0."""
        return sum(entry.macs for entry in self.nodes)

    @property
    def parameters(self) -> int:
        """Weights, each once however often it is read; scales, zero points and shape constants are none."""
        return sum(entry.parameters for entry in self.nodes)

    @property
    def weight_bytes(self) -> int:
        """Storage of all initializers that are read, each once; sub-byte types are packed."""
        return sum(entry.weight_bytes for entry in self.nodes)

    @property
    def bytes_read(self) -> int:
        """Bytes that the nodes read, weights included."""
        return sum(entry.bytes_read for entry in self.nodes)

    @property
    def bytes_written(self) -> int:
        """Bytes that the nodes write."""
        return sum(entry.bytes_written for entry in self.nodes)

    @property
    def unknown(self) -> tuple[NodeCost, ...]:
        """The nodes with a figure that is missing; each says why."""
        return tuple(entry for entry in self.nodes if not entry.known)

    def by_op(self) -> tuple[OperatorCost, ...]:
        """The cost summed by operator, the most MACs first, then the most bytes."""
        groups: dict[str, list[NodeCost]] = {}
        for entry in self.nodes:
            groups.setdefault(entry.operator, []).append(entry)
        sums = [_operator_cost(operator, entries) for operator, entries in groups.items()]
        return tuple(sorted(sums, key=lambda item: (-item.macs, -item.bytes_read - item.bytes_written, item.operator)))


def cost(
    model: ir.Model,
    sizes: Mapping[str, int] | None = None,
    *,
    table: OpTable | None = None,
    facts: Facts | None = None,
) -> ModelCost:
    """Cost of running `model` once.

    Subgraphs: of an If the branch with more MACs counts (then the one that moves more bytes), the other runs
    0 times but keeps its parameters; the body of a Loop or Scan counts as often as it runs, once where that
    is not known (listed in `assumed`). A node that holds subgraphs moves no bytes itself.

    Args:
        model: a model in canonical form (functions inlined, weights as initializers); it is not changed.
        sizes: elements of each symbolic input dimension, as `propagate` takes them; ignored where `facts` is
        given.
        table: rows of the op table, the default table where None.
        facts: shapes and constants of this model, where the caller has them already.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[n,6] x) => (float[n,4] y) '
        ...     '<float[6,4] w = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}> { y = MatMul (x, w) }')
        >>> found = cost(model, {"n": 2})
        >>> found.macs, found.parameters, found.bytes_read, found.bytes_written
        (48, 24, 144, 32)
    """
    rows = table or default_table()
    return _Count(model, rows, facts or propagate(model, sizes, table=rows)).run()


def operator_name(node: ir.Node) -> str:
    """Operator of a node as "Conv", or "domain::Name" outside the standard domain."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def storage_bytes(count: int, dtype: ir.DataType) -> int:
    """Bytes that `count` elements take, sub-byte elements packed: three int4 take two bytes.

    Strings, whose length is not in their type, take 0.
    """
    return 0 if dtype in _WITHOUT_WIDTH else (count * dtype.bitwidth + 7) // 8


_WITHOUT_WIDTH = (ir.DataType.STRING, ir.DataType.UNDEFINED)


class _UnknownSizeError(Exception):
    """The bytes of a tensor are not known, because its shape or its element type is not."""


class _Count:
    """One count: walks the graphs in order and remembers which initializers have been counted."""

    def __init__(self, model: ir.Model, table: OpTable, facts: Facts) -> None:
        self.model, self.table, self.facts = model, table, facts
        self.stored: set[ir.Value] = set()
        self.counted: set[ir.Value] = set()
        self.assumed: list[ir.Node] = []

    def run(self) -> ModelCost:
        entries = tuple(self._graph(self.model.graph))
        return ModelCost(entries, tuple(self.assumed))

    def _graph(self, graph: ir.Graph) -> Iterator[NodeCost]:
        for node in graph:
            row = self.table.row(node.domain, node.op_type, self.model.opset_imports.get(node.domain, 1))
            bodies = _subgraphs(node)
            yield self._holder(node, row) if bodies else self._node(node, row)
            if node.op_type == "If":
                yield from self._larger_branch(bodies)
            elif bodies:
                yield from self._repeated(node, bodies)

    def _larger_branch(self, branches: Sequence[ir.Graph]) -> list[NodeCost]:
        costs = [list(self._graph(branch)) for branch in branches]
        largest = max(costs, key=_weight)
        return [entry for entries in costs for entry in (entries if entries is largest else _scaled(entries, 0))]

    def _repeated(self, node: ir.Node, bodies: Sequence[ir.Graph]) -> list[NodeCost]:
        runs = trip_count(self.facts.site(node))
        if runs is None:
            self.assumed.append(node)
            runs = 1
        return _scaled([entry for body in bodies for entry in self._graph(body)], runs)

    def _holder(self, node: ir.Node, row: OpRow | None) -> NodeCost:
        parameters, weight_bytes = self._weights(node, row)
        unknown = None if row is not None else f"the op table has no row for {operator_name(node)}"
        return NodeCost(node, 1, 0, parameters, weight_bytes, unknown=unknown)

    def _node(self, node: ir.Node, row: OpRow | None) -> NodeCost:
        parameters, weight_bytes = self._weights(node, row)
        macs, unknown = self._macs(node, row)
        try:
            read, written = self._bytes(node, row)
        except _UnknownSizeError as error:
            read, written, unknown = 0, 0, unknown or str(error)
        return NodeCost(node, 1, macs, parameters, weight_bytes, read, written, unknown)

    def _macs(self, node: ir.Node, row: OpRow | None) -> tuple[int, str | None]:
        if row is None:
            return 0, f"the op table has no row for {operator_name(node)}"
        if row.cost is None:
            return 0, f"the op table does not know the MACs of {operator_name(node)}"
        try:
            return row.cost(self._site(node, row)), None
        except UnknownShapeError as error:
            return 0, str(error)

    def _site(self, node: ir.Node, row: OpRow) -> Site:
        """As `Facts.site`, with constants of structural inputs only: no weight is read from disk."""
        constants = [
            self.facts.constant(value) if index in row.structural else None for index, value in enumerate(node.inputs)
        ]
        return Site(
            node,
            tuple(self.facts.shape(value) for value in node.inputs),
            tuple(self.facts.shape(value) for value in node.outputs),
            tuple(constants),
        )

    def _bytes(self, node: ir.Node, row: OpRow | None) -> tuple[int, int]:
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        written = sum(self._size(value) for value in used)
        distinct = list(dict.fromkeys(value for value in node.inputs if value is not None))
        read = sum(self._size(value) for value in distinct)
        if row is not None and not row.reads_all and node.inputs and node.inputs[0] is not None:
            whole = self._size(node.inputs[0])
            touched = elements(self._shape(node.outputs[0]))
            dtype = self.facts.dtypes.get(node.inputs[0], node.inputs[0].dtype)
            if dtype is not None:
                read -= max(whole - storage_bytes(touched, dtype), 0)
        return read, written

    def _size(self, value: ir.Value) -> int:
        """Bytes of a tensor; sequences and optionals, whose elements no type counts, are 0."""
        if value.type is not None and not isinstance(value.type, (ir.TensorType, ir.SparseTensorType)):
            return 0
        dtype = self.facts.dtypes.get(value, value.dtype)
        if dtype is None:
            raise _UnknownSizeError(f"element type of {value.name!r} is unknown")
        return storage_bytes(elements(self._shape(value)), dtype)

    def _shape(self, value: ir.Value) -> Shape:
        shape = self.facts.shape(value)
        if shape is None:
            raise _UnknownSizeError(f"shape of {value.name!r} is unknown")
        return shape

    def _weights(self, node: ir.Node, row: OpRow | None) -> tuple[int, int]:
        """Parameters and bytes of the initializers that no earlier node has accounted for."""
        parameters = stored = 0
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.const_value is None:
                continue
            tensor = value.const_value
            if value not in self.stored:
                self.stored.add(value)
                stored += storage_bytes(tensor.size, tensor.dtype)
            if value not in self.counted and _is_parameter(tensor.dtype, index, row):
                self.counted.add(value)
                parameters += tensor.size * _numbers_per_element(node, tensor.dtype)
        return parameters, stored


def numbers_per_element(value: ir.Value, row_of: Callable[[ir.Node], OpRow | None]) -> int:
    """How many parameters an element of an initializer stands for: 1, more where they are packed, 0 for no weight.

    Args:
        value: an initializer.
        row_of: the op row of a node that reads it.
    """
    tensor = value.const_value
    if tensor is None:
        return 0
    readers = (use for use in value.uses() if _is_parameter(tensor.dtype, use.idx, row_of(use.node)))
    return next((_numbers_per_element(use.node, tensor.dtype) for use in readers), 0)


def _is_parameter(dtype: ir.DataType, index: int, row: OpRow | None) -> bool:
    """Whether an initializer read at input `index` is a weight.

    Floats are, and so are integers that stand for reals: those of 8 bits and less (no op takes them as
    indices or sizes), and wider ones (an int32 bias) where the op has scales. What the row calls structural,
    a scale or a zero point is none.
    """
    if row is not None and (index in row.structural or index in row.quantization):
        return False
    if dtype in _WITHOUT_WIDTH or dtype == ir.DataType.BOOL:
        return False
    reals = row is not None and bool(row.quantization)
    return not dtype.is_integer() or dtype.bitwidth <= 8 or reals


def _numbers_per_element(node: ir.Node, dtype: ir.DataType) -> int:
    """Numbers in one stored byte: the weight-only ops of onnxruntime pack them and say so in `bits`."""
    bits = node.attributes.get("bits")
    return 8 // bits.as_int() if bits is not None and dtype == ir.DataType.UINT8 else 1


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs


def _scaled(entries: Sequence[NodeCost], runs: int) -> list[NodeCost]:
    """The same nodes run `runs` times as often; their weights stay, because a weight is stored once."""
    return [
        dataclasses.replace(
            entry,
            runs=entry.runs * runs,
            macs=entry.macs * runs,
            bytes_read=entry.bytes_read * runs,
            bytes_written=entry.bytes_written * runs,
        )
        for entry in entries
    ]


def _weight(entries: Sequence[NodeCost]) -> tuple[int, int]:
    return (
        sum(entry.macs for entry in entries),
        sum(entry.bytes_read + entry.bytes_written for entry in entries),
    )


def _operator_cost(operator: str, entries: Sequence[NodeCost]) -> OperatorCost:
    return OperatorCost(
        operator,
        len(entries),
        macs=sum(entry.macs for entry in entries),
        parameters=sum(entry.parameters for entry in entries),
        weight_bytes=sum(entry.weight_bytes for entry in entries),
        bytes_read=sum(entry.bytes_read for entry in entries),
        bytes_written=sum(entry.bytes_written for entry in entries),
    )
