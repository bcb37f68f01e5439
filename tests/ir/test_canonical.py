"""The canonical form: what every pass may rely on, and that the function stays the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.ir.canonical import NOTES, canonicalize
from graphopt.ir.compare import within_exact
from graphopt.ir.dimensions import symbolic_dimensions
from graphopt.ir.fingerprint import fingerprint
from graphopt.ir.load import load
from graphopt.ir.propagate import propagate
from graphopt.ir.session import open_session


def parse(body: str, signature: str = "(float[n,6] x) => (float[a,b] y)", opset: int = 21, extra: str = "") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": {opset}{extra}]> g {signature} {{ {body} }}')


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_same_function(before: ir.Model, after: ir.Model, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        feeds = {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
        assert within_exact(
            open_session(before, optimized=False).run(None, feeds), open_session(after).run(None, feeds)
        )


def test_sizes_that_do_not_depend_on_a_dynamic_dimension_are_folded() -> None:
    model = parse(
        "shape = Shape (x) one = Constant <value = int64[1] {1}> () width = Gather (shape, one) "
        "two = Constant <value = int64[1] {2}> () half = Div (width, two) minus = Constant <value = int64[1] {-1}> () "
        "target = Concat <axis = 0> (minus, two, half) r = Reshape (x, target) y = Relu (r)",
        "(float[n,6] x) => (float[n,2,3] y)",
    )
    result = canonicalize(model.clone())
    assert ops(result) == ["Reshape", "Relu"]
    assert_same_function(model, result, (2, 6), (5, 6))
    assert [str(dimension) for dimension in result.graph.node(0).outputs[0].shape] == ["n", "2", "3"]


def test_sizes_that_depend_on_a_dynamic_dimension_stay() -> None:
    model = parse(
        "shape = Shape (x) zero = Constant <value = int64[1] {0}> () rows = Gather (shape, zero) "
        "six = Constant <value = int64[1] {6}> () target = Concat <axis = 0> (six, rows) y = Reshape (x, target)"
    )
    result = canonicalize(model.clone())
    assert ops(result) == ["Shape", "Gather", "Concat", "Reshape"]
    assert_same_function(model, result, (2, 6), (5, 6))


def test_values_from_weights_are_not_folded() -> None:
    body = (
        "w = Constant <value = float[6,2] {1,2,3,4,5,6,7,8,9,10,11,12}> () "
        "t = Transpose (w) u = Transpose (t) y = MatMul (x, u)"
    )
    result = canonicalize(parse(body))
    assert ops(result) == ["Transpose", "Transpose", "MatMul"]
    assert list(result.graph.initializers) == ["w"]


def test_scale_computed_from_the_width_becomes_a_number() -> None:
    body = "shape = Shape <start = 1> (x) f = Cast <to = 1> (shape) root = Sqrt (f) s = Div (x, root) y = Relu (s)"
    result = canonicalize(parse(body))
    assert ops(result) == ["Div", "Relu"]
    assert float(result.graph.node(0).inputs[1].const_value.numpy().item()) == pytest.approx(6**0.5)


def test_constant_of_shape_becomes_a_weight() -> None:
    body = (
        "s = Constant <value = int64[2] {6, 4}> () w = ConstantOfShape <value = float[1] {0.5}> (s) y = MatMul (x, w)"
    )
    result = canonicalize(parse(body))
    assert ops(result) == ["MatMul"]
    assert_same_function(parse(body), result, (3, 6))


def test_identity_and_inactive_dropout_disappear() -> None:
    body = "a = Identity (x) d = Dropout (a) e = Identity (d) y = Relu (e)"
    assert ops(canonicalize(parse(body))) == ["Relu"]


def test_identity_between_input_and_output_stays() -> None:
    model = canonicalize(parse("y = Identity (x)"))
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert_same_function(parse("y = Identity (x)"), model, (2, 6))


def test_dropout_in_training_mode_is_reported() -> None:
    body = "r = Constant <value = float {0.5}> () t = Constant <value = bool {1}> () d = Dropout (x, r, t) y = Relu (d)"
    model = canonicalize(parse(body))
    assert ops(model) == ["Relu"]
    assert "training mode" in model.meta[NOTES][0]


def test_initializers_that_are_inputs_and_functions_and_constants() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[n,6] x) => (float[n,6] y) { a = local.twice (x) y = Relu (a) }
        <domain: "local", opset_import: ["": 17]>
        twice (x) => (y) { two = Constant <value = float {2}> () y = Mul (x, two) }"""
    )
    model = load(proto)
    assert ops(model) == ["Mul", "Relu"]
    assert not model.functions


