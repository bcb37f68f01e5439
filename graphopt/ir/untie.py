"""Values that are shared by accident: tensors filled with one number, of which exporters keep a single copy.

Zero biases, unit scales and zero initial states of different layers are equal before training, or are made as one and
sliced. Sharing them would tie the channels of layers that have nothing to do with each other. Equality of anything
but a filling is no accident and stays a tie.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphopt.ir.rewrite import Rewriter, constant, is_op

_LARGEST = 1 << 20
"""Elements up to which a shared tensor is looked at."""


def untie_fillings(model: ir.Model) -> None:
    """Give every reader its own copy of a filled tensor, in place; the copies share their memory.

    Readers that also share a weight that is no filling (one module, called several times) keep sharing.
    """
    rewriter = Rewriter(model)
    for value in tuple(model.graph.initializers.values()):
        if len(value.uses()) > 1 and not value.is_graph_output() and _is_filled(value):
            _untie_initializer(rewriter, value)
    for graph in model.graphs():
        for node in tuple(graph):
            if _fills(node) and len(node.outputs[0].uses()) > 1 and not node.outputs[0].is_graph_output():
                _untie_node(rewriter, graph, node)


def _is_filled(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or not 1 < tensor.size <= _LARGEST or not tensor.dtype.is_floating_point():
        return False
    array = tensor.numpy().reshape(-1)
    return bool((array == array[0]).all())


def _fills(node: ir.Node) -> bool:
    """Whether a node makes a tensor of one number whose size is decided at run time."""
    if is_op(node, "ConstantOfShape"):
        return True
    filling = constant(node.inputs[0]) if is_op(node, "Expand") else None
    return filling is not None and filling.size == 1


def _weights(node: ir.Node, value: ir.Value) -> Iterator[str]:
    for other in node.inputs:
        if other is not None and other is not value and other.is_initializer() and not _is_filled(other):
            tensor = other.const_value
            if tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1:
                yield other.name or ""


def _untie_initializer(rewriter: Rewriter, value: ir.Value) -> None:
    assert value.const_value is not None
    owners: dict[object, ir.Value] = {}
    for use in tuple(value.uses()):
        shared = frozenset(_weights(use.node, value))
        key: object = shared or (use.node, use.idx)
        if key not in owners:
            copy = (
                value if not owners else rewriter.initializer(rewriter.model.graph, value.name or "", value.const_value)
            )
            copy.meta.update(value.meta)
            owners[key] = copy
        if owners[key] is not value:
            use.node.replace_input_with(use.idx, owners[key])


def _untie_node(rewriter: Rewriter, graph: ir.Graph, node: ir.Node) -> None:
    result = node.outputs[0]
    for use in tuple(result.uses())[1:]:
        copy = ir.node(
            node.op_type,
            list(node.inputs),
            attributes=dict(node.attributes),  # pyright: ignore[reportArgumentType]
            outputs=[
                ir.Value(name=rewriter.unique_name(result.name or "filled"), type=result.type, shape=result.shape)
            ],
        )
        copy.name = rewriter.unique_name(node.name or node.op_type)
        copy.metadata_props.update(node.metadata_props)
        graph.insert_after(node, copy)
        use.node.replace_input_with(use.idx, copy.outputs[0])
