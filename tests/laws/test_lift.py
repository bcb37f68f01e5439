"""The law of the lift over the zoo: the module computes what onnxruntime computes, lowering gives the graph back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

import graphopt
from graphopt.errors import DataError
from graphopt.ir.compare import compare_arrays, reference_outputs
from graphopt.ir.lifted import LiftedModule, as_array
from graphopt.passes import Context
from graphopt.recipe import preset
from tests.zoo.models import CORE, NAMES, QUICK, zoo_feeds, zoo_model

pytestmark = pytest.mark.torch
ZOO = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
TOLERANCE = 1e-4
"""Largest difference over the scale of an output."""
CHEAP = ("mobilenet-v2", "bert", "llama", "recurrent", "mlp")
"""One network of each kind, for what takes seconds."""
OF_CORE_FAST = [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
CHEAP_FAST = [name if name in CHEAP else pytest.param(name, marks=pytest.mark.slow) for name in CORE]
WITHOUT_GRADIENT = {
    "quantized-conv": "it computes in integers",
    "quantized-linear": "it computes in integers",
}


def worst_error(model: ir.Model, lifted: LiftedModule, feeds: dict[str, np.ndarray]) -> float:
    """How far the lifted outputs are from onnxruntime's without optimisations."""
    (expected,) = reference_outputs(model, [feeds])
    with torch.no_grad():
        found = lifted.run_feeds(feeds)
    return max(compare_arrays(a, as_array(b)).error for a, b in zip(expected, found.values(), strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_lifted_equals_onnxruntime(name: str) -> None:
    """At two sizes where the model takes them; and lowered again it is the graph that it was."""
    model = zoo_model(name)
    lifted = graphopt.lift(model)
    assert worst_error(model, lifted, zoo_feeds(model)) <= TOLERANCE
    lowered = graphopt.lower(lifted, model)
    assert not graphopt.diff(model, lowered)
    for key, value in model.graph.initializers.items():
        assert value.const_value is lowered.graph.initializers[key].const_value
    try:
        larger = zoo_feeds(model, scale=2, seed=1)
        reference_outputs(model, [larger])
    except DataError:
        pass  # the model takes one size only
    else:
        assert worst_error(model, lifted, larger) <= TOLERANCE


@pytest.mark.parametrize("name", OF_CORE_FAST)
def test_every_parameter_gets_a_gradient_or_is_cut_off_in_the_graph(name: str) -> None:
    """A step of training changes the outputs, and what it changed arrives in the lowered model."""
    if name in WITHOUT_GRADIENT:
        pytest.skip(WITHOUT_GRADIENT[name])
    model = zoo_model(name)
    feeds = zoo_feeds(model)
    lifted = graphopt.lift(model)
    outputs = [value for value in lifted.run_feeds(feeds).values() if value.is_floating_point() and value.requires_grad]
    if not outputs:
        pytest.skip("no output depends on a parameter in a differentiable way")
    sum(output.square().mean() for output in outputs).backward()
    moved = [parameter for parameter in lifted.parameters() if parameter.grad is not None]
    assert moved
    with torch.no_grad():
        for parameter in moved:
            assert torch.isfinite(parameter.grad).all()
            scale = parameter.abs().mean() / (parameter.grad.abs().mean() + 1e-12)
            parameter.sub_(1e-3 * scale * parameter.grad)
    lowered = graphopt.lower(lifted, model)
    assert worst_error(lowered, lifted, feeds) <= TOLERANCE


@pytest.mark.parametrize(
    "name", [name if name in CHEAP else pytest.param(name, marks=pytest.mark.slow) for name in CORE]
)
def test_compiled_equals_eager(name: str) -> None:
    """Traced by dynamo, whole where no value decides what runs, and dynamic in the sizes that are."""
    model = zoo_model(name)
    lifted = graphopt.lift(model)
    torch._dynamo.reset()
    compiled = torch.compile(lifted, backend="eager", fullgraph=True, dynamic=True)
    for scale in (1, 2):
        try:
            feeds = zoo_feeds(model, scale=scale)
            reference_outputs(model, [feeds])
        except DataError:
            continue
        inputs = lifted.tensors(feeds)
        with torch.no_grad():
            expected, found = lifted(*inputs), compiled(*inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CORE)
def test_bfloat16_computes_in_bfloat16(name: str) -> None:
    model = zoo_model(name)
    feeds = zoo_feeds(model)
    lifted = graphopt.lift(model).to(torch.bfloat16)
    with torch.no_grad():
        found = lifted.run_feeds(feeds)
    (expected,) = reference_outputs(model, [feeds])
    for wanted, got in zip(expected, found.values(), strict=True):
        assert got.dtype == torch.bfloat16
        assert compare_arrays(wanted, got.float().numpy()).rms_error < 0.1


@pytest.mark.parametrize(
    "name", [name if name in CHEAP else pytest.param(name, marks=pytest.mark.slow) for name in CORE]
)
@pytest.mark.parametrize("recipe", ["default", "int8"])
def test_optimized_models_lift(name: str, recipe: str) -> None:
    """What the passes emit (quantized operators, fused attention, merged layers) has torch functions too."""
    model = zoo_model(name)
    for single in preset(recipe).passes:
        single.run(model, Context())
    assert worst_error(model, graphopt.lift(model), zoo_feeds(model)) <= TOLERANCE
