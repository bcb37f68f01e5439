"""What is inserted computes in torch what it folds to in ONNX: quantizers, masks, gates, alone and together."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import onnx_ir as ir
import pytest
import torch

import graphopt
from graphopt.errors import GraphoptError, LiftError, SelectionError
from graphopt.ir.compare import compare_outputs, reference_outputs
from graphopt.ir.lifted import Insertion, LiftedModule, as_array
from graphopt.ir.lower import Folding, Link
from graphopt.ir.quantizer import TensorPlan
from graphopt.ir.session import open_session
from graphopt.passes import ALL_PASSES, Context
from graphopt.passes.quantize import Quantize
from graphopt.train import FakeQuant, Mask, Scale
from tests.zoo.models import zoo_feeds, zoo_model

pytestmark = pytest.mark.torch
MODELS = ("resnet", "mobilenet-v2", "vit", "bert", "conv-1d-3d")


def parsed(body: str) -> ir.Model:
    return graphopt.load(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {body}'))


def error_of(lowered: ir.Model, lifted: LiftedModule, feeds: dict[str, np.ndarray]) -> float:
    with torch.no_grad():
        found = [as_array(value) for value in lifted.eval().run_feeds(feeds).values()]
    return compare_outputs(reference_outputs(lowered, [feeds])[0], found)


LAYERS = """(float[n,4] x) => (float[n,3] y)
    <float[4,8] w = {WEIGHTS32}, float[8] b = {0.1, -0.2, 0.3, 0, 0, 0.1, 0, 0.2}, float[8,3] v = {WEIGHTS24}>
    { h = MatMul(x, w) i = Add(h, b) a = Relu(i) y = MatMul(a, v) }"""


def layers() -> ir.Model:
    generator = np.random.default_rng(0)
    text = LAYERS
    for count in (32, 24):
        numbers = ", ".join(f"{number:.4f}" for number in generator.normal(size=count))
        text = text.replace(f"WEIGHTS{count}", numbers)
    return parsed(text)


FEEDS = {"x": np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)}


# FakeQuant.


@pytest.mark.parametrize(("bits", "signed"), [*itertools.product((2, 3, 4, 7, 8), (False, True))])
def test_a_quantizer_is_bit_exact(bits: int, signed: bool) -> None:
    """Dense inputs, ties and values far outside the range included."""
    model = parsed("(float[3,n] x) => (float[3,n] y) { y = Neg(x) }")
    zero = 0 if signed else 2 ** (bits - 1) - 1
    lifted = graphopt.lift(model)
    lifted.attach(
        "quantizers", FakeQuant([TensorPlan("x", "activation", bits, signed, None, (0.37,), (zero,), "calibration")])
    )
    values = np.concatenate([np.linspace(-100, 100, 5000), (np.arange(-300, 300) + 0.5) * np.float32(0.37)])
    feeds = {"x": np.tile(values.astype(np.float32), (3, 1))}
    found = lifted.run_feeds(feeds)["y"].detach().numpy()
    (expected,) = reference_outputs(graphopt.lower(lifted, model), [feeds])[0]
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) <= 2**bits


@pytest.mark.parametrize("bits", [3, 8])
def test_activations_by_channel_are_bit_exact(bits: int) -> None:
    model = parsed("(float[3,n] x) => (float[3,n] y) { y = Neg(x) }")
    lifted = graphopt.lift(model)
    plan = TensorPlan("x", "activation", bits, False, 0, (0.1, 0.2, 0.3), (0, 1, 2), "calibration")
    lifted.attach("quantizers", FakeQuant([plan]))
    feeds = {"x": np.tile(np.linspace(-100, 100, 5000).astype(np.float32), (3, 1))}
    found = lifted.run_feeds(feeds)["y"].detach().numpy()
    np.testing.assert_array_equal(found, reference_outputs(graphopt.lower(lifted, model), [feeds])[0][0])
    assert all(len(np.unique(row)) <= 2**bits for row in found)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_by_channel_are_bit_exact(bits: int) -> None:
    model = layers()
    lifted = graphopt.lift(model)
    lifted.attach("quantizers", FakeQuant([TensorPlan("w", "weight", bits, True, 1, (), (), "weights")]))
    lowered = graphopt.lower(lifted, model)
    session = open_session(lowered, optimized=False, extra_outputs=["w_DequantizeLinear"])
    folded = session.run_feeds(FEEDS)[-1]
    trained = lifted.with_outputs(["w"]).run_feeds(FEEDS)["w"].detach().numpy()
    np.testing.assert_array_equal(folded, trained)
    assert all(len(np.unique(column)) <= 2**bits for column in trained.T)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_quantizers_of_whole_networks_fold(name: str, bits: int) -> None:
    """A value next to a tie may land one step apart where sums are rounded differently before it."""
    model, lifted = zoo_model(name), graphopt.lift(zoo_model(name))
    feeds = zoo_feeds(model)
    quantizers = FakeQuant.for_linear(model, weight_bits=bits, activation_bits=bits)
    lifted.attach("quantizers", quantizers)
    quantizers.prepare(lifted, [lifted.tensors(feeds)])
    lowered = graphopt.lower(lifted, model)
    assert error_of(lowered, lifted, feeds) < (1e-5 if bits == 8 else 1e-2)
    kinds = [node.op_type for node in lowered.graph]
    weights = {entry.name for entry in quantizers.plan() if entry.role == "weight"}
    assert kinds.count("DequantizeLinear") == len(quantizers.plan()) + len(quantizers.bias_names)
    assert kinds.count("QuantizeLinear") == len(quantizers.plan()) - len(weights)
    assert not weights & set(lowered.graph.initializers)


def test_gradients_are_those_of_lsq() -> None:
    """Against the formulas of the paper, and against differences where the value is clamped."""
    scale, low, high = 0.5, 0, 7
    x = torch.tensor([-1.0, 0.3, 1.1, 3.0, 9.0], requires_grad=True)
    quantizers = FakeQuant([TensorPlan("x", "activation", 3, False, None, (scale,), (0,), "calibration")])
    model = parsed("(float[5] x) => (float[5] y) { y = Neg(x) }")
    lifted = graphopt.lift(model)
    lifted.attach("quantizers", quantizers)
    lifted(x).sum().backward()
    ratio = x.detach() / scale
    inside = (ratio.round() >= low) & (ratio.round() <= high)
    assert x.grad is not None
    assert (-x.grad).tolist() == inside.float().tolist()
    slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high)).sum()
    (parameter,) = [value for name, value in quantizers.named_parameters() if name.endswith("log_ratio")]
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, -(scale * slope / high**0.5).reshape(1))
    (zero,) = [value for name, value in quantizers.named_parameters() if name.endswith("zero_point")]
    assert zero.grad is not None
    torch.testing.assert_close(zero.grad, torch.tensor([scale * float((~inside).sum()) / high**0.5]))


def test_ranges_have_the_least_squared_error() -> None:
    """An outlier is clipped where that is better for the others, and not where it is not."""
    weight = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([8.0])])
    quantizers = FakeQuant([TensorPlan("w", "weight", 3, True, None, (), (), "weights")])
    quantizers.quantizers["q0"].fit(weight)
    (plan,) = quantizers.plan()
    assert plan.scale[0] * 3 < 4
    full = TensorPlan("w", "weight", 3, True, None, (8 / 3,), (0,), "weights")

    def error(entry: TensorPlan) -> float:
        return float(np.square(entry.quantize(weight.numpy()) * np.float32(entry.scale[0]) - weight.numpy()).sum())

    assert error(plan) < error(full)


def test_plans_survive_json_and_are_those_of_the_quantize_pass() -> None:
    model = zoo_model("resnet")
    ALL_PASSES["fold-batchnorm"]().run(model, Context())
    planned = Quantize(form="static").plan(model, Context())
    known = {value.name for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    tensors = [tensor for tensor in planned.to_json()["tensors"] if tensor["name"] in known]
    assert len(tensors) > 10
    quantizers = FakeQuant(json.loads(json.dumps({"tensors": tensors})))
    lifted = graphopt.lift(model)
    lifted.attach("quantizers", quantizers)
    feeds = zoo_feeds(model)
    assert error_of(graphopt.lower(lifted, model), lifted, feeds) < 1e-5
    again = FakeQuant(json.loads(json.dumps(quantizers.to_json())))
    assert [(p.name, p.scale) for p in again.plan()] == [(p.name, p.scale) for p in quantizers.plan()]


def test_training_moves_scales_and_weights_and_is_better_than_none() -> None:
    model = layers()
    teacher = graphopt.lift(model)
    lifted = graphopt.lift(model)
    quantizers = FakeQuant.for_linear(model, weight_bits=3, activation_bits=5, edge_bits=2)
    lifted.attach("quantizers", quantizers)
    data = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    quantizers.prepare(lifted, [[data]])
    before = quantizers.plan()

    def loss() -> torch.Tensor:
        return (lifted(data) - teacher(data).detach()).square().mean()

    first = float(loss().detach())
    optimizer = torch.optim.Adam(lifted.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.5 * first
    assert all(a.scale != b.scale for a, b in zip(before, quantizers.plan(), strict=True))
    lowered = graphopt.lower(lifted, model)
    assert error_of(lowered, lifted, {"x": data.numpy()}) < 1e-5


def test_ranges_travel_in_state_dicts() -> None:
    model = layers()
    lifted, other = graphopt.lift(model), graphopt.lift(model)
    quantizers = FakeQuant.for_linear(model)
    lifted.attach("quantizers", quantizers)
    quantizers.prepare(lifted, [lifted.tensors(FEEDS)])
    other.attach("quantizers", FakeQuant.for_linear(model))
    with pytest.raises(LiftError, match="no range yet"):
        other.run_feeds(FEEDS)
    other.load_state_dict(lifted.state_dict())
    torch.testing.assert_close(other.run_feeds(FEEDS), lifted.run_feeds(FEEDS))


def test_quantizers_refuse_what_does_not_fit() -> None:
    entry = TensorPlan("nowhere", "activation", 8, False, None, (1.0,), (0,), "calibration")
    with pytest.raises(LiftError, match="two quantizers"):
        FakeQuant([entry, entry])
    lifted = graphopt.lift(layers())
    with pytest.raises(LiftError, match="no value 'nowhere'"):
        lifted.attach("quantizers", FakeQuant([entry]))
    assert not len(lifted.insertions)
    lifted.run_feeds(FEEDS)


# Mask.


@pytest.mark.parametrize(("name", "scope"), [*((name, "layer") for name in MODELS), ("resnet", "global")])
def test_unstructured_masks_fold_to_zeros(name: str, scope: str) -> None:
    model, lifted = zoo_model(name), graphopt.lift(zoo_model(name))
    mask = Mask.unstructured(model, 0.75, scope=scope, ramp=0)
    lifted.attach("mask", mask)
    assert mask.sparsity == pytest.approx(0.75, abs=0.01)
    feeds = zoo_feeds(model)
    lowered = graphopt.lower(lifted, model)
    assert error_of(lowered, lifted, feeds) < 1e-5
    arrays = [lowered.graph.initializers[key].const_value for key in mask.names.values()]
    zeros = sum(int((array.numpy() == 0).sum()) for array in arrays if array is not None)
    assert zeros == pytest.approx(0.75 * sum(array.size for array in arrays if array is not None), rel=0.02)


def test_masked_weights_have_no_effect_and_no_gradient() -> None:
    model, lifted = layers(), graphopt.lift(layers())
    mask = Mask.unstructured(model, 0.5, ramp=0)
    lifted.attach("mask", mask)
    lifted.run_feeds(FEEDS)["y"].square().sum().backward()
    for key, name in mask.names.items():
        kept = mask.masks[key].mask
        gradient = lifted.get_parameter(name).grad
        assert isinstance(kept, torch.Tensor)
        assert gradient is not None
        assert not gradient[~kept].any()
        weight = lifted.get_parameter(name).detach().abs()
        assert weight[kept].min() >= weight[~kept].max()


@pytest.mark.parametrize(
    ("name", "n", "m"), [*((name, 2, 4) for name in MODELS), ("resnet", 1, 4), ("vit", 1, 2), ("resnet", 4, 8)]
)
def test_n_of_m_masks_keep_n_of_every_m_inputs(name: str, n: int, m: int) -> None:
    model, lifted = zoo_model(name), graphopt.lift(zoo_model(name))
    mask = Mask.n_of_m(model, n, m)
    lifted.attach("mask", mask)
    lowered = graphopt.lower(lifted, model)
    axes = {"Conv": 1, "ConvTranspose": 0}
    checked = 0
    for node in lowered.graph:
        for value in node.inputs[1:2]:
            if value is not None and value.name in mask.names.values() and node.op_type in axes:
                assert value.const_value is not None
                rows = np.moveaxis(value.const_value.numpy(), axes[node.op_type], -1)
                assert (np.count_nonzero(rows.reshape(*rows.shape[:-1], -1, m), axis=-1) <= n).all()
                checked += 1
    assert checked or name in ("vit", "bert")
    assert all("multiple" in reason for reason in mask.skipped.values())
    assert error_of(lowered, lifted, zoo_feeds(model)) < 1e-5


def test_masks_follow_the_weights_while_the_sparsity_rises() -> None:
    model, lifted = layers(), graphopt.lift(layers())
    mask = Mask.unstructured(model, 0.5, ramp=0.5)
    lifted.attach("mask", mask)
    copied = copy.deepcopy(lifted)
    assert mask.sparsity == 0
    seen: list[float] = []
    for step in range(20):
        mask.advance(step, 20)
        seen.append(mask.sparsity)
        if step == 4:
            with torch.no_grad():
                lifted.get_parameter("w").copy_(lifted.get_parameter("w").flip(0))
    assert seen == sorted(seen)
    assert seen[9:] == [0.5] * 11
    weight, kept = lifted.get_parameter("w").detach().abs(), mask.masks["m0"].mask
    assert weight[kept].min() >= weight[~kept].max()
    of_copy = copied.insertions["mask"]
    assert isinstance(of_copy, Mask)
    for step in range(20):
        of_copy.advance(step, 20)
    assert of_copy.sparsity == 0.5
    weight, kept = copied.get_parameter("w").detach().abs(), of_copy.masks["m0"].mask
    assert weight[kept].min() >= weight[~kept].max()


@pytest.mark.parametrize("name", MODELS)
def test_masked_units_fold_to_their_removal(name: str) -> None:
    model, lifted = zoo_model(name), graphopt.lift(zoo_model(name))
    groups = [group for group in graphopt.channel_groups(model) if group.prunable and group.exact]
    selection = {group.name: list(range(group.units // 2)) for group in groups}
    lifted.attach("units", Mask.units(model, selection))
    lowered = graphopt.lower(lifted, model)
    feeds = zoo_feeds(model)
    assert error_of(lowered, lifted, feeds) < 1e-5
    zeroed = graphopt.lift(model)
    zeroed.attach("units", Mask.units(model, selection, remove=False))
    assert error_of(graphopt.lower(zeroed, model), zeroed, feeds) < 1e-5

    def size(one: ir.Model) -> int:
        return sum(value.const_value.size for value in one.graph.initializers.values() if value.const_value is not None)

    assert size(lowered) < 0.9 * size(model)


def test_masked_units_stay_removable_after_training() -> None:
    model, lifted = layers(), graphopt.lift(layers())
    (group,) = [group for group in graphopt.channel_groups(model) if group.prunable]
    lifted.attach("units", Mask.units(model, {group.name: [0, 3]}))
    optimizer = torch.optim.SGD(lifted.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        lifted.run_feeds(FEEDS)["y"].square().mean().backward()
        optimizer.step()
    lowered = graphopt.lower(lifted, model)
    assert error_of(lowered, lifted, FEEDS) < 1e-6
    stored = lowered.graph.initializers["w"].const_value
    assert stored is not None
    assert list(stored.shape.numpy()) == [4, 6]


def test_masks_refuse_what_does_not_fit() -> None:
    model = layers()
    with pytest.raises(GraphoptError, match="sparsity is 1"):
        Mask.unstructured(model, 1.0)
    with pytest.raises(GraphoptError, match="scope"):
        Mask.unstructured(model, 0.5, scope="all")
    with pytest.raises(GraphoptError, match="no weight"):
        Mask.unstructured(model, 0.5, weights=["nothing*"])
    with pytest.raises(GraphoptError, match="one string"):
        Mask.unstructured(model, 0.5, weights="w")
    with pytest.raises(GraphoptError, match="no pattern"):
        Mask.n_of_m(model, 4, 4)
    with pytest.raises(SelectionError):
        Mask.units(model, {"nothing": [0]})
    with pytest.raises(LiftError, match="no weight 'nothing'"):
        graphopt.lift(model).attach("mask", Mask({"nothing": torch.ones(1, dtype=torch.bool)}))


# Scale.


@pytest.mark.parametrize("name", MODELS)
def test_gates_fold_into_weights(name: str) -> None:
    model, lifted = zoo_model(name), graphopt.lift(zoo_model(name))
    gates = Scale.for_channels(model, l1=0.5)
    lifted.attach("gates", gates)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.uniform_(-1, 1)
    lowered = graphopt.lower(lifted, model)
    assert error_of(lowered, lifted, zoo_feeds(model)) < 1e-5
    assert len(lowered.graph) == len(model.graph)
    total = sum(float(np.abs(gate).sum()) for gate in gates.values().values())
    assert float(gates.penalty().detach()) == pytest.approx(0.5 * total, rel=1e-5)


def test_gates_that_no_weight_takes_become_one_multiplication() -> None:
    model, lifted = layers(), graphopt.lift(layers())
    gates = Scale({"a": 1}, {"a": 8})
    lifted.attach("gates", gates)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.uniform_(-1, 1)
    lowered = graphopt.lower(lifted, model)
    assert [node.op_type for node in lowered.graph] == ["MatMul", "Add", "Relu", "Mul", "MatMul"]
    assert error_of(lowered, lifted, FEEDS) < 1e-6


def test_the_penalty_closes_the_gates_of_channels_that_nothing_needs() -> None:
    model = layers()
    stored = model.graph.initializers["v"].const_value
    assert stored is not None
    weight = stored.numpy().copy()
    weight[5] = 0  # the output does not depend on channel 5
    model.graph.initializers["v"].const_value = ir.tensor(weight, name="v")
    teacher, lifted = graphopt.lift(model), graphopt.lift(model)
    gates = Scale.for_channels(model, l1=1e-3)
    lifted.attach("gates", gates)
    data = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(gates.parameters(), 3e-2)
    for _ in range(100):
        optimizer.zero_grad()
        ((lifted(data) - teacher(data).detach()).square().mean() + gates.penalty()).backward()
        optimizer.step()
    (scores,) = gates.scores(model).values()
    assert int(np.argmin(scores)) == 5
    assert scores[5] < 0.1 * np.median(scores)


# Together, and the contract itself.


def test_insertions_stack_in_the_order_of_attachment() -> None:
    model, lifted = zoo_model("resnet"), graphopt.lift(zoo_model("resnet"))
    feeds = zoo_feeds(model)
    lifted.attach("mask", Mask.n_of_m(model))
    quantizers = FakeQuant.for_linear(model, weight_bits=4, activation_bits=4)
    lifted.attach("quantizers", quantizers)
    lifted.attach("gates", Scale.for_channels(model))
    quantizers.prepare(lifted, [lifted.tensors(feeds)])
    with torch.no_grad():
        for parameter in lifted.insertions["gates"].parameters():
            parameter.uniform_(0.5, 1.5)
    assert list(lifted.insertions) == ["mask", "quantizers", "gates"]
    copied = copy.deepcopy(lifted)
    lowered = graphopt.lower(lifted, model)
    assert error_of(lowered, lifted, feeds) < 1e-2
    assert error_of(lowered, copied, feeds) < 1e-2


def test_a_member_of_ones_own_and_a_name_that_is_taken() -> None:
    class Shift(Insertion):
        def __init__(self) -> None:
            super().__init__()
            self.amount = torch.nn.Parameter(torch.tensor(2.0))

        def insert(self, lifted: LiftedModule, path: str) -> None:
            lifted.place("i", path, consumers=nodes[2:3])

        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + self.amount

        def fold(self, folding: Folding) -> None:
            amount = folding.add_constant("amount", self.amount.detach().numpy())
            folding.insert_after("i", [Link("Add", [amount])])

    model = layers()
    nodes = [node.name or "" for node in model.graph]
    lifted = graphopt.lift(model)
    lifted.attach("shift", Shift())
    assert error_of(graphopt.lower(lifted, model), lifted, FEEDS) < 1e-6
    with pytest.raises(LiftError, match="cannot be named 'shift'"):
        lifted.attach("shift", Shift())
    with pytest.raises(LiftError, match="cannot be named"):
        lifted.attach("a b", Shift())
    with pytest.raises(LiftError, match="does not read"):
        lifted.place("x", "insertions.shift", consumers=["nobody"])


def test_an_insertion_at_a_graph_output_keeps_its_name() -> None:
    model, lifted = layers(), graphopt.lift(layers())
    entry = TensorPlan("y", "activation", 8, False, None, (0.05,), (128,), "calibration")
    lifted.attach("quantizers", FakeQuant([entry]))
    lowered = graphopt.lower(lifted, model)
    assert [value.name for value in lowered.graph.outputs] == ["y"]
    assert error_of(lowered, lifted, FEEDS) < 1e-6