def test_defaults_are_written_out() -> None:
    model = canonicalize(
        parse(
            "a, b = Split <axis = 1, num_outputs = 2> (x) c = Unsqueeze (a, axes) y = Squeeze (c)".replace(
                "c = Unsqueeze (a, axes)", "axes = Constant <value = int64[1] {0}> () c = Unsqueeze (a, axes)"
            ),
            "(float[4,6] x) => (float[4,3] y, float[4,3] b)",
        )
    )
    split, squeeze = model.graph.node(0), model.graph.node(2)
    assert split.inputs[1].const_value.numpy().tolist() == [3, 3]
    assert "num_outputs" not in split.attributes
    assert squeeze.inputs[1].const_value.numpy().tolist() == [0]


def test_canonical_twice_is_canonical_once() -> None:
    model = canonicalize(parse("a = Identity (x) s = Shape (a) r = Reshape (a, s) y = Relu (r)"))
    before = ir.to_onnx_text(model)
    assert ir.to_onnx_text(canonicalize(model)) == before


def test_the_interface_is_kept() -> None:
    model = parse("a = Identity (x) y = Relu (a)", "(float[batch,6] x) => (float[batch,6] y)")
    model.metadata_props["author"] = "someone"
    result = canonicalize(model)
    assert str(result.graph.inputs[0]) == str(
        parse("y = Relu (x)", "(float[batch,6] x) => (float[batch,6] y)").graph.inputs[0]
    )
    assert result.metadata_props["author"] == "someone"


def test_every_node_and_value_has_one_name() -> None:
    model = canonicalize(parse("a = Relu (x) b = Relu (a) y = Relu (b)"))
    names = [node.name for node in model.graph]
    assert all(names)
    assert len(set(names)) == len(names)


def test_branches_of_an_if_are_seen() -> None:
    body = (
        "zero = Constant <value = float {0}> () m = ReduceSum <keepdims = 0> (x) c = Greater (m, zero) "
        "y = If (c) <then_branch = t () => (float[n,6] p) { i = Identity (x) p = Relu (i) }, "
        "else_branch = e () => (float[n,6] q) { s = Shape (x) r = Reshape (x, s) q = Neg (r) }>"
    )
    model = parse(body, "(float[n,6] x) => (float[n,6] y)")
    result = canonicalize(model.clone())
    assert_same_function(model, result, (2, 6), (3, 6))
    facts = propagate(result, {"n": 5})
    assert facts.shape(result.graph.outputs[0]) == (5, 6)


def test_propagation_of_loops() -> None:
    body = (
        "trip = Constant <value = int64 {3}> () go = Constant <value = bool {1}> () "
        "last, y = Loop (trip, go, x) <body = b "
        "(int64 i, bool c, float[n,6] s) => (bool d, float[n,6] t, float[n,6] u) "
        "{ d = Identity (c) t = Relu (s) u = Neg (s) }>"
    )
    model = parse(body, "(float[n,6] x) => (float[3,n,6] y)")
    facts = propagate(model, {"n": 4})
    loop = next(node for node in model.graph if node.op_type == "Loop")
    assert [facts.shape(value) for value in loop.outputs] == [(4, 6), (3, 4, 6)]


def test_symbolic_dimensions_are_named_once_and_anonymous_ones_too() -> None:
    model = parse("y = Relu (x)", "(float[n,?,n] x) => (float[n,?,n] y)")
    assert symbolic_dimensions(model) == ["n", "x[1]"]


