"""Changes of meaning between opsets that the version converters overlook.

Found by running models of each old opset before and after the conversion; each function says which operator.
"""

from __future__ import annotations

import onnx_ir as ir

_RESIZE_WITHOUT_MODES = 10
"""Up to this opset, Upsample and Resize have one fixed rule for coordinates."""
_DROPOUT_OF_UNDEFINED_MASK = 10
"""Up to this opset, the mask of an inactive Dropout is not defined, and before 10 it is of the type of the data."""
_FLATTENING_HARDMAX = 12
"""Up to this opset, Hardmax sees its operand as a matrix, flattened around `axis`."""


def cannot_be_lifted(model: ir.Model, opset: int) -> str | None:
    """Why a model of this opset has no equal in a newer one, None where nothing is known against it."""
    for graph in model.graphs():
        for node in graph:
            mask = node.outputs[1] if is_standard(node, "Dropout") and len(node.outputs) > 1 else None
            if mask is not None and opset <= _DROPOUT_OF_UNDEFINED_MASK and (mask.uses() or mask.is_graph_output()):
                return f"the mask of Dropout {node.name!r} is read, which opset {opset} does not define"
    return None


def before_lifting(model: ir.Model, opset: int) -> None:
    """Write out, in place, what the converter of the next opsets would read wrongly."""
    if opset <= _FLATTENING_HARDMAX:
        _flatten_around_hardmax(model)


def after_lifting(model: ir.Model, opset: int) -> None:
    """State, in place, what operators meant in the opset that the model came from."""
    if opset <= _RESIZE_WITHOUT_MODES:
        _write_resize_modes(model)


def is_standard(node: ir.Node, op_type: str) -> bool:
    """Whether the node is this operator of the standard domain."""
    return node.op_type == op_type and node.domain in ("", "ai.onnx")


def _flatten_around_hardmax(model: ir.Model) -> None:
    """Hardmax(x, axis) as Reshape(Hardmax(Flatten(x, axis), axis=1), Shape(x)), which every opset reads alike.

    The converter does this for Softmax and LogSoftmax only.
    """
    for graph in model.graphs():
        for node in tuple(graph):
            if not is_standard(node, "Hardmax"):
                continue
            result = node.outputs[0]
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            matrix = ir.node("Flatten", [node.inputs[0]], attributes={"axis": axis})
            largest = ir.node("Hardmax", [matrix.outputs[0]], attributes={"axis": 1})
            shape = ir.node("Shape", [node.inputs[0]])
            restored = ir.node("Reshape", [largest.outputs[0], shape.outputs[0]])
            for new, suffix in ((matrix, "matrix"), (largest, "largest"), (shape, "shape")):
                new.outputs[0].name = f"{result.name}.{suffix}"
            graph.insert_before(node, [matrix, largest, shape, restored])
            restored.outputs[0].type, restored.outputs[0].shape = result.type, result.shape
            result.replace_all_uses_with(restored.outputs[0], replace_graph_outputs=True)
            restored.outputs[0].name, result.name = result.name, None
            graph.remove(node, safe=True)


def _write_resize_modes(model: ir.Model) -> None:
    """Coordinates were divided by the scale, and rounded down to the nearest sample; up where the image shrinks."""
    for graph in model.graphs():
        for node in graph:
            if not is_standard(node, "Resize"):
                continue
            factors = node.inputs[2] if len(node.inputs) > 2 else None
            scales = None if factors is None else ir.convenience.get_const_tensor(factors)
            shrinks = scales is not None and bool((scales.numpy() < 1).any())
            for name, mode in (
                ("coordinate_transformation_mode", "asymmetric"),
                ("nearest_mode", "ceil" if shrinks else "floor"),
            ):
                node.attributes[name] = ir.AttrString(name, mode)
