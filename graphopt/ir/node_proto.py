"""One node as a proto, for the inference and the evaluator of onnx, which know no `onnx_ir`."""

from __future__ import annotations

import onnx
import onnx_ir as ir


def bare_node(node: ir.Node) -> onnx.NodeProto:
    """The node as a proto with neutral operand names, so that names shared by accident cannot confuse inference."""
    proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    proto.input.extend("" if value is None else f"i{index}" for index, value in enumerate(node.inputs))
    proto.output.extend(f"o{index}" if value.name else "" for index, value in enumerate(node.outputs))
    for attribute in node.attributes.values():
        if not attribute.is_ref():
            proto.attribute.append(ir.serde.serialize_attribute(attribute))
    return proto


def untyped(name: str) -> onnx.ValueInfoProto:
    """A value of which only the name is said."""
    return onnx.ValueInfoProto(name=name)
