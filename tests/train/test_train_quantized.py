"""Quantization-aware training from the plan of the pass `quantize`: one writer, and what is trained is what runs."""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import DataError, GraphoptError, LiftError, RecipeError
from graphopt.ir.compare import compare_arrays
from graphopt.ir.origin import origin_of
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.session import open_session
from graphopt.passes import Context, Quantize
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.recipe import build_pass, preset, resolve
from graphopt.train_quantized import TrainQuantized, fake_quantize
from tests.zoo.models import zoo_feeds, zoo_model

torch = pytest.importorskip("torch")
from graphopt.ir.lifted import LiftedModule, as_array  # noqa: E402
from graphopt.train import FakeQuant, Mask  # noqa: E402
from graphopt.train.minibatches import Minibatches  # noqa: E402
from graphopt.train.quantizers import DynamicQuantizer  # noqa: E402
from tests.train.networks import convnet, images, weights_of  # noqa: E402

pytestmark = pytest.mark.torch

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
ROUNDING = 1e-2
"""Of the outputs' scale, rms: a value next to a tie may land one step apart where sums are rounded differently."""


@functools.cache
def _exact(name: str) -> ir.Model:
    model = zoo_model(name) if name != "convnet" else convnet()
    for single in preset("exact").passes[:-1]:
        single.run(model, Context())
    return model


def exact(name: str) -> ir.Model:
    """A model of the zoo after the exact passes."""
    return _exact(name).clone()


def lifted_form(model: ir.Model, plan: QuantizePlan) -> tuple[ir.Model, LiftedModule]:
    graph, quantizers = fake_quantize(model, plan)
    lifted = graphopt.lift(graph)
    lifted.attach("quantizers", quantizers)
    return graph, lifted


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def distance(lifted: LiftedModule, lowered: ir.Model, feeds: dict[str, np.ndarray], *, optimized: bool) -> float:
    with torch.no_grad():
        expected = [as_array(value) for value in lifted.eval().run_feeds(feeds).values()]
    found = open_session(lowered, optimized=optimized).run_feeds(feeds)
    return max(compare_arrays(a, b).rms_error for a, b in zip(expected, found, strict=True))


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


CASES = [
    *((name, {}) for name in ("resnet", "mobilenet-v2", "mobilenet-v3", "vit", "bert")),
    *((name, {"form": "static", "bits": 4, "weight_bits": 3}) for name in ("resnet", "bert")),
    *((name, {}) for name in ("shared-thrice", "conv-and-linear")),
    *((name, {"form": "weights", "weight_bits": 4, "symmetric": True}) for name in ("bert",)),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name} {options}" for name, options in CASES])
def test_untrained_it_is_what_the_pass_writes(name: str, options: dict[str, Any]) -> None:
    model = exact(name)
    single = Quantize(**options)
    plan = single.plan(model, Context())
    assert any(operator.form in ("static", "dynamic", "weights") for operator in plan.operators)
    expected = model.clone()
    single.apply(expected, plan)
    graph, lifted = lifted_form(model, QuantizePlan.from_json(json.loads(json.dumps(plan.to_json()))))
    lowered = graphopt.lower(lifted, graph)
    assert serialized(lowered) == serialized(expected)
    feeds = zoo_feeds(model)
    for optimized in (False, True):
        assert distance(lifted, lowered, feeds, optimized=optimized) < ROUNDING, optimized


@pytest.mark.parametrize("name", ["mobilenet-v2", "vit"])
def test_trained_it_has_the_same_form_and_runs_as_it_was_trained(name: str) -> None:
    model = exact(name)
    bits = 8 if name == "vit" else 4
    plan = Quantize(bits=bits).plan(model, Context())
    untrained = model.clone()
    Quantize().apply(untrained, plan)
    graph, quantizers = fake_quantize(model, plan)
    feeds = zoo_feeds(model)
    recovery = graphopt.recover(
        graph, [feeds], steps=4, learning_rate=1e-2, norm="frozen", insertions={"q": quantizers}, quiet=True
    )
    assert [(n.name, n.op_type) for n in recovery.model.graph] == [(n.name, n.op_type) for n in untrained.graph]
    before, after = weights_of(untrained), weights_of(recovery.model)
    assert {n: (a.shape, a.dtype) for n, a in before.items()} == {n: (a.shape, a.dtype) for n, a in after.items()}
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert any(name.endswith(".scale") for name in moved)
    assert any(name.endswith(".quantized") for name in moved)
    for optimized in (False, True):
        assert distance(recovery.module, recovery.model, feeds, optimized=optimized) < ROUNDING, optimized
    origin = origin_of(recovery.model)
    assert origin is not None
    assert not set(kinds(origin.model)) & {"QuantizeLinear", "DequantizeLinear"}


