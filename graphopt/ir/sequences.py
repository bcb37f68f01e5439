"""Sequences that exporters make on the way between tensors, and that need not be: torch's chunk becomes a Split.

onnxruntime copies every element of a sequence, and no analysis sees through one.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.propagate import Facts
from graphopt.ir.rewrite import Rewriter, constant, discard_if_dead, is_op


def resolve_sequences(model: ir.Model, facts: Facts) -> bool:
    """Replace sequences whose elements are read by constant positions by the tensors themselves, in place.

    `SequenceAt(SplitToSequence(x))` becomes outputs of one Split, `SequenceAt(SequenceConstruct(...))` the element,
    `ConcatFromSequence(SequenceConstruct(...))` a Concat. A sequence with any other reader stays.

    Returns:
        Whether anything changed; shapes must then be inferred anew.
    """
    rewriter = Rewriter(model)
    changed = False
    for graph in tuple(model.graphs()):
        for node in tuple(graph):
            if is_op(node, "SplitToSequence"):
                changed |= _split(rewriter, graph, node, facts)
            elif is_op(node, "SequenceConstruct"):
                changed |= _construct(rewriter, graph, node)
    return changed


def _positions(sequence: ir.Value, length: int) -> dict[ir.Node, int] | None:
    """Each reader and the element that it takes; None where a reader wants more, or leaves the graph."""
    found: dict[ir.Node, int] = {}
    for use in sequence.uses():
        position = constant(use.node.inputs[1]) if is_op(use.node, "SequenceAt") and use.idx == 0 else None
        if position is None or not -length <= int(position.reshape(())) < length:
            return None
        found[use.node] = int(position.reshape(())) % length
    return None if sequence.is_graph_output() or not found else found


def _lengths(node: ir.Node, facts: Facts) -> tuple[int, list[int]] | None:
    """Axis and lengths of the parts, None where they are decided at run time."""
    data = node.inputs[0]
    shape = facts.shape(data)
    if data is None or shape is None or data.shape is None:
        return None
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(shape)
    if not isinstance(data.shape[axis], int):
        return None
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    split = constant(node.inputs[1]) if given else np.array(1)
    if split is None:
        return None
    if split.ndim:
        return axis, [int(size) for size in split]
    step = int(split)
    return axis, [min(step, shape[axis] - start) for start in range(0, shape[axis], step)]


def _split(rewriter: Rewriter, graph: ir.Graph, node: ir.Node, facts: Facts) -> bool:
    found = _lengths(node, facts)
    keeps = len(node.inputs) > 1 and node.inputs[1] is not None
    if found is None or (not keeps and not node.attributes.get_int("keepdims", 1)):
        return False
    axis, lengths = found
    readers = _positions(node.outputs[0], len(lengths))
    if readers is None:
        return False
    sizes = rewriter.initializer(rewriter.model.graph, f"{node.name or 'split'}.sizes", ir.Tensor(np.array(lengths)))
    names = [rewriter.unique_name(f"{node.outputs[0].name}.{index}") for index in range(len(lengths))]
    parts = [ir.Value(name=name) for name in names]
    split = ir.node("Split", [node.inputs[0], sizes], attributes={"axis": axis}, outputs=parts)
    split.name = rewriter.unique_name(f"{node.name or 'split'}.Split")
    split.metadata_props.update(node.metadata_props)
    graph.insert_before(node, split)
    for reader, position in readers.items():
        _hand_over(rewriter, reader, parts[position])
    discard_if_dead(node)
    return True


def _hand_over(rewriter: Rewriter, reader: ir.Node, value: ir.Value) -> None:
    """Let `value` stand for the result of `reader`."""
    result = reader.outputs[0]
    if value.type is None:
        value.type, value.shape = result.type, result.shape
    if not rewriter.bypass(result, value):
        reader.op_type = "Identity"
        reader.resize_inputs(1)
        reader.replace_input_with(0, value)


def _construct(rewriter: Rewriter, graph: ir.Graph, node: ir.Node) -> bool:
    sequence, elements = node.outputs[0], list(node.inputs)
    uses = list(sequence.uses())
    if len(uses) == 1 and is_op(uses[0].node, "ConcatFromSequence") and not sequence.is_graph_output():
        reader = uses[0].node
        if reader.attributes.get_int("new_axis", 0) or reader.graph is not graph:
            return False
        concat = ir.node("Concat", elements, attributes={"axis": reader.attributes.get_int("axis")})
        concat.name = rewriter.unique_name(f"{reader.name or 'concat'}.Concat")
        concat.outputs[0].name = rewriter.unique_name(f"{reader.outputs[0].name}.joined")
        graph.insert_before(reader, concat)
        rewriter.supersede(reader.outputs[0], concat.outputs[0])
        discard_if_dead(node)
        return True
    readers = _positions(sequence, len(elements))
    if readers is None:
        return False
    for reader, position in readers.items():
        element = elements[position]
        assert element is not None
        _hand_over(rewriter, reader, element)
    discard_if_dead(node)
    return True
