"""The shared mechanics of rewrites: names, constants, weights that clones share, the interface."""

from __future__ import annotations

import doctest

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.ir import rewrite
from graphopt.ir.linear import linear_at
from graphopt.ir.rewrite import DeclinedError, Rewriter, constant, sole_consumer, to_tensor

_HEADER = '<ir_version: 10, opset_import: ["": 21]>'


def _model(text: str) -> ir.Model:
    return ir.from_onnx_text(f"{_HEADER} {text}")


def _node(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for graph in model.graphs() for node in graph if node.op_type == op_type)


def test_doctest() -> None:
    assert doctest.testmod(rewrite).failed == 0


def test_an_initializer_that_the_caller_may_override_is_not_constant() -> None:
    model = _model("g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Add(x, w) }")
    assert constant(_node(model, "Add").inputs[1]) is None
    model.graph.inputs.pop()
    np.testing.assert_array_equal(constant(_node(model, "Add").inputs[1]), [1, 2])


def test_a_changed_weight_is_a_new_tensor() -> None:
    model = _model("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    clone = model.clone()
    node = _node(clone, "Add")
    Rewriter(clone).replace_constant(node, 1, to_tensor(np.array([3.0, 4.0]), ir.DataType.FLOAT))
    np.testing.assert_array_equal(constant(_node(model, "Add").inputs[1]), [1, 2])
    np.testing.assert_array_equal(constant(node.inputs[1]), [3, 4])
    assert list(clone.graph.initializers) == ["w"]


def test_a_shared_weight_is_copied_under_a_new_name() -> None:
    model = _model(
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float[2] w_1 = {0, 0}> { a = Add(x, w) b = Mul(a, w) "
        "y = Add(b, w_1) }"
    )
    node = _node(model, "Mul")
    Rewriter(model).replace_constant(node, 1, to_tensor(np.array([3.0, 4.0]), ir.DataType.FLOAT))
    assert sorted(model.graph.initializers) == ["w", "w_1", "w_2"]
    np.testing.assert_array_equal(constant(_node(model, "Add").inputs[1]), [1, 2])


def test_new_names_avoid_those_of_subgraphs() -> None:
    model = _model(
        "g (bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = t () => (float[2] a) { a = Neg(x) }, "
        "else_branch = e () => (float[2] b) { b = Abs(x) }> }"
    )
    assert Rewriter(model).unique_name("a") == "a_1"
    assert Rewriter(model).unique_name("new") == "new"


def test_a_value_that_a_subgraph_reads_has_no_sole_consumer() -> None:
    model = _model(
        "g (bool c, float[2] x) => (float[2] y) { n = Neg(x) y = If (c) <then_branch = t () => (float[2] a) "
        "{ a = Relu(n) }, else_branch = e () => (float[2] b) { b = Abs(x) }> }"
    )
    assert sole_consumer(_node(model, "Neg").outputs[0]) is None


def test_bypass_keeps_output_names_or_refuses() -> None:
    model = _model("g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Identity(y) }")
    node = _node(model, "Identity")
    assert not Rewriter(model).bypass(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    model = _model("g (float[2] x) => (float[2] z) { y = Relu(x) z = Identity(y) }")
    node = _node(model, "Identity")
    assert Rewriter(model).bypass(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
    assert [value.name for value in model.graph.outputs] == ["z"]
    assert [node.op_type for node in model.graph] == ["Relu"]


def test_rounding_to_infinity_is_declined() -> None:
    with pytest.raises(DeclinedError, match="float16"):
        to_tensor(np.array([1e6]), ir.DataType.FLOAT16)


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.DOUBLE])
def test_weights_of_every_floating_type_go_through_float64(dtype: ir.DataType) -> None:
    model = _model("g (float[N,2] x) => (float[N,3] y) <float[2,3] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) }")
    node = _node(model, "MatMul")
    weight = node.inputs[1]
    assert weight is not None
    weight.const_value = to_tensor(np.arange(6.0).reshape(2, 3), dtype)
    weight.type = ir.TensorType(dtype)
    linear = linear_at(node)
    assert linear is not None
    assert linear.weight().dtype == np.float64
    linear.store(Rewriter(model), 2 * linear.weight(), np.array([1.0, 0.0, 0.0]))
    assert weight.const_value.dtype == dtype
    assert constant(weight).astype(float).tolist() == [[0, 2, 4], [6, 8, 10]]  # type: ignore[union-attr]
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    assert model.graph.outputs[0].name == "y"
