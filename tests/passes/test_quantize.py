from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError, GraphoptError
from graphopt.ir.compare import QUANTIZATION_TOLERANCE, compare_outputs, within_exact
from graphopt.ir.session import open_session
from graphopt.ir.statistics import BATCHNORM_STATISTICS
from graphopt.passes.contract import Context
from graphopt.passes.fold_batchnorm import FoldBatchnorm
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.passes.quantize_saturation import kernels_of, saturating_kernels
from tests.passes.quantized_nets import (
    GATED,
    INCEPTION,
    MOBILE,
    RESIDUAL,
    TRANSFORMER,
    UNET,
    assert_close,
    canonical_constants,
    feeds,
    fused,
    quantized,
    set_weight,
    tiny,
    weighted,
)


@pytest.mark.parametrize(
    "model",
    [RESIDUAL, MOBILE, INCEPTION, UNET, GATED],
    ids=["residual", "mobile", "inception", "unet", "gated"],
)
def test_convolutional_nets_run_on_integers_throughout(model: ir.Model, tmp_path: Path) -> None:
    model = canonical_constants(model)
    data = feeds()
    result = quantized(model, context=Context(calibration=data))
    operators = fused(result, tmp_path)
    linear = sum(node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose") for node in model.graph)
    assert operators["QLinearConv"] + operators["QGemm"] == linear
    forbidden = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "ConvTranspose", "Add", "Mul", "Relu", "Clip"}
    assert not forbidden & set(operators)
    assert operators["QuantizeLinear"] == 1
    assert operators["DequantizeLinear"] <= 1
    assert_close(model, result, data)


def test_shape_operators_run_on_the_integers(tmp_path: Path) -> None:
    model = weighted(
        "float[1,3,16,16] x => float[1,4,8,8] y",
        """a = Conv(x, w0, b0) p = Constant<value_ints=[0,0,1,1,0,0,1,1]>() a1 = Pad(a, p)
           d = DepthToSpace<blocksize=2>(a1) e = SpaceToDepth<blocksize=2>(d) t = Transpose<perm=[0,1,3,2]>(e)
           st = Constant<value_ints=[0,0]>() en = Constant<value_ints=[16,16]>() ax = Constant<value_ints=[2,3]>()
           sp = Constant<value_ints=[2,2]>() s = Slice(t, st, en, ax, sp) y = Conv(s, w1)""",
        w0=(16, 3, 1, 1), b0=(16,), w1=(4, 16, 1, 1),
    )  # fmt: skip
    model = canonical_constants(model)
    data = feeds()
    result = quantized(model, context=Context(calibration=data))
    operators = fused(result, tmp_path)
    assert operators["QLinearConv"] == 2
    assert operators["QuantizeLinear"] == 1
    assert operators["DequantizeLinear"] == 1
    assert_close(model, result, data)


def quantize_array(array: np.ndarray, scale: float, zero: int) -> np.ndarray:
    return np.clip(np.rint(array / np.float32(scale)) + zero, 0, 255)


@pytest.mark.parametrize(("weight_range", "largest"), [("full", 127), ("reduced", 63)])
def test_matches_numpy_reference(weight_range: str, largest: int) -> None:
    """Conv 1x1, Relu, as integers by hand: y = s_x s_w (sum (q_x - z_x) q_w + q_b), rounded into y's quantizer."""
    model = weighted("float[1,3,4,4] x => float[1,2,4,4] y", "c = Conv(x, w, b) y = Relu(c)", w=(2, 3, 1, 1), b=(2,))
    data = feeds(2, (1, 3, 4, 4))
    plan = Quantize(weight_range=weight_range).plan(model, Context(calibration=data))
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    x, y, w = tensors["x"], tensors["y"], tensors["w"]
    weight = model.graph.initializers["w"].const_value.numpy()[:, :, 0, 0]
    bias = model.graph.initializers["b"].const_value.numpy()
    s_w = np.abs(weight).max(axis=1) / np.float32(largest)
    np.testing.assert_array_equal(np.asarray(w.scale, np.float32), s_w)
    q_w = np.rint(weight / s_w[:, None])
    q_b = np.rint(bias / (s_w * np.float32(x.scale[0])))
    q_x = quantize_array(data[0]["x"][0], x.scale[0], x.zero_point[0]) - x.zero_point[0]
    accumulated = np.einsum("oi,ihw->ohw", q_w, q_x) + q_b[:, None, None]
    expected = accumulated * s_w[:, None, None] * x.scale[0]
    expected = (quantize_array(expected, y.scale[0], y.zero_point[0]) - y.zero_point[0]) * np.float32(y.scale[0])
    assert y.zero_point == (0,)
    result = model.clone()
    Quantize().apply(result, plan)
    exact_kernels = weight_range == "reduced" or "QLinearConv" not in saturating_kernels()
    for optimized in (False, True) if exact_kernels else (False,):
        found = open_session(result, optimized=optimized).run_feeds(data[0])[0][0]
        np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(("weight_range", "kind"), [("full", "int8 symmetric"), ("reduced", "int7 symmetric")])
