"""Names of run-time dimensions: what the inputs' symbols explain is named, what they do not stays anonymous."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import pytest

import graphopt.ir.shapes
from graphopt.ir.propagate import Facts, propagate
from graphopt.ir.shapes import infer_shapes


def named(
    body: str, inputs: str, constants: str = "", sizes: Mapping[str, int] | None = None
) -> dict[str, list[int | str | None]]:
    """Dimensions of every value that the body computes, by the value's name; the output is y."""
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => (float[?] y) <{constants}> {{ {body} }}'
    )
    infer_shapes(model, sizes)
    found: dict[str, list[int | str | None]] = {}
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                found[value.name or ""] = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return found


FLATTEN = "int64[2] flat = {-1, 8}, int64[3] heads = {-1, 5, 2}, int64[1] all = {-1}"


@pytest.mark.parametrize("sizes", [None, {"b": 4, "s": 4}, {"b": 2, "s": 7}, {"b": 8, "s": 2}])
def test_products_and_multiples(sizes: dict[str, int] | None) -> None:
    """Whatever sizes the model is known to accept, equal ones and ones that divide each other included."""
    dims = named("r = Reshape(x, flat) v = Reshape(x, all) y = Relu(v)", "float[b,s,8] x", FLATTEN, sizes)
    assert dims["r"] == ["b*s", 8]
    assert dims["v"] == ["8*b*s"]


def test_sums_and_products_with_sums() -> None:
    body = (
        "t = Concat<axis=1>(c, x, x) p = Concat<axis=1>(x, one) r = Reshape(p, flat) v = Reshape(t, flat) y = Relu(v)"
    )
    dims = named(body, "float[b,s,8] x, float[b,past,8] c, float[b,1,8] one", FLATTEN, {"b": 2, "s": 3, "past": 5})
    assert dims["t"] == ["b", "past + 2*s", 8]
    assert dims["p"] == ["b", "s + 1", 8]
    assert dims["r"] == ["b*s + b", 8]
    assert dims["v"] == ["b*past + 2*b*s", 8]


@pytest.mark.parametrize("size", [2, 4, 7, 32])
def test_rounding_is_not_taken_for_a_symbol(size: int) -> None:
    """Halved and doubled again is the size itself only where it is even, as in both corners."""
    body = 'm = MaxPool<kernel_shape=[2], strides=[2]>(x) u = Resize<mode="nearest">(m, , scales) y = Relu(u)'
    dims = named(body, "float[1,3,w] x", "float[3] scales = {1,1,2}", {"w": size})
    assert dims["m"] == [1, 3, None]
    assert dims["u"] == [1, 3, None]


def test_sizes_that_must_be_divisible_are_confirmed_at_three_times() -> None:
    """The model takes even widths only, so one more says nothing about it."""
    body = "r = Reshape(x, pairs) t = Transpose<perm=[1,0]>(r) v = Reshape(x, all) y = Relu(v)"
    dims = named(body, "float[w] x", "int64[2] pairs = {-1, 2}, int64[1] all = {-1}", {"w": 6})
    assert dims["v"] == ["w"]
    assert dims["r"] == [None, 2]  # w / 2 is no polynomial with whole coefficients


def test_what_the_model_declares_stays_unless_it_is_refuted() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[w] x) => (float[?] y) '
        "{ m = MaxPool<kernel_shape=[2], strides=[2]>(x) n = Neg(m) y = Relu(n) }"
    )
    model.graph.inputs[0].shape = ir.Shape([1, 1, "w"])
    pool, negative = list(model.graph)[:2]
    pool.outputs[0].shape, negative.outputs[0].shape = ir.Shape([1, 1, "w"]), ir.Shape([1, 1, "half"])
    infer_shapes(model, {"w": 4})
    assert str(pool.outputs[0].shape) == "[1,1,None]"  # w, the model says, and it is half of that
    assert str(negative.outputs[0].shape) == "[1,1,half]"


def test_dimensions_that_depend_on_an_anonymous_input_stay_anonymous() -> None:
    dims = named("v = Reshape(x, all) r = Neg(x) y = Relu(v)", "float[b,?] x", FLATTEN)
    assert dims["r"] == ["b", None]
    assert dims["v"] == [None]


def test_input_symbols_that_are_expressions_follow_the_others() -> None:
    body = "t = Concat<axis=0>(x, z) y = Relu(t)"
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x, float[m,4] z) => (float[?] y) {{ {body} }}'
    )
    model.graph.inputs[1].shape = ir.Shape(["2*n", 4])
    infer_shapes(model)
    assert str(model.graph.node(0).outputs[0].shape) == "[3*n,4]"


def test_the_interface_is_not_touched() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[b,s] x) => (float[rows,?] y) { y = Relu(x) }'
    )
    infer_shapes(model)
    assert str(model.graph.outputs[0].shape) == "[rows,None]"
    assert str(model.graph.inputs[0].shape) == "[b,s]"


def test_few_probes_are_made_and_none_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Mapping[str, int]] = []

    def counted(model: ir.Model, sizes: Mapping[str, int], **options: Any) -> Facts:
        made.append(sizes)
        return propagate(model, sizes, **options)

    monkeypatch.setattr(graphopt.ir.shapes, "propagate", counted)
    named("v = Reshape(x, all) y = Relu(v)", "float[2,8] x", FLATTEN)
    assert len(made) == 1
    made.clear()
    named("r = Reshape(x, flat) y = Relu(r)", "float[b,s,8] x", FLATTEN)
    assert len(made) == 7  # four corners, one off them, one much smaller, one much larger
