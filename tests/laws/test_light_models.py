"""The light models of the `onnx` wheel (opset 9, initializers as inputs) against their own reference outputs.

Their weights are constants made by ConstantOfShape, so that a file of a few kilobytes stands for a whole network.
The larger ones run with the slow tests.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

import graphopt
from graphopt.ir.check import check_structure
from graphopt.ir.compare import within_exact
from graphopt.ir.session import open_session
from graphopt.passes import Context
from graphopt.recipe import preset

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
QUICK = ("inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet")
SLOW = ("bvlc_alexnet", "densenet121", "vgg19", "zfnet512")


def feeds_of(path: Path) -> dict[str, np.ndarray]:
    """The input that the wheel's runner makes: an even ramp from 0 to 1."""
    graph = onnx.load(path).graph
    weights = {weight.name for weight in graph.initializer}
    (value,) = (value for value in graph.input if value.name not in weights)
    shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    size = int(np.prod(shape))
    return {value.name: (np.arange(size).reshape(shape) / size).astype(np.float32)}


def expected_of(path: Path) -> np.ndarray:
    proto = onnx.TensorProto.FromString((path.parent / f"{path.stem}_output_0.pb").read_bytes())
    return onnx.numpy_helper.to_array(proto)


def path_of(name: str) -> Path:
    return FOLDER / f"light_{name}.onnx"


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_exact_passes_keep_the_reference_output(name: str) -> None:
    path = path_of(name)
    model = graphopt.load(path)
    before = sum(1 for _ in model.graph)
    for single in preset("exact").passes:
        single.run(model, Context())
    check_structure(model)
    assert sum(1 for _ in model.graph) <= before
    assert within_exact([expected_of(path)], open_session(model).run_feeds(feeds_of(path)))


def test_optimize_keeps_the_reference_output() -> None:
    path = path_of("squeezenet")
    result = graphopt.optimize(path, recipe="exact", quiet=True)
    assert within_exact([expected_of(path)], result.session().run(None, feeds_of(path)))
    assert not result.report.missed


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_lifted_gives_the_reference_output(name: str) -> None:
    path = path_of(name)
    (found,) = graphopt.lift(graphopt.load(path)).run_feeds(feeds_of(path)).values()
    assert within_exact([expected_of(path)], [found.detach().numpy()])
