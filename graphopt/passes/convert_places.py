"""Which operators compute in half precision so that little time goes into Casts: a minimum cut.

Each operator is on the side of float32 or of half precision. Some must be on one of them; for the others the cut weighs
a Cast (one for each value that is made on one side and read on the other) against what running in half saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from graphopt.ir.rewrite import constant_tensor
from graphopt.passes.convert_kernels import Ports

GAINING = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "Attention", "LSTM", "GRU", "RNN", "Einsum", "DeformConv"}
)
"""Operators for whose time half precision is asked for."""
_UNKNOWN_SIZE = 8
_LAUNCH = 4096.0
"""What a Cast costs besides moving its elements, in elements."""
_SAVED = 0.5
"""What an operator saves in half precision, in Casts of its result."""
_TOTAL = 2**28
"""Sum of the capacities of one cut, in the int32 of scipy."""
_INFINITE = 2**30


@dataclass
class Sides:
    """What is known of each operator of the main graph before the cut.

    Attributes:
        ports: what becomes half of those that can compute in half precision.
        kept: those that must not, and why.
    """

    ports: dict[ir.Node, Ports] = field(default_factory=dict)
    kept: dict[ir.Node, str] = field(default_factory=dict)


def choose_half(nodes: Sequence[ir.Node], sides: Sides, sizes: Mapping[str, int]) -> set[ir.Node]:
    """The operators that compute in half precision.

    Args:
        nodes: of the main graph, in order.
        sides: what can and what must not; those in neither touch no float32.
        sizes: elements of symbolic dimensions, by name; 8 where not known.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[64, 64] x, float[64, 64] w)
        ...     => (float[64, 64] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, w) }''')
        >>> both = Ports(frozenset({0, 1}), frozenset({0}))
        >>> sides = Sides(dict(zip(model.graph, (both, Ports(frozenset({0}), frozenset({0})), both))))
        >>> len(choose_half(list(model.graph), sides, {}))
        3
    """
    free = {node: ports for node, ports in sides.ports.items() if node not in sides.kept}
    if not free:
        return set()
    network = _Network()
    for node in nodes:
        if node in free and (node.op_type in GAINING or any(user in free for user in _transposed_products(node))):
            network.edge("half", node, None)
        elif node in free:
            saved = _SAVED * sum(_elements(value, sizes) for value in node.outputs) + 1.0
            network.edge("half", node, saved)
    for node in nodes:
        for index, value in enumerate(node.outputs):
            if value.dtype == ir.DataType.FLOAT:
                made_half = node in free and index in free[node].outputs
                _add_value(network, value, node if made_half else "float", free, sizes)
    outside = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    for value in outside:
        if value.producer() is None and value.dtype == ir.DataType.FLOAT and constant_tensor(value) is None:
            _add_value(network, value, "float", free, sizes)
    return network.half_side(free)


def keep_transposed_products(sides: Sides) -> None:
    """Keep a MatMul and the Transposes that it reads on one side: a Cast between them ends the process.

    onnxruntime 1.31.1 crashes when it loads MatMul (Cast (Transpose (x, perm = [1, 0, 2])), w), with and without a
    Cast of the model's own: its fusion of the two reads past the Cast.
    """
    stable = False
    while not stable:
        stable = True
        for node in sides.ports:
            for product in _transposed_products(node):
                for first, second in ((node, product), (product, node)):
                    if first in sides.kept and second not in sides.kept:
                        why = f"a Cast between it and {first.op_type} {first.name!r} would crash onnxruntime"
                        sides.kept[second], stable = why, False


def _transposed_products(node: ir.Node) -> list[ir.Node]:
    """The MatMuls that read a Transpose."""
    if node.op_type != "Transpose":
        return []
    return [user for user in node.outputs[0].consumers() if user.op_type == "MatMul"]


def _add_value(
    network: _Network, value: ir.Value, maker: object, free: Mapping[ir.Node, Ports], sizes: Mapping[str, int]
) -> None:
    """One Cast to float where a half value has a reader in float32, one to half the other way round."""
    readers: set[object] = {"float"} if value.is_graph_output() else set()
    for use in value.uses():
        readers.add(use.node if use.node in free and use.idx in free[use.node].inputs else "float")
    if not readers or readers == {maker}:
        return
    price = _elements(value, sizes) + _LAUNCH
    down, up = ("down", value), ("up", value)
    network.edge(maker, down, price)
    network.edge(up, maker, price)
    for reader in readers:
        network.edge(down, reader, None)
        network.edge(reader, up, None)


class _Network:
    """Capacities between things; "half" is the source and "float" the sink. None stands for infinite."""

    def __init__(self) -> None:
        self.index: dict[object, int] = {"half": 0, "float": 1}
        self.edges: dict[tuple[int, int], float | None] = {}

    def edge(self, first: object, second: object, capacity: float | None) -> None:
        key = (self._number(first), self._number(second))
        if key[0] == key[1] or key[1] == 0 or key[0] == 1:
            return  # into the source and out of the sink nothing flows
        known = self.edges.get(key, 0.0)
        self.edges[key] = None if capacity is None or known is None else known + capacity

    def half_side(self, free: Mapping[ir.Node, Ports]) -> set[ir.Node]:
        """The free nodes that cannot reach the sink once all is cut: the largest side of a minimum cut."""
        total = sum(capacity for capacity in self.edges.values() if capacity is not None) or 1.0
        scale = min(_TOTAL / total, 1.0)
        pairs = np.array(list(self.edges), dtype=np.int32)
        capacities = [
            _INFINITE if capacity is None else max(1, round(capacity * scale)) for capacity in self.edges.values()
        ]
        size = len(self.index)
        graph = csr_array((np.array(capacities, np.int32), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
        flow = maximum_flow(graph, 0, 1).flow
        residual = csr_array(graph - flow)
        residual.data = np.where(residual.data > 0, residual.data, 0)
        residual.eliminate_zeros()
        reaching = set(breadth_first_order(csr_array(residual.T), 1, return_predecessors=False).tolist())
        return {node for node in free if node in self.index and self.index[node] not in reaching}

    def _number(self, thing: object) -> int:
        return self.index.setdefault(thing, len(self.index))


def _elements(value: ir.Value, sizes: Mapping[str, int]) -> float:
    if constant_tensor(value) is not None or value.shape is None:
        return float(_UNKNOWN_SIZE)
    total = 1.0
    for size in value.shape:
        total *= size if isinstance(size, int) else sizes.get(str(size.value), _UNKNOWN_SIZE)
    return total
