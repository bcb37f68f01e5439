"""Pass decompose: the plan, the chains, the refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.errors import DataError, GraphoptError, TargetMissedError
from graphopt.factorizations import factorization, layer_of
from graphopt.ir.check import check_structure
from graphopt.ir.cost import cost
from graphopt.ir.linear import linear_at
from graphopt.ir.origin import origin_of
from graphopt.ir.session import open_session
from graphopt.ir.text import print_graph
from graphopt.passes import Context, Decompose, FoldBatchnorm, FoldConstants, FoldReconstruction
from graphopt.passes import decompose_speed as speed_module
from graphopt.passes.decompose_plan import DecomposePlan
from graphopt.passes.decompose_speed import Speed
from graphopt.recipe import read_recipe
from tests.laws.channel_law import difference, run
from tests.passes.golden import docstring_blocks, parse
from tests.search.pruning_nets import conv_net, mlp, weighted
from tests.zoo.models import zoo_feeds, zoo_model

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
ROUNDING = 1e-5


def quick(**options: Any) -> Decompose:
    """Without a clock and without inputs, any rank."""
    return Decompose(**{"measure": False, "source": "none", "round_to": 1, **options})


def at_full_rank(model: ir.Model, node: str, form: str) -> ir.Model:
    """A copy with one layer as a chain that loses nothing."""
    (found,) = [one for one in model.graph if one.name == node]
    linear = linear_at(found)
    assert linear is not None
    plan = DecomposePlan.by_hand(model, {node: (form, factorization(form).full(layer_of(linear)))})
    changed = model.clone()
    Decompose(source="none").apply(changed, plan)
    check_structure(changed)
    return changed


# The law ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_chain_of_full_rank_is_the_convolution(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))
    form = data.draw(st.sampled_from(["channel-svd", "spatial-svd", "tucker", "cp", "svd"]))
    transposed = data.draw(st.booleans())
    group = data.draw(st.sampled_from([1, 1, 2, 4]))
    each = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    kernel = [1] * axes if form == "svd" else data.draw(each)
    strides, dilations = data.draw(each), [min(one, 2) for one in data.draw(each)]
    reach = [dilation * (size - 1) for dilation, size in zip(dilations, kernel, strict=True)]
    pads = [min(data.draw(st.integers(0, 2)), one) for one in (*reach, *reach)]
    outputs, inputs = 4 * data.draw(st.integers(1, 2)), 4
    padded = f"pads = {pads}"
    if not transposed and data.draw(st.integers(0, 4)) == 0:
        padded = f'auto_pad = "{data.draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))}"'
        dilations = [1] * axes  # all that onnxruntime takes beside auto_pad
    extra = ", output_padding = " + str([min(1, one - 1) for one in strides]) if transposed else ""
    shape = [inputs, outputs // group, *kernel] if transposed else [outputs, inputs // group, *kernel]
    text = f"""{HEAD} g (float[2,{inputs},{",".join(["9"] * axes)}] x, float{shape} w_a, float[{outputs}] w_b)
        => (float[{",".join("nmabc"[: axes + 2])}] y) {{
        y = {"ConvTranspose" if transposed else "Conv"} <group = {group}, strides = {strides},
            dilations = {dilations}, {padded}{extra}> (x, w_a, w_b) }}"""
    model = weighted(text)
    node = model.graph[0].name or ""
    linear = linear_at(model.graph[0])
    assert linear is not None
    if factorization(form).refusal(layer_of(linear)) is not None:
        return
    x = np.random.default_rng(0).standard_normal((2, inputs, *[9] * axes)).astype(np.float32)
    changed = at_full_rank(model, node, form)
    assert len(changed.graph) > 1
    assert difference(run(model, {"x": x}), run(changed, {"x": x})) < ROUNDING
    assert next(one.name for one in changed.graph) == f"{node}/factor_0"


@pytest.mark.parametrize(
    "body",
    [
        "y = Gemm <alpha = 0.5, beta = 2.0> (x, w_a, w_b)",
        "y = Gemm <transB = 1> (x, w_t, w_b)",
        "y = Gemm <transA = 1, transB = 1> (x, w_s)",
        "h = MatMul (x, w_a) y = Add (h, w_b)",
        "y = MatMul (x, w_a)",
        "y = MatMul (w_s, x)",
        "h = MatMul (w_s, x) y = Add (w_c, h)",
    ],
)
@pytest.mark.parametrize("source", ["none", "calibration"])
def test_products_of_every_layout(body: str, source: str) -> None:
    text = f"""{HEAD} g (float[6,6] x, float[6,9] w_a, float[9,6] w_t, float[9] w_b, float[9,6] w_s, float[9,1] w_c)
        => (float[a,b] y) {{ {body} }}"""
    model = weighted(text)
    x = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32) + 1
    changed = at_full_rank(model, model.graph[0].name or "", "svd")
    assert difference(run(model, {"x": x}), run(changed, {"x": x})) < ROUNDING
    single, context = quick(source=source, energy=0.6), Context(calibration=[{"x": x}])
    plan = single.plan(model, context)
    low = model.clone()
    single.apply(low, plan, context)
    check_structure(low)
    masked = single.masked(model, plan, context)
    assert difference(run(masked, {"x": x}), run(low, {"x": x})) < ROUNDING
    if source == "calibration":  # the bias has taken up the mean
        axis = 1 if "MatMul (w_s" in body else 0
        before, after = (run(one, {"x": x})[0].mean(axis=axis) for one in (model, low))
        np.testing.assert_allclose(before, after, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    ["mobilenet-v2", "unet", "hf-bert", *(pytest.param(one, marks=pytest.mark.slow) for one in ("resnet", "vit"))],
)
def test_zoo_models_compute_what_the_dense_reference_computes(name: str) -> None:
    model, context = zoo_model(name), Context(threads=1)
    FoldConstants()(model)
    single = quick(energy=0.8, source="probes", samples=4, form=("svd", "channel-svd", "spatial-svd", "tucker"))
    plan = single.plan(model, context)
    assert plan.layers
    changed = model.clone()
    single.apply(changed, plan, context)
    check_structure(changed)
    feeds = zoo_feeds(model)
    assert difference(run(single.masked(model, plan, context), feeds), run(changed, feeds)) < 1e-3
    sizes = {"batch": 1, "batch_size": 1}
    assert plan.after.params == cost(changed, sizes).parameters
    again = changed.clone()
    before = print_graph(again)
    quick(energy=1.0).apply(again, DecomposePlan.by_hand(again, {}))
    assert print_graph(again) == before


# Text ---------------------------------------------------------------------------------------------------------


def test_docstring_example_is_true() -> None:
    before, after = docstring_blocks(Decompose)
    model = parse(before)
    Decompose(source="none", form="spatial-svd").apply(
        model, DecomposePlan.by_hand(model, {model.graph[0].name or "": ("spatial-svd", 2)})
    )
    expected = parse(after, inputs={"x"})
    renamed = {"w_a.factor_0": "w_a_0", "w_a.factor_1": "w_a_1"}
    text = print_graph(model)
    for old, new in renamed.items():
        text = text.replace(old, new)
    assert text == print_graph(expected)


def test_a_weight_of_rank_one_is_found_and_exact_and_a_second_run_finds_nothing() -> None:
    weight = np.outer(np.arange(1, 9), np.arange(1, 7)).astype(np.float32).reshape(8, 6)
    model = weighted(f"{HEAD} g (float[n,6] x, float[6,8] w) => (float[n,8] y) {{ h = MatMul (x, w) y = Relu (h) }}")
    model.graph.initializers["w"].const_value = ir.Tensor(weight.T.copy(), name="w")
    for ranks in ({"energy": 0.999}, {"error": 1e-3}, {"ranks": "evbmf"}):
        single, changed = quick(**ranks), model.clone()
        plan = single.plan(model)
        assert [(layer.form, layer.rank) for layer in plan.layers] == [("svd", (1,))]
        assert plan.layers[0].error < 1e-9
        assert plan.layers[0].macs == (48, 14)
        single.apply(changed, plan)
        x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
        assert difference(run(model, {"x": x}), run(changed, {"x": x})) < ROUNDING
        before = print_graph(changed)
        with pytest.raises(GraphoptError, match="one group has one input or output"):
            single.plan(changed)
        assert print_graph(changed) == before


# Selection ----------------------------------------------------------------------------------------------------


def test_a_share_of_the_work_is_met_and_counted() -> None:
    model, forms = conv_net((3, 32, 32, 16)), ("channel-svd", "spatial-svd")
    for kind in ("macs", "params", "bytes"):
        single = quick(form=forms, **{kind: 0.5})
        plan = single.plan(model)
        changed = model.clone()
        single.apply(changed, plan)
        counted = cost(changed, {"n": 1})
        assert (plan.after.macs, plan.after.params, plan.after.bytes) == (
            counted.macs,
            counted.parameters,
            counted.weight_bytes,
        )
        assert 0.45 <= plan.after.get(kind) / plan.before.get(kind) <= 0.5
    plans = [quick(macs=share, form=forms).plan(model) for share in (0.9, 0.7, 0.5, 0.3)]
    errors = [sum(layer.error for layer in plan.layers) for plan in plans]
    assert errors == sorted(errors)
    with pytest.raises(TargetMissedError, match=r"0.001 of the macs[^$]*help: ask for less"):
        quick(macs=0.001, form=forms).plan(model)


def test_inputs_decide_what_is_kept() -> None:
    """An input that is never there costs nothing: the metric sees it, the plain weight does not."""
    model = mlp((8, 8), scales=[1.0])
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    x[:, 3:] *= 1e-3
    context = Context(calibration=[{"x": x}])
    found = {}
    for source in ("none", "calibration"):
        single, changed = quick(source=source, form="svd"), model.clone()
        plan = DecomposePlan.by_hand(model, {model.graph[0].name or "": ("svd", 3)})
        single.apply(changed, plan, context)
        found[source] = difference(run(model, {"x": x}), run(changed, {"x": x}))
    assert found["calibration"] < 0.01 < 0.1 < found["none"]


def test_normalisation_behind_weighs_the_outputs_and_folds() -> None:
    text = f"""{HEAD} g (float[n,8,6,6] x, float[16,8,3,3] w, float[16] gamma, float[16] beta, float[16] mean,
        float[16] var) => (float[n,16,4,4] y) {{ c = Conv (x, w) b = BatchNormalization (c, gamma, beta, mean, var)
        y = Relu (b) }}"""
    model = weighted(text)
    for name in ("var", "gamma"):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(np.geomspace(0.01, 1, 16).astype(np.float32), name=name)
    single, context = quick(energy=0.8, source="probes", samples=16), Context()
    plan = single.plan(model, context)
    changed = model.clone()
    single.apply(changed, plan, context)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 8, 6, 6)).astype(np.float32)}
    expected = run(changed, feeds)
    FoldBatchnorm()(changed)
    assert "BatchNormalization" not in {node.op_type for node in changed.graph}
    assert difference(expected, run(changed, feeds)) < ROUNDING


def test_reconstruction_behind_solves_the_last_factors_again() -> None:
    model, context = conv_net((3, 16, 16, 8), seed=3), Context(threads=1)
    changed = model.clone()
    quick(energy=0.7, source="probes", samples=32, form="spatial-svd").rewrite(changed, context)
    assert origin_of(changed) is not None
    feeds = {"x": next(iter(context.inputs(model, "probes", 32).batches))["x"]}
    before = difference(run(model, feeds), run(changed, feeds))
    done = FoldReconstruction(source="probes", samples=32).rebuild(changed, context)
    assert any("/factor_1" in one.node for one in done.solved)
    assert all(one.after <= one.before for one in done.solved)
    assert difference(run(model, feeds), run(changed, feeds)) < before


# The clock ----------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Says that chains are faster for some layers."""

    ratios: Sequence[float]
    asked: list[int] = field(default_factory=list)

    def __call__(self, sessions: Sequence[Any], feeds: dict[str, np.ndarray], context: Context) -> Speed:
        self.asked.append(len(sessions))
        for session in sessions:
            session.run_feeds(feeds)
        ratio = self.ratios[(len(self.asked) - 1) % len(self.ratios)]
        return Speed(ratio, ratio - 0.01, 1.0, 1.0 / ratio)


