"""Form "operands" of quantize: what products read, those of two activations too, and nothing behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from golden import parse

import graphopt
from graphopt.inputs.probes import probe_feeds
from graphopt.ir.session import open_session
from graphopt.passes import Context, Dequantize, Quantize
from graphopt.passes.quantize_diagnosis import diagnose
from graphopt.passes.quantize_places import quantizer_places
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.passes.quantize_speed import COMPARED, COMPARED_ON, kinds

_ATTENTION = """<ir_version: 10, opset_import: ["": 21]>
g (float[1,6,16] x, float[16,16] w_q, float[16] w_qb, float[16,16] w_k, float[16,16] w_v, float[16] w_vb,
   float[16,8] w_out, float[8] w_ob) => (float[1,6,8] y) <float scale = {0.01}> {
  [query] q = MatMul (x, w_q)
  qb = Add (q, w_qb)
  [key] k = MatMul (x, w_k)
  [value] v = MatMul (x, w_v)
  vb = Add (v, w_vb)
  kt = Transpose <perm = [0, 2, 1]> (k)
  [scores] s = MatMul (qb, kt)
  scaled = Mul (s, scale)
  p = Softmax (scaled)
  [mixed] o = MatMul (p, vb)
  [out] z = MatMul (o, w_out)
  y = Add (w_ob, z)
}"""


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return parse(_ATTENTION)


@pytest.fixture(scope="module")
def feeds(model: ir.Model) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal((1, 6, 16)).astype(np.float32)} for _ in range(8)]


@pytest.fixture(scope="module")
def plan(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> QuantizePlan:
    return Quantize(form="operands", search=False).plan(model, Context(calibration=feeds))


@pytest.fixture(scope="module")
def quantized(model: ir.Model, plan: QuantizePlan) -> ir.Model:
    copy = model.clone()
    Quantize(form="operands").apply(copy, plan)
    return copy


def test_every_operand_of_every_product_and_nothing_else_is_on_integers(quantized: ir.Model) -> None:
    products = [node for node in quantized.graph if node.op_type == "MatMul"]
    assert len(products) == 6
    for node in products:
        assert [value.producer().op_type for value in node.inputs] == ["DequantizeLinear"] * 2
    (turned,) = [node for node in quantized.graph if node.op_type == "Transpose"]
    assert turned.inputs[0].producer().op_type == "QuantizeLinear", "keys are turned as integers"
    for node in quantized.graph:
        if node.op_type in ("Add", "Mul", "Softmax"):
            makers = [value.producer() for value in node.inputs]
            assert "DequantizeLinear" not in [maker.op_type for maker in makers if maker is not None]


def test_operands_of_a_product_of_activations_have_zero_points_of_zero(plan: QuantizePlan) -> None:
    tensors = {tensor.name: tensor for tensor in plan.tensors if tensor.role == "activation"}
    assert all(tensors[name].symmetric for name in ("qb", "k", "vb")), "k: that of kt moves with it"
    assert tensors["p"].zero_point == (0,)
    assert not tensors["p"].signed, "probabilities are not negative"
    assert tensors["x"].zero_point != (0,), "what weights multiply may have any"
    assert not tensors["x"].signed


def test_what_a_float_transpose_reads_too_is_unsigned(feeds: list[dict[str, np.ndarray]]) -> None:
    """onnxruntime 1.31 makes an invalid graph of signed integers there, when it optimizes."""
    text = _ATTENTION.replace("=> (float[1,6,8] y)", "=> (float[1,6,8] y, float[16,1,6] past)").replace(
        "[scores]", "past = Transpose <perm = [2, 0, 1]> (k)\n  [scores]"
    )
    net = parse(text)
    options = Quantize(form="operands", search=False)
    plan = options.plan(net.clone(), Context(calibration=feeds))
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    assert not tensors["k"].signed
    assert tensors["k"].zero_point == (128,), "in the middle all the same"
    assert tensors["qb"].signed
    copy = net.clone()
    options.apply(copy, plan)
    exact, found = (open_session(one).run_feeds(feeds[0]) for one in (net, copy))
    for expected, array in zip(exact, found, strict=True):
        assert np.abs(array - expected).max() < 0.05 * np.abs(expected).max()


def test_what_a_matrix_multiplies_before_a_bias_is_unsigned() -> None:
    """onnxruntime 1.31 puts a Reshape there, a Gemm and a Reshape, and makes an invalid graph of signed integers."""
    net = parse("""<ir_version: 10, opset_import: ["": 21]>
    g (float[1,6,16] x, float[8] b, float[16,8] m) => (float[1,6,8] y) {
      p = MatMul (x, m)
      y = Add (p, b)
    }""")
    options = Quantize(form="operands", search=False)
    plan = options.plan(net.clone(), Context())
    assert not any(tensor.signed for tensor in plan.tensors)
    copy = net.clone()
    options.apply(copy, plan)
    open_session(copy)


def test_signed_integers_cover_the_larger_side(
    model: ir.Model, plan: QuantizePlan, feeds: list[dict[str, np.ndarray]]
) -> None:
    (planned,) = [tensor for tensor in plan.tensors if tensor.name == "qb"]
    copy = model.clone()
    copy.graph.outputs.extend(node.outputs[0] for node in copy.graph if node.outputs[0].name == "qb")
    found = np.stack([open_session(copy).run_feeds(one)[-1] for one in feeds])
    assert planned.scale[0] * 127 == pytest.approx(np.abs(found).max(), rel=1e-6)
    assert planned.quantize(np.array([-1e9, 1e9])).tolist() == [-128, 127], "what QuantizeLinear saturates at"


def test_the_result_is_near_and_does_not_depend_on_optimisations(
    model: ir.Model, quantized: ir.Model, feeds: list[dict[str, np.ndarray]]
) -> None:
    (exact,) = open_session(model).run_feeds(feeds[0])
    (plain,), (fused,) = (open_session(quantized, optimized=flag).run_feeds(feeds[0]) for flag in (False, True))
    scale = np.sqrt(np.mean(exact**2))
    assert 0 < np.sqrt(np.mean((plain - exact) ** 2)) < 0.03 * scale
    assert np.abs(plain - fused).max() < 0.03 * scale


def test_onnxruntime_makes_no_gemm_of_product_and_bias(quantized: ir.Model, model: ir.Model, tmp_path: Path) -> None:
    def operators(one: ir.Model, name: str) -> list[str]:
        graphopt.save(one, tmp_path / f"{name}.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / f"{name}-basic.onnx")
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(tmp_path / f"{name}-basic.onnx").graph.node]

    assert "Gemm" in operators(model, "float"), "else there is nothing to keep it from"
    assert "Gemm" not in operators(quantized, "quantized")


def test_a_convolution_keeps_its_float_result() -> None:
    net = parse("""<ir_version: 10, opset_import: ["": 21]>
    g (float[1,4,8,8] x, float[4,1,3,3] w_depth, float[8,4,1,1] w_point, float[8] w_bias) => (float[1,8,8,8] y) {
      d = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w_depth)
      r = Relu (d)
      c = Conv (r, w_point, w_bias)
      y = Relu (c)
    }""")
    written = Quantize(form="operands", search=False)(net).model
    (last,) = [node for node in written.graph if node.outputs[0].is_graph_output()]
    assert last.op_type == "Relu"
    assert last.inputs[0].producer().op_type == "Conv"
    assert sum(node.op_type == "QuantizeLinear" for node in written.graph) == 2


def test_excluded_products_stay_float(model: ir.Model) -> None:
    written = Quantize(form="operands", exclude=("scores",), search=False)(model.clone()).model
    (scores,) = [node for node in written.graph if node.name == "scores"]
    assert "DequantizeLinear" not in [value.producer().op_type for value in scores.inputs]


def test_the_plan_can_be_diagnosed_stored_and_trained(
    model: ir.Model, plan: QuantizePlan, feeds: list[dict[str, np.ndarray]]
) -> None:
    assert QuantizePlan.from_json(plan.to_json()) == plan
    found = diagnose(model, plan, feeds)
    assert {one.node for one in found.operators} == {"query", "key", "value", "scores", "mixed", "out"}
    assert all(np.isfinite(one.alone) for one in found.operators)
    places = {place.tensor.name: place.consumers for place in quantizer_places(model, plan).quantizers}
    assert places["k"] is None, "read by everybody"
    assert places["vb"] == places["p"] == ("mixed",)


def test_it_is_compared_where_a_compiler_places_quantizers() -> None:
    assert "operands" in COMPARED_ON["openvino"]
    assert "operands" not in COMPARED


def test_products_with_probabilities_are_tried_in_float_together(model: ir.Model, plan: QuantizePlan) -> None:
    found = dict(kinds(model, plan, Context()))
    assert found["products with probabilities"] == ["mixed"]


def test_made_up_inputs_will_do(model: ir.Model) -> None:
    written = Quantize(form="operands")(model.clone()).model
    open_session(written).run_feeds(probe_feeds(model)[0])


def test_dequantize_gives_the_products_back(
    model: ir.Model, quantized: ir.Model, feeds: list[dict[str, np.ndarray]]
) -> None:
    back = Dequantize()(quantized.clone()).model
    assert not any("QuantizeLinear" in node.op_type for node in back.graph)
    (exact,), (found,) = (open_session(one).run_feeds(feeds[0]) for one in (model, back))
    assert np.sqrt(np.mean((exact - found) ** 2)) < 0.02 * np.sqrt(np.mean(exact**2))
