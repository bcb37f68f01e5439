"""Laws of every exact pass over the core of the zoo: same function, same interface, nothing to do twice."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.ir.check import check_structure
from graphopt.ir.compare import within_exact
from graphopt.ir.fingerprint import fingerprint
from graphopt.ir.session import open_session
from graphopt.passes import ALL_PASSES, Context, Semantics
from graphopt.recipe import preset
from tests.zoo.models import CORE, zoo_feeds, zoo_model

EXACT = sorted(name for name, kind in ALL_PASSES.items() if kind.semantics is Semantics.EXACT)
pytestmark = pytest.mark.torch


def interface(model: ir.Model) -> list[str]:
    return [f"{value.name}: {value.type} {value.shape}" for value in (*model.graph.inputs, *model.graph.outputs)]


def outputs(model: ir.Model, *, optimized: bool, scale: int) -> list[np.ndarray]:
    return open_session(model, optimized=optimized).run_feeds(zoo_feeds(model, scale=scale))


@pytest.mark.parametrize("name", CORE)
def test_each_pass_alone_keeps_function_and_interface(name: str) -> None:
    model = zoo_model(name)
    expected = {scale: outputs(model, optimized=False, scale=scale) for scale in (1, 2)}
    before = interface(model)
    for pass_name in EXACT:
        changed = model.clone()
        if not ALL_PASSES[pass_name]()(changed).modified:
            continue
        check_structure(changed)
        assert interface(changed) == before, pass_name
        for scale, reference in expected.items():
            assert within_exact(reference, outputs(changed, optimized=True, scale=scale)), (pass_name, scale)


@pytest.mark.parametrize("name", CORE)
def test_the_whole_recipe_keeps_the_function_and_is_idempotent(name: str) -> None:
    model = zoo_model(name)
    before = interface(model)
    result = model.clone()
    for single in preset("exact").passes:
        single.run(result, Context())
        again = fingerprint(result)
        single.run(result, Context())
        assert fingerprint(result) == again, f"{single.name} changes its own result"
    check_structure(result)
    assert interface(result) == before
    for scale in (1, 2):
        assert within_exact(outputs(model, optimized=False, scale=scale), outputs(result, optimized=True, scale=scale))


@pytest.mark.parametrize("name", CORE)
def test_tensors_of_the_input_are_never_written_to(name: str) -> None:
    model = zoo_model(name)
    before = {key: value.const_value.numpy().copy() for key, value in model.graph.initializers.items()}
    for single in preset("exact").passes:
        single.run(model.clone(), Context())
    for key, array in before.items():
        assert np.array_equal(
            array, model.graph.initializers[key].const_value.numpy(), equal_nan=array.dtype.kind == "f"
        )


@pytest.mark.parametrize("name", CORE)
def test_batchnorm_is_gone_where_a_linear_operator_is_near(name: str) -> None:
    model = zoo_model(name)
    for single in preset("exact").passes:
        single.run(model, Context())
    left = [node for node in model.graph if node.op_type == "BatchNormalization"]
    assert len(left) == {"densenet": 4}.get(name, 0)
