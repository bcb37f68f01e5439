from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import GraphoptError
from graphopt.ir.compare import compare_runs
from graphopt.ir.fingerprint import fingerprint
from graphopt.ir.session import open_session
from graphopt.passes import Context, ConvertFloat, Quantize, convert_float, convert_kernels
from graphopt.passes.convert_kernels import Ports, half_ports
from graphopt.passes.convert_places import Sides, choose_half
from graphopt.passes.convert_ranges import HalfType, unfit
from graphopt.recipe import preset
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
    fused,
    weighted,
)
from tests.zoo.models import zoo_feeds, zoo_model

NETS = {"residual": RESIDUAL, "mobile": MOBILE, "inception": INCEPTION, "unet": UNET, "gated": GATED}
HALF = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of one rounding."""


@pytest.fixture
def any_kernel(monkeypatch: pytest.MonkeyPatch) -> Context:
    """As on a machine without the provider: operators count by their definition. onnxruntime runs what comes out."""
    monkeypatch.setattr(convert_kernels, "has_kernels", lambda target: target == "cpu")
    monkeypatch.setattr(convert_float, "has_kernels", lambda target: target == "cpu")
    return Context(target="cuda")


def converted(model: ir.Model, context: Context | None = None, **options: object) -> ir.Model:
    result = model.clone()
    interface = [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
    before = ir.to_proto(model).SerializeToString()
    ConvertFloat(**options).run(result, context or Context())  # type: ignore[arg-type]
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    assert [(v.name, v.dtype, str(v.shape)) for v in (*result.graph.inputs, *result.graph.outputs)] == interface
    assert ir.to_proto(model).SerializeToString() == before, "the original changed with its clone"
    return result


def error(model: ir.Model, other: ir.Model, data: list[dict[str, np.ndarray]]) -> float:
    runs = [[open_session(m, optimized=m is other).run_feeds(one) for one in data] for m in (model, other)]
    return compare_runs([value.name or "" for value in model.graph.outputs], *runs).rms_error


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def in_half(model: ir.Model) -> set[str | None]:
    halves = set(HALF.values())
    return {value.name for node in model.graph for value in node.outputs if value.dtype in halves}


# Storage.


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", sorted(NETS.keys() - {"gated"}))
def test_stored_weights_are_cast_when_the_model_is_loaded(name: str, dtype: str, tmp_path: Path) -> None:
    model, data = canonical_constants(NETS[name]), feeds(2)
    result = converted(model, dtype=dtype)
    large = [value for value in model.graph.initializers.values() if value.const_value.size >= 256]
    assert operators(result)["Cast"] == len(large) > 0
    for value in large:
        assert result.graph.initializers[value.name].const_value.nbytes * 2 == value.const_value.nbytes
    assert 0 < error(model, result, data) < 2 * STEP[dtype]
    assert fused(result, tmp_path) == fused(model, tmp_path)


def test_stored_weights_are_the_nearest_numbers() -> None:
    model = canonical_constants(RESIDUAL)
    result = converted(model)
    weight = model.graph.initializers["w1"].const_value.numpy()
    np.testing.assert_array_equal(result.graph.initializers["w1"].const_value.numpy(), weight.astype(np.float16))


def test_a_mapped_file_stays_mapped(tmp_path: Path) -> None:
    """Weights are converted when they are written, one at a time, and not kept."""
    model = weighted("float[n,64] x => float[n,64] y", "h = MatMul(x, a) y = MatMul(h, b)", a=(64, 64), b=(64, 64))
    ir.save(model.clone(), tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=0)
    loaded = graphopt.load(tmp_path / "model.onnx")
    assert isinstance(loaded.graph.initializers["a"].const_value, ir.ExternalTensor)
    result = converted(loaded)
    for name in ("a", "b"):
        tensor = result.graph.initializers[name].const_value
        assert isinstance(tensor, ir.LazyTensor)
        assert not tensor.cache
    ir.save(result, tmp_path / "half.onnx", external_data="half.data", size_threshold_bytes=0)
    assert (tmp_path / "half.data").stat().st_size <= (tmp_path / "model.data").stat().st_size / 2 + 8192
    graphopt.save(result, tmp_path / "whole.onnx")
    data = feeds(1, (3, 64))
    for file in ("half.onnx", "whole.onnx"):
        assert 0 < error(model, graphopt.load(tmp_path / file), data) < 2 * STEP["float16"]


def test_what_half_precision_does_not_hold_stays() -> None:
    model = weighted("float[n,32] x => float[n,32] y", "h = MatMul(x, a) k = MatMul(h, b) y = MatMul(k, c)",
                     a=(32, 32), b=(32, 32), c=(32, 32))  # fmt: skip
    for name, factor in (("a", 1e6), ("b", 1e-7)):
        tensor = model.graph.initializers[name].const_value
        model.graph.initializers[name].const_value = ir.tensor(tensor.numpy() * np.float32(factor), name=name)
    context = Context()
    result = converted(model, context)
    assert [result.graph.initializers[name].dtype.name for name in "abc"] == ["FLOAT", "FLOAT", "FLOAT16"]
    reasons = {remark.where: remark.why for remark in context.remarks if remark.kind == "missed"}
    assert "float16 ends at 65504" in reasons["a"]
    assert "too small" in reasons["b"]
    assert {value.dtype.name for value in converted(model, dtype="bfloat16").graph.initializers.values()} == {
        "BFLOAT16"
    }


def test_scales_of_quantized_weights_are_left() -> None:
    model = canonical_constants(RESIDUAL)
    Quantize(search=False).run(model, Context(calibration=feeds(2)))
    assert not ConvertFloat().run(model, Context()).modified


@pytest.mark.torch
def test_a_loop_reads_a_stored_weight_through_its_cast() -> None:
    model = zoo_model("loop-captures")
    result = converted(model)
    data = [zoo_feeds(model)]
    assert error(model, result, data) < 2 * STEP["float16"]


# Computing.


@pytest.mark.parametrize("name", NETS)
def test_whole_networks_compute_in_half(name: str, any_kernel: Context) -> None:
    model, data = canonical_constants(NETS[name]), feeds(2)
    result = converted(model, any_kernel, form="compute")
    assert operators(result)["Cast"] == 2
    assert {node.outputs[0].dtype for node in result.graph if node.op_type != "Cast"} == {ir.DataType.FLOAT16}
    assert 0 < error(model, result, data) < 5e-3
    again = fingerprint(result)
    ConvertFloat(form="compute").run(result, Context(target="cuda"))
    assert fingerprint(result) == again


@pytest.mark.torch
@pytest.mark.parametrize("name", ["hf-bert", "llama", "recurrent", "if-captures", "scan-weights", "local-functions"])
def test_zoo_models_compute_in_half(name: str, any_kernel: Context) -> None:
    model = zoo_model(name)
    data = [zoo_feeds(model)]
    result = converted(model, any_kernel, form="compute")
    assert in_half(result)
    assert error(model, result, data) < 1e-2
    again = fingerprint(result)
    ConvertFloat(form="compute").run(result, Context(target="cuda"))
    assert fingerprint(result) == again


def test_on_the_cpu_auto_stores_and_says_why() -> None:
    context = Context()
    result = converted(canonical_constants(RESIDUAL), context)
    assert not in_half(result)
    assert any("compute in float32 only" in remark.why for remark in context.remarks)
    ports = half_ports(RESIDUAL.graph[0], {"": 21}, ir.DataType.FLOAT16, "cpu")
    assert ports == "CPUExecutionProvider has no float16 kernel for it", "then say so no longer"


def test_kernels_are_asked_for(tmp_path: Path) -> None:
    """What the kernel table says of small models is what onnxruntime runs without Casts around it."""
    model = ir.from_onnx_text(f"""{HEAD} g (float[n,8] x, float[8] s) => (float[n,8] y) {{
        a = LayerNormalization(x, s) b = Clip(a) c = Neg(b) y = Round(c) }}""")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    ports = [half_ports(node, {"": 21}, ir.DataType.FLOAT16, "cpu") for node in model.graph]
    half = ir.from_onnx_text(f"""{HEAD} g (float16[n,8] x, float16[8] s) => (float16[n,8] y) {{
        a = LayerNormalization(x, s) b = Clip(a) c = Neg(b) y = Round(c) }}""")
    path = tmp_path / "run.onnx"
    open_session(half, optimized_model_path=str(path))
    run = onnx.load(path).graph.node
    around_neg = [node.op_type for node in run]
    assert [isinstance(one, Ports) for one in ports] == [True, True, False, True]
    assert around_neg.count("Cast") == 2
    assert around_neg.index("Neg") == around_neg.index("Cast") + 1


def test_a_number_too_small_keeps_its_root_and_quotient_in_float32(any_kernel: Context) -> None:
    """d / sqrt(mean(d d) + 1e-12) of numbers around 1e-4, whose squares float16 does not hold."""
    model = weighted(
        "float[n,32] x => float[n,32] y",
        """h = MatMul(x, w) a = Constant<value_ints=[-1]>() e = Constant<value_float=1e-12>() q = Mul(h, h)
           m = ReduceMean(q, a) v = Add(m, e) r = Sqrt(v) d = Div(h, r) y = MatMul(d, u)""",
        w=(32, 32), u=(32, 32),
    )  # fmt: skip
    model = canonical_constants(model)
    data = [{"x": one["x"] * np.float32(1e-4)} for one in feeds(2, (3, 32))]
    any_kernel.calibration = data
    result = converted(model, any_kernel, form="compute")
    floats = {node.op_type for node in result.graph if node.outputs[0].dtype == ir.DataType.FLOAT} - {"Cast"}
    assert floats == {"Mul", "ReduceMean", "Add", "Sqrt", "Div"}
    assert error(model, result, data) < 5e-3
    assert any("1e-12, which is 0 in float16" in remark.why for remark in any_kernel.remarks)


def test_masks_are_cut_so_that_two_can_be_added(any_kernel: Context) -> None:
    lowest = float(np.finfo(np.float32).min)
    model = ir.from_onnx_text(f"""{HEAD} g (float[n,4,8] x, bool[n,1,4] m, bool[n,4,4] k, float[8,8] w) =>
        (float[n,4,8] y)
        <float low = {{{lowest!r}}}, float zero = {{0}}> {{
        q = MatMul(x, w) t = Transpose<perm=[0,2,1]>(x) s = MatMul(q, t) a = Where(m, zero, low) b = Where(k, zero, low)
        s1 = Add(s, a) s2 = Add(s1, b) p = Softmax(s2) y = MatMul(p, x) }}""")
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(np.eye(8, dtype=np.float32) * 3)
    model.graph.register_initializer(weight)
    model = graphopt.load(model)
    generator = np.random.default_rng(0)
    one = {"x": generator.standard_normal((2, 4, 8)).astype(np.float32), "m": np.zeros((2, 1, 4), bool),
           "k": generator.random((2, 4, 4)) < 0.5}  # fmt: skip
    one["m"][0] = True
    any_kernel.calibration = [one]
    result = converted(model, any_kernel, form="compute")
    assert not [node for node in result.graph if node.outputs[0].dtype == ir.DataType.FLOAT and node.op_type != "Cast"]
    found = open_session(result, optimized=False).run_feeds(one)[0]
    assert np.isfinite(found).all()
    expected = open_session(model, optimized=False).run_feeds(one)[0]
    assert np.abs(found[0] - expected[0]).max() < 1e-2, "the sample of which something is to be seen"
    assert any("it is a mask" in remark.why for remark in any_kernel.remarks)


def test_operators_whose_values_came_too_near_the_end_stay(any_kernel: Context) -> None:
    model = weighted("float[n,16] x => float[n,16] y", "h = MatMul(x, w) q = Mul(h, h) r = Sqrt(q) y = MatMul(r, u)",
                     w=(16, 16), u=(16, 16))  # fmt: skip
    data = [{"x": one["x"] * np.float32(200)} for one in feeds(2, (3, 16))]
    any_kernel.calibration = data
    result = converted(model, any_kernel, form="compute")
    floats = {node.op_type for node in result.graph if node.outputs[0].dtype == ir.DataType.FLOAT} - {"Cast"}
    assert floats == {"Mul", "Sqrt"}
    assert error(model, result, data) < 5e-3
    whys = [remark.why for remark in any_kernel.remarks if remark.kind == "missed"]
    assert any(why.startswith("it makes") for why in whys)
    assert any(why.startswith("it reads") for why in whys)


def test_operands_that_are_float32_by_definition_stay(any_kernel: Context) -> None:
    """Scales of Resize, a Cast from integers, a filled constant, and random numbers whose attribute says the type."""
    model = ir.from_onnx_text(
        f"""{HEAD} g (float[1,2,4,4] x, int64[1] i) => (float[1,2,8,8] y, int64[4] size)
        <float[4] scales = {{1, 1, 2, 2}}, int64[4] four = {{1, 2, 4, 4}}> {{
        a = Conv(x, w0) j = Cast<to=1>(i) b = Mul(a, j) f = ConstantOfShape<value=float[1]{{3}}>(four) c = Add(b, f)
        n = RandomNormal<shape=[1,2,4,4], scale=0.0001>() l = RandomNormalLike<dtype=1, scale=0.0001>(c)
        m = Add(c, l) d = Add(m, n) size = Shape(d) e = Conv(d, w0)
        r = Resize<mode="nearest">(e, , scales) y = Conv(r, w0) }}""".replace(
            "float[1,2,4,4] x,", "float[1,2,4,4] x, float[2,2,1,1] w0,"
        )
    )
    weight = next(value for value in model.graph.inputs if value.name == "w0")
    model.graph.inputs.remove(weight)
    weight.const_value = ir.tensor(np.ones((2, 2, 1, 1), np.float32))
    model.graph.register_initializer(weight)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    data = [{"x": feeds(1, (1, 2, 4, 4))[0]["x"], "i": np.array([3])}]
    any_kernel.calibration = data
    result = converted(model, any_kernel, form="compute")
    assert all(node.outputs[0].dtype in (ir.DataType.FLOAT16, ir.DataType.INT64)
               for node in result.graph if node.op_type not in ("Cast", "RandomNormal"))  # fmt: skip
    resize = next(node for node in result.graph if node.op_type == "Resize")
    assert resize.inputs[2].dtype == ir.DataType.FLOAT
    assert error(model, result, data) < 5e-3


def test_a_model_in_float16_already_is_left_alone(any_kernel: Context) -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (float16[n,8] x) => (float16[n,8] y) {{ a = Relu(x) y = Neg(a) }}""")
    for form in ("compute", "storage"):
        assert not ConvertFloat(form=form).run(model, any_kernel).modified


