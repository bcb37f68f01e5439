"""Linear operators as products of matrices agree with onnxruntime, and the adjoint is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.ir.linear import linear_at
from graphopt.ir.linear_kernel import LinearKernel
from graphopt.ir.linear_rows import LinearRows, apply_rows, linear_rows
from graphopt.ir.rewrite import DeclinedError
from graphopt.ir.session import open_session

FLOAT = ir.TensorType(ir.DataType.FLOAT)
CASES: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("Conv", (2, 4, 9, 7), (6, 2, 3, 3), {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]}),
    ("Conv", (2, 4, 9), (4, 1, 3), {"group": 4, "pads": [1, 1]}),
    ("Conv", (1, 2, 4, 5, 6), (3, 2, 2, 1, 3), {"strides": [1, 2, 1]}),
    ("ConvTranspose", (2, 4, 5, 6), (4, 3, 3, 3), {"group": 2, "strides": [2, 3], "output_padding": [1, 0]}),
    ("ConvTranspose", (2, 4, 5, 6), (4, 3, 2, 2), {"strides": [2, 2], "pads": [1, 1, 1, 1], "dilations": [2, 1]}),
    ("ConvTranspose", (1, 2, 5), (2, 3, 2), {"pads": [2, 3]}),
    ("Gemm", (5, 4), (4, 3), {}),
    ("Gemm", (4, 5), (3, 4), {"transA": 1, "transB": 1}),
    ("MatMul", (2, 3, 4), (4, 5), {}),
]


def node_of(op_type: str, data: tuple[int, ...], weight: np.ndarray, attributes: dict[str, Any]) -> ir.Model:
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape(data))
    w = ir.Value(name="w", type=FLOAT, shape=ir.Shape(weight.shape), const_value=ir.tensor(weight, name="w"))
    node = ir.node(op_type, [x, w], attributes=attributes)
    node.outputs[0].name, node.outputs[0].type = "y", FLOAT
    graph = ir.Graph([x], list(node.outputs), nodes=[node], initializers=[w], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def rows_of(model: ir.Model) -> LinearRows:
    linear = linear_at(model.graph[0])
    assert linear is not None
    return linear_rows(linear)


@pytest.mark.parametrize(("op_type", "data", "weight", "attributes"), CASES)
def test_the_product_is_what_onnxruntime_computes(
    op_type: str, data: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    generator = np.random.default_rng(0)
    model = node_of(op_type, data, generator.standard_normal(weight).astype(np.float32), attributes)
    x = generator.standard_normal(data).astype(np.float32)
    expected = open_session(model).run_feeds({"x": x})[0]
    rows = rows_of(model)
    patches = rows.patches(x)
    product = apply_rows(patches, rows.weight())
    assert rows.count(x) == patches.shape[1] == len(product)
    np.testing.assert_allclose(rows.result(product, expected), expected, atol=1e-5)
    np.testing.assert_array_equal(rows.rows(rows.result(product, expected)), product)
    chosen = generator.permutation(patches.shape[1])[:3]
    np.testing.assert_array_equal(rows.patches(x, chosen), patches[:, chosen])
    again = rows.by_group(rows.as_weight(rows.weight()))
    np.testing.assert_array_equal(again, rows.weight())


@pytest.mark.parametrize(("op_type", "data", "weight", "attributes"), [c for c in CASES if c[0] != "ConvTranspose"])
def test_the_adjoint_is_one(
    op_type: str, data: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    generator = np.random.default_rng(0)
    rows = rows_of(node_of(op_type, data, generator.standard_normal(weight).astype(np.float32), attributes))
    x = generator.standard_normal(data)
    patches = rows.patches(x)
    other = generator.standard_normal(patches.shape)
    assert float((rows.adjoint(other, x) * x).sum()) == pytest.approx(float((other * patches).sum()))


def test_what_depends_on_the_input_is_declined() -> None:
    weight = np.ones((2, 2, 3), np.float32)
    with pytest.raises(DeclinedError, match="auto_pad"):
        rows_of(node_of("Conv", (1, 2, 8), weight, {"auto_pad": "SAME_UPPER"}))
    with pytest.raises(DeclinedError, match="output_shape"):
        rows_of(node_of("ConvTranspose", (1, 2, 8), weight, {"output_shape": [12]}))


@pytest.mark.parametrize(("op_type", "data", "weight", "attributes"), CASES)
def test_the_kernel_takes_any_weight(
    op_type: str, data: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.standard_normal(weight).astype(np.float32) for _ in range(2))
    x = generator.standard_normal(data).astype(np.float32)
    kernel = LinearKernel(rows_of(node_of(op_type, data, first, attributes)))
    other = node_of(op_type, data, second, attributes)
    expected = open_session(other).run_feeds({"x": x})[0]
    wanted = rows_of(other).linear.weight()
    np.testing.assert_allclose(kernel.forward(x, wanted), expected, atol=1e-5)
    if op_type == "ConvTranspose":
        with pytest.raises(DeclinedError, match="adjoint"):
            kernel.backward(expected, wanted, x.shape)
        return
    result = generator.standard_normal(expected.shape).astype(np.float32)
    back = kernel.backward(result, wanted, x.shape)
    assert back.shape == x.shape
    assert float((back * x).sum()) == pytest.approx(float((result * expected).sum()), rel=1e-3, abs=1e-3)