def test_what_is_not_faster_stays_with_both_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    model = conv_net((3, 32, 48, 16))
    clock = Clock([0.9, 1.5])
    monkeypatch.setattr(speed_module.Speeds, "measure", staticmethod(clock), raising=False)
    monkeypatch.setattr(speed_module, "timed", clock)
    single = Decompose(form="channel-svd", energy=0.5, source="none", round_to=4)
    speeds = speed_module.Speeds(Context(), measure=clock)
    monkeypatch.setattr("graphopt.passes.decompose.Speeds", lambda *_: speeds)
    context = Context()
    plan = single.plan(model, context)
    assert [layer.speed for layer in plan.layers] == [1.5] * len(plan.layers)
    slow = [one for one in plan.declined if "is not faster" in one.reason]
    assert slow
    assert "channel-svd" in slow[0].reason
    assert "with error" in slow[0].reason
    assert "1.111 ms instead of 1 ms, 0.90x" in slow[0].reason
    assert any("is not faster" in remark.why for remark in context.remarks)
    count = len(clock.asked)
    assert single.plan(model) == plan
    assert len(clock.asked) == count, "measured again"
    clock.ratios = [0.5]
    with pytest.raises(TargetMissedError, match="is left with every layer at its least"):
        Decompose(form="spatial-svd", macs=0.5, source="none", round_to=4).plan(model)


