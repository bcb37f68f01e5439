"""Constructors of whole families of rows, and the shape arithmetic that several families share.

Knows no operator by name. A row without `since` describes the op in every opset version that has it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import onnx_ir as ir

from graphopt.ir.ops.channels.elementwise import broadcast as broadcast_channels
from graphopt.ir.ops.row import ChannelsRule, OpRow, RepairRule, Shape, ShapeRule, Site, TorchFunction

MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators, which its graph optimizer and quantizers put into files."""


def no_macs(site: Site) -> int:
    """The cost of whatever is no contraction: 0 by convention (see `CostRule`)."""
    return 0


def unary(
    *names: str,
    domain: str = "",
    structural: tuple[int, ...] = (),
    quantization: tuple[int, ...] = (),
    reads_all: bool = True,
    shape: ShapeRule | None = None,
    element_type: int | ir.DataType = 0,
    channels: ChannelsRule | None = None,
    repair: RepairRule | None = None,
    frozen: str = "",
    torch: str = "",
) -> tuple[OpRow, ...]:
    """Rows of ops whose output is computed from input 0 without a contraction: 0 MACs.

    Outside the standard domain the output has the shape of input 0, unless `shape` says otherwise. `torch` is the
    file in `graphopt/ir/ops/torch` that has their torch functions.

    Example:
        >>> [row.op_type for row in unary("Relu", "Sigmoid")]
        ['Relu', 'Sigmoid']
    """
    rule = shape or (None if domain == "" else same_shape)
    return tuple(
        OpRow(
            name,
            domain=domain,
            reads_all=reads_all,
            structural=structural,
            quantization=quantization,
            cost=no_macs,
            shape=rule,
            element_type=element_type,
            channels=channels,
            repair=repair,
            frozen=frozen,
            torch=TorchFunction(torch, name) if torch else None,
        )
        for name in names
    )


def broadcasting(
    *names: str,
    domain: str = "",
    operands: tuple[int, ...] | None = None,
    quantization: tuple[int, ...] = (),
    channels: ChannelsRule = broadcast_channels,
    torch: str = "",
) -> tuple[OpRow, ...]:
    """Rows of ops that combine their operands position by position under ONNX broadcasting: 0 MACs.

    Args:
        names: operator names.
        domain: operator domain; outside the standard one the rows carry a shape rule.
        operands: indices of the inputs that are broadcast together; None for all of them.
        quantization: indices of the scales and zero points.
        channels: see `OpRow`; by default all operands must be 0 for the result to be.
        torch: the file in `graphopt/ir/ops/torch` that has their torch functions.
    """

    def shape(site: Site) -> list[Shape]:
        indices = range(len(site.inputs)) if operands is None else operands
        return [broadcast(site.input_shape(index) for index in indices)]

    rule = None if domain == "" else shape
    return tuple(
        OpRow(
            name,
            domain=domain,
            cost=no_macs,
            shape=rule,
            quantization=quantization,
            channels=channels,
            torch=TorchFunction(torch, name) if torch else None,
        )
        for name in names
    )


def uncounted(
    *names: str,
    domain: str = "",
    structural: tuple[int, ...] = (),
    channels: ChannelsRule | None = None,
    frozen: str = "",
    torch: str = "",
) -> tuple[OpRow, ...]:
    """Rows of ops that multiply and accumulate an unknown number of times: cost lists them as unknown.

    The comment at the call says why it is unknown. An op of another domain needs no such row: no row means
    the same.
    """
    return tuple(
        OpRow(
            name,
            domain=domain,
            structural=structural,
            cost=None,
            channels=channels,
            frozen=frozen,
            torch=TorchFunction(torch, name) if torch else None,
        )
        for name in names
    )


def same_shape(site: Site) -> list[Shape]:
    """Every output has the shape of input 0."""
    return [site.input_shape(0)] * len(site.node.outputs)


def broadcast(shapes: Iterable[Shape]) -> Shape:
    """The multidirectional broadcast of shapes (ONNX "Broadcasting", that of numpy).

    Raises:
        ValueError: two sizes differ and neither is 1.

    Example:
        >>> broadcast([(4, 1, 5), (3, 1)])
        (4, 3, 5)
    """
    result: list[int] = []
    for sizes in itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        distinct = set(sizes) - {1}
        if len(distinct) > 1:
            raise ValueError(f"sizes {sorted(distinct)} do not broadcast")
        result.append(distinct.pop() if distinct else 1)
    return tuple(reversed(result))


def elements(shape: Shape) -> int:
    """Number of elements of a shape; 1 for a scalar."""
    return math.prod(shape)
