from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import DataError, GraphoptError
from graphopt.export.verify import compare
from graphopt.inputs.probes import probe_feeds
from graphopt.ir.compare import QUANTIZATION_TOLERANCE, compare_outputs, within_exact
from graphopt.ir.session import open_session
from graphopt.ir.statistics import BATCHNORM_STATISTICS
from graphopt.passes.contract import Context
from graphopt.passes.fold_batchnorm import FoldBatchnorm
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_legalize import legalize
from graphopt.passes.quantize_plan import QuantizePlan

HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def weighted(signature: str, body: str, **weights: tuple[int, ...]) -> ir.Model:
    """A model from ONNX text whose free names `weights` are random initializers of these shapes."""
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    inputs, outputs = signature.split("=>")
    text = f"g ({inputs.strip()}{', ' if declared else ''}{declared}) => ({outputs.strip()}) {{ {body} }}"
    model = ir.from_onnx_text(f"{HEAD} {text}")
    generator = np.random.default_rng(3)
    values = {value.name: value for value in model.graph.inputs}
    for name, shape in weights.items():
        fan_in = max(int(np.prod(shape[1:])), 1) if len(shape) > 1 else 4
        model.graph.inputs.remove(values[name])
        values[name].const_value = ir.tensor(
            (generator.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32), name=name
        )
        model.graph.register_initializer(values[name])
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def set_weight(model: ir.Model, name: str, array: np.ndarray) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)


