"""Weights alone as integers: the form that onnxruntime fuses, the numbers that it means, what is declined, memory."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import GraphoptError
from graphopt.ir.session import open_session
from graphopt.passes import quantize_blocks, quantize_weights
from graphopt.passes.contract import Context
from graphopt.passes.dequantize import Dequantize
from graphopt.passes.merge_initializers import MergeInitializers
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize_blocks import Grid, block_scales
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.passes.quantize_weight_kernels import can_be_lifted, is_right, level_errors
from graphopt.passes.quantize_weight_sites import BLOCK_SIZES
from tests.passes.quantized_nets import (
    WEIGHTS,
    canonical_constants,
    feeds,
    fused,
    quantized,
    relative,
    set_weight,
    weighted,
)


def reasons(model: ir.Model, options: Quantize = WEIGHTS) -> dict[str, str]:
    """Why operators stay float, by operator type."""
    return {one.op_type: one.reason for one in options.plan(model, Context()).operators if one.form == "float"}


def forms(model: ir.Model, options: Quantize = WEIGHTS) -> list[str]:
    return [one.form for one in options.plan(model, Context()).operators]


def array(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def stored_matrix(model: ir.Model, name: str) -> np.ndarray:
    """The weight that integers, scales and zero points of the graph stand for, read by hand."""
    node = next(n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0].name == f"{name}.quantized")
    integers = node.inputs[0].const_value.numpy().astype(np.float64)
    scale = node.inputs[1].const_value.numpy().astype(np.float64)
    zero = node.inputs[2].const_value.numpy().astype(np.float64) if len(node.inputs) > 2 else np.zeros_like(scale)
    axis = node.attributes["axis"].as_int()
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    if block:
        assert axis == 0
        scale, zero = (np.repeat(one, block, 0)[: len(integers)] for one in (scale, zero))
    return (integers - zero) * scale


def product(inputs: int = 96, outputs: int = 40, rank: int = 3) -> ir.Model:
    shape = ",".join(["n"] * (rank - 1))
    return weighted(f"float[{shape},{inputs}] x => float[{shape},{outputs}] y", "y = MatMul(x, w)", w=(inputs, outputs))


def packed_attributes(model: ir.Model, folder: Path) -> list[dict[str, int]]:
    """Attributes of the MatMulNBits nodes of the graph that onnxruntime saves."""
    path = folder / "fused.onnx"
    open_session(model, optimized_model_path=str(path))
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [{a.name: a.i for a in node.attribute} for node in nodes if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize("block", [0, *BLOCK_SIZES])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False), (2, True), (2, False)])
def test_onnxruntime_fuses_every_form(tmp_path: Path, bits: int, symmetric: bool, block: int) -> None:
    model = product(inputs=600)
    options = Quantize(form="weights", weight_bits=bits, block_size=block, symmetric=symmetric)
    result = quantized(model, options)
    assert fused(result, tmp_path) == {"MatMulNBits": 1}
    (attributes,) = packed_attributes(result, tmp_path)
    assert attributes["bits"] == bits
    assert (attributes["K"], attributes["N"]) == (600, 40)
    assert attributes["block_size"] == (block or attributes["block_size"])
    data = {"x": np.random.default_rng(0).standard_normal((2, 3, 600)).astype(np.float32)}
    expected = data["x"].astype(np.float64) @ stored_matrix(result, "w")
    assert relative(open_session(result, optimized=False).run_feeds(data)[0], expected) < 1e-6
    assert relative(open_session(result).run_feeds(data)[0], expected) < 0.02
    error = {2: 0.6, 4: 0.13, 8: 0.012}[bits]
    assert relative(stored_matrix(result, "w"), array(model, "w")) < error
    width = result.graph.initializers["w.quantized"].const_value
    assert width.dtype.bitwidth == bits
    assert width.nbytes == 600 * 40 * bits // 8


@pytest.mark.parametrize("inputs", [20, 33, 70])
@pytest.mark.parametrize("contrib", [False, True])
def test_inputs_that_fill_no_block(tmp_path: Path, inputs: int, contrib: bool) -> None:
    model = product(inputs=inputs, outputs=33)
    result = quantized(model, replace(WEIGHTS, contrib=contrib))
    assert fused(result, tmp_path) == {"MatMulNBits": 1}
    data = {"x": np.random.default_rng(0).standard_normal((2, 3, inputs)).astype(np.float32)}
    expected = open_session(model, optimized=False).run_feeds(data)[0]
    assert relative(open_session(result).run_feeds(data)[0], expected) < 0.13


@pytest.mark.parametrize("contrib", [False, True])
@pytest.mark.parametrize("outputs", [1, 3, 4, 6, 10, 16, 33])
def test_two_bits_only_where_the_kernel_is_right(outputs: int, contrib: bool) -> None:
    """That of onnxruntime 1.31 is wrong where outputs are no multiple of 4: four bits hold them then."""
    model = product(inputs=64, outputs=outputs, rank=2)
    options = Quantize(form="weights", weight_bits=2, contrib=contrib)
    (planned,) = options.plan(model, Context()).tensors
    right = is_right(ir.DataType.UINT2, 32, ir.DataType.FLOAT, outputs)
    assert planned.storage == ("uint2" if right else "uint4")
    assert right or outputs % 4
    expected = array(model, "w")
    exact = block_scales(expected, Grid(2, False, 32), np.dtype(np.float32)).matrix()
    data = feeds(1, (5, 64))[0]
    found = open_session(quantized(model, options)).run_feeds(data)[0]
    assert relative(found, data["x"].astype(np.float64) @ exact) < 0.04


def test_no_opset_for_which_onnxruntime_lacks_a_kernel() -> None:
    """onnxruntime 1.31 has no RoiAlign of opset 22, so a model with one is not lifted to 25 for the sake of 2 bits."""
    model = weighted(
        "float[1,8,16,16] x, float[2,4] rois, int64[2] batch => float[2,8,2,40] y",
        "r = RoiAlign<output_height=2, output_width=64>(x, rois, batch) y = MatMul(r, w)",
        w=(64, 40),
    )
    assert can_be_lifted(product(), 25)
    (planned,) = Quantize(form="weights", weight_bits=2).plan(model, Context()).tensors
    assert planned.storage == ("uint2" if can_be_lifted(model, 25) else "uint4")
    open_session(quantized(model, Quantize(form="weights", weight_bits=2)))


def test_a_weight_that_is_read_along_both_axes(tmp_path: Path) -> None:
    model = weighted(
        "float[n,80] x => float[n,80] y", "a = Gemm(x, w) t = Tanh(a) y = Gemm<transB=1>(t, w)", w=(80, 48)
    )
    data = feeds(1, (5, 80))[0]
    for contrib in (False, True):
        result = quantized(model, Quantize(form="weights", contrib=contrib))
        assert fused(result, tmp_path) == {"MatMulNBits": 2, "Tanh": 1}
        expected = open_session(model, optimized=False).run_feeds(data)[0]
        assert relative(open_session(result).run_feeds(data)[0], expected) < 0.02


@pytest.mark.parametrize("bias", ["b", "", "row", "one"])
def test_gemm_loses_its_transpose_its_factors_and_the_shape_of_its_bias(tmp_path: Path, bias: str) -> None:
    shapes = {"b": (40,), "row": (1, 40), "one": (1,)}
    model = weighted(
        "float[n,96] x => float[n,40] y",
        f"y = Gemm<transB=1, alpha=-0.5, beta=2.0>(x, w{f', {bias}' if bias else ''})",
        w=(40, 96),
        **({bias: shapes[bias]} if bias else {}),
    )
    data = feeds(1, (5, 96))[0]
    expected = open_session(model, optimized=False).run_feeds(data)[0]
    for contrib in (False, True):
        result = quantized(model, Quantize(form="weights", contrib=contrib))
        assert fused(result, tmp_path) == {"MatMulNBits": 1}
        assert relative(open_session(result).run_feeds(data)[0], expected) < 0.015
    plain = quantized(model, Quantize(form="weights"))
    assert relative(stored_matrix(plain, "w"), -0.5 * array(model, "w").T) < 0.01
    assert relative(open_session(plain, optimized=False).run_feeds(data)[0], expected) < 0.01


def test_readers_of_one_weight_have_integers_of_their_own_that_share_memory(tmp_path: Path) -> None:
    model = weighted(
        "float[n,64] x => float[n,64] y", "a = MatMul(x, w) r = Relu(a) c = MatMul(r, w) y = Tanh(c)", w=(64, 64)
    )
    result = quantized(model, WEIGHTS)
    assert "w" not in result.graph.initializers
    own = [value for value in result.graph.initializers.values() if (value.name or "").startswith("w.quantized")]
    assert len(own) == 2
    assert own[0].const_value is own[1].const_value
    MergeInitializers().run(result, Context())
    assert fused(result, tmp_path)["MatMulNBits"] == 2
    assert not {"MatMul", "DequantizeLinear"} & set(fused(result, tmp_path))


@pytest.mark.parametrize("clamp", ["Relu(c)", "Clip(c, lo, hi)", "Clip(c, lo)", "Clip(c)"])
@pytest.mark.parametrize("product", ["c = Gemm(x, w, b)", "c = Gemm(x, w)", "a = MatMul(x, w) c = Add(a, b)"])
def test_a_clamp_behind_a_product_does_not_keep_it_from_being_fused(tmp_path: Path, product: str, clamp: str) -> None:
    """onnxruntime 1.31 leaves a DequantizeLinear and a float product where Relu or Clip follows, and then a reader."""
    constants = "lo = Constant<value_float=-0.5>() hi = Constant<value_float=0.25>()"
    model = canonical_constants(
        weighted(
            "float[n,64] x => float[n,48] y",
            f"{constants} {product} r = {clamp} y = MatMul(r, v)",
            w=(64, 64),
            b=(64,),
            v=(64, 48),
        )
    )
    result = quantized(model, Quantize(form="weights"))
    operators = fused(result, tmp_path)
    assert operators["MatMulNBits"] == 2
    assert not {"MatMul", "Gemm", "FusedGemm", "DequantizeLinear"} & set(operators)
    data = feeds(1, (5, 64))[0]
    expected = open_session(model, optimized=False).run_feeds(data)[0]
    assert relative(open_session(result, optimized=False).run_feeds(data)[0], expected) < 0.02


TIED = weighted(
    "int64[b,n] i => float[b,n,100] y",
    """e = Gather(t, i) h = LayerNormalization<axis=-1>(e, g) a = MatMul(h, w) r = Relu(a)
       o = Transpose<perm=[1,0]>(t) y = MatMul(r, o)""",
    t=(100, 64), g=(64,), w=(64, 64),
)  # fmt: skip
IDS = {"i": np.random.default_rng(0).integers(0, 100, (2, 7))}


@pytest.mark.parametrize("contrib", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (2, False), (8, True), (8, False)])
def test_a_table_that_is_also_the_last_product(tmp_path: Path, bits: int, symmetric: bool, contrib: bool) -> None:
    options = Quantize(form="weights", weight_bits=bits, symmetric=symmetric, contrib=contrib)
    assert forms(TIED, options) == ["table", "weights", "weights"]
    assert len(options.plan(TIED, Context()).tensors) == 2
    result = quantized(TIED, options)
    operators = fused(result, tmp_path)
    assert operators["MatMulNBits"] == 2
    assert not {"MatMul", "Transpose"} & set(operators)
    assert "t" not in result.graph.initializers
    assert not [v for v in result.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and v.shape == [100, 64]]
    table = next(node for node in result.graph if node.op_type in ("Gather", "GatherBlockQuantized"))
    assert table.inputs[0].const_value.nbytes == 100 * 64 * bits // 8
    found = open_session(result).run_feeds(IDS)[0]
    limit = {2: 0.9, 4: 0.25, 8: 0.03}[bits]
    assert relative(found, open_session(TIED, optimized=False).run_feeds(IDS)[0]) < limit


@pytest.mark.parametrize("width", [64, 66, 63])
@pytest.mark.parametrize("block", [0, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_a_table_are_those_of_its_integers(width: int, block: int, symmetric: bool) -> None:
    model = weighted(f"int64[b,n] i => float[b,n,{width}] y", "e = Gather(t, i) y = Neg(e)", t=(100, width))
    grid = Grid(4, symmetric, block)
    expected = -block_scales(array(model, "t").T, grid, np.dtype(np.float32)).matrix().T[IDS["i"]]
    options = Quantize(form="weights", weight_bits=4, block_size=block, symmetric=symmetric)
    (planned,) = options.plan(model, Context()).tensors
    assert planned.storage.endswith("8" if width == 63 else "4")  # 63 numbers of 4 bits fill no bytes
    for optimized in (False, True):
        found = open_session(quantized(model, options), optimized=optimized).run_feeds(IDS)[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    floats = quantized(quantized(model, options), Dequantize())
    assert [node.op_type for node in floats.graph] == ["Gather", "Neg"]
    np.testing.assert_allclose(open_session(floats).run_feeds(IDS)[0], expected, rtol=0, atol=1e-6)


def test_one_row_of_one_block_stays_float() -> None:
    model = weighted("int64 ids => float[32] y", "y = Gather(e, ids)", e=(200, 32))
    for options in (WEIGHTS, replace(WEIGHTS, block_size=16), replace(WEIGHTS, contrib=True)):
        result = quantized(model, options)
        assert ("e" in result.graph.initializers) == (options == WEIGHTS)
        found, expected = (open_session(one).run_feeds({"ids": np.array(3)})[0] for one in (result, model))
        assert np.abs(found - expected).max() < 0.3


def test_a_table_before_a_product_is_declined_since_onnxruntime_would_misread_it() -> None:
    model = weighted(
        "int64[b,n] i => float[b,n,40] y",
        "e = Gather(t, i) s = Unsqueeze(e, k) q = Squeeze(s, k) y = MatMul(q, w)",
        t=(100, 64), w=(64, 40), k=(1,),
    )  # fmt: skip
    axis = model.graph.initializers["k"]
    axis.const_value, axis.dtype = ir.tensor(np.array([0]), name="k"), ir.DataType.INT64
    assert "contrib=True" in reasons(model)["Gather"]
    for options in (WEIGHTS, Quantize(form="weights", weight_bits=2), replace(WEIGHTS, contrib=True)):
        result = quantized(model, options)
        expected = open_session(model, optimized=False).run_feeds(IDS)[0]
        assert relative(open_session(result).run_feeds(IDS)[0], expected) < (0.2 if options.weight_bits == 4 else 0.7)
    assert forms(model, replace(WEIGHTS, contrib=True)) == ["table", "weights"]


def test_what_is_quantized_already_is_not_touched() -> None:
    model = weighted(
        "float[n,64] x => float[n,40] y", "a = MatMul(x, w) t = Tanh(a) y = MatMul(t, v)", w=(64, 64), v=(64, 40)
    )
    once = quantized(model, WEIGHTS)
    assert ir.to_proto(quantized(once, WEIGHTS)) == ir.to_proto(once)
    static = weighted(
        "float[n,64] x => float[n,40] y",
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) r = Unsqueeze(d, k) y = MatMul(r, w)",
        w=(64, 40), s=(1,), z=(1,), k=(1,),
    )  # fmt: skip
    for name, stored in (("s", np.float32(0.1)), ("z", np.uint8(128)), ("k", np.zeros(1, np.int64))):
        value = static.graph.initializers[name]
        value.const_value = ir.tensor(np.asarray(stored), name=name)
        value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
    assert "quantized already" in reasons(static)["MatMul"]


def test_float16_models(tmp_path: Path) -> None:
    half = product()
    for value in (*half.graph.inputs, *half.graph.outputs, *(o for node in half.graph for o in node.outputs)):
        value.dtype = ir.DataType.FLOAT16
    weight = half.graph.initializers["w"]
    weight.const_value, weight.dtype = ir.tensor(array(half, "w").astype(np.float16), name="w"), ir.DataType.FLOAT16
    data = {"x": np.random.default_rng(0).standard_normal((2, 3, 96)).astype(np.float16)}
    expected = open_session(half).run_feeds(data)[0].astype(np.float64)
    for contrib in (False, True):
        result = quantized(half, replace(WEIGHTS, contrib=contrib))
        assert fused(result, tmp_path)["MatMulNBits"] == 1
        assert result.graph.initializers["w.scale"].dtype == ir.DataType.FLOAT16
        assert relative(open_session(result).run_feeds(data)[0], expected) < 0.13


def test_what_stays_float_says_why() -> None:
    model = weighted(
        "float[2,32,4,4] x => float[2,32,4,8] y",
        """c = Conv(x, k) m = MatMul(l, c) d = MatMul(m, w3) e = MatMul(d, s) f = MatMul(e, n) h = MatMul(f, u)
           t = Add(u, h) y = MatMul(t, v)""",
        k=(32, 32, 1, 1), l=(4, 4), w3=(2, 32, 4, 4), s=(4, 1), n=(1, 4), u=(4, 4), v=(4, 8),
    )  # fmt: skip
    found = {one.node: one.reason for one in WEIGHTS.plan(model, Context()).operators}
    assert "dequantized in every run" in found["n0"]
    assert "left operand" in found["n1"]
    assert "4 axes" in found["n2"]
    assert "no smaller as integers" in found["n4"]
    assert "read by Add 'n6' in float too" in found["n5"]
    assert found["n3"] == found["n7"] == ""
    before = ir.to_proto(model).SerializeToString()
    WEIGHTS.plan(model, Context())
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_stay(bad: float) -> None:
    model = product()
    weight = array(model, "w").copy()
    weight[3, 5] = bad
    set_weight(model, "w", weight)
    assert reasons(model) == {"MatMul": "its weight holds NaN or infinity"}
    context = Context()
    WEIGHTS.run(model, context)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert any("no operator has a weight" in str(remark) for remark in context.remarks)


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_other_floats_stay(dtype: type) -> None:
    model = product()
    weight = model.graph.initializers["w"]
    weight.const_value = ir.Tensor(array(model, "w").astype(dtype), name="w")
    assert "onnxruntime dequantizes to float32 and float16" in reasons(model)["MatMul"]


def test_weights_in_subgraphs_stay() -> None:
    model = weighted(
        "float[n,64] x, bool c => float[n,64] y",
        """y = If (c) <then_branch = inner () => (float[n,64] a) { a = MatMul (x, w) },
                      else_branch = other () => (float[n,64] b) { b = Identity (x) }>""",
        w=(64, 64),
    )
    assert reasons(model) == {"MatMul": "it stands in a subgraph (If, Loop, Scan)"}
    assert quantized(model, WEIGHTS).graph.initializers["w"].dtype == ir.DataType.FLOAT


def test_excluded_readers_keep_a_shared_weight_whole() -> None:
    model = weighted("float[n,64] x => float[n,64] y", "a = MatMul(x, w) y = MatMul(a, w)", w=(64, 64))
    plan = replace(WEIGHTS, exclude=("n1",)).plan(model, Context())
    assert [one.reason for one in plan.operators] == ["its weight is read by 'n1' in float too", "excluded by 'n1'"]
    assert plan.tensors == ()
    assert reasons(TIED, replace(WEIGHTS, exclude=("t",)))["Gather"] == "excluded by 't'"


def test_plan_round_trips_replays_and_prints() -> None:
    options = Quantize(form="weights", weight_bits=3, symmetric=True)
    plan = options.plan(TIED, Context())
    again = QuantizePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert "int3 symmetric in int4  1 in blocks of 32" in str(plan)
    first, second = quantized(TIED, options), TIED.clone()
    Quantize().apply(second, again)
    assert ir.to_proto(first) == ir.to_proto(second)
    with pytest.raises(GraphoptError, match="another model"):
        Quantize().apply(product(), plan)
    old = [{key: entry[key] for key in entry if key not in ("block_size", "storage", "rounding")}
           for entry in plan.to_json()["tensors"]]  # fmt: skip
    assert QuantizePlan.from_json({"tensors": old, "operators": []}).tensors[0].block_size == 0


@pytest.mark.parametrize("contrib", [False, True])
@pytest.mark.parametrize(("block", "transposed"), [(32, 0), (32, 1), (0, 0), (0, 1)])
def test_scales_that_a_plan_lists_are_used(block: int, transposed: int, contrib: bool) -> None:
    """Those that training has learned, in the order of the stored weight."""
    shape = (40, 70) if transposed else (70, 40)
    model = weighted("float[n,70] x => float[n,40] y", f"y = Gemm<transB={transposed}, alpha=0.5>(x, w)", w=shape)
    options = Quantize(form="weights", weight_bits=4, block_size=block, contrib=contrib and bool(block))
    plan = options.plan(model, Context())
    (planned,) = plan.tensors
    grid = [-(-size // block) if block and axis == planned.axis else size for axis, size in enumerate(shape)]
    grid = grid if block else [40]
    generator = np.random.default_rng(0)
    scale = generator.uniform(0.02, 0.05, grid).astype(np.float32)
    zero = generator.integers(5, 10, grid)
    learned = replace(planned, scale=tuple(map(float, scale.ravel())), zero_point=tuple(map(int, zero.ravel())))
    result = model.clone()
    options.apply(result, replace(plan, tensors=(learned,)))
    steps, offsets = learned.expanded(shape)
    meant = (np.clip(np.rint(array(model, "w") / steps) + offsets, 0, 15) - offsets) * steps
    data = feeds(1, (5, 70))[0]
    expected = 0.5 * data["x"].astype(np.float64) @ (meant.T if transposed else meant)
    found = open_session(result, optimized=False).run_feeds(data)[0]
    assert relative(found, expected) < (0.02 if options.contrib else 1e-6)
    short = replace(learned, scale=learned.scale[:-1], zero_point=learned.zero_point[:-1])
    with pytest.raises(GraphoptError, match="scales for"):
        options.apply(model.clone(), replace(plan, tensors=(short,)))


def test_training_says_that_it_has_no_blocks_and_takes_one_scale_an_output() -> None:
    from graphopt.train.fake_quant import FakeQuant

    with pytest.raises(GraphoptError, match="blocks of 32"):
        FakeQuant(WEIGHTS.plan(product(), Context()).tensors)
    tensors = replace(WEIGHTS, block_size=0, symmetric=True).plan(product(), Context()).tensors
    lifted = graphopt.lift(product())
    lifted.attach("quantizers", FakeQuant(tensors))
    (learned,) = lifted.insertions.quantizers.plan()
    assert (learned.storage, len(learned.scale), learned.limits) == ("int4", 40, (-8, 7))


def test_a_plan_may_mix_weights_alone_with_other_forms(tmp_path: Path) -> None:
    model = weighted(
        "float[n,64] x => float[n,64] y", "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", w=(64, 64), v=(64, 64)
    )
    alone, dynamic = WEIGHTS.plan(model, Context()), Quantize(form="dynamic").plan(model, Context())
    mixed = QuantizePlan(
        (alone.tensors[0], *(one for one in dynamic.tensors if one.name == "v")),
        (alone.operators[0], dynamic.operators[1]),
    )
    result = model.clone()
    Quantize().apply(result, mixed)
    operators = fused(result, tmp_path)
    assert operators["MatMulNBits"] == operators["DynamicQuantizeMatMul"] == 1
    data = feeds(1, (5, 64))[0]
    assert relative(open_session(result).run_feeds(data)[0], open_session(model).run_feeds(data)[0]) < 0.15


def test_old_opsets_are_lifted_or_refused_and_contrib_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = product()
    model.opset_imports[""] = 18
    data = {"x": np.random.default_rng(0).standard_normal((2, 3, 96)).astype(np.float32)}
    expected = open_session(model, optimized=False).run_feeds(data)[0]
    for bits, opset in ((4, 21), (8, 21), (2, 25)):
        result = quantized(model, Quantize(form="weights", weight_bits=bits))
        assert result.opset_imports[""] == opset
        open_session(result)
    assert quantized(model, Quantize(form="weights", block_size=0)).opset_imports[""] == 18
    monkeypatch.setattr(quantize_weights, "can_be_lifted", lambda model, opset: False)
    assert "opset 18 has no DequantizeLinear in blocks" in reasons(model)["MatMul"]
    contrib = quantized(model, replace(WEIGHTS, contrib=True))
    assert contrib.opset_imports[""] == 18
    assert relative(open_session(contrib).run_feeds(data)[0], expected) < 0.13
    newer = product()  # as where onnxruntime lacks a kernel of the newer opset
    (planned,) = Quantize(form="weights", weight_bits=2).plan(newer, Context()).tensors
    assert planned.storage == "uint4"  # opset 21 has no 2 bits


def test_remarks_say_storage_simulation_and_the_error_of_each_accuracy_level() -> None:
    context = Context()
    quantized(product(), Quantize(form="weights", weight_bits=6, block_size=64), context)
    notes = " ".join(map(str, context.remarks))
    assert "1 weights as uint8, blocks of 64, zero points" in notes
    assert "6 bits are simulated: they are stored as uint8" in notes
    assert "session.qdq_matmulnbits_accuracy_level" in notes
    for bits, storage in ((4, ir.DataType.UINT4), (8, ir.DataType.INT8)):
        errors = level_errors(storage, 32, bits)
        assert errors[0] < 1e-6
        assert errors[1] < 1e-6
        assert 1e-3 < errors[4] < 2e-2


def test_accuracy_level_of_contrib_operators(tmp_path: Path) -> None:
    data = {"x": np.random.default_rng(0).standard_normal((2, 3, 96)).astype(np.float32)}
    found = {}
    for level in (0, 4):
        result = quantized(product(), replace(WEIGHTS, contrib=True, accuracy_level=level))
        assert packed_attributes(result, tmp_path)[0]["accuracy_level"] == level
        found[level] = open_session(result).run_feeds(data)[0]
    expected = data["x"].astype(np.float64) @ stored_matrix(quantized(product(), WEIGHTS), "w")
    assert relative(found[0], expected) < 1e-6 < relative(found[4], expected) < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 48},
        {"block_size": -1},
        {"rounding": "up"},
        {"contrib": True, "block_size": 0},
        {"accuracy_level": 3},
        {"weight_bits": 1},
        {"weight_bits": 9},
        {"form": "weight"},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(GraphoptError):
        Quantize(**{"form": "weights", **options})


# Streaming --------------------------------------------------------------------------------------------------------


def test_weights_are_read_one_at_a_time_and_the_file_is_written_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight weights of 4 MB in a file: what is allocated stays near one weight and the result."""
    monkeypatch.setattr(quantize_blocks, "_CHUNK", 2**15)
    names = [f"w{number}" for number in range(8)]
    body = " ".join(f"v{n + 1} = MatMul(v{n}, w{n})" for n in range(8))
    model = weighted("float[n,1024] x => float[n,1024] y", f"v0 = Identity(x) {body} y = Identity(v8)",
                     **dict.fromkeys(names, (1024, 1024)))  # fmt: skip
    ir.save(model, tmp_path / "large.onnx", external_data="large.data")
    quantized(product(), WEIGHTS)  # what is measured and cached on first use
    del model
    tracemalloc.start()
    model = graphopt.load(tmp_path / "large.onnx")
    WEIGHTS.run(model, Context())
    graphopt.save(model, tmp_path / "small.onnx")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest, written = 4 * 2**20, (tmp_path / "small.onnx").stat().st_size
    assert written < 8 * largest / 6
    assert peak < 1.5 * largest + written
    assert fused(graphopt.load(tmp_path / "small.onnx"), tmp_path) == {"MatMulNBits": 8}


def test_recipe(tmp_path: Path) -> None:
    model = weighted("float[n,256] x => float[n,256] y", "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)",
                     w=(256, 256), v=(256, 256))  # fmt: skip
    for single in graphopt.recipe.preset("int4-weights").passes:
        single.run(model, Context())
    assert fused(model, tmp_path) == {"MatMulNBits": 2, "Max": 1}


@pytest.mark.parametrize("bits", [4, 8])
def test_what_has_integer_weights_already_is_left_alone(bits: int) -> None:
    model = weighted(
        "int64[n,3] t => float[n,3,40] y", "e = Gather(table, t) y = MatMul(e, w)", table=(300, 64), w=(64, 40)
    )
    once = quantized(canonical_constants(model), replace(WEIGHTS, weight_bits=bits))
    before = [node.op_type for node in once.graph]
    assert "DequantizeLinear" in before
    context = Context()
    replace(WEIGHTS, weight_bits=bits).run(once, context)
    assert [node.op_type for node in once.graph] == before
