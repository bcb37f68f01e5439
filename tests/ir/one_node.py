"""One-node models for tests about single operators: built, run in onnxruntime, and seen as a `Site`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from graphopt.ir.ops.row import Site


def one_node_model(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    *,
    outputs: int = 1,
    domain: str = "",
    standard_opset: int = 21,
    **attributes: Any,
) -> onnx.ModelProto:
    names = [f"i{index}" if array is not None else "" for index, array in enumerate(inputs)]
    results = [f"o{index}" for index in range(outputs)]
    node = onnx.helper.make_node(op_type, names, results, domain=domain, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, inputs, strict=True)
            if array is not None
        ],
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in results],
    )
    imports = [onnx.helper.make_opsetid("", standard_opset)]
    if domain:
        imports.append(onnx.helper.make_opsetid(domain, 1))
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def run_one_node(model: onnx.ModelProto, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {f"i{index}": array for index, array in enumerate(inputs) if array is not None}
    return session.run(None, feeds)  # type: ignore[no-any-return]


def site_of(model: onnx.ModelProto, inputs: Sequence[np.ndarray | None], outputs: Sequence[np.ndarray] = ()) -> Site:
    """The only node with its true shapes; every input counts as a known constant."""
    node = ir.from_proto(model).graph.node(0)
    return Site(
        node,
        tuple(None if array is None else array.shape for array in inputs),
        tuple(np.shape(array) for array in outputs),
        tuple(inputs),
    )
