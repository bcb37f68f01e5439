"""Graphs as text: `print_graph` for people (weights elided), `to_text` and `from_text` lossless for files and tests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence

import networkx
import numpy as np
import onnx
import onnx_ir as ir

from graphopt.errors import GraphoptError, LoadError

_INLINE_ELEMENTS = 8
"""Integer tensors up to this size (shapes, axes, pads) are printed with their values: they are structure."""
_PLAIN_NAME = re.compile(r"[\w./:\-]+\Z")
_DTYPE_NAMES = {ir.DataType.BOOL: "bool", ir.DataType.STRING: "string", ir.DataType.UNDEFINED: "?"}
_DTYPES_WITHOUT_SYNTAX = frozenset(
    name
    for name in ("COMPLEX64", "COMPLEX128", "UINT4", "INT4", "FLOAT4E2M1", "UINT2", "INT2", "FLOAT6E2M3", "FLOAT6E3M2")
)
"""Element types for which onnx's printer writes `...` instead of the numbers, and its parser has no word."""


def print_graph(model: ir.Model, *, weights: bool = False) -> str:
    """The graph for reading: one line a node, in topological order, the same text in every process.

    Nodes keep the model's own order where that is topological. Weights are listed in the order of first use
    with dtype and shape; integer weights of up to 8 elements show their values. Subgraphs (If, Loop, Scan) are
    indented below their node, functions come last.

    Args:
        model: any model; it is not changed.
        weights: add a content digest (the first 12 hex digits of SHA-256 over the little-endian bytes) to each
            weight whose values are not shown. Reads every weight.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[1,N] x) => (float[1,N] y) { y = Relu(x) }')
        >>> print(print_graph(model))
        graph g (opset 21)
          input  %x: f32[1,N]
          %y: f32[1,N] = Relu(%x)
          output %y: f32[1,N]
    """
    lines = [f"graph {_name(model.graph.name)} ({opset_text(model.opset_imports)})"]
    lines += _graph_lines(model.graph, "  ", weights)
    for function in model.functions.values():
        signature = _name("::".join(part for part in function.identifier() if part))
        lines.append(f"function {signature} ({opset_text(function.opset_imports)})")
        lines += _graph_lines(function, "  ", weights)
    return "\n".join(lines)


def to_text(model: ir.Model) -> str:
    """The whole model, every weight included, in ONNX's textual syntax. `from_text` reads it back.

    Kept: everything that the model computes and its interface, model metadata, node names, value types. Not kept,
    because the syntax has no place for it: doc strings and metadata of nodes and values.
    Meant for small models: a number takes about 10 characters.

    Raises:
        GraphoptError: a tensor whose element type the syntax cannot write (4-bit and 2-bit types, complex numbers).

    Source: https://onnx.ai/onnx/repo-docs/Syntax.html

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
        >>> to_text(from_text(to_text(from_text(text)))) == to_text(from_text(text))
        True
    """
    for where, tensor in _tensors(model):
        if tensor.dtype.name in _DTYPES_WITHOUT_SYNTAX:
            raise GraphoptError(
                f"ONNX's textual syntax cannot write {dtype_text(tensor.dtype)} numbers",
                where=where,
                help="save the model as .onnx, or print it for reading with print_graph",
            )
    if any(isinstance(tensor, ir.ExternalTensor) for _, tensor in _tensors(model)):
        # The printer would write a reference to the file instead of the numbers.
        model = model.clone()
        ir.external_data.load_to_model(model)
    return ir.to_onnx_text(model)


def from_text(text: str) -> ir.Model:
    """The model that `to_text` wrote, or any text in ONNX's textual syntax.

    Raises:
        LoadError: text that is not a model; names the line.
    """
    try:
        return ir.from_onnx_text(text)
    except (onnx.parser.ParseError, ValueError, TypeError, RuntimeError) as error:
        raise _parse_error(text, error) from error