def test_plan_round_trips_and_replays(weight_range: str, kind: str) -> None:
    model = tiny()
    context = Context(calibration=feeds())
    plan = Quantize(weight_range=weight_range).plan(model, context)
    again = QuantizePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    first, second = model.clone(), model.clone()
    Quantize().apply(first, plan)
    Quantize().apply(second, again)
    data = feeds(1)
    outputs = [open_session(m).run_feeds(data[0]) for m in (first, second)]
    assert compare_outputs(*outputs) == 0.0
    assert [node.name for node in first.graph] == [node.name for node in second.graph]
    table = str(plan)
    assert "uint8" in table
    assert kind in table
    assert "calibration" in table


def test_plan_changes_nothing() -> None:
    model = tiny()
    before = ir.to_proto(model).SerializeToString()
    Quantize().plan(model, Context())
    assert ir.to_proto(model).SerializeToString() == before


def test_plan_of_another_model_is_refused() -> None:
    plan = Quantize().plan(tiny(), Context())
    with pytest.raises(GraphoptError, match="another model"):
        Quantize().apply(canonical_constants(INCEPTION), plan)
    with pytest.raises(GraphoptError, match="not a quantization plan"):
        QuantizePlan.from_json({"tensors": [{"name": 1}]})


@pytest.mark.parametrize(("transposed", "axis"), [(1, 0), (0, 1)])
def test_scales_follow_output_channels_of_gemm(transposed: int, axis: int) -> None:
    shape = (5, 8) if transposed else (8, 5)
    model = weighted(
        "float[n,8] x => float[n,5] y", f"y = Gemm<transB={transposed}, alpha=0.5, beta=2.0>(x, w, b)", w=shape, b=(5,)
    )
    weight = model.graph.initializers["w"].const_value.numpy().copy()
    channel = [slice(None)] * 2
    channel[axis] = slice(1, 2)
    weight[tuple(channel)] *= 300  # one channel far larger: one scale for all would flatten the others
    set_weight(model, "w", weight)
    data = feeds(2, (4, 8))
    for form in ("static", "dynamic"):
        plan = Quantize(form=form).plan(model, Context(calibration=data))
        (planned,) = [tensor for tensor in plan.tensors if tensor.role == "weight"]
        assert planned.axis == axis
        largest = 63 if kernels_of(model.graph[0], form) & saturating_kernels() else 127
        expected_scale = (0.5 * np.abs(weight).max(axis=1 - axis) / largest).astype(np.float32)
        assert within_exact([expected_scale], [np.asarray(planned.scale, np.float32)])
        result = quantized(model, Quantize(form=form), Context(calibration=data))
        for one in data:
            expected = open_session(model, optimized=False).run_feeds(one)[0]
            found = open_session(result).run_feeds(one)[0]
            for column in range(5):  # each channel to its own scale
                error = np.sqrt(np.mean(np.square(expected[:, column] - found[:, column])))
                assert error < QUANTIZATION_TOLERANCE * np.sqrt(np.mean(np.square(expected[:, column])))


def test_transformer_layers_take_the_dynamic_form_that_fuses(tmp_path: Path) -> None:
    context = Context()
    result = quantized(TRANSFORMER, context=context)
    operators = fused(result, tmp_path)
    assert operators["MatMulIntegerToFloat"] == 3
    assert operators["DynamicQuantizeLinear"] == 1  # one for the three layers that read the same tensor
    assert operators["DynamicQuantizeMatMul"] == 1
    assert operators["MatMulInteger"] == operators["Cast"] == 0
    assert operators["MatMul"] + operators["FusedMatMul"] == 2  # attention products
    assert sum("run time" in remark.why for remark in context.remarks) == 2
    assert_close(TRANSFORMER, result, feeds(2, (2, 6, 32)))


def test_patch_convolution_is_static_and_the_transformer_behind_it_dynamic(tmp_path: Path) -> None:
    model = weighted(
        "float[n,3,16,16] x => float[n,16,8] y",
        """c = Conv<strides=[4,4]>(x, w, b) sh = Constant<value_ints=[0,16,-1]>() r = Reshape(c, sh)
           t = Transpose<perm=[0,2,1]>(r) l = LayerNormalization<axis=-1>(t, g) y = MatMul(l, v)""",
        w=(16, 3, 4, 4), b=(16,), g=(16,), v=(16, 8),
    )  # fmt: skip
    model = canonical_constants(model)
    operators = fused(quantized(model, context=Context(calibration=feeds())), tmp_path)
    assert operators["QLinearConv"] == 1
    assert operators["DynamicQuantizeMatMul"] == 1