CLAMPED = """g (float[n,2,4,4] x) => (float[n,2,4,4] y) <float[3,2,1,1] w = {1, -2, 3, 1, -1, 2}, float low = {LOW},
    float high = {6}, float[3] b = {1, 0, -1}, float[2,3,1,1] v = {1, 1, 1, 2, -1, 1}>
    { c = Conv(x, w, b) r = Clip(c, low, high) y = Conv(r, v) }"""


@pytest.mark.parametrize("low", [0, -2])
def test_a_quantizer_that_stands_for_a_clamp_never_lets_more_through(low: int) -> None:
    model = graphopt.load(ir.from_onnx_text(f"{HEAD} {CLAMPED.replace('LOW', str(low))}"))
    x = {"x": np.random.default_rng(0).normal(size=(4, 2, 4, 4)).astype(np.float32) * 4}
    plan = Quantize(bits=4).plan(model, Context(calibration=[x]))
    assert plan.forms() == {"static": 2, "folded": 1}
    graph, lifted = lifted_form(model, plan)
    quantizers = lifted.insertions["quantizers"]
    assert isinstance(quantizers, FakeQuant)
    with torch.no_grad():
        for name, parameter in quantizers.named_parameters():
            if name.endswith("log_ratio"):
                parameter.fill_(1.0)
    learned = {tensor.name: tensor for tensor in quantizers.plan()}
    bottom, top = learned["r"].range()
    half = learned["r"].scale[0] / 2
    assert bottom[0] >= low - half
    assert top[0] <= 6 + half
    assert learned["x"].scale[0] == pytest.approx(np.e * plan.tensors[0].scale[0])
    lowered = graphopt.lower(lifted, graph)
    assert "Clip" not in [
        node.op_type for node in lowered.graph if node.inputs[0] is not None and node.inputs[0].name == "c"
    ]
    for optimized in (False, True):
        assert distance(lifted, lowered, x, optimized=optimized) < 1e-5


def test_zero_points_of_a_relu_stay() -> None:
    graph, quantizers = fake_quantize(exact("resnet"), Quantize().plan(exact("resnet"), Context()))
    assert graph.graph.initializers
    folded = [place.tensor.name for place in quantizers.places.quantizers if place.bounds] if quantizers.places else []
    assert folded
    for tensor, quantizer in zip(quantizers.plan(), quantizers.quantizers.children(), strict=True):
        zero = quantizer.get_parameter("zero_point")
        assert zero.requires_grad == (tensor.name not in folded and not tensor.signed)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fewer_bits_have_fewer_levels(bits: int) -> None:
    """QuantizeLinear saturates at 8 bits only: inputs far outside of the range must not reach more levels."""
    text = f"{HEAD} g (float[1,1,8,8] x) => (float[1,1,8,8] y) <float[1,1,1,1] w = {{1}}> {{ y = Conv(x, w) }}"
    model = graphopt.load(ir.from_onnx_text(text))
    narrow = {"x": np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)}
    plan = Quantize(bits=bits).plan(model, Context(calibration=[narrow]))
    Quantize().apply(model, plan)
    x, y = (next(tensor for tensor in plan.tensors if tensor.name == name) for name in "xy")
    wide = narrow["x"] * 10
    (w,) = (tensor for tensor in plan.tensors if tensor.role == "weight")
    data = (x.quantize(wide) - np.float32(x.zero_point[0])) * np.float32(x.scale[0])
    products = data * (w.quantize(np.ones((1, 1, 1, 1), np.float32)) * np.float32(w.scale[0]))
    expected = (y.quantize(products) - np.float32(y.zero_point[0])) * np.float32(y.scale[0])
    for optimized in (False, True):
        (found,) = open_session(model, optimized=optimized).run_feeds({"x": wide})
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert len(np.unique(found)) <= 2**bits


