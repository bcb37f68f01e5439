"""Selections that are spelled as something longer: a shuffle of one axis, a GatherND along one axis, become a Gather.

A channel shuffle is written Reshape, Transpose, Reshape. As a Gather it tells which channel goes where, so that
channels that merely pass the cut in between are not tied to each other.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir import views
from graphopt.ir.rewrite import Rewriter, constant, is_op, set_attributes


def gather_shuffles(rewriter: Rewriter, node: ir.Node) -> bool:
    """A chain of Reshape, Transpose and kin that permutes the positions of one static axis becomes a Gather.

    A rule for `Rewriter.until_stable`. The chain must rearrange more than whole axes, and nothing but that axis.
    """
    if not is_op(node, "Reshape", "Flatten"):
        return False
    for view in views.views(node.outputs[0]):
        if view.scale != 1.0 or view.part is not None or len(view.nodes) < 3:
            continue
        found = _permuted_axis(view)
        if found is None:
            continue
        axis, order = found
        indices = rewriter.initializer(rewriter.model.graph, f"{node.name}.order", ir.Tensor(order))
        result = ir.Value(name=rewriter.unique_name(f"{node.outputs[0].name}_shuffled"), type=node.outputs[0].type)
        gather = ir.node("Gather", [view.base, indices], attributes={"axis": axis}, outputs=[result])
        gather.name = rewriter.unique_name(f"{node.name}_Gather")
        gather.metadata_props.update(node.metadata_props)
        assert isinstance(node.graph, ir.Graph)
        node.graph.insert_before(node, gather)
        rewriter.supersede(node.outputs[0], result)
        return True
    return False


def _permuted_axis(view: views.View) -> tuple[int, np.ndarray] | None:
    """The only axis whose atoms changed their order, and where each of its positions comes from."""
    start = views.start(view.base)
    if start is None or len(start) != len(view.axes):
        return None
    changed = [axis for axis, (before, after) in enumerate(zip(start, view.axes, strict=True)) if before != after]
    if len(changed) != 1:
        return None
    atoms = view.axes[changed[0]]
    if any(atom.origin[0] != changed[0] or not isinstance(atom.size, int) for atom in atoms):
        return None
    in_memory = sorted(atoms, key=lambda atom: atom.origin)
    if list(atoms) == in_memory:
        return None
    sizes = [int(atom.size) for atom in in_memory]
    order = np.arange(int(np.prod(sizes)), dtype=np.int64).reshape(sizes)
    return changed[0], order.transpose([in_memory.index(atom) for atom in atoms]).reshape(-1)


def gather_by_rows(rewriter: Rewriter, node: ir.Node) -> bool:
    """GatherND with constant tuples of one index, and no batch axes, is a Gather along axis 0."""
    if not is_op(node, "GatherND") or node.attributes.get_int("batch_dims", 0):
        return False
    indices = constant(node.inputs[1])
    if indices is None or indices.ndim < 2 or indices.shape[-1] != 1:
        return False
    node.op_type = "Gather"
    set_attributes(node, batch_dims=None, axis=0)
    rewriter.replace_constant(node, 1, ir.Tensor(np.ascontiguousarray(indices[..., 0])))
    return True
