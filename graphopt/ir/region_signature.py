"""Which parts of a graph compute the same with other weights: a text without names, read from the result backwards."""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from graphopt.ir.region_flow import Flow
from graphopt.ir.rewrite import constant_tensor
from graphopt.ir.text import attribute_text, op_text, operands, subgraphs, tensor_text, type_text


def signature(flow: Flow, nodes: frozenset[ir.Node], entry: ir.Value, exit_value: ir.Value) -> str:
    """Hex digest that is equal for equal structure, attributes, shapes and element types.

    Names, the order of nodes and the values of floating point constants play no part; small integer constants (axes,
    shapes) do, since they are structure.

    Args:
        flow: the graph.
        nodes: the part of it.
        entry: what goes in.
        exit_value: what comes out; values are numbered on the way back from here.
    """
    lines: list[str] = []
    numbers: dict[ir.Node, int] = {}
    outside: dict[ir.Value, int] = {}

    def word(value: ir.Value | None) -> str:
        if value is None:
            return "_"
        producer = value.producer()
        if value is entry:
            return f"entry:{type_text(value)}"
        if producer in numbers:
            return f"%{numbers[producer]}.{value.index()}"
        if value in flow.dynamic:
            return f"read{outside.setdefault(value, len(outside))}:{type_text(value)}"
        tensor = constant_tensor(value)
        if tensor is None or tensor.dtype.is_floating_point():
            return type_text(value)
        return tensor_text(tensor, digest=False)

    pending: list[tuple[ir.Node, bool]] = [(node, False) for node in (exit_value.producer(),) if node in nodes]
    while pending:
        node, ready = pending.pop()
        if node in numbers:
            continue
        if not ready:
            pending.append((node, True))
            inner = [value.producer() for value in operands(node) if value is not entry]
            pending += [(source, False) for source in reversed(inner) if source in nodes and source not in numbers]
            continue
        numbers[node] = len(numbers)
        attributes = ",".join(f"{name}={attribute_text(node.attributes[name])}" for name in sorted(node.attributes))
        bodies = ",".join(op_text(inner) for _, body in subgraphs(node) for inner in body)
        results = ",".join(type_text(output) for output in node.outputs)
        lines.append(f"{op_text(node)}({','.join(map(word, node.inputs))}){{{attributes}}}[{bodies}]->{results}")
    lines.append(f"exit {word(exit_value)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