def _parse_error(text: str, error: Exception) -> LoadError:
    message = str(error)
    if message.startswith(("b'", 'b"')):  # onnx passes the C++ message on as bytes
        message = str(error.args[0], "utf-8", "replace") if isinstance(error.args[0], bytes) else message[2:-1]
    message = message.replace("\\n", "\n").strip()
    reason = message.splitlines()[-1] if message else type(error).__name__
    position = re.search(r"line: (\d+) column: (\d+)", message)
    if position is None:
        return LoadError(f"the text is not an ONNX model: {reason}", help="see onnx.ai/onnx/repo-docs/Syntax.html")
    line, column = int(position[1]), int(position[2])
    lines = text.splitlines()
    shown = lines[line - 1].strip()[:80] if 0 < line <= len(lines) else "end of text"
    return LoadError(
        f"the text is not an ONNX model: {reason}",
        where=f"line {line}, column {column}: {shown}",
        help="the mistake is there or just before it; see onnx.ai/onnx/repo-docs/Syntax.html for the syntax",
    )


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every tensor of the model with where it stands: weights, and tensors in attributes."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield f"weight {name}", value.const_value
    for container in (model.graph, *model.functions.values()):
        for node in container.all_nodes():
            for attribute in node.attributes.values():
                if not attribute.is_ref() and attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
                    tensors = (
                        [attribute.as_tensor()] if attribute.type == ir.AttributeType.TENSOR else attribute.as_tensors()
                    )
                    yield from ((f"attribute {attribute.name} of {describe(node)}", tensor) for tensor in tensors)


# --- the parts of a line; diff.py prints with the same ones ---


def node_text(node: ir.Node) -> str:
    """One node as one line: `%y: f32[1,16,32,32] = Conv(%x, %w, %b) {pads=[1,1,1,1]}`; subgraphs as `graph(n)`."""
    outputs = list(node.outputs)
    while len(outputs) > 1 and not outputs[-1].name:
        outputs.pop()
    left = ", ".join(typed_text(value) if value.name else "_" for value in outputs)
    inputs = ", ".join(value_text(value) for value in node.inputs)
    attributes = ", ".join(f"{name}={attribute_text(attribute)}" for name, attribute in sorted(node.attributes.items()))
    return f"{left} = {op_text(node)}({inputs})" + (f" {{{attributes}}}" if attributes else "")


def describe(node: ir.Node) -> str:
    """The op with the node's own name, or its first output's name where it has none."""
    return f"{op_text(node)} {_name(node.name or (node.outputs[0].name if node.outputs else None))}"


def op_text(node: ir.Node) -> str:
    """`Conv`, or `domain::Op` outside the standard domain."""
    name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{name}:{node.overload}" if node.overload else name


def value_text(value: ir.Value | None) -> str:
    """`%name`, or `_` for an operand that is left out."""
    return "_" if value is None else f"%{_name(value.name)}"


def typed_text(value: ir.Value) -> str:
    """`%name: f32[1,16,32,32]`; the type is left out where nothing is known of it."""
    known = type_text(value)
    return f"{value_text(value)}: {known}" if known else value_text(value)


def type_text(value: ir.Value) -> str:
    """`f32[1,N,3]`, `f32[...]` for an unknown rank, `seq(f32[...])`, or `""` where dtype and shape are unknown."""
    if value.type is None and value.shape is None:
        return ""
    if value.type is not None and not isinstance(value.type, ir.TensorType | ir.SparseTensorType):
        kind = "seq" if isinstance(value.type, ir.SequenceType) else "optional"
        return f"{kind}({dtype_text(value.dtype)})"
    return dtype_text(value.dtype) + shape_text(value.shape)


def shape_text(shape: ir.Shape | Sequence[int] | None) -> str:
    """`[1,N,?]`, or `[...]` for an unknown rank."""
    if shape is None:
        return "[...]"
    dims = [dim if isinstance(dim, int) else (dim.value or "?") for dim in shape]
    return f"[{','.join(str(dim) for dim in dims)}]"


def dtype_text(dtype: ir.DataType | None) -> str:
    """`f32`, `i64`, `u8`, `bf16`, `bool`."""
    return "?" if dtype is None else _DTYPE_NAMES.get(dtype) or dtype.short_name()


def opset_text(opsets: dict[str, int]) -> str:
    """`opset 21, com.acme 1`: the standard domain first, then by name."""
    return ", ".join(f"{domain or 'opset'} {version}" for domain, version in sorted(opsets.items()))


def attribute_text(attribute: ir.Attr) -> str:
    """The value of an attribute: `[1,1]`, `"SAME_UPPER"`, `0.001`, `f32[64]#a0b1c2d3e4f5`."""
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    kind = attribute.type
    if kind == ir.AttributeType.TENSOR:
        return tensor_text(attribute.as_tensor(), digest=True)
    if kind == ir.AttributeType.TENSORS:
        return f"[{','.join(tensor_text(tensor, digest=True) for tensor in attribute.as_tensors())}]"
    if kind == ir.AttributeType.GRAPH:
        return f"graph({len(attribute.as_graph())})"
    if kind == ir.AttributeType.GRAPHS:
        return f"[{','.join(f'graph({len(graph)})' for graph in attribute.as_graphs())}]"
    value = attribute.value
    return (
        f"[{','.join(_scalar_text(item) for item in value)}]"
        if isinstance(value, (list, tuple))
        else _scalar_text(value)
    )


