from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import graphopt
from graphopt.ir.compare import compare_runs, within_exact
from graphopt.ir.session import open_session
from graphopt.passes import Context, Dequantize, Quantize
from graphopt.passes.dequantize_model import quantized_nodes
from graphopt.passes.dequantize_regions import quantized_regions
from graphopt.passes.dequantize_values import unpacked
from tests.passes.quantized_nets import (
    GATED,
    HEAD,
    INCEPTION,
    MOBILE,
    RESIDUAL,
    TRANSFORMER,
    UNET,
    canonical_constants,
    feeds,
    tiny,
    weighted,
)

NETS = {"residual": RESIDUAL, "mobile": MOBILE, "inception": INCEPTION, "unet": UNET, "gated": GATED}
Feeds = list[dict[str, np.ndarray]]


class Reader(CalibrationDataReader):
    def __init__(self, data: Feeds) -> None:
        self.data: Iterator[dict[str, np.ndarray]] = iter(data)

    def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
        return next(self.data, None)


def written(model: ir.Model, tmp_path: Path) -> Path:
    """The file that onnxruntime's tools read: without the shapes that they stumble over."""
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def static(model: ir.Model, data: Feeds, tmp_path: Path, **options: Any) -> ir.Model:
    path = written(model, tmp_path)
    quantize_static(path, tmp_path / "int.onnx", Reader(data), weight_type=QuantType.QInt8, **options)
    return graphopt.load(tmp_path / "int.onnx")


def dequantized(model: ir.Model, *, keep_ranges: bool = False, left: int = 0) -> ir.Model:
    result, context = model.clone(), Context()
    Dequantize(keep_ranges=keep_ranges).run(result, context)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    assert len(list(quantized_nodes(result))) == left
    assert len([remark for remark in context.remarks if remark.kind == "missed"]) == left
    return result


def outputs(model: ir.Model, data: Feeds, *, optimized: bool = False) -> list[list[np.ndarray]]:
    session = open_session(model, optimized=optimized)
    return [session.run_feeds(one) for one in data]


def error(reference: ir.Model, candidate: ir.Model, data: Feeds) -> float:
    names = [value.name or "" for value in reference.graph.outputs]
    return compare_runs(names, outputs(reference, data), outputs(candidate, data, optimized=True)).rms_error


def assert_undone(model: ir.Model, quantized: ir.Model, result: ir.Model, data: Feeds) -> None:
    """What is left of rounding is that of the weights, and between the two models lies that of activations."""
    rounding = error(model, quantized, data)
    assert 0 < rounding < 0.1
    assert error(quantized, result, data) <= 1.25 * rounding
    assert error(model, result, data) <= 1.4 * rounding


def linear_operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["qdq", "qoperator"])
@pytest.mark.parametrize("name", NETS)
def test_static_models_of_onnxruntime_become_the_float_model(name: str, form: QuantFormat, tmp_path: Path) -> None:
    model, data = canonical_constants(NETS[name]), feeds(3)
    quantized = static(model, data, tmp_path, quant_format=form, per_channel=True)
    result = dequantized(quantized)
    assert linear_operators(result) == linear_operators(graphopt.load(model))
    assert_undone(model, quantized, result, data)


@pytest.mark.parametrize("name", ["residual", "inception", "unet"])
def test_with_fine_steps_and_all_ranges_it_computes_the_same(name: str, tmp_path: Path) -> None:
    """16 bits round by 1e-5, so what is left is what the pass does, saturation beyond the calibrated range included."""
    model, data = canonical_constants(NETS[name]), feeds(3)
    quantized = static(
        model, data, tmp_path, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt16, per_channel=True
    )
    wide = [{"x": 3 * one["x"]} for one in data]
    result = dequantized(quantized, keep_ranges=True)
    assert error(quantized, result, wide) < 3e-4
    assert error(quantized, dequantized(quantized), wide) > 10 * error(quantized, result, wide)