def feeds(count: int = 4, shape: tuple[int, ...] = (1, 3, 16, 16), name: str = "x") -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(7)
    return [{name: generator.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def quantized(model: ir.Model, options: Quantize | None = None, context: Context | None = None) -> ir.Model:
    result = model.clone()
    (options or Quantize()).run(result, context or Context())
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    return result


def fused(model: ir.Model, tmp_path: Path) -> Counter[str]:
    """Operators of the graph that onnxruntime really runs."""
    path = tmp_path / "fused.onnx"
    open_session(model, optimized_model_path=str(path))
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def assert_close(model: ir.Model, other: ir.Model, data: list[dict[str, np.ndarray]]) -> None:
    assert compare(model, other, data).rms_error < QUANTIZATION_TOLERANCE


def tiny() -> ir.Model:
    return weighted(
        "float[n,3,16,16] x => float[n,5] y",
        "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p)"
        " y = Gemm<transB=1>(f, v, d)",
        w=(8, 3, 3, 3),
        b=(8,),
        v=(5, 8),
        d=(5,),
    )


RESIDUAL = weighted(
    "float[n,3,16,16] x => float[n,4] y",
    """a = Conv<pads=[1,1,1,1]>(x, w0, b0) a1 = Relu(a) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a1)
       c = Conv<pads=[1,1,1,1]>(m, w1, b1) c1 = Relu(c) d = Conv<pads=[1,1,1,1]>(c1, w2, b2)
       s = Add(d, m) s1 = Relu(s) p = GlobalAveragePool(s1) f = Flatten(p) y = Gemm<transB=1>(f, v)""",
    w0=(16, 3, 3, 3), b0=(16,), w1=(16, 16, 3, 3), b1=(16,), w2=(16, 16, 3, 3), b2=(16,), v=(4, 16),
)  # fmt: skip
MOBILE = weighted(
    "float[n,3,16,16] x => float[n,4] y",
    """lo = Constant<value_float=0.0>() hi = Constant<value_float=6.0>()
       a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w0) a1 = Clip(a, lo, hi)
       e = Conv(a1, w1) e1 = Clip(e, lo, hi) d = Conv<pads=[1,1,1,1], group=32>(e1, w2, b2) d1 = Clip(d, lo, hi)
       o = Conv(d1, w3) s = Sum(o, a1) g = GlobalAveragePool(s) p = Flatten(g)
       y = Gemm<transB=1>(p, v)""",
    w0=(16, 3, 3, 3), w1=(32, 16, 1, 1), w2=(32, 1, 3, 3), b2=(32,), w3=(16, 32, 1, 1), v=(4, 16),
)  # fmt: skip
INCEPTION = weighted(
    "float[n,3,16,16] x => float[n,4,16,16] y",
    """a = Conv(x, w0) a1 = Relu(a) b = Conv(a1, w1) b1 = Relu(b) c = Conv<pads=[1,1,1,1]>(a1, w2) c1 = Relu(c)
       q = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a1) q1 = Conv(q, w3)
       m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(a1) k = Concat<axis=1>(b1, c1, q1, m) y = Conv(k, w4)""",
    w0=(16, 3, 1, 1), w1=(16, 16, 1, 1), w2=(16, 16, 3, 3), w3=(16, 16, 1, 1), w4=(4, 64, 1, 1),
)  # fmt: skip
UNET = weighted(
    "float[n,3,16,16] x => float[n,2,16,16] y",
    """a = Conv<pads=[1,1,1,1]>(x, w0) a1 = Relu(a) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a1)
       b = Conv<pads=[1,1,1,1]>(m, w1) b1 = Relu(b) u = ConvTranspose<kernel_shape=[2,2], strides=[2,2]>(b1, t, tb)
       k = Concat<axis=1>(a1, u) z = Conv<pads=[1,1,1,1]>(k, w2) z1 = LeakyRelu<alpha=0.1>(z) y = Conv(z1, w3)""",
    w0=(16, 3, 3, 3), w1=(32, 16, 3, 3), t=(32, 16, 2, 2), tb=(16,), w2=(16, 32, 3, 3), w3=(2, 16, 1, 1),
)  # fmt: skip
GATED = weighted(
    "float[n,3,16,16] x => float[n,4,16,16] y",
    """a = Conv(x, w0) g = Sigmoid(a) s = Mul(a, g) p = GlobalAveragePool(s) e = Conv(p, w1) e1 = Relu(e)
       f = Conv(e1, w2) h = Sigmoid(f) q = Mul(s, h) y = Conv(q, w3)""",
    w0=(16, 3, 1, 1), w1=(4, 16, 1, 1), w2=(16, 4, 1, 1), w3=(4, 16, 1, 1),
)  # fmt: skip


def canonical_constants(model: ir.Model) -> ir.Model:
    """Constant nodes as initializers, as the canonical form has them."""
    model = model.clone()
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


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


def test_matches_numpy_reference() -> None:
    """Conv 1x1, Relu, as integers by hand: y = s_x s_w (sum (q_x - z_x) q_w + q_b), rounded into y's quantizer."""
    model = weighted("float[1,3,4,4] x => float[1,2,4,4] y", "c = Conv(x, w, b) y = Relu(c)", w=(2, 3, 1, 1), b=(2,))
    data = feeds(2, (1, 3, 4, 4))
    plan = Quantize().plan(model, Context(calibration=data))
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    x, y, w = tensors["x"], tensors["y"], tensors["w"]
    weight = model.graph.initializers["w"].const_value.numpy()[:, :, 0, 0]
    bias = model.graph.initializers["b"].const_value.numpy()
    s_w = np.abs(weight).max(axis=1) / np.float32(127)
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
    for optimized in (False, True):
        found = open_session(result, optimized=optimized).run_feeds(data[0])[0][0]
        np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_plan_round_trips_and_replays() -> None:
    model = tiny()
    context = Context(calibration=feeds())
    plan = Quantize().plan(model, context)
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
    assert "int8 symmetric" in table
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
        expected_scale = (0.5 * np.abs(weight).max(axis=1 - axis) / 127).astype(np.float32)
        assert within_exact([expected_scale], [np.asarray(planned.scale, np.float32)])
        result = quantized(model, Quantize(form=form), Context(calibration=data))
        for one in data:
            expected = open_session(model, optimized=False).run_feeds(one)[0]
            found = open_session(result).run_feeds(one)[0]
            for column in range(5):  # each channel to its own scale
                error = np.sqrt(np.mean(np.square(expected[:, column] - found[:, column])))
                assert error < QUANTIZATION_TOLERANCE * np.sqrt(np.mean(np.square(expected[:, column])))


TRANSFORMER = weighted(
    "float[n,6,32] x => float[n,6,32] y",
    """l = LayerNormalization<axis=-1>(x, g) q = MatMul(l, wq) q1 = Add(q, bq) k = MatMul(l, wk) k1 = Add(k, bk)
       kt = Transpose<perm=[0,2,1]>(k1) s = MatMul(q1, kt) p = Softmax(s) v = MatMul(l, wv) o = MatMul(p, v)
       h = Gelu(o) z = MatMul(h, wo) y = Add(x, z)""",
    g=(32,), wq=(32, 32), bq=(32,), wk=(32, 32), bk=(32,), wv=(32, 32), wo=(32, 32),
)  # fmt: skip


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


def test_interface_is_untouched() -> None:
    model = tiny()
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == "r"))
    result = quantized(model, context=Context(calibration=feeds()))
    assert [(v.name, v.dtype, v.shape) for v in result.graph.outputs] == [
        (v.name, v.dtype, v.shape) for v in model.graph.outputs
    ]
    assert [v.name for v in result.graph.inputs] == ["x"]
    assert_close(model, result, feeds())