# Where it runs, and what it refuses ---------------------------------------------------------------------------


def test_a_plan_travels_as_text_and_replays() -> None:
    model, context = conv_net((3, 16, 24, 8)), Context()
    single = quick(macs=0.6, source="probes", samples=8)
    plan = single.plan(model, context)
    assert DecomposePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert "macs" in str(plan)
    assert plan.layers[0].form in str(plan)
    first, second = model.clone(), model.clone()
    single.apply(first, plan, context)
    single.apply(second, DecomposePlan.from_json(plan.to_json()), Context())
    assert print_graph(first) == print_graph(second)
    third = model.clone()
    single.rewrite(third, Context())
    feeds = {"x": np.ones((1, 3, 8, 8), np.float32)}
    for other in (second, third):
        assert difference(run(first, feeds), run(other, feeds)) < ROUNDING
    with pytest.raises(GraphoptError, match="made for another model"):
        single.apply(conv_net((3, 16, 24, 8), seed=1), plan)
    for broken in ({}, {**plan.to_json(), "colour": 1}, {**plan.to_json(), "layers": [{"node": "a"}]}):
        with pytest.raises(GraphoptError, match="not a decomposition plan"):
            DecomposePlan.from_json(broken)
    for choices, message in (
        ({"nobody": ("svd", 1)}, "no operator is called 'nobody'"),
        ({model.graph[0].name: ("svg", 1)}, "no factorisation 'svg'"),
        ({model.graph[0].name: ("channel-svd", 0)}, "is no rank"),
        ({model.graph[0].name: ("channel-svd", 999)}, "has no rank"),
        ({model.graph[0].name: ("svd", 1)}, "its kernel is larger than 1"),
        ({model.graph[1].name: ("svd", 1)}, "cannot be taken apart: it is none with a weight"),
    ):
        before = print_graph(model)
        with pytest.raises(GraphoptError, match=message):
            single.apply(model, DecomposePlan.by_hand(model, choices))  # type: ignore[arg-type]
        assert print_graph(model) == before