def test_weights_are_the_floats_that_the_integers_stand_for(tmp_path: Path) -> None:
    model, data = canonical_constants(RESIDUAL), feeds(2)
    result = dequantized(static(model, data, tmp_path, quant_format=QuantFormat.QDQ, per_channel=True))
    for name in ("w0", "w1", "w2"):
        found, weight = (m.graph.initializers[name].const_value.numpy() for m in (result, model))
        step = np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127
        assert np.all(np.abs(found - weight) <= 0.51 * step.reshape(-1, 1, 1, 1))
        assert np.any(found != weight)


@pytest.mark.parametrize("name", NETS)
def test_our_own_static_form_is_undone(name: str) -> None:
    model, data = canonical_constants(NETS[name]), feeds(3)
    quantized = model.clone()
    Quantize(search=False).run(quantized, Context(calibration=data))
    result = dequantized(quantized)
    assert_undone(model, quantized, result, data)
    groups = [sorted((g.units, g.prunable) for g in graphopt.channel_groups(m)) for m in (quantized, result)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("level", ["onnx", "fused"])
def test_our_own_dynamic_form_is_undone_also_as_onnxruntime_fuses_it(level: str, tmp_path: Path) -> None:
    model, data = TRANSFORMER, feeds(2, (2, 6, 32))
    quantized = model.clone()
    Quantize(search=False).run(quantized, Context(calibration=data))
    if level == "fused":
        quantized = as_fused(quantized, tmp_path)
        assert {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"} & set(operators(quantized))
    result = dequantized(quantized)
    assert operators(result)["MatMul"] + operators(result)["FusedMatMul"] == operators(model)["MatMul"]
    assert_undone(model, quantized, result, data)


def as_fused(model: ir.Model, tmp_path: Path) -> ir.Model:
    """What onnxruntime makes of a model before it chooses layouts: its own operators of com.microsoft."""
    path = tmp_path / "plain.onnx"
    onnx.save(ir.to_proto(model), path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return graphopt.load(tmp_path / "fused.onnx")


@pytest.mark.parametrize("name", ["residual", "gated", "unet"])
def test_the_operators_that_onnxruntime_fuses_to_are_read(name: str, tmp_path: Path) -> None:
    model, data = canonical_constants(NETS[name]), feeds(2)
    quantized = model.clone()
    Quantize(search=False).run(quantized, Context(calibration=data))
    fused = as_fused(quantized, tmp_path)
    assert operators(fused)["QLinearConv"]
    result = dequantized(fused)
    assert_undone(model, quantized, result, data)


@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamic_models_of_onnxruntime(per_channel: bool, tmp_path: Path) -> None:
    text = """a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a) f = Flatten(r) g = Gemm<transB=1>(f, v, d)
              h = Relu(g) y = MatMul(h, u)"""
    model = weighted("float[n,3,4,4] x => float[n,5] y", text, w0=(4, 3, 3, 3), b0=(4,), v=(8, 64), d=(8,), u=(8, 5))
    data = feeds(2, (2, 3, 4, 4))
    path = written(model, tmp_path)
    quantize_dynamic(path, tmp_path / "int.onnx", per_channel=per_channel, weight_type=QuantType.QUInt8)
    quantized = graphopt.load(tmp_path / "int.onnx")
    assert {"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"} <= set(operators(quantized))
    result = dequantized(quantized)
    assert operators(result)["Conv"] == 1
    assert operators(result)["MatMul"] + operators(result)["Gemm"] == 2
    assert_undone(model, quantized, result, data)


def test_dynamic_lstm(tmp_path: Path) -> None:
    text = 'h, last, cell = LSTM<hidden_size=6, direction="bidirectional">(x, w, r, b) y = Relu(h)'
    model = weighted("float[5,n,4] x => float[5,2,n,6] y", text, w=(2, 24, 4), r=(2, 24, 6), b=(2, 48))
    data = feeds(2, (5, 3, 4))
    path = written(model, tmp_path)
    quantize_dynamic(path, tmp_path / "int.onnx", per_channel=True, weight_type=QuantType.QInt8)
    quantized = graphopt.load(tmp_path / "int.onnx")
    assert "DynamicQuantizeLSTM" in operators(quantized)
    assert_undone(model, quantized, dequantized(quantized), data)


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["qdq", "qoperator"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_weights(form: QuantFormat, bits: int, symmetric: bool, tmp_path: Path) -> None:
    if form == QuantFormat.QDQ and bits != 4:
        pytest.skip("onnxruntime's tool writes this form for 4 bits")
    model = weighted("float[n,40] x => float[n,9] y", "h = MatMul(x, a) y = MatMul(h, b)", a=(40, 24), b=(24, 9))
    data = feeds(2, (3, 40))
    quantizer = MatMulNBitsQuantizer(
        onnx.load(written(model, tmp_path)), bits=bits, block_size=16, is_symmetric=symmetric, quant_format=form
    )
    quantizer.process()
    quantized = graphopt.load(quantizer.model.model)
    assert {"MatMulNBits", "DequantizeLinear"} & set(operators(quantized))
    result = dequantized(quantized)
    assert operators(result) == {"MatMul": 2}
    assert within_exact(outputs(quantized, data)[0], outputs(result, data)[0])


def test_groups_of_packed_weights_may_be_in_any_order() -> None:
    """g_idx: the weight by hand, w[k, n] = s[n, g[k]] (q[n, k] - z[n, g[k]])."""
    generator = np.random.default_rng(0)
    packed, groups = generator.integers(0, 256, (3, 2, 8), np.uint8), generator.integers(0, 2, 32).astype(np.int32)
    scales, zeros = generator.random((3, 2)).astype(np.float32), generator.integers(0, 256, (3, 1), np.uint8)
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        g (float[n,32] x, uint8[3,2,8] b, float[3,2] s, uint8[3,1] z, int32[32] i) => (float[n,3] y)
        { y = com.microsoft.MatMulNBits<K=32, N=3, bits=4, block_size=16>(x, b, s, z, i) }"""
    )
    for value, array in zip(list(model.graph.inputs)[1:], (packed, scales, zeros, groups), strict=True):
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array)
        model.graph.register_initializer(value)
    integers = unpacked(packed.reshape(3, -1), 4, 32).astype(int)
    zero = np.concatenate([zeros & 15, zeros >> 4], axis=1).astype(int)
    expected = np.stack([scales[:, g] * (integers[:, k] - zero[:, g]) for k, g in enumerate(groups)])
    (node,) = dequantized(model).graph
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    np.testing.assert_allclose(weight.const_value.numpy(), expected, rtol=1e-6)


def constants(text: str, **arrays: np.ndarray) -> ir.Model:
    """A model from ONNX text whose inputs of these names are constants."""
    model = ir.from_onnx_text(text)
    for name, array in arrays.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    return graphopt.load(model)


def test_rows_of_quantized_tables() -> None:
    generator = np.random.default_rng(0)
    table, scale = generator.integers(-127, 128, (16, 4), np.int8), generator.random(4).astype(np.float32)
    by_column = constants(
        f"""{HEAD} g (int64[n,m] i, int8[16,4] t, float[4] s) => (float[n,m,4] y)
        {{ r = Gather(t, i) y = DequantizeLinear<axis=-1>(r, s) }}""",
        t=table,
        s=scale,
    )
    in_blocks = constants(
        f"""{HEAD} g (int64[n,m] i, int8[16,4] t, float[16,2] s) => (float[n,m,4] y)
        {{ r = Gather(t, i) q = Gather(s, i) y = DequantizeLinear<axis=-1, block_size=2>(r, q) }}""",
        t=table,
        s=generator.random((16, 2)).astype(np.float32),
    )
    data = [{"i": generator.integers(0, 16, (2, 3))}]
    for model in (by_column, in_blocks):
        result = dequantized(model)
        assert operators(result) == {"Gather": 1}
        assert within_exact(outputs(model, data)[0], outputs(result, data)[0])


def test_the_same_integers_read_in_another_scale() -> None:
    """s' (q - z') = s' / s x + s' (z - z')."""
    model = ir.from_onnx_text(f"""{HEAD} g (float[n,8] x) => (float[n,8] y)
        <float s = {{0.0001}}, uint16 z = {{32768}}, float t = {{0.0003}}, uint16 u = {{30000}}>
        {{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, t, u) }}""")
    result, data = dequantized(model), feeds(1, (3, 8))
    assert operators(result) == {"Mul": 1, "Add": 1}
    assert within_exact(outputs(model, data)[0], outputs(result, data)[0])


def test_padding_and_bounds_of_integers_are_translated() -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (float[2,8] x) => (float[2,10] y)
        <float s = {{0.02}}, uint8 z = {{100}}, int64[4] p = {{0,1,0,1}}, uint8 fill = {{150}}, uint8 most = {{200}}>
        {{ q = QuantizeLinear(x, s, z) a = Pad(q, p, fill) b = Clip(a, z, most) y = DequantizeLinear(b, s, z) }}""")
    result, data = dequantized(model), feeds(1, (2, 8))
    found, expected = outputs(result, data)[0][0], outputs(model, data)[0][0]
    assert np.abs(found - expected).max() <= 0.0101
    np.testing.assert_allclose(found[:, 0], 1.0, rtol=1e-6)
    assert found.min() == 0.0
    assert found.max() <= 2.0


@pytest.mark.parametrize(("scale", "operator"), [(6 / 255, "Clip"), (5.3 / 255, "Relu")])
def test_a_quantizer_that_begins_at_zero_stands_for_an_activation(scale: float, operator: str) -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (float[n,8] x, float[n,8] z) => (float[n,8] y)
        <float s = {{{scale:.9g}}}, uint8 o = {{0}}>
        {{ a = Add(x, z) q = QuantizeLinear(a, s, o) d = DequantizeLinear(q, s, o) y = Neg(d) }}""")
    assert [node.op_type for node in dequantized(model).graph] == ["Add", operator, "Neg"]


@pytest.mark.parametrize("operator", ["Relu", "Sigmoid", "Abs", "Exp"])
def test_nothing_is_added_where_nothing_negative_can_come(operator: str) -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (float[n,2,4,4] x) => (float[n,2,1,1] y)
        <float s = {{0.01}}, uint8 o = {{0}}>
        {{ a = {operator}(x) p = GlobalAveragePool(a) q = QuantizeLinear(p, s, o) y = DequantizeLinear(q, s, o) }}""")
    assert [node.op_type for node in dequantized(model).graph] == [operator, "GlobalAveragePool"]


def test_integers_of_the_interface_stay_and_are_listed() -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (uint8[n,8] x) => (float[n,8] y, uint8[n,8] i)
        <float s = {{0.02}}, uint8 z = {{100}}>
        {{ d = DequantizeLinear(x, s, z) y = Neg(d) i = QuantizeLinear(y, s, z) }}""")
    assert operators(dequantized(model, left=2)) == operators(model)


def test_integers_that_something_else_reads_are_made_from_the_floats() -> None:
    """An operator without a rule (BitShift) reads the result of QLinearMul: it gets integers of the float product."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        g (float[n,8] x) => (uint8[n,8] y) <float s = {0.02}, uint8 z = {100}, uint8 one = {1}> {
        q = QuantizeLinear(x, s, z) m = com.microsoft.QLinearMul(q, s, z, q, s, z, s, z)
        y = BitShift<direction="RIGHT">(m, one) }""")
    result, data = dequantized(model, left=1), feeds(1, (3, 8))
    assert [node.op_type for node in result.graph] == ["Mul", "QuantizeLinear", "BitShift"]
    difference = outputs(model, data)[0][0].astype(int) - outputs(result, data)[0][0].astype(int)
    assert np.abs(difference).max() <= 4


def test_scales_that_are_computed_at_run_time_are_left() -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (float[n,8] x, float s) => (float[n,8] y) <uint8 z = {{100}}>
        {{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}""")
    assert operators(dequantized(model, left=2)) == operators(model)


def test_subgraphs() -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (bool c, float[n,2] x) => (float[n,2] y)
        <int8[2,2] w = {{1,2,3,4}}, float s = {{0.5}}, float t = {{0.0001}}, uint16 z = {{32768}}>
        {{ q = QuantizeLinear(x, t, z)
           y = If(c) <then_branch = one () => (float[n,2] a) {{ d = DequantizeLinear(q, t, z)
               v = DequantizeLinear(w, s) a = MatMul(d, v) }},
               else_branch = two () => (float[n,2] b) {{ b = DequantizeLinear(q, t, z) }}> }}""")
    result = dequantized(model)
    for choice in (True, False):
        data = [{"c": np.array(choice), **feeds(1, (3, 2))[0]}]
        assert within_exact(outputs(model, data)[0], outputs(result, data)[0])


def test_a_float_model_is_left_alone() -> None:
    model = tiny()
    assert not Dequantize().run(model, Context()).modified


# Quantizing what is quantized.


def test_requantize_starts_from_the_float_model(tmp_path: Path) -> None:
    model, data = canonical_constants(RESIDUAL), feeds(3)
    theirs = static(model, data, tmp_path, quant_format=QuantFormat.QOperator)
    assert not Quantize().run(theirs.clone(), Context(calibration=data)).modified
    pass_, context = Quantize(requantize=True, search=False), Context(calibration=data)
    ours = theirs.clone()
    plan = pass_.plan(ours, context)
    assert ir.to_proto(ours).SerializeToString() == ir.to_proto(theirs).SerializeToString()
    pass_.run(ours, Context(calibration=data))
    assert operators(ours)["QLinearConv"] == 0
    assert operators(ours)["QuantizeLinear"] > 4
    assert error(model, ours, data) < 2 * error(model, theirs, data)
    again = theirs.clone()
    pass_.apply(again, plan)
    assert operators(again) == operators(ours)
    assert error(ours, again, data) == pytest.approx(0.0, abs=1e-6)


def test_operators_of_another_kind_are_quantized_beside_packed_weights(tmp_path: Path) -> None:
    text = """a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a) c = Conv(r, w1) p = GlobalAveragePool(c) f = Flatten(p)
              g = MatMul(f, v) h = Relu(g) y = Gemm<transB=1>(h, u)"""
    shapes = {"w0": (16, 3, 3, 3), "b0": (16,), "w1": (32, 16, 1, 1), "v": (32, 16), "u": (4, 16)}
    model = weighted("float[n,3,8,8] x => float[n,4] y", text, **shapes)
    quantizer = MatMulNBitsQuantizer(onnx.load(written(model, tmp_path)), bits=4, block_size=16)
    quantizer.process()
    partly = graphopt.load(quantizer.model.model)
    data, context = feeds(2, (2, 3, 8, 8)), Context()
    context.calibration = data
    result = partly.clone()
    plan = Quantize(search=False).plan(result, context)
    forms = {operator.op_type: operator.form for operator in plan.operators}
    assert forms["Conv"] == "static"
    assert forms["Gemm"] == "float"
    assert any("product" in remark.why for remark in context.remarks)
    Quantize(search=False).run(result, Context(calibration=data))
    assert operators(result)["MatMulNBits"] == 1
    assert error(partly, result, data) < 0.05
    assert not Quantize(search=False).run(result.clone(), Context(calibration=data)).modified


def test_where_activations_are_quantized_the_rest_is_meant_to_be_float() -> None:
    model, data = canonical_constants(RESIDUAL), feeds(2)
    Quantize(search=False, exclude=("Gemm",)).run(model, Context(calibration=data))
    context = Context(calibration=data)
    assert not Quantize().run(model, context).modified
    regions = quantized_regions(model)
    assert regions is not None
    assert not regions.weights_alone
    assert any("stay float as they are" in remark.why for remark in context.remarks)