def test_quantizing_twice_changes_nothing() -> None:
    once = quantized(tiny())
    context = Context()
    again = once.clone()
    assert not Quantize().run(again, context).modified
    assert any("already" in remark.why for remark in context.remarks)


def test_zero_is_exact() -> None:
    plan = Quantize().plan(tiny(), Context(calibration=feeds()))
    for tensor in plan.tensors:
        if tensor.role == "activation":
            assert (tensor.quantize(np.zeros(1))[0] - tensor.zero_point[0]) * tensor.scale[0] == 0.0
    shifted = [{"x": one["x"] + 100} for one in feeds()]  # a range that leaves 0 out is widened to it
    (x, *_) = Quantize().plan(tiny(), Context(calibration=shifted)).tensors
    assert x.zero_point == (0,)


def test_excluded_operators_stay_float_and_say_so() -> None:
    context = Context()
    result = quantized(tiny(), Quantize(exclude=("Conv",)), context)
    assert any(node.op_type == "Conv" and node.inputs[1].name == "w" for node in result.graph)
    assert any("excluded by 'Conv'" in remark.why for remark in context.remarks)


def test_weights_with_nan_are_declined() -> None:
    model = tiny()
    weight = model.graph.initializers["w"].const_value.numpy().copy()
    weight[0, 0, 0, 0] = np.nan
    set_weight(model, "w", weight)
    context = Context(calibration=feeds())
    plan = Quantize().plan(model, context)
    (conv,) = [operator for operator in plan.operators if operator.op_type == "Conv"]
    assert (conv.form, conv.reason) == ("float", "its weight or bias holds NaN or infinity")


def test_silent_channels_and_large_biases_survive() -> None:
    model = tiny()
    weight = model.graph.initializers["w"].const_value.numpy().copy()
    weight[1] = 0.0
    weight[2] *= 1e-12  # its bias in units of the accumulator would overflow int32
    set_weight(model, "w", weight)
    set_weight(model, "b", np.linspace(1, 5, 8).astype(np.float32))
    data = feeds()
    assert_close(model, quantized(model, context=Context(calibration=data)), data)


def test_constant_activations() -> None:
    zeros = [{"x": np.zeros((1, 3, 16, 16), np.float32)}]
    result = quantized(tiny(), context=Context(calibration=zeros))
    assert_close(tiny(), result, zeros)


def test_shared_weights() -> None:
    model = weighted(
        "float[n,4,8,8] x => float[n,4,8,8] y",
        "a = Conv(x, w, b) r = Relu(a) y = Conv(r, w, b)",
        w=(4, 4, 1, 1),
        b=(4,),
    )
    data = feeds(4, (1, 4, 8, 8))
    result = quantized(model, context=Context(calibration=data))
    assert (
        sum(value.dtype == ir.DataType.INT8 and value.shape.rank() == 4 for value in result.graph.initializers.values())
        == 1
    )
    assert_close(model, result, data)


