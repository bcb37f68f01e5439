from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.ir.channels import channel_groups
from graphopt.ir.linear import linear_at
from graphopt.ir.linear_rows import apply_rows, linear_rows
from graphopt.ir.origin import Origin, origin_of, set_origin
from graphopt.ir.quantized_linear import QuantizedLinear, linear_view_at, quantized_linear_at
from graphopt.ir.removal import remove_channels
from graphopt.ir.rewrite import DeclinedError, Rewriter
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context
from graphopt.passes.quantize import Quantize
from graphopt.passes.reconstruct_rounding import (
    beyond_clamp,
    prior_weight,
)
from graphopt.passes.reconstruct_sweep import Effort, Sweep
from graphopt.recipe import preset
from tests.passes.quantized_nets import HEAD, RESIDUAL, canonical_constants, feeds, fused, weighted
from tests.zoo.models import QUICK, zoo_feeds, zoo_model

Batches = list[dict[str, np.ndarray]]


def rewritten(model: ir.Model, batches: Batches) -> tuple[Sweep, Context]:
    """Runs one sweep over `model`, whose origin is known."""
    origin, context = origin_of(model), Context()
    assert origin is not None
    sweep = Sweep(model, origin, batches, Effort(), context)
    sweep.run()
    return sweep, context


def outputs(model: ir.Model, batches: Batches) -> list[np.ndarray]:
    session = open_session(model, optimized=False)
    return [array for one in batches for array in session.run_feeds(one) if array.dtype.kind == "f"]