def test_shared_weights_share_their_factors() -> None:
    model = weighted(
        f"""{HEAD} g (float[n,12] x, float[12,12] w, float[12] b) => (float[n,12] y)
        {{ h = Gemm (x, w, b) r = Relu (h) y = Gemm (r, w) }}"""
    )
    context = Context(calibration=[{"x": np.random.default_rng(0).standard_normal((30, 12)).astype(np.float32) + 1}])
    single = quick(energy=0.7, source="calibration")
    plan = single.plan(model, context)
    assert len(plan.layers) == 1
    changed = model.clone()
    single.apply(changed, plan, context)
    check_structure(changed)
    matrices = [value for value in changed.graph.initializers.values() if len(value.shape or ()) == 2]
    assert [len(value.uses()) for value in matrices] == [2, 2]
    assert plan.after.params < plan.before.params
    feeds = {"x": np.ones((2, 12), np.float32)}
    assert difference(run(single.masked(model, plan, context), feeds), run(changed, feeds)) < ROUNDING


def test_what_cannot_be_taken_apart_says_why() -> None:
    text = f"""{HEAD} g (float[2,8,8] x, float[8,8] good, float[8,8] twice, float[2,8,8] batched, float[8,8] zero,
        float[8,8] broken, float[1,8] thin, bool c) => (float[2,8,8] y, float[8,8] t) {{
        a = MatMul (x, good) b = MatMul (a, twice) d = MatMul (twice, b) e = MatMul (d, batched)
        f = MatMul (e, zero) h = MatMul (f, broken) s = Constant <value = float {{0.1}}> ()
        q = QuantizeLinear (good, s) k = DequantizeLinear (q, s) i = MatMul (h, k) t = Neg (twice)
        y = If (c) <then_branch = u () => (float[2,8,8] o) {{ o = MatMul (i, good) }},
                    else_branch = v () => (float[2,8,8] p) {{ p = Neg (i) }}> }}"""
    proto = onnx.parser.parse_model(text)
    model = ir.from_proto(proto)
    random = np.random.default_rng(0)
    for value in list(model.graph.inputs):
        if value.name in ("x", "c"):
            continue
        assert value.shape is not None
        model.graph.inputs.remove(value)
        array = random.standard_normal(value.shape.numpy()).astype(np.float32)
        array = array * 0 if value.name == "zero" else array
        array = np.full_like(array, np.nan) if value.name == "broken" else array
        value.const_value = ir.Tensor(array, name=value.name)
        model.graph.register_initializer(value)
    context = Context()
    with pytest.raises(GraphoptError, match="no layer can be taken apart"):
        quick(energy=0.5).plan(model, context)
    reasons = " | ".join(f"{remark.where}: {remark.why}" for remark in context.remarks)
    for reason in (
        "read by MatMul", "in another way too", "is not a matrix", "0 throughout", "not finite",
        "operators inside of subgraphs",
    ):  # fmt: skip
        assert reason in reasons, f"{reason!r} is not in {reasons}"