def test_isolated_depthwise_convolution_stays_float() -> None:
    model = weighted(
        "float[n,8,16,16] x => float[n,8,16,16] y", "y = Conv<group=8, pads=[1,1,1,1]>(x, w)", w=(8, 1, 3, 3)
    )
    context = Context()
    result = quantized(model, context=context)
    assert [node.op_type for node in result.graph] == ["Conv"]
    assert any("depthwise" in remark.why for remark in context.remarks)


def test_data_free_ranges_come_from_batchnorm_statistics() -> None:
    model = weighted(
        "float[n,3,16,16] x => float[n,4,16,16] y",
        "c = Conv<pads=[1,1,1,1]>(x, w) k = BatchNormalization(c, gamma, beta, mean, var) r = Relu(k) y = Conv(r, v)",
        w=(8, 3, 3, 3), gamma=(8,), beta=(8,), mean=(8,), var=(8,), v=(4, 8, 1, 1),
    )  # fmt: skip
    set_weight(model, "var", np.full(8, 0.5, np.float32))
    set_weight(model, "gamma", np.full(8, 2.0, np.float32))
    set_weight(model, "beta", np.linspace(-1, 20, 8).astype(np.float32))
    FoldBatchnorm()(model)
    assert any(BATCHNORM_STATISTICS in value.meta for node in model.graph for value in node.outputs)
    context = Context()
    plan = Quantize().plan(model, context)
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    assert by_name["r"].source == "batchnorm"
    assert by_name["x"].source == "probes"
    # The largest channel has mean 20 and deviation 2: about 4 deviations of Gaussian values above it.
    assert 24 < 255 * by_name["r"].scale[0] < 36
    assert any("batchnorm" in remark.why for remark in context.remarks)


def test_data_free_without_statistics_uses_probes() -> None:
    context = Context()
    model = canonical_constants(RESIDUAL)
    result = quantized(model, context=context)
    assert any("from probes" in remark.why for remark in context.remarks)
    assert_close(model, result, feeds())


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "entropy"])
def test_ranges_from_calibration(ranges: str) -> None:
    model = canonical_constants(RESIDUAL)
    data = feeds(6)
    assert_close(model, quantized(model, Quantize(ranges=ranges), Context(calibration=data)), data)


def test_clamps_with_a_second_reader_run_on_the_integers(tmp_path: Path) -> None:
    """A pre-activation block: the Relu cannot be folded into the quantizer, since the sum before it is read too."""
    model = weighted(
        "float[n,3,8,8] x => float[n,4,8,8] y",
        "a = Conv(x, w0, b0) r = Relu(a) b = Conv(r, w1) s = Add(a, b) y = Conv(s, w2)",
        w0=(8, 3, 1, 1), b0=(8,), w1=(8, 8, 1, 1), w2=(4, 8, 1, 1),
    )  # fmt: skip
    data = feeds(4, (1, 3, 8, 8))
    result = quantized(model, context=Context(calibration=data))
    operators = fused(result, tmp_path)
    assert operators["QLinearConv"] == 3
    assert operators["QLinearAdd"] == 1
    assert operators["DequantizeLinear"] <= 1
    assert_close(model, result, data)


@pytest.mark.parametrize("array", [np.full((1, 4, 1, 1), -np.inf, np.float32), np.zeros((1, 0, 8, 8), np.float32)])
def test_constant_operands_without_a_range_stay_float(array: np.ndarray) -> None:
    operator = "Add(c, k)" if array.size else "Concat<axis=1>(c, k)"
    text = f"c = Conv(x, w) a = {operator} r = Relu(a) y = Conv(r, v)"
    model = weighted("float[1,3,8,8] x => float[1,4,8,8] y", text, w=(4, 3, 1, 1), v=(4, 4, 1, 1), k=array.shape)
    set_weight(model, "k", array)
    data = feeds(1, (1, 3, 8, 8))
    plan = Quantize(form="static").plan(model, Context(calibration=data))
    assert "k" not in {tensor.name for tensor in plan.tensors}
    result = quantized(model, Quantize(form="static", search=False), Context(calibration=data))
    expected, found = (open_session(one).run_feeds(data[0])[0] for one in (model, result))
    assert np.abs(found - expected).max() < 0.1


def test_a_pattern_that_matches_nothing_is_said() -> None:
    context = Context()
    Quantize(exclude=("n0", "nosuch*")).run(tiny(), context)
    (remark,) = [remark for remark in context.remarks if remark.what == "exclude"]
    assert "'nosuch*'" in remark.why


def test_calibration_that_is_no_dict_says_what_to_do() -> None:
    with pytest.raises(DataError, match="dicts by input name") as caught:
        Quantize().plan(tiny(), Context(calibration=[np.zeros((1, 3, 16, 16), np.float32)]))
    assert "Calibration(model" in (caught.value.help or "")