def distance(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Root mean square of the difference, relative."""
    missed = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(found, wanted, strict=True))
    return (missed / sum(float(np.square(b.astype(np.float64)).sum()) for b in wanted)) ** 0.5


def quantized_views(model: ir.Model) -> list[QuantizedLinear]:
    views = [quantized_linear_at(node) for node in model.graph]
    return [view for view in views if view is not None]


def interface(model: ir.Model) -> list[tuple[str | None, object, object]]:
    return [(value.name, value.dtype, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]


# Reading and writing ----------------------------------------------------------------------------------------


VIEWS = {
    "conv": """g (float[1,4,5,5] x) => (float[1,6,3,3] y)
        <int8[6,2,3,3] q, float[6] s, int8[6] z, int32[6] bq, float[6] bs>
        { w = DequantizeLinear<axis=0>(q, s, z) b = DequantizeLinear<axis=0>(bq, bs) y = Conv<group=2>(x, w, b) }""",
    "conv without bias": """g (float[1,4,5,5] x) => (float[1,6,3,3] y) <int8[6,4,3,3] q, float s>
        { w = DequantizeLinear(q, s) y = Conv(x, w) }""",
    "unsigned with zero points": """g (float[1,4,5,5] x) => (float[1,6,3,3] y)
        <uint8[6,4,3,3] q, float[6] s, uint8[6] z, float[6] b>
        { w = DequantizeLinear<axis=-4>(q, s, z) y = Conv(x, w, b) }""",
    "transposed": """g (float[1,4,5,5] x) => (float[1,6,7,7] y) <int8[4,6,3,3] q, float[6] s, float[6] b>
        { w = DequantizeLinear<axis=1>(q, s) y = ConvTranspose(x, w, b) }""",
    "transposed groups": """g (float[1,4,5,5] x) => (float[1,6,7,7] y) <int8[4,3,3,3] q, float s, float[6] b>
        { w = DequantizeLinear(q, s) y = ConvTranspose<group=2>(x, w, b) }""",
    "gemm": """g (float[3,4] x) => (float[3,6] y) <int8[4,6] q, float[6] s, int32[6] bq, float[6] bs>
        { w = DequantizeLinear<axis=1>(q, s) b = DequantizeLinear<axis=0>(bq, bs) y = Gemm(x, w, b) }""",
    "gemm, transposed int4": """g (float[3,4] x) => (float[3,6] y) <int4[6,4] q, float[6] s, float[6] b>
        { w = DequantizeLinear<axis=0>(q, s) y = Gemm<transB=1>(x, w, b) }""",
    "matmul": """g (float[2,3,4] x) => (float[2,3,6] y) <int8[4,6] q, float[6] s, float[6] b>
        { w = DequantizeLinear<axis=1>(q, s) p = MatMul(x, w) y = Add(p, b) }""",
    "matmul from the left": """g (float[2,4,3] x) => (float[2,6,3] y) <int8[6,4] q, float[6] s>
        { w = DequantizeLinear<axis=0>(q, s) y = MatMul(w, x) }""",
    "data on integers": """g (float[3,4] x) => (float[3,6] y)
        <float xs = {0.05}, uint8 xz = {128}, int8[4,6] q, float[6] s>
        { xq = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xq, xs, xz)
          w = DequantizeLinear<axis=1>(q, s) y = Gemm(xd, w) }""",
}  # fmt: skip


def filled(text: str) -> ir.Model:
    """A model whose initializers are random numbers of their types."""
    declared, body = text.split("<", 1)[0], text.split("<", 1)[1]
    model = ir.from_onnx_text(f"{HEAD} {with_values(declared, body)}")
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.INT4:  # the text parser does not pack two of them into a byte
            numbers = np.random.default_rng(5).integers(-7, 8, tuple(int(size) for size in value.shape or ()))
            value.const_value = ir.Tensor(numbers.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4)
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def with_values(signature: str, rest: str) -> str:
    generator = np.random.default_rng(5)
    parameters, body = rest.split(">\n", 1) if ">\n" in rest else rest.split("> {", 1)
    body = body if body.lstrip().startswith("{") else "{" + body
    stated: list[str] = []
    for one in split_declarations(parameters):
        if "=" in one:
            stated.append(one)
            continue
        kind, name = one.split()
        shape = [int(size) for size in kind[kind.index("[") + 1 : -1].split(",")] if "[" in kind else []
        count = int(np.prod(shape, dtype=int))
        base = kind.split("[")[0]
        low, high = {"int8": (-31, 32), "uint8": (0, 200), "int4": (-7, 8), "int32": (-900, 900)}.get(base, (1, 9))
        numbers = generator.integers(low, high, count) * (0.01 if base == "float" else 1)
        stated.append(f"{kind} {name} = {{{', '.join(map(str, numbers.tolist()))}}}")
    return f"{signature} <{', '.join(stated)}> {body}"


def split_declarations(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += letter in "[{"
        depth -= letter in "]}"
        if letter == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def the_view(model: ir.Model) -> QuantizedLinear:
    (view,) = quantized_views(model)
    return view


def run(model: ir.Model) -> tuple[np.ndarray, np.ndarray]:
    shape = tuple(int(size) for size in model.graph.inputs[0].shape or ())
    data = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return data, open_session(model, optimized=False).run_feeds({"x": data})[0]


@pytest.mark.parametrize("name", VIEWS)
def test_the_view_says_what_the_operator_computes(name: str) -> None:
    model = filled(VIEWS[name])
    view, (data, result) = the_view(model), run(model)
    rows = linear_rows(view)
    if view.input_scale is not None:
        data = np.clip(np.rint(data / np.float32(0.05)), -128, 127) * np.float32(0.05)
    made = apply_rows(rows.patches(data).astype(np.float64), rows.weight(), view.bias())
    assert np.abs(made - rows.rows(result)).max() < 1e-4 * np.abs(result).max()
    assert (view.integers() * view.scales.reshape(-1, *[1] * (view.integers().ndim - 1)) == view.weight()).all()


@pytest.mark.parametrize("name", VIEWS)
def test_writing_what_was_read_changes_nothing(name: str) -> None:
    model = filled(VIEWS[name])
    types = {value.name: value.dtype for value in model.graph.initializers.values()}
    view, (_, before) = the_view(model), run(model)
    view.store(Rewriter(model), view.weight(), view.bias())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert np.abs(run(model)[1] - before).max() <= 1e-3 * np.abs(before).max()  # an int32 bias may get another unit
    again = the_view(model)
    assert (again.integers() == view.integers()).all()
    assert [a.tolist() for a in again.limits()] == [a.tolist() for a in view.limits()]
    assert {name: value.dtype for name, value in model.graph.initializers.items() if name in types} == types


@pytest.mark.parametrize("name", VIEWS)
def test_integers_scales_and_bias_are_written(name: str) -> None:
    model = filled(VIEWS[name])
    view = the_view(model)
    generator = np.random.default_rng(2)
    low, high = (limit.reshape(-1, *[1] * (view.integers().ndim - 1)) for limit in view.limits())
    integers = np.rint(np.clip(generator.normal(0.0, 20.0, view.integers().shape), low, high))
    scales = 0.5 + 0.25 * np.arange(6) if view.weights.scale.size > 1 else np.full(6, 0.5)
    bias = np.arange(6.0) - 2 if view.has_bias else np.zeros(6)
    result = view.store_integers(Rewriter(model), integers, scales, bias)
    assert result.name == "y"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    run(model)
    again = the_view(model)
    assert (again.integers() == integers).all()
    assert again.scales.tolist() == scales.tolist()
    assert np.abs(again.bias() - bias).max() < 0.05
    assert (again.input_scale is None) or again.biases is not None


def test_bits_are_told_from_the_largest_integer() -> None:
    assert the_view(filled(VIEWS["gemm"])).weights.limits() == (-31, 31)
    assert the_view(filled(VIEWS["conv"])).weights.limits() == (-32, 31)  # it has zero points
    view = the_view(filled(VIEWS["unsigned with zero points"]))
    assert view.weights.limits() == (0, 255)
    low, high = view.limits()
    assert (high - low == 255).all()
    assert the_view(filled(VIEWS["gemm, transposed int4"])).weights.limits() == (-7, 7)


def test_a_bias_has_the_unit_of_the_accumulator() -> None:
    model = filled(VIEWS["data on integers"])
    view = the_view(model)
    view.store(Rewriter(model), view.weight(), np.arange(6.0))
    biases = the_view(model).biases
    assert biases is not None
    assert np.allclose(biases.scale, view.scales * 0.05, rtol=1e-6)
    assert biases.tensor.dtype == ir.DataType.INT32


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<int8[4,6] q, float[4] s> { w = DequantizeLinear<axis=0>(q, s) y = Gemm(x, w) }", "along an input axis"),
        ("<int8[4,6] q, float[2,6] s> { w = DequantizeLinear<axis=0, block_size=2>(q, s) y = Gemm(x, w) }", "blocks"),
        ("<int8[4,6] q, float s> { w = DequantizeLinear(q, s) y = Gemm<alpha=2.0>(x, w) }", "alpha"),
        ("<int32[4,6] q, float s> { w = DequantizeLinear(q, s) y = Gemm(x, w) }", "int32"),
    ],
)
def test_other_forms_are_refused(text: str, why: str) -> None:
    model = filled(f"g (float[3,4] x) => (float[3,6] y) {text}")
    with pytest.raises(DeclinedError, match=why):
        quantized_linear_at(list(model.graph)[-1])


def test_a_bias_that_has_no_place_is_refused() -> None:
    model = filled(VIEWS["matmul from the left"])
    view = the_view(model)
    with pytest.raises(DeclinedError, match="no place for a bias"):
        view.store(Rewriter(model), view.weight(), np.ones(6))


def test_integers_beyond_the_type_are_refused() -> None:
    model = filled(VIEWS["gemm"])
    view = the_view(model)
    with pytest.raises(DeclinedError, match="does not fit"):
        view.store_integers(Rewriter(model), 1000 + view.integers(), view.scales, view.bias())


def test_floats_have_the_ordinary_view() -> None:
    (node,) = weighted("float[3,4] x => float[3,2] y", "y = MatMul(x, w)", w=(4, 2)).graph
    assert linear_view_at(node) == linear_at(node)
    assert quantized_linear_at(node) is None


# The sweep --------------------------------------------------------------------------------------------------


def images(count: int = 6) -> Batches:
    return feeds(count, (4, 3, 16, 16))


def residual(bits: int = 8) -> tuple[ir.Model, ir.Model]:
    """A float model and its quantized self."""
    model = canonical_constants(RESIDUAL)
    result = model.clone()
    Quantize(bits=bits).run(result, Context(calibration=images()))
    return model, result


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_quantized_graph_comes_nearer_to_the_float_one(bits: int, tmp_path: Path) -> None:
    model, result = residual(bits)
    wanted, before = outputs(model, images()), distance(outputs(result, images()), outputs(model, images()))
    names, kernels = interface(result), fused(result, tmp_path)
    most = {view.node.name: view.weights.limits()[1] for view in quantized_views(result)}
    sweep, context = rewritten(result, images())
    assert distance(outputs(result, images()), wanted) < (0.8 if bits < 8 else 1.0) * before
    assert len(sweep.solved) == 4
    assert not context.remarks
    assert interface(result) == names
    assert fused(result, tmp_path) == kernels
    for view in quantized_views(result):
        assert np.abs(view.weights.centred()).max() <= most[view.node.name]
        assert view.weights.tensor.dtype == ir.DataType.INT8
        assert view.biases is None or view.biases.tensor.dtype == ir.DataType.INT32
    onnx.checker.check_model(ir.to_proto(result), full_check=True)


def test_unseen_inputs_gain_too() -> None:
    model, result = residual(4)
    generator = np.random.default_rng(99)
    unseen = [{"x": generator.standard_normal((8, 3, 16, 16)).astype(np.float32)}]
    before = distance(outputs(result, unseen), outputs(model, unseen))
    rewritten(result, images())
    assert distance(outputs(result, unseen), outputs(model, unseen)) < before


def test_nothing_is_lost_where_bits_abound() -> None:
    """Weights of 16 bits, data as floats: what comes out is the float model."""
    model = weighted(
        "float[n,3,8,8] x => float[n,4,8,8] y",
        "a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, w1, b1)",
        w0=(6, 3, 3, 3), b0=(6,), w1=(4, 6, 3, 3), b1=(4,),
    )  # fmt: skip
    result = model.clone()
    set_origin(result, Origin(model))
    for node in list(result.graph):
        if node.op_type == "Conv":
            weight_on_integers(result, node, 16)
    batches = [{"x": np.random.default_rng(i).standard_normal((8, 3, 8, 8)).astype(np.float32)} for i in range(4)]
    sweep, _ = rewritten(result, batches)
    assert len(sweep.solved) == 2
    assert distance(outputs(result, batches), outputs(model, batches)) < 1e-3
    for view, node in zip(quantized_views(result), [n for n in model.graph if n.op_type == "Conv"], strict=True):
        linear = linear_at(node)
        assert linear is not None
        assert np.abs(view.weight() - linear.weight()).max() < 1e-3 * np.abs(linear.weight()).max()


def weight_on_integers(model: ir.Model, node: ir.Node, bits: int) -> None:
    """Put a DequantizeLinear of int16, one scale an output channel, in the place of a Conv's weight."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    scale = (np.abs(array).max(axis=(1, 2, 3)) / (2 ** (bits - 1) - 1)).astype(np.float32)
    integers = np.rint(array / scale[:, None, None, None]).astype(np.int16)
    rewriter = Rewriter(model)
    operands = [
        rewriter.initializer(model.graph, f"{weight.name}.{part}", ir.tensor(one))
        for part, one in (("quantized", integers), ("scale", scale))
    ]
    value = ir.Value(name=f"{weight.name}.float", type=ir.TensorType(ir.DataType.FLOAT), shape=weight.shape)
    model.graph.insert_before(
        node, ir.node("DequantizeLinear", operands, attributes={"axis": 0}, outputs=[value], name=f"{weight.name}.dq")
    )
    node.replace_input_with(1, value)
    del model.graph.initializers[weight.name or ""]


