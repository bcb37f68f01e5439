"""The canonical form of a graph (design.md D2): what every pass may rely on.

Weights are initializers, and initializers are no inputs. Functions are inlined, the opset is lifted, sizes that do
not depend on a run-time dimension are numbers, defaults that hide a size are written out, no-ops and dead code are
gone, names are unique, nodes sorted, shapes inferred. The interface (inputs, outputs, metadata) is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from graphopt.errors import InvalidGraphError
from graphopt.ir.check import sort_nodes
from graphopt.ir.explicit import write_defaults_out
from graphopt.ir.identities import remove_no_op
from graphopt.ir.opset import lift_opset
from graphopt.ir.permutations import gather_by_rows, gather_shuffles
from graphopt.ir.propagate import LITERAL, Facts
from graphopt.ir.rewrite import Rewriter, constant, is_op, let_go
from graphopt.ir.sequences import resolve_sequences
from graphopt.ir.shapes import Probes, infer_shapes
from graphopt.ir.untie import untie_fillings

NOTES = "graphopt.notes"
"""Key in `model.meta`: list of sentences about how the model was read, for the report."""

_LARGEST_FILLED_WEIGHT = 2**31
"""Bytes of the largest weight that a ConstantOfShape may stand for before it is left in the graph."""


def canonicalize(model: ir.Model, *, sizes: Mapping[str, int] | None = None) -> ir.Model:
    """Bring a model into canonical form, in place, and return it.

    Args:
        model: a valid model of opset 7 or above.
        sizes: elements of the symbolic input dimensions that the model is known to accept, by name; they serve as
            the first probe (the second has twice as many). Without them every symbol is 8.

    Raises:
        InvalidGraphError: the graph has a cycle, a node reads a value that nobody produces, functions cannot be
            inlined, or the model cannot be lifted to opset 18.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[n,6] x) => (float[n,6] y) {
        ...     shape = Shape (x)  same = Identity (x)  flat = Reshape (same, shape)  y = Relu (flat) }''')
        >>> [node.op_type for node in canonicalize(model).graph]
        ['Shape', 'Reshape', 'Relu']
    """
    sort_nodes(model)
    _name_standard_domain(model)
    _inline_functions(model)
    _lift_constants(model)
    _clean(model, common.LiftSubgraphInitializersToMainGraphPass(), common.RemoveInitializersFromInputsPass())
    lift_opset(model)
    _lift_constants(model)
    _clean(model, common.LiftSubgraphInitializersToMainGraphPass())  # lifting writes axes into branches
    _forget_negative_sizes(model)
    _drop_training_mode(model)
    fold_static_sizes(model, sizes)
    facts = infer_shapes(model, sizes)
    if resolve_sequences(model, facts):
        facts = infer_shapes(model, sizes)
    write_defaults_out(model, facts)
    for rule in (remove_no_op, gather_by_rows, gather_shuffles):
        Rewriter(model).until_stable(rule, "canonical form", lambda what, why, where: None)
    _drop_zero_biases(model)
    untie_fillings(model)
    _clean(
        model,
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )
    sort_nodes(model)
    _name_nodes(model)
    _note_broken_weights(model)
    return model


def _name_standard_domain(model: ir.Model) -> None:
    """The standard domain has two names, "" and "ai.onnx"; from here on it is ""."""
    for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if "ai.onnx" in imports:
            imports.setdefault("", imports.pop("ai.onnx"))


def _forget_negative_sizes(model: ir.Model) -> None:
    """A size of -1, which old converters write for one that is decided at run time, becomes an anonymous dimension."""
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)):
            if value.shape is not None and any(isinstance(size, int) and size < 0 for size in value.shape):
                value.shape = ir.Shape(None if isinstance(size, int) and size < 0 else size for size in value.shape)


def _inline_functions(model: ir.Model) -> None:
    try:
        _clean(model, common.InlinePass(), common.RemoveUnusedFunctionsPass())
    except ValueError as error:  # functions that call themselves, or are of another opset than the model
        raise InvalidGraphError(
            f"the model's functions cannot be inlined: {error}",
            where=model.graph.name,
            help="export the model again, without functions if there is such an option",
        ) from error


def _lift_constants(model: ir.Model) -> None:
    """Constant nodes become initializers, marked as literals: numbers in the code, not parameters of the network."""
    before = {id(value) for graph in model.graphs() for value in graph.initializers.values()}
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for graph in model.graphs():
        for value in graph.initializers.values():
            if id(value) not in before:
                value.meta[LITERAL] = True


def fold_static_sizes(model: ir.Model, sizes: Mapping[str, int] | None = None) -> None:
    """Replace every small value that all probes of the symbolic dimensions agree on by an initializer.

    See `Probes.votes`: with two probes alone, a size that is rounded up to a multiple or clamped to a maximum would
    pass for a constant.

    Values computed from float weights alone are left: folding them would tear the weight from its name before
    pruning and training. Weights that a ConstantOfShape stands for are written out.
    """
    probes = Probes(model, sizes)
    facts = probes.votes()
    for graph in model.graphs():
        for node in list(graph):
            for value in node.outputs:
                array = _static_value(value, facts)
                if array is not None and value.uses() and not value.is_graph_output():
                    _replace_by_initializer(model.graph, value, array)
    common.RemoveUnusedNodesPass()(model)


def _static_value(value: ir.Value, facts: Sequence[Facts]) -> np.ndarray | None:
    first, second = facts[:2]
    torn = value in first.from_weights or (value in first.from_scalars and value not in first.sizes)
    if value in first.constants and value in second.constants and not torn:
        known = [probe.constants[value] for probe in facts if value in probe.constants]
        return known[0] if all(_equal(known[0], array) for array in known[1:]) else None
    node = value.producer()
    if node is not None and node.op_type == "ConstantOfShape" and node.domain == "":
        return _filled(node, first, second)
    return None


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _filled(node: ir.Node, first: Facts, second: Facts) -> np.ndarray | None:
    """The tensor behind ConstantOfShape, as a broadcast view that takes no memory until it is written."""
    target, other = first.constant(node.inputs[0]), second.constant(node.inputs[0])
    if target is None or other is None or not np.array_equal(target, other):
        return None
    attribute = node.attributes.get("value")
    fill = np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()
    shape = tuple(int(size) for size in target)
    if int(np.prod(shape)) * fill.itemsize > _LARGEST_FILLED_WEIGHT:
        return None
    return np.broadcast_to(fill.reshape(()), shape)


def _replace_by_initializer(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    name = value.name or f"constant_{len(graph.initializers)}"
    value.name = f"{name}.computed"
    while name in graph.initializers:
        name = f"{name}_"
    folded = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    folded.meta[LITERAL] = True
    folded.shape, folded.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(folded)
    value.replace_all_uses_with(folded)


def _drop_training_mode(model: ir.Model) -> None:
    """Dropout in training mode becomes inactive, with a note: a deployed model does not drop at random."""
    for graph in model.graphs():
        for node in list(graph):
            if node.op_type != "Dropout" or node.domain != "":
                continue
            mode = node.inputs[2] if len(node.inputs) > 2 else None
            if mode is not None:
                node.replace_input_with(2, None)
                node.resize_inputs(1)
                note(model, f"Dropout {node.name!r} was exported in training mode and is now inactive")


def _drop_zero_biases(model: ir.Model) -> None:
    """A bias of zeros that an exporter made up goes; one that is a parameter stays, since training may move it."""
    for graph in model.graphs():
        for node in graph:
            bias = node.inputs[2] if is_op(node, "Conv", "ConvTranspose") and len(node.inputs) > 2 else None
            if bias is not None and bias.meta.get(LITERAL):
                array = constant(bias)
                if array is not None and not array.any():
                    node.replace_input_with(2, None)
                    node.resize_inputs(2)


def _note_broken_weights(model: ir.Model) -> None:
    """Say which weights hold NaN or infinity. Minus infinity alone is what masks are made of, and no news."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or tensor.size == 0:
                continue
            largest = float(np.max(tensor.numpy()))  # NaN where any element is
            let_go(tensor)
            if not np.isfinite(largest) and largest != -np.inf:
                note(model, f"weight {name!r} holds {'NaN' if np.isnan(largest) else 'infinity'}")


def note(model: ir.Model, sentence: str) -> None:
    """Keep a sentence about how the model was read, for the report."""
    notes = model.meta.setdefault(NOTES, [])
    if sentence not in notes:
        notes.append(sentence)


def _clean(model: ir.Model, *passes: ir.passes.InPlacePass) -> None:
    for single in passes:
        single(model)


def _name_nodes(model: ir.Model) -> None:
    """Unique value and node names; a node without one is named after its first output."""
    common.NameFixPass()(model)
    taken = {node.name for graph in model.graphs() for node in graph if node.name}
    for graph in model.graphs():
        for node in graph:
            if not node.name:
                base = f"{node.op_type}:{node.outputs[0].name}" if node.outputs else node.op_type
                name, number = base, 1
                while name in taken:
                    number += 1
                    name = f"{base}_{number}"
                taken.add(name)
                node.name = name
