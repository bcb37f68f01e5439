"""What onnx says about single nodes: shapes and element types of the results, and their values where all is known.

Equal nodes on equal operands are asked about once, however often they occur in a graph (repeated layers) and in its
probes. onnx knows no `onnx_ir`, so that each node goes to it as a proto.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from graphopt.ir.ops.row import Shape


@dataclass(frozen=True)
class Inferred:
    """The answer about one node.

    Attributes:
        shapes: of the outputs that have one, by index.
        dtypes: element types, by index.
        error: why the node is refused, None where it is not.
    """

    shapes: dict[int, Shape]
    dtypes: dict[int, ir.DataType]
    error: str | None = None


_NOTHING = Inferred({}, {})
Operands = Sequence[tuple[int, ir.DataType, "Shape | None", "np.ndarray | None"]]
"""Index, element type, shape where known, and value where it may decide a shape, of the inputs that are there."""


class Inference:
    """Answers about the nodes of one model, which must not change meanwhile.

    Args:
        opsets: versions of the operator domains.
        ir_version: of the model.
    """

    def __init__(self, opsets: Mapping[str, int], ir_version: int) -> None:
        self._opsets, self._ir_version = dict(opsets), ir_version
        self._imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        self._protos: dict[ir.Node, tuple[onnx.NodeProto, bytes]] = {}
        self._inferred: dict[tuple[Any, ...], Inferred] = {}
        self._evaluated: dict[tuple[Any, ...], Sequence[Any] | None] = {}

    def infer(self, node: ir.Node, operands: Operands) -> Inferred:
        """Shapes and element types of the outputs; nothing for an operator that onnx does not have."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        if not onnx.defs.has(node.op_type, domain):
            return _NOTHING
        proto, text = self._proto(node)
        key = (text, *((index, dtype, shape, _key(value)) for index, dtype, shape, value in operands))
        if key not in self._inferred:
            self._inferred[key] = self._ask(proto, domain, operands)
        return self._inferred[key]

    def _ask(self, proto: onnx.NodeProto, domain: str, operands: Operands) -> Inferred:
        try:
            schema = onnx.defs.get_schema(proto.op_type, self._opsets.get(proto.domain) or 1, domain)
        except onnx.defs.SchemaError:
            return _NOTHING
        types = {f"i{i}": onnx.helper.make_tensor_type_proto(int(dtype), shape) for i, dtype, shape, _ in operands}
        data = {f"i{i}": onnx.numpy_helper.from_array(value) for i, _, _, value in operands if value is not None}
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema, proto, types, data, opset_imports=self._imports, ir_version=self._ir_version
            )
        except Exception as error:  # InferenceError is not exported under one stable name
            return Inferred({}, {}, str(error))
        shapes: dict[int, Shape] = {}
        dtypes: dict[int, ir.DataType] = {}
        for index in range(len(proto.output)):
            answer = found.get(f"o{index}")
            if answer is None or not answer.HasField("tensor_type"):
                continue
            if answer.tensor_type.elem_type:
                dtypes[index] = ir.DataType(answer.tensor_type.elem_type)
            if answer.tensor_type.HasField("shape"):
                dimensions = answer.tensor_type.shape.dim
                if all(dimension.HasField("dim_value") for dimension in dimensions):
                    shapes[index] = tuple(dimension.dim_value for dimension in dimensions)
        return Inferred(shapes, dtypes)

    def evaluate(self, node: ir.Node, operands: Sequence[tuple[int, np.ndarray]]) -> Sequence[Any] | None:
        """Values of the outputs by the reference evaluator, None where it cannot tell. They must not be written to."""
        proto, text = self._proto(node)
        key = (text, *((index, _key(array)) for index, array in operands))
        if key not in self._evaluated:
            self._evaluated[key] = self._run(proto, {f"i{index}": array for index, array in operands})
        return self._evaluated[key]

    def _run(self, proto: onnx.NodeProto, feeds: dict[str, np.ndarray]) -> Sequence[Any] | None:
        inputs = [onnx.ValueInfoProto(name=name) for name in feeds]
        outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
        graph = onnx.helper.make_graph([proto], "one", inputs, outputs)
        model = onnx.helper.make_model(graph, opset_imports=self._imports)
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                return ReferenceEvaluator(model).run(None, feeds)  # type: ignore[no-any-return]
        except Exception:  # the reference evaluator lacks some ops and raises anything: then it is not known
            return None

    def _proto(self, node: ir.Node) -> tuple[onnx.NodeProto, bytes]:
        """The node with neutral operand names, so that names shared by accident cannot confuse inference."""
        if node not in self._protos:
            proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
            proto.input.extend("" if value is None else f"i{index}" for index, value in enumerate(node.inputs))
            proto.output.extend(f"o{index}" if value.name else "" for index, value in enumerate(node.outputs))
            for attribute in node.attributes.values():
                if not attribute.is_ref():
                    proto.attribute.append(ir.serde.serialize_attribute(attribute))
            self._protos[node] = proto, proto.SerializeToString(deterministic=True)
        return self._protos[node]


def _key(array: np.ndarray | None) -> tuple[str, Shape, bytes] | None:
    """What tells arrays apart."""
    if array is None:
        return None
    return array.dtype.str, array.shape, array.tobytes() if array.dtype != object else repr(array.tolist()).encode()