def test_pruned_and_quantized_at_once() -> None:
    model = zoo_model("resnet")
    batches = [zoo_feeds(model, scale=4, seed=seed) for seed in range(4)]
    groups = channel_groups(model)
    chosen = {group.name: list(range(0, group.units, 3)) for group in groups if group.prunable and group.units > 3}
    small = remove_channels(model, chosen, groups=groups)
    set_origin(small, Origin(model).without(groups, chosen))
    context = Context(calibration=batches)
    for step in preset("exact").passes:
        step.run(small, context)
    Quantize(bits=6).run(small, context)
    wanted = outputs(model, batches)
    before = distance(outputs(small, batches), wanted)
    sweep, _ = rewritten(small, batches)
    assert len(sweep.solved) > 5
    assert distance(outputs(small, batches), wanted) < 0.7 * before


def test_the_float_weight_is_the_prior_where_it_was_rounded_to_what_is_there() -> None:
    model, result = residual(6)
    origin = origin_of(result)
    assert origin is not None
    view = quantized_views(result)[1]
    found = prior_weight(view, origin, "c")
    assert np.abs(found - view.weight()).max() > 0
    assert (found == next(linear_at(n).weight() for n in model.graph if n.outputs[0].name == "c")).all()  # type: ignore[union-attr]
    view.store_integers(Rewriter(result), 31 - np.abs(view.integers()), view.scales, view.bias())
    changed = quantized_views(result)[1]
    assert (prior_weight(changed, origin, "c") == changed.weight()).all()
    assert (prior_weight(changed, origin, "nothing of that name") == changed.weight()).all()


