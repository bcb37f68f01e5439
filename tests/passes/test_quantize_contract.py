from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError, GraphoptError
from graphopt.inputs.probes import probe_feeds
from graphopt.ir.compare import within_exact
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_legalize import legalize
from graphopt.passes.quantize_plan import QuantizePlan
from tests.passes.quantized_nets import (
    HEAD,
    MOBILE,
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
    [{"ranges": "best"}, {"form": "fp8"}, {"percentile": 10.0}, {"bits": 9}, {"weight_range": "wide"}],
    ids=["ranges", "form", "percentile", "bits", "weight_range"],
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


def test_a_plan_with_an_unknown_form_is_refused() -> None:
    document = Quantize().plan(tiny(), Context()).to_json()
    with pytest.raises(GraphoptError, match="unknown form 'magic'"):
        QuantizePlan.from_json(json.loads(json.dumps(document).replace('"static"', '"magic"')))