@pytest.mark.parametrize("seed", range(3))
def test_ranges_of_run_time_are_those_of_onnxruntime(seed: int) -> None:
    text = f"""{HEAD} g (float[n] x) => (float[n] y) {{ q, s, z = DynamicQuantizeLinear(x)
        y = DequantizeLinear(q, s, z) }}"""
    x = np.random.default_rng(seed).normal(loc=seed, size=1000).astype(np.float32)
    (expected,) = open_session(ir.from_onnx_text(text)).run_feeds({"x": x})
    given = torch.from_numpy(x).requires_grad_()
    found = DynamicQuantizer()(given)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-6)
    found.sum().backward()
    assert given.grad is not None
    assert given.grad.eq(1).all()
    assert DynamicQuantizer()(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_masked_weights_are_zeros_in_the_integers() -> None:
    model = exact("resnet")
    graph, lifted = lifted_form(model, Quantize().plan(model, Context()))
    mask = Mask.unstructured(graph, 0.75)
    lifted.attach("mask", mask)
    lowered = graphopt.lower(lifted, graph)
    integers = [array for name, array in weights_of(lowered).items() if name.endswith("weight.quantized")]
    assert integers
    assert np.mean(np.concatenate([array.ravel() for array in integers]) == 0) > 0.7
    assert distance(lifted, lowered, zoo_feeds(model), optimized=True) < ROUNDING


def test_what_does_not_fit_is_refused() -> None:
    plan = Quantize().plan(exact("resnet"), Context())
    with pytest.raises(GraphoptError, match="made for another model"):
        fake_quantize(exact("mobilenet-v2"), plan)
    with pytest.raises(GraphoptError, match="not a quantization plan"):
        fake_quantize(exact("resnet"), {"tensors": 3})
    with pytest.raises(GraphoptError, match="no such tensor"):
        plan.with_tensors([TensorPlan("nowhere", "activation", 8, False, None, (1.0,), (0,), "training")])
    graph, quantizers = fake_quantize(exact("resnet"), plan)
    assert quantizers.places is not None
    lifted = graphopt.lift(graph)
    lifted.attach("quantizers", FakeQuant(quantizers.places))
    with pytest.raises(LiftError, match="do not fold without"):
        graphopt.lower(lifted, graph)


# The pass.


def calibration(count: int = 6) -> list[dict[str, np.ndarray]]:
    return [{"x": batch} for batch in images(count)]


def trained(options: TrainQuantized, context: Context | None = None) -> tuple[ir.Model, Context]:
    model, context = exact("convnet"), context or Context(calibration=calibration())
    options.run(model, context)
    return model, context


def test_the_pass_brings_the_outputs_nearer_to_those_of_the_original() -> None:
    original = exact("convnet")
    options = TrainQuantized(bits=3, edge_bits=3, steps=120, learning_rate=1e-2, batch_size=16)
    model, context = trained(options)
    untrained = original.clone()
    Quantize(bits=3, weight_range="full").run(untrained, Context(calibration=calibration()))
    unseen = {"x": images(1, batch=64, seed=11)[0]}
    after = graphopt.compare(original, model, unseen).rms_error
    assert after < 0.8 * graphopt.compare(original, untrained, unseen).rms_error
    (note,) = (remark.why for remark in context.remarks if "error of the outputs" in remark.why)
    assert "trained on calibration" in note
    assert "120 steps" in note


def test_edges_have_8_bits_and_the_rest_as_asked() -> None:
    model = exact("resnet")
    plan = Quantize().plan(model, Context())
    narrowed = TrainQuantized(bits=5, weight_bits=3).plan(model, Context())
    _, quantizers = fake_quantize(model, narrowed)
    narrow = quantizers.places
    assert narrow is not None
    bits = {tensor.name: tensor.bits for tensor in narrowed.tensors}
    wide = {tensor.name: tensor.bits for tensor in plan.tensors}
    layers = list(narrow.layers)
    first, last = layers[0], layers[-1]
    for layer in (first, last):
        assert narrow.quantizers[layer.data].tensor.bits == 8
        assert narrow.quantizers[layer.weight].tensor.bits == wide[narrow.quantizers[layer.weight].tensor.name]
    inner = [layer for layer in layers if layer not in (first, last)]
    assert {narrow.quantizers[layer.weight].tensor.bits for layer in inner} == {3}
    assert {narrow.quantizers[layer.data].tensor.bits for layer in inner} == {5}
    assert {tensor.bits == wide[tensor.name] for tensor in narrowed.tensors if tensor.scale} == {True}
    read = {narrow.quantizers[layer.data].tensor.name for layer in layers}
    assert {bits[place.tensor.name] for place in narrow.quantizers if place.tensor.role == "activation"} == {5, 8}
    assert all(
        bits[place.tensor.name] == 8
        for place in narrow.quantizers
        if place.tensor.role == "activation" and place.tensor.name not in read
    )


@pytest.mark.parametrize(
    ("name", "form"), [("vit", "auto"), ("bert", "auto"), ("bert", "weights"), ("bert", "dynamic")]
)
def test_4_bits_of_a_transformer_are_real_where_they_can_be(name: str, form: str) -> None:
    model, original = exact(name), exact(name)
    feeds = zoo_feeds(model)
    options = TrainQuantized(weight_bits=4, steps=6, learning_rate=3e-3, form=form)
    plan = options.plan(model, Context(calibration=[feeds]))
    context = Context(calibration=[feeds])
    options.run(model, context)
    stored = {array.dtype.name for array in weights_of(model).values()}
    assert bool(stored & {"int4", "uint4"}) == (form != "dynamic")
    assert ("dynamic" in plan.forms()) == (form == "dynamic")
    assert plan.forms().get("static", 0) == (name == "vit")
    assert graphopt.compare(original, model, feeds).rms_error < 0.3
    untrained = original.clone()
    if form != "dynamic":  # with a range to be found there is no untrained graph of the plan yet
        Quantize().apply(untrained, plan)
        assert kinds(untrained) == kinds(model)


def test_never_worse_than_untrained() -> None:
    """A rate at which training only destroys: the weights before it are kept, and the note says so."""
    model, context = trained(TrainQuantized(steps=5, learning_rate=0.9))
    untrained = exact("convnet")
    plan = Quantize().plan(untrained, Context(calibration=calibration()))
    Quantize().apply(untrained, plan)
    assert serialized(model) == serialized(untrained)
    assert any("weights after 0 are kept" in remark.why for remark in context.remarks)


def test_the_same_seed_gives_the_same_graph() -> None:
    first, second, other = (trained(TrainQuantized(bits=4, steps=6, seed=seed, batch_size=8))[0] for seed in (0, 0, 1))
    assert serialized(first) == serialized(second)
    assert serialized(first) != serialized(other)


@pytest.mark.parametrize("recipe", ["int8-qat", "int4-qat"])
def test_recipes(recipe: str) -> None:
    chosen = preset(recipe).with_options("train-quantized", steps=4)
    result = graphopt.optimize(convnet(), recipe=chosen, calibration=images(), quiet=True)
    step = next(step for step in result.report.steps if step.name == "train-quantized")
    assert step.error is not None
    assert any("trained on calibration" in remark.why for remark in step.remarks)


def test_the_guard_rolls_back_what_moves_too_far() -> None:
    chosen = preset("int4-qat").with_options("train-quantized", steps=2)
    result = graphopt.optimize(convnet(), recipe=chosen, calibration=images(), tolerance=1e-6, quiet=True)
    step = next(step for step in result.report.steps if step.name == "train-quantized")
    assert step.status == "rolled back"
    assert "tolerance" in (step.reason or "")


def test_without_data_it_trains_on_what_is_made_up_and_says_so() -> None:
    _, context = trained(TrainQuantized(steps=2), Context())
    assert any("no data was given, so on" in remark.why for remark in context.remarks)


def test_progress_is_shown() -> None:
    heard: list[tuple[int, int, str]] = []
    context = Context(calibration=calibration(), progress=lambda *told: heard.append(told))
    trained(TrainQuantized(steps=3), context)
    assert [(done, total) for done, total, text in heard if text.startswith("training, loss")] == [
        (1, 3),
        (2, 3),
        (3, 3),
    ]


def test_what_cannot_be_lifted_is_quantized_without_training() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        g (float[n,2,4,4] x) => (float[n,3,4,4] y) <float[3,2,1,1] w = {1, -2, 3, 1, -1, 2}>
        { c = Conv(x, w) y = com.microsoft.Inverse(c) }"""
    model = graphopt.load(ir.from_onnx_text(text))
    context = Context(calibration=[{"x": np.random.default_rng(0).normal(size=(4, 2, 4, 4)).astype(np.float32)}])
    TrainQuantized().run(model, context)
    assert kinds(model)["DequantizeLinear"]
    (missed,) = (remark for remark in context.remarks if remark.what == "train quantized")
    assert missed.kind == "missed"
    assert "Inverse" in missed.why
    assert "quantized without training" in missed.why


def test_what_cannot_be_lifted_has_the_widths_and_the_form_that_were_asked_for() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        g (float[1,64,64] x, float[64,64] w, float[64,64] v) => (float[1,64,64] y)
        { a = MatMul(x, w) b = com.microsoft.Inverse(a) y = MatMul(b, v) }"""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        array = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    for options, stored in ((TrainQuantized(weight_bits=4), "UINT4"), (TrainQuantized(bits=4, form="static"), "INT8")):
        result = graphopt.load(ir.to_proto(model))
        context = Context()
        options.run(result, context)
        assert any("quantized without training" in remark.why for remark in context.remarks)
        large = {value.dtype.name for value in result.graph.initializers.values() if value.const_value.size == 64 * 64}
        assert large == {stored}


def test_nothing_to_quantize_and_what_is_quantized_already() -> None:
    model = graphopt.load(ir.from_onnx_text(f"{HEAD} g (float[2] x) => (float[2] y) {{ y = Relu(x) }}"))
    context = Context()
    assert not TrainQuantized().run(model, context).modified
    assert context.remarks
    again, _ = trained(TrainQuantized(steps=1))
    before = serialized(again)
    assert not TrainQuantized(steps=1).run(again, context).modified
    assert serialized(again) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits is 9"),
        ({"weight_bits": 1}, "weight_bits is 1"),
        ({"edge_bits": 0}, "edge_bits is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"distillation": "l1"}, "unknown distillation"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"form": "int8"}, "unknown form"),
        ({"step": 1}, "no option 'step'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_pass("train-quantized", options)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(GraphoptError, match="no device"):
        trained(TrainQuantized(device="nowhere:7", steps=1))


def test_no_calibration_in_the_iterable() -> None:
    with pytest.raises(DataError):
        graphopt.optimize(convnet(), recipe="int8-qat", calibration=[], quiet=True)


def test_order() -> None:
    with pytest.raises(RecipeError, match="train-quantized stands before fold-batchnorm"):
        resolve(["train-quantized", "fold-batchnorm"])


# Batches.


def test_batches_of_one_size_in_an_order_of_their_own() -> None:
    model = convnet()
    source = [{"x": np.full((3, 2, 6, 6), number, np.float32)} for number in range(7)]
    batches = Minibatches(model, source, 4, seed=5)
    first, second = ([feeds["x"][:, 0, 0, 0].tolist() for feeds in batches] for _ in range(2))
    assert [len(batch) for batch in first] == [4] * 5
    assert first != second
    for given in (first, second):
        counted = Counter(number for batch in given for number in batch)
        assert sum(counted.values()) == 20
        assert all(count <= 3 for count in counted.values())
    again = Minibatches(model, source, 4, seed=5)
    assert [feeds["x"][:, 0, 0, 0].tolist() for feeds in again] == first


def test_few_samples_and_fixed_batches() -> None:
    assert [feeds["x"].shape[0] for feeds in Minibatches(convnet(), [{"x": images(1, batch=3)[0]}], 8)] == [3]
    fixed = graphopt.load(ir.from_onnx_text(f"{HEAD} g (float[2,3] x) => (float[2,3] y) {{ y = Relu(x) }}"))
    given = [{"x": np.ones((2, 3), np.float32)}] * 3
    assert [feeds["x"].shape for feeds in Minibatches(fixed, given, 8)] == [(2, 3)] * 3
    lengths = graphopt.load(ir.from_onnx_text(f"{HEAD} g (float[n,k] x) => (float[n,k] y) {{ y = Relu(x) }}"))
    several = [{"x": np.ones((2, length), np.float32)} for length in (3, 5)]
    assert [feeds["x"].shape for feeds in Minibatches(lengths, several, 8)] == [(2, 3), (2, 5)]