def test_a_weight_with_two_readers_stays() -> None:
    model = weighted(
        "float[n,4,8,8] x => float[n,4,8,8] y",
        "a = Conv(x, w, b) r = Relu(a) y = Conv(r, w, b)",
        w=(4, 4, 1, 1),
        b=(4,),
    )
    batches = feeds(4, (2, 4, 8, 8))
    result = model.clone()
    Quantize().run(result, Context(calibration=batches))
    before = outputs(result, batches)
    sweep, context = rewritten(result, batches)
    assert not sweep.solved
    assert [remark.why for remark in context.remarks] == ["its weight is read by other operators too"] * 2
    assert all((a == b).all() for a, b in zip(outputs(result, batches), before, strict=True))


def test_a_matmul_without_a_place_for_a_bias_gets_none() -> None:
    model = weighted("float[n,6,16] x => float[n,6,8] y", "h = MatMul(x, w) y = MatMul(h, v)", w=(16, 12), v=(12, 8))
    batches = [{"x": 1.0 + np.random.default_rng(i).standard_normal((32, 6, 16)).astype(np.float32)} for i in range(4)]
    result = model.clone()
    Quantize(bits=4, form="static").run(result, Context(calibration=batches))
    operators = [node.op_type for node in result.graph]
    before = distance(outputs(result, batches), outputs(model, batches))
    sweep, _ = rewritten(result, batches)
    assert len(sweep.solved) == 2
    assert [node.op_type for node in result.graph] == operators
    assert distance(outputs(result, batches), outputs(model, batches)) < before