def test_bfloat16_needs_kernels_that_can_be_asked_for(any_kernel: Context) -> None:
    """onnxruntime puts no Casts around it, so a node without a kernel would not load."""
    model = canonical_constants(RESIDUAL)
    assert not ConvertFloat(dtype="bfloat16", form="compute").run(model, any_kernel).modified
    assert any("does not load" in remark.why for remark in any_kernel.remarks)
    cpu = Context()
    converted_model = converted(TRANSFORMER, cpu, dtype="bfloat16", form="compute")
    assert error(TRANSFORMER, converted_model, feeds(1, (2, 6, 32))) < 5e-2


@pytest.mark.parametrize("seed", range(12))
def test_the_cut_is_the_cheapest_of_all(seed: int) -> None:
    """Every choice of sides of a small graph is priced; the cut must be one of the cheapest."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(4, 9))
    lines, sizes = [], {f"d{index}": int(generator.integers(1000, 60000)) for index in range(count)}
    inputs = ", ".join(f"float[d{index}] x{index}" for index in range(count))
    names: list[str] = []
    for index in range(count):
        operands = [names[i] for i in generator.choice(len(names), min(2, len(names)), replace=False)] if names else []
        operands.append(f"x{index}")
        operator = "MatMul" if generator.random() < 0.3 else "Max"
        lines.append(f"v{index} = {operator}({', '.join(operands)})")
        names.append(f"v{index}")
    model = ir.from_onnx_text(f"{HEAD} g ({inputs}) => (float[d0] v{count - 1}) {{ {' '.join(lines)} }}")
    nodes = list(model.graph)
    sides = Sides()
    for index, node in enumerate(nodes):
        model.graph.inputs[index].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([f"d{index}"])
        sides.ports[node] = Ports(frozenset(range(len(node.inputs))), frozenset({0}))
        if generator.random() < 0.35:
            sides.kept[node] = "drawn"
    free = [node for node in nodes if node not in sides.kept]

    def price(half: set[ir.Node]) -> float:
        total = sum(0.5 * sizes[f"d{nodes.index(node)}"] + 1 for node in free if node not in half)
        for index, node in enumerate(nodes):
            value = node.outputs[0]
            readers = [use.node in half for use in value.uses()] + [False] * value.is_graph_output()
            if any(reader != (node in half) for reader in readers):
                total += sizes[f"d{index}"] + 4096
            total += (sizes[f"d{index}"] + 4096) * (node in half)  # its own input comes in float32
        return total

    must = {node for node in free if node.op_type == "MatMul"}
    others = [node for node in free if node not in must]
    prices = [price(must | set(chosen)) for size in range(len(others) + 1)
              for chosen in itertools.combinations(others, size)]  # fmt: skip
    found = choose_half(nodes, sides, sizes)
    assert must <= found <= set(free)
    assert price(found) == pytest.approx(min(prices), rel=1e-6)


def test_numbers_that_do_not_fit() -> None:
    half, brain = (HalfType.of(dtype) for dtype in HALF.values())
    assert unfit(np.array([65519.0], np.float32), half) is None
    assert unfit(np.array([65520.0], np.float32), half) is not None
    assert unfit(np.array([np.nan, np.inf, 1.0], np.float32), half) is None
    lowest = np.array([np.finfo(np.float32).min], np.float32)
    assert unfit(lowest, brain) is not None
    assert np.isfinite(brain.masked(lowest).astype(np.float32)).all()
    assert unfit(np.full(100, 1e-30, np.float32), brain) is None


@pytest.mark.parametrize("options", [{"dtype": "float8"}, {"form": "best"}, {"exclude": "w"}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(GraphoptError):
        ConvertFloat(**options)  # type: ignore[arg-type]


def test_the_recipe_halves_the_file() -> None:
    model = canonical_constants(INCEPTION)
    result = model.clone()
    for single in preset("fp16").passes:
        single.run(result, Context())
    sizes = [sum(v.const_value.nbytes for v in m.graph.initializers.values()) for m in (model, result)]
    assert sizes[1] < 0.7 * sizes[0]
    assert error(model, result, feeds(1)) < 2e-3


def test_no_cast_comes_between_a_transpose_and_its_product(any_kernel: Context) -> None:
    """onnxruntime 1.31.1 ends the process when it loads MatMul (Cast (Transpose (x, perm = [1, 0, 2])), w)."""
    model = weighted(
        "float[4,3,16] x => float[3,4,16] y",
        "a = MatMul(x, w) b = Relu(a) t = Transpose<perm=[1,0,2]>(b) c = MatMul(t, u) y = MatMul(c, v)",
        w=(16, 16), u=(16, 16), v=(16, 16),
    )  # fmt: skip
    result = converted(model, any_kernel, form="compute", exclude=("u",))
    transpose = next(node for node in result.graph if node.op_type == "Transpose")
    assert transpose.outputs[0].dtype == ir.DataType.FLOAT
    assert [user.op_type for user in transpose.outputs[0].consumers()] == ["MatMul"]
    assert {"a", "y"} <= {name.removesuffix("_float32") for name in in_half(result) if name}
    assert error(model, result, feeds(1, (4, 3, 16))) < 5e-3