def test_quantized_weights_stay() -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (float[n,2] x) => (float[n,2] y)
        <int8[2,2] q = {{1, 2, 3, 4}}, float s = {{0.5}}> {{ w = DequantizeLinear (q, s) y = Gemm (x, w) }}""")
    with pytest.raises(GraphoptError, match="stored as integers: decompose before quantizing"):
        quick().plan(model)


def test_float16_keeps_its_type() -> None:
    model = parse(f"{HEAD} g (float16[n,16] x, float16[16,16] w_a) => (float16[n,16] y) {{ y = MatMul (x, w_a) }}")
    model.graph[0].name = "product"
    changed = at_full_rank(model, model.graph[0].name or "", "svd")
    assert {value.dtype for value in changed.graph.initializers.values()} == {ir.DataType.FLOAT16}
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float16)
    assert difference(run(model, {"x": x}), run(changed, {"x": x})) < 5e-3


def test_keep_names_what_stays() -> None:
    model = conv_net((3, 16, 24, 8))
    plan = quick(energy=0.5, keep=("w1",)).plan(model)
    assert "w1" not in {layer.weight for layer in plan.layers}
    assert any(one.reason == "keep has 'w1'" for one in plan.declined)
    with pytest.raises(GraphoptError, match="keep has 'w7', and no weight or node"):
        quick(keep=("w7",)).plan(model)
    with pytest.raises(GraphoptError, match=r"no layer can be taken apart[^$]*keep has"):
        quick(keep=("w*",)).plan(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "tuker"}, "did you mean 'tucker'"),
        ({"form": ()}, "form is empty"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"macs": "0.5"}, "must be a number"),
        ({"macs": 0.5, "params": 0.5}, "several targets"),
        ({"ranks": "ratio"}, "without macs"),
        ({"ranks": "energy", "macs": 0.5}, "no use for macs"),
        ({"ranks": "error"}, "there is no error"),
        ({"ranks": "best"}, "unknown ranks"),
        ({"source": "dreams"}, "unknown source"),
        ({"samples": 0}, "samples is 0"),
        ({"round_to": 0}, "round_to is 0"),
        ({"keep": "w"}, "one string"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        Decompose(**options)


def test_calibration_must_be_there_before_anything_changes() -> None:
    model = conv_net()
    with pytest.raises(DataError, match="there is none"):
        quick(source="calibration").plan(model)
    plan = quick(energy=0.5).plan(model)
    before = print_graph(model)
    with pytest.raises(DataError, match="there is none"):
        quick(source="calibration").apply(model, plan)
    assert print_graph(model) == before


def test_from_toml_and_under_the_guard(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text('[[pass]]\nname = "decompose"\nform = ["channel-svd", "svd"]\nmacs = 0.7\nmeasure = false\n')
    (single,) = read_recipe(file).passes
    assert isinstance(single, Decompose)
    assert single.forms == ("channel-svd", "svd")
    assert hash(single) == hash(read_recipe(file).passes[0])
    result = graphopt.optimize(
        conv_net((3, 32, 32, 8), size=12), recipe=[quick(macs=0.7, form="channel-svd")], quiet=True
    )
    assert "decompose" in {step.name for step in result.report.steps}
    open_session(result.model).run_feeds({"x": np.zeros((1, 3, 12, 12), np.float32)})


def test_real_timing_of_small_layers_runs_for_every_operator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(speed_module, "_SECONDS", 0.0)
    model = weighted(
        f"""{HEAD} g (float[1,8,6,6] x, float[8,8,3,3] a, float[8,1,3,3] d, float[8,6,3,3] t, float[100,12] m,
        float[12,9] s) => (float[1,9] y) {{
        c = Conv <pads = [1,1,1,1]> (x, a) r = Clip (c) e = Conv <pads = [1,1,1,1], group = 8> (r, d)
        u = ConvTranspose <strides = [1,1]> (e, t) p = GlobalAveragePool (u) f = Flatten (p)
        k = Concat <axis = 1> (f, f) y = Gemm (k, s) }}"""
    )
    context = Context(threads=1)
    plan = Decompose(energy=0.3, source="none", round_to=1).plan(model, context)
    timed = [layer.speed for layer in plan.layers] + [one.reason for one in plan.declined if "ms instead" in one.reason]
    assert len(timed) == 4
    assert not [one for one in plan.declined if "could not be timed" in one.reason]
