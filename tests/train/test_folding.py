"""What is inserted folds in the order of attachment, wherever it stands: weights, inputs, outputs, single consumers."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import GraphoptError, LiftError
from graphopt.ir.compare import compare_arrays, compare_outputs, reference_outputs
from graphopt.ir.lifted import Insertion, LiftedModule, as_array
from graphopt.ir.lower import Folding, Link
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.session import open_session
from graphopt.passes import ALL_PASSES, Context
from graphopt.train import FakeQuant, Mask, Scale
from tests.zoo.models import zoo_feeds, zoo_model

pytestmark = pytest.mark.torch
FEEDS = {"x": np.array([[1, -2], [0.5, 3]], np.float32)}
SIMPLE = "(float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}> { h = MatMul(x, w) y = Relu(h) }"
BIASED = """(float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}>
    { k = MatMul(x, w) h = Add(k, b) y = Relu(h) }"""
NORMALISED = """(float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] g = {1, 2}, float[2] b = {1, 2},
    float[2] m = {0, 1}, float[2] v = {1, 2}> { k = MatMul(x, w) h = BatchNormalization(k, g, b, m, v) y = Relu(h) }"""
WEIGHT_OUT = (
    "(float[n,2] x) => (float[n,2] y, float[2,2] w) <float[2,2] w = {1, 2, 3, 4}> { h = MatMul(x, w) y = Relu(h) }"
)
INPUT_OUT = (
    "(float[n,2] x) => (float[n,2] y, float[n,2] x) <float[2,2] w = {1, 2, 3, 4}> { h = MatMul(x, w) y = Relu(h) }"
)
LEFT_WEIGHT = """(float[2,2] x) => (float[2,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}>
    { h = Gemm(w, x, b) y = Relu(h) }"""
INNER_NAME = """(float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}, bool c = {1}> { h = MatMul(x, w)
    y = If(c) <then_branch = t () => (float[n,2] h_Add) { h_Add = Neg(h) },
               else_branch = e () => (float[n,2] other) { other = Identity(h) }> }"""

SAME_NAME = """(float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}, bool c = {1}> { h = MatMul(x, w)
    y = If(c) <then_branch = t () => (float[n,2] a) { [matmul] a = MatMul(h, w) },
               else_branch = e () => (float[n,2] b) { b = Identity(h) }> }"""


def parsed(body: str) -> ir.Model:
    return graphopt.load(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {body}'))


def error_of(lowered: ir.Model, lifted: LiftedModule, feeds: dict[str, np.ndarray]) -> float:
    with torch.no_grad():
        found = [as_array(value) for value in lifted.eval().run_feeds(feeds).values()]
    return compare_outputs(reference_outputs(lowered, [feeds])[0], found)


class Affine(Insertion):
    """x * factor + shift behind one value."""

    def __init__(self, value: str, factor: float, shift: float, consumers: Collection[str] | None = None) -> None:
        super().__init__()
        self.value, self.consumers = value, consumers
        self.factor, self.shift = nn.Parameter(torch.tensor(factor)), nn.Parameter(torch.tensor(shift))

    def insert(self, lifted: LiftedModule, path: str) -> None:
        lifted.place(self.value, path, self.consumers)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.factor + self.shift

    def fold(self, folding: Folding) -> None:
        factor, shift = (
            folding.add_constant(f"{self.value}_{name}", getattr(self, name).detach().numpy())
            for name in ("factor", "shift")
        )
        folding.insert_after(self.value, [Link("Mul", [factor]), Link("Add", [shift])], consumers=self.consumers)


def gates(axis: int = -1) -> Scale:
    scale = Scale({"h": axis}, {"h": 2})
    with torch.no_grad():
        scale.gates["g0"].get_parameter("gate").copy_(torch.tensor([2.0, 3.0]))
    return scale


def quantizer() -> FakeQuant:
    return FakeQuant([TensorPlan("w", "weight", 3, True, 1, (), (), "weights")])


def mask() -> Mask:
    return Mask({"w": torch.tensor([[True, False], [True, True]])})


CASES: dict[str, tuple[str, list[Callable[[], Insertion]]]] = {
    "gates, then quantizer": (SIMPLE, [gates, quantizer]),
    "quantizer, then gates": (SIMPLE, [quantizer, gates]),
    "quantizer, then mask": (SIMPLE, [quantizer, mask]),
    "mask, then quantizer": (SIMPLE, [mask, quantizer]),
    "operators, then quantizer": (SIMPLE, [lambda: Affine("w", 1.3, 0.2), quantizer]),
    "operators, then mask": (SIMPLE, [lambda: Affine("w", 1.3, 0.2), mask]),
    "gates, then the bias": (BIASED, [gates, lambda: Affine("b", 1.3, 0.2)]),
    "gates, then before the bias": (BIASED, [gates, lambda: Affine("k", 1.3, 0.2)]),
    "gates, then the shift": (NORMALISED, [gates, lambda: Affine("b", 1.3, 0.2)]),
    "one consumer, twice": (
        SIMPLE,
        [lambda: Affine("h", 1.3, 0.2, ["relu"]), lambda: Affine("h", -0.7, 0.5, ["relu"])],
    ),
    "one consumer, then all": (SIMPLE, [lambda: Affine("h", 1.3, 0.2, ["relu"]), lambda: Affine("h", -0.7, 0.5)]),
    "three at an output": (SIMPLE, [lambda: Affine("y", 1.3, 0.2)] * 3),
    "two outputs that are one": (
        SIMPLE.replace("float[n,2] y)", "float[n,2] y, float[n,2] y)"),
        [lambda: Affine("y", 1.3, 0.2)],
    ),
    "two at an input that is an output": (INPUT_OUT, [lambda: Affine("x", 1.3, 0.2), lambda: Affine("x", -0.7, 0.5)]),
    "quantizer of a weight that is an output": (WEIGHT_OUT, [quantizer, mask]),
    "gates on a weight that is an output": (WEIGHT_OUT, [gates]),
    "gates with the weight on the left": (LEFT_WEIGHT, [lambda: gates(0)]),
    "one consumer, of the name of another in a subgraph": (SAME_NAME, [lambda: Affine("w", 1.3, 0.2, ["matmul"])]),
    "names in a subgraph": (INNER_NAME, [lambda: Affine("h", 1.3, 0.2)]),
}


@pytest.mark.parametrize("name", CASES)
def test_folding_computes_what_the_module_does(name: str) -> None:
    body, insertions = CASES[name]
    model = graphopt.load(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {body}'))
    for node in model.graph:
        node.name = node.op_type.lower()
    lifted = graphopt.lift(model)
    for number, insertion in enumerate(insertions):
        lifted.attach(f"i{number}", insertion())
    lowered = graphopt.lower(lifted, model)
    for ours, theirs in ((lowered.graph.inputs, model.graph.inputs), (lowered.graph.outputs, model.graph.outputs)):
        assert [value.name for value in ours] == [value.name for value in theirs]
    with torch.no_grad():
        outputs = lifted(*lifted.tensors(FEEDS))
    found = [as_array(output) for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
    assert compare_outputs(reference_outputs(lowered, [FEEDS])[0], found) < 1e-6


def test_a_masked_quantizer_stores_zeros() -> None:
    model = graphopt.load(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {SIMPLE}'))
    lifted = graphopt.lift(model)
    lifted.attach("quantizer", quantizer())
    lifted.attach("mask", mask())
    lowered = graphopt.lower(lifted, model)
    stored = lowered.graph.initializers["w_quantized"].const_value
    assert stored is not None
    assert (stored.numpy() == 0).tolist() == [[False, True], [False, False]]
    assert [node.op_type for node in lowered.graph] == ["DequantizeLinear", "MatMul", "Relu"]


def test_a_constant_with_operators_behind_it_is_not_set() -> None:
    class Doubled(Affine):
        def fold(self, folding: Folding) -> None:
            folding.set_constant("w", folding.constant("w") * 2)

    model = graphopt.load(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {SIMPLE}'))
    lifted = graphopt.lift(model)
    lifted.attach("first", Affine("w", 1.3, 0.2))
    lifted.attach("second", Doubled("w", 2.0, 0.0))
    with pytest.raises(LiftError, match="has operators behind it"):
        graphopt.lower(lifted, model)


def test_frozen_weights_can_be_quantized_and_masked() -> None:
    module = nn.Linear(3, 4).requires_grad_(False).eval()
    model = graphopt.trace(module, (torch.randn(2, 3),))
    lifted = graphopt.lift(model)
    lifted.attach("mask", Mask.unstructured(model, 0.5, ramp=0))
    lifted.attach("quantizers", FakeQuant.for_linear(model))
    assert lifted.insertions["mask"].sparsity == 0.5


def test_quantizers_of_float64_are_refused() -> None:
    text = "(double[n,2] x) => (double[n,2] y) <double[2,2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }"
    model = graphopt.load(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {text}'))
    with pytest.raises(LiftError, match="float64"):
        graphopt.lift(model).attach("quantizers", FakeQuant.for_linear(model))


@pytest.mark.parametrize("name", ["class", "keys", "training", "a b", "ﬁ"])
def test_names_that_torch_or_python_needs_are_refused(name: str) -> None:
    model = graphopt.load(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {SIMPLE}'))
    lifted = graphopt.lift(model)
    with pytest.raises(LiftError, match="cannot be named"):
        lifted.attach(name, Affine("h", 2.0, 0.0))
    lifted.attach("fine", Affine("h", 2.0, 0.0))
    assert lifted(torch.ones(1, 2)).tolist() == [[8.0, 12.0]]


def test_ranges_by_channel_are_found() -> None:
    text = "(float[n,3,k] x) => (float[n,3,k] y) { y = Neg(x) }"
    model = graphopt.load(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {text}'))
    lifted = graphopt.lift(model)
    lifted.attach("quantizer", FakeQuant([TensorPlan("x", "activation", 8, False, 1, (), (), "calibration")]))
    data = torch.rand(8, 3, 50) * torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1)
    lifted.insertions["quantizer"].prepare(lifted, [[data[:4]], [data[4:]]])
    (plan,) = lifted.insertions["quantizer"].plan()
    np.testing.assert_allclose(np.array(plan.scale) * 255, [1, 10, 100], rtol=0.05)


def test_gates_on_values_of_unknown_rank_count_axes_from_the_end() -> None:
    text = "(float[n,2] x, int64[k] s) => (float[a,b] y) { h = Reshape(x, s) y = Relu(h) }"
    model = graphopt.load(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {text}'))
    feeds = {**FEEDS, "s": np.array([2, 2])}
    lifted = graphopt.lift(model)
    lifted.attach("gates", gates())
    found = [as_array(output) for output in lifted.run_feeds(feeds).values()]
    assert compare_outputs(reference_outputs(graphopt.lower(lifted, model), [feeds])[0], found) < 1e-6
    lifted = graphopt.lift(model)
    lifted.attach("gates", gates(1))
    with pytest.raises(LiftError, match="rank of a gated value"):
        graphopt.lower(lifted, model)


@pytest.mark.parametrize("bits", [1, 9, 16, 4.5])
def test_quantizers_have_two_to_eight_bits(bits: float) -> None:
    with pytest.raises(LiftError, match="bits"):
        FakeQuant([TensorPlan("w", "weight", bits, True, None, (1.0,), (0,), "weights")])  # pyright: ignore[reportArgumentType]


def test_quantizers_without_ranges_do_not_fold() -> None:
    model = parsed(SIMPLE)
    lifted = graphopt.lift(model)
    lifted.attach("quantizers", FakeQuant.for_linear(model))
    with pytest.raises(LiftError, match="no range yet"):
        graphopt.lower(lifted, model)
    with pytest.raises(LiftError, match="two quantizers"):
        lifted.attach("again", FakeQuant.for_linear(model))


def test_models_without_linear_layers_have_no_quantizers() -> None:
    with pytest.raises(GraphoptError, match="no linear layer"):
        FakeQuant.for_linear(parsed("(float[2] x) => (float[2] y) { y = Relu(x) }"))
    with pytest.raises(GraphoptError, match="is no graph"):
        FakeQuant.for_linear(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


def test_weights_behind_a_cast_are_quantized() -> None:
    model = parsed("""(float[1,2] x) => (float[1,2] y) <float16[2,2] w = {1, 2, 3, 4}>
        { c = Cast<to = 1>(w) y = MatMul(x, c) }""")
    weight = np.array([[1, 2], [3, 4]], np.float16)  # the text has bit patterns
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    lifted = graphopt.lift(model)
    quantizers = FakeQuant.for_linear(model)
    lifted.attach("quantizers", quantizers)
    quantizers.prepare(lifted, [[torch.ones(1, 2)]])
    assert [entry.name for entry in quantizers.plan()] == ["w", "x"]
    assert error_of(graphopt.lower(lifted, model), lifted, {"x": np.ones((1, 2), np.float32)}) < 1e-2


def test_masks_of_another_model_are_refused() -> None:
    mask = Mask({"w": torch.ones(3, 3, dtype=torch.bool)})
    with pytest.raises(LiftError, match="is not"):
        graphopt.lift(parsed(SIMPLE)).attach("mask", mask)


def test_statistics_that_the_graph_computes() -> None:
    """Weight standardisation, as torch exports it: BatchNormalization of the weight by its own mean and variance."""
    model = parsed("""(float[1,2] x) => (float[1,2] y) <float[2,2] w = {1, 2, 3, 5}, float[2] one = {1, 1},
        float[2] zero = {0, 0}, int64[1] axis = {0}>
        { m = ReduceMean<keepdims = 0>(w, axis) d = Sub(w, m) q = Mul(d, d) v = ReduceMean<keepdims = 0>(q, axis)
          n = BatchNormalization(w, one, zero, m, v) y = MatMul(x, n) }""")
    lifted = graphopt.lift(model)
    feeds = {"x": np.array([[1, 2]], np.float32)}
    assert error_of(model, lifted, feeds) < 1e-5
    assert error_of(model, lifted.train(), feeds) < 1e-5
    lifted.train().run_feeds(feeds)["y"].square().sum().backward()
    assert lifted.get_parameter("w").grad is not None


def test_a_loop_of_ones_own() -> None:
    """As docs/training.md writes it."""
    module = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)
    )
    images = torch.randn(16, 4, 6, 6)
    batch = torch.export.Dim("batch")
    model = graphopt.trace(module.eval(), (images,), dynamic_shapes=({0: batch},))
    lifted, wanted = graphopt.lift(model), module(images).detach()
    quantizers = FakeQuant.for_linear(model, weight_bits=4, activation_bits=4)
    lifted.attach("quantizers", quantizers)
    quantizers.prepare(lifted, [[images]])
    lifted.attach("mask", Mask.n_of_m(model, 2, 4, ramp=0.5))
    lifted.attach("gates", Scale.for_channels(model, l1=1e-4))
    optimizer = torch.optim.AdamW(lifted.parameters(), 3e-3)
    losses: list[float] = []
    for step in range(30):
        for insertion in lifted.insertions.children():
            assert isinstance(insertion, Insertion)
            insertion.advance(step, 30)
        penalties = sum(each.penalty() for each in lifted.insertions.children() if isinstance(each, Insertion))
        loss = (lifted(images) - wanted).square().mean() + penalties
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[20:]) < max(losses[:20])
    lowered = graphopt.lower(lifted, model)
    assert error_of(lowered, lifted, {model.graph.inputs[0].name or "": images.numpy()}) < 1e-2


def test_optimized_onnxruntime_computes_what_was_trained() -> None:
    """It rounds biases between quantized operands to int32; so does the module. Few products make coarse units."""
    layers = [nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1)]
    images = torch.randn(2, 2, 16, 16)
    model = graphopt.trace(nn.Sequential(*layers).eval(), (images,))
    lifted = graphopt.lift(model)
    quantizers = FakeQuant.for_linear(model, weight_bits=3, activation_bits=3, edge_bits=3)
    lifted.attach("quantizers", quantizers)
    assert len(quantizers.bias_names) == 3
    quantizers.prepare(lifted, [[images]])
    lowered = graphopt.lower(lifted, model)
    feeds = {model.graph.inputs[0].name or "": images.numpy()}
    with torch.no_grad():
        (expected,) = (as_array(value) for value in lifted.run_feeds(feeds).values())
    for optimized in (False, True):
        (found,) = open_session(lowered, optimized=optimized).run_feeds(feeds)
        assert compare_arrays(expected, found).rms_error < 0.01, optimized


@pytest.mark.parametrize("order", ["qu", "uq", "squ", "unqs"])
def test_units_are_removed_whatever_else_is_inserted(order: str) -> None:
    """Names of groups count tensors, and insertions add some: units are found by what they are made of."""
    model = zoo_model("resnet")
    ALL_PASSES["fold-batchnorm"]().run(model, Context())
    selection = {
        group.name: range(group.units // 2)
        for group in graphopt.channel_groups(model)
        if group.prunable and group.exact
    }
    make: dict[str, Callable[[], Insertion]] = {
        "q": lambda: FakeQuant.for_linear(model),
        "u": lambda: Mask.units(model, selection),
        "s": lambda: Scale.for_channels(model),
        "n": lambda: Mask.unstructured(model, 0.5),
    }
    lifted, feeds = graphopt.lift(model), zoo_feeds(model)
    for name in order:
        lifted.attach(name, make[name]())
    lifted.insertions.get_submodule("q").prepare(lifted, [lifted.tensors(feeds)])  # pyright: ignore[reportCallIssue]
    lowered = graphopt.lower(lifted, model)
    assert error_of(lowered, lifted, feeds) < 1e-3
    removed = graphopt.remove_channels(model, selection)
    weight = next(name for name in removed.graph.initializers if name.endswith("conv1.0.weight"))
    stored, expected = (one.graph.initializers[key].const_value for one, key in
                        ((lowered, f"{weight}_quantized"), (removed, weight)))  # fmt: skip
    assert stored is not None
    assert expected is not None
    assert stored.shape == expected.shape