def test_fingerprint_sees_a_new_weight_and_nothing_else() -> None:
    model = canonicalize(parse("w = Constant <value = float[6] {1,2,3,4,5,6}> () y = Add (x, w)"))
    before = fingerprint(model)
    assert fingerprint(model) == before
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(np.zeros(6, np.float32), name="w")
    assert fingerprint(model) != before


@pytest.mark.parametrize("multiple", [4, 7, 8, 16])
def test_a_size_rounded_up_to_a_multiple_is_no_constant(multiple: int) -> None:
    body = (
        "shape = Shape <start = 0, end = 1> (x) "
        f"m = Constant <value = int64[1] {{{multiple}}}> () less = Constant <value = int64[1] {{{multiple - 1}}}> () "
        "more = Add (shape, less) blocks = Div (more, m) padded = Mul (blocks, m) extra = Sub (padded, shape) "
        "zero = Constant <value = int64[3] {0, 0, 0}> () pads = Concat <axis = 0> (zero_2, extra, zero_1) "
        "y = Pad (x, pads)"
    ).replace("zero = Constant <value = int64[3] {0, 0, 0}> ()",
              "zero_2 = Constant <value = int64[2] {0, 0}> () zero_1 = Constant <value = int64[1] {0}> ()")  # fmt: skip
    model = parse(body)
    result = canonicalize(model.clone())
    for rows in (1, 2, multiple - 1, multiple, multiple + 1, 5 * multiple):
        assert_same_function(model, result, (rows, 6))


@pytest.mark.parametrize("maximum", [4, 8, 16, 40])
@pytest.mark.parametrize("given", [None, "maximum"])
def test_a_size_clamped_to_a_maximum_is_no_constant(maximum: int, given: str | None) -> None:
    rows = ", ".join(["0.5"] * maximum)
    body = (
        f"table = Constant <value = float[{maximum}] {{{rows}}}> () "
        "shape = Shape <start = 0, end = 1> (x) zero = Constant <value = int64[1] {0}> () "
        "positions = Slice (table, zero, shape) one = Constant <value = int64[1] {1}> () "
        "column = Unsqueeze (positions, one) length = Shape <end = 1> (positions) "
        "six = Constant <value = int64[1] {6}> () target = Concat <axis = 0> (length, six) "
        "flat = Reshape (x, target) y = Add (flat, column)"
    )
    model = parse(body)
    result = canonicalize(model.clone(), sizes=None if given is None else {"n": maximum})
    for count in sorted({1, 2, 3, maximum}):
        assert_same_function(model, result, (count, 6))


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize(
    "window",
    [
        "y = Conv <auto_pad = AUTO, strides = [STEP, STEP]> (x, w)",
        "y = MaxPool <auto_pad = AUTO, kernel_shape = [4, 3], strides = [STEP, STEP]> (x)",
        "y = AveragePool <auto_pad = AUTO, kernel_shape = [4, 3], strides = [STEP, STEP]> (x)",
    ],
)
def test_automatic_pads_are_written_out(auto: str, step: int, window: str) -> None:
    body = window.replace("AUTO", f'"{auto}"').replace("STEP", str(step))
    weights = ", ".join(["0.5", "-1", "2"] * 16)
    text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[n,2,11,SIZE] x) => (float[n,c,a,b] y)
        <float[2,2,4,3] w = {{{weights}}}> {{ {body} }}"""
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 2, 11, 12)).astype(np.float32)}
    for size in ("12", "width"):
        original = ir.from_onnx_text(text.replace("SIZE", size))
        model = load(original.clone())
        (node,) = model.graph
        is_known = size == "12" or step == 1 or auto == "VALID"
        assert ("auto_pad" not in node.attributes) == is_known
        expected, found = (open_session(one).run_feeds(feeds)[0] for one in (original, model))
        np.testing.assert_array_equal(found, expected)