def test_dynamic_operators_are_named() -> None:
    model = weighted("float[n,16] x => float[n,8] y", "y = MatMul(x, w)", w=(16, 8))
    batches = [{"x": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)}]
    result = model.clone()
    Quantize(form="dynamic").run(result, Context(calibration=batches))
    _, context = rewritten(result, batches)
    assert [remark.kind for remark in context.remarks] == ["missed"]


def test_a_quantizer_that_clamps_ends_the_way() -> None:
    model = weighted(
        "float[n,4,8,8] x => float[n,4,8,8] y",
        "a = Conv(x, w0) r = Relu(a) c = Conv(r, w1) s = Relu(c) y = Add(r, s)",
        w0=(4, 4, 1, 1),
        w1=(4, 4, 1, 1),
    )
    result = model.clone()
    Quantize().run(result, Context(calibration=feeds(2, (2, 4, 8, 8))))
    of_float = {value.name: value for node in model.graph for value in node.outputs}
    convolution = next(node for node in result.graph if node.outputs[0].name == "c")
    quantizer = convolution.outputs[0].consumers()[0]
    (reader,) = quantizer.outputs[0].consumers()
    assert beyond_clamp(convolution.outputs[0], reader.outputs[0], of_float)
    assert beyond_clamp(convolution.outputs[0], reader.outputs[0], {})
    assert not beyond_clamp(convolution.outputs[0], convolution.outputs[0], of_float)


FAST = (
    "mobilenet-v3", "efficientnet", "densenet", "channel-shuffle", "swin", "prelu", "grouped-transpose",
    "two-outputs", "shared-thrice", "split-operators", "batch-concat", "if-captures", "vit", "wavenet",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in QUICK]
)
def test_the_zoo_comes_nearer_to_its_float_self(name: str) -> None:
    model = zoo_model(name)
    batches = [zoo_feeds(model, scale=2, seed=seed) for seed in range(4)]
    context = Context(calibration=batches)
    for step in preset("exact").passes:
        step.run(model, context)
    result = model.clone()
    Quantize(bits=4, form="static").run(result, context)
    if origin_of(result) is None:
        pytest.skip("has no integer form")
    wanted, names = outputs(model, batches), interface(result)
    before = distance(outputs(result, batches), wanted)
    sweep, _ = rewritten(result, batches)
    # one net of random weights whose standardized weights leave nothing to gain ends 5 % above
    assert distance(outputs(result, batches), wanted) <= 1.1 * before
    assert all(np.isfinite([one.before, one.after]).all() for one in sweep.solved)
    assert interface(result) == names
    onnx.checker.check_model(ir.to_proto(result), full_check=False)