def test_computed_weights_are_declined() -> None:
    model = weighted("float[n,4,8,8] x, float[4,4,1,1] k => float[n,4,8,8] y", "y = Conv(x, k)")
    context = Context()
    quantized(model, context=context)
    assert any("weight of Conv is not constant" in remark.why for remark in context.remarks)


@pytest.mark.parametrize(
    "options",
    [{"ranges": "best"}, {"form": "fp8"}, {"percentile": 10.0}, {"bits": 9}],
    ids=["ranges", "form", "percentile", "bits"],
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(GraphoptError):
        Quantize(**options)  # type: ignore[arg-type]


def test_empty_calibration_is_refused() -> None:
    with pytest.raises(DataError):
        Quantize().plan(tiny(), Context(calibration=[]))


def test_narrow_bits_keep_within_their_integers() -> None:
    data = feeds()
    plan = Quantize(bits=4).plan(tiny(), Context(calibration=data))
    weights = [tensor for tensor in plan.tensors if tensor.role == "weight"]
    for tensor in weights:
        array = tiny().graph.initializers[tensor.name].const_value.numpy()
        assert np.abs(tensor.quantize(array)).max() == 7
    assert all(tensor.zero_point[0] <= 15 for tensor in plan.tensors)


HARD = weighted(
    "float[n,3,8,8] x => float[n,4,8,8] y",
    """a = Conv(x, w0, b0) h = HardSwish(a) d = Conv<group=16, pads=[1,1,1,1]>(h, w1) d1 = HardSwish(d)
       p = GlobalAveragePool(d1) e = Conv(p, w2, b2) g = HardSigmoid<alpha=0.25, beta=0.5>(e) m = Mul(d1, g)
       y = Conv(m, w3)""",
    w0=(16, 3, 1, 1), b0=(16,), w1=(16, 1, 3, 3), w2=(16, 16, 1, 1), b2=(16,), w3=(4, 16, 1, 1),
)  # fmt: skip
DENSE = weighted(
    "float[n,3,8,8] x => float[n,4,8,8] y",
    """a = Conv(x, w0) a1 = Relu(a) n0 = BatchNormalization(a1, g0, b0, m0, v0) n1 = Relu(n0) c = Conv(n1, w1)
       k = Concat<axis=1>(a1, c) n2 = BatchNormalization(k, g1, b1, m1, v1) n3 = Relu(n2) y = Conv(n3, w2)""",
    w0=(16, 3, 1, 1), g0=(16,), b0=(16,), m0=(16,), v0=(16,), w1=(16, 16, 1, 1), g1=(32,), b1=(32,), m1=(32,),
    v1=(32,), w2=(4, 32, 1, 1),
)  # fmt: skip
SCALED = weighted(
    "float[n,3,8,8] x => float[n,4,8,8] y",
    """a = Conv(x, w0, b0) t = Constant<value_float=0.1>() s = Mul(a, t) r = Conv(a, w1) q = Add(r, s)
       y = Conv(q, w2)""",
    w0=(8, 3, 1, 1), b0=(8,), w1=(8, 8, 1, 1), w2=(4, 8, 1, 1),
)  # fmt: skip
for _name in ("v0", "v1"):
    set_weight(DENSE, _name, np.linspace(0.5, 2, 16 if _name == "v0" else 32).astype(np.float32))


@pytest.mark.parametrize("model", [HARD, DENSE, SCALED], ids=["hard", "dense", "scaled"])
def test_legalized_operators_run_on_integers(model: ir.Model, tmp_path: Path) -> None:
    model = canonical_constants(model)
    data = feeds(4, (1, 3, 8, 8))
    result = quantized(model, context=Context(calibration=data))
    operators = fused(result, tmp_path)
    forbidden = {"Conv", "FusedConv", "HardSwish", "HardSigmoid", "BatchNormalization", "Mul", "Add", "Relu", "Clip"}
    assert not forbidden & set(operators)
    assert (operators["QuantizeLinear"], operators["DequantizeLinear"]) == (1, 1)
    assert_close(model, result, data)


def test_legalization_is_exact() -> None:
    for model in (canonical_constants(HARD), canonical_constants(DENSE), canonical_constants(MOBILE), UNET):
        rewritten = model.clone()
        legalize(rewritten)
        one = probe_feeds(model)[0]
        outputs = [open_session(m, optimized=False).run_feeds(one) for m in (model, rewritten)]
        assert within_exact(*outputs)


def test_static_linear_layers_with_a_bias_behind_them_fuse(tmp_path: Path) -> None:
    data = feeds(4, (2, 6, 32))
    result = quantized(TRANSFORMER, Quantize(form="static"), Context(calibration=data))
    operators = fused(result, tmp_path)
    assert operators["Gemm"] == operators["FusedGemm"] == 0
    assert operators["QLinearMatMul"] + operators["MatMulIntegerToFloat"] == 4
    assert_close(TRANSFORMER, result, data)


def test_a_plan_names_what_it_quantizes_and_leaves_no_dead_weights() -> None:
    model = canonical_constants(SCALED)
    result = quantized(model, context=Context(calibration=feeds(2, (1, 3, 8, 8))))
    assert all(value.uses() for value in result.graph.initializers.values())


def test_what_only_static_kernels_need_is_not_rewritten_for_the_dynamic_form() -> None:
    model = canonical_constants(HARD)
    result = quantized(model, Quantize(form="dynamic"))
    assert [node.op_type for node in result.graph] == [node.op_type for node in model.graph]


def test_embedding_tables_are_stored_as_integers() -> None:
    generator = np.random.default_rng(0)
    table = generator.standard_normal((128, 64)).astype(np.float32) * generator.random(64).astype(np.float32)
    model = ir.from_onnx_text(f"{HEAD} g (int64[n,s] ids, float[128,64] w_table) => (float[n,s,64] y)"
                              "{ rows = Gather (w_table, ids) y = Relu (rows) }")  # fmt: skip
    weight = model.graph.inputs.pop(1)
    weight.const_value = ir.tensor(table, name="w_table")
    model.graph.register_initializer(weight)
    ids = generator.integers(0, 128, (2, 5))
    before = open_session(model, optimized=False).run_feeds({"ids": ids})[0]
    plan = Quantize().plan(model, Context())
    assert [operator.form for operator in plan.operators] == ["table"]
    Quantize().apply(model, QuantizePlan.from_json(plan.to_json()))
    assert [node.op_type for node in model.graph] == ["Gather", "DequantizeLinear", "Relu"]
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) < table.nbytes / 3
    after = open_session(model).run_feeds({"ids": ids})[0]
    step = np.abs(table).max(axis=0) / 127
    assert np.all(np.abs(after - before) <= step / 2 * 1.001)


def test_a_table_that_is_read_in_float_too_is_declined() -> None:
    model = ir.from_onnx_text(f"{HEAD} g (int64[n] ids, float[n,64] x, float[128,64] w_table) => (float[n,64] y)"
                              "{ rows = Gather (w_table, ids) first = Relu (w_table) t = Gather (first, ids)"
                              " s = Add (rows, t) y = Add (s, x) }")  # fmt: skip
    weight = model.graph.inputs.pop(2)
    weight.const_value = ir.tensor(np.ones((128, 64), np.float32), name="w_table")
    model.graph.register_initializer(weight)
    context = Context()
    Quantize()(model)
    plan = Quantize().plan(model, context)
    assert not [operator for operator in plan.operators if operator.form == "table"]
    assert any("read by Relu in float too" in remark.why for remark in context.remarks)


def test_exclude_is_a_list_of_patterns() -> None:
    with pytest.raises(GraphoptError, match="exclude is one string"):
        Quantize(exclude="*head*")  # type: ignore[arg-type]