def tensor_text(tensor: ir.TensorProtocol, *, digest: bool) -> str:
    """`i64[2] {1,-1}` where small and integer (or one float), else `f32[64,3,3,3]`, with `#digest` when asked."""
    head = dtype_text(tensor.dtype) + shape_text([int(dim) for dim in tensor.shape.numpy()])
    exact = tensor.dtype.is_integer() or tensor.dtype in (ir.DataType.BOOL, ir.DataType.STRING)
    if tensor.size <= (_INLINE_ELEMENTS if exact else 1):
        return f"{head} {{{','.join(_scalar_text(item) for item in tensor.numpy().reshape(-1).tolist())}}}"
    return f"{head} #{tensor_digest(tensor)[:12]}" if digest else head


def tensor_digest(tensor: ir.TensorProtocol) -> str:
    """SHA-256 of the content in hex: equal for equal bytes, whatever holds them. Strings count with their lengths."""
    if tensor.dtype == ir.DataType.STRING:
        content = json.dumps([_scalar_text(item) for item in tensor.numpy().reshape(-1).tolist()]).encode()
        return hashlib.sha256(content).hexdigest()
    array = tensor.numpy()
    if array.dtype.isbuiltin and array.dtype.byteorder in "=|<" and array.flags.c_contiguous:
        return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()  # no copy
    return hashlib.sha256(tensor.tobytes()).hexdigest()


def _scalar_text(value: object) -> str:
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        return (
            np.format_float_positional(value, 7, fractional=False, trim="0")
            if 1e-4 <= abs(value) < 1e6
            else f"{value:.7g}"
        )
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _name(name: str | None) -> str:
    """The name, quoted where it would not read as one word."""
    if not name:
        return "?"
    return name if _PLAIN_NAME.match(name) else json.dumps(name, ensure_ascii=False)


# --- a whole graph ---


def topological(graph: ir.Graph | ir.Function) -> list[ir.Node]:
    """The nodes with producers before consumers, otherwise in their stored order; as stored where there is a cycle."""
    nodes = list(graph)
    position = {node: index for index, node in enumerate(nodes)}
    edges = [
        (position[producer], index)
        for index, node in enumerate(nodes)
        for value in operands(node)
        if (producer := value.producer()) is not None and producer in position
    ]
    if all(before < after for before, after in edges):
        return nodes
    order = networkx.DiGraph()
    order.add_nodes_from(range(len(nodes)))
    order.add_edges_from(edges)
    try:
        return [nodes[index] for index in networkx.lexicographical_topological_sort(order)]
    except networkx.NetworkXUnfeasible:
        return nodes


def subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """The bodies of a node with their attribute's name, in the order of the names: `then_branch`, `body`."""
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((f"{name}[{index}]", graph) for index, graph in enumerate(attribute.as_graphs()))


def operands(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads: its inputs that are not left out, and what the nodes of its bodies read."""
    yield from (value for value in node.inputs if value is not None)
    for _, body in subgraphs(node):
        for inner in body:
            yield from operands(inner)
        yield from body.outputs


def _graph_lines(graph: ir.Graph | ir.Function, indent: str, weights: bool) -> Iterator[str]:
    inputs = set(graph.inputs)
    for value in graph.inputs:
        default = f" = {tensor_text(value.const_value, digest=weights)}" if value.const_value is not None else ""
        yield f"{indent}input  {typed_text(value)}{default}"
    nodes = topological(graph)
    if isinstance(graph, ir.Graph):
        used = dict.fromkeys(value for node in nodes for value in operands(node) if value.is_initializer())
        unused = sorted(
            (value for value in graph.initializers.values() if value not in used), key=lambda v: v.name or ""
        )
        for value in (*used, *unused):
            if value.graph is graph and value not in inputs:
                content = (
                    type_text(value) if value.const_value is None else tensor_text(value.const_value, digest=weights)
                )
                yield f"{indent}weight {value_text(value)}: {content}"
    for node in nodes:
        yield indent + node_text(node)
        for name, body in subgraphs(node):
            yield f"{indent}  {name}:"
            yield from _graph_lines(body, indent + "    ", weights)
    for value in graph.outputs:
        yield f"{indent}output {typed_text(value)}"
