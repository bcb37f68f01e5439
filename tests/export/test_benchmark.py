"""The stopwatch: it must see a slower model, and must not see a difference where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import DataError
from graphopt.export.benchmark import benchmark
from graphopt.export.verify import verify
from graphopt.export.write import save
from graphopt.ir.timing import Benchmark, Latency, Speed
from tests.export.test_write import with_weight


def chain(length: int) -> ir.Model:
    body = " ".join(f"v{index + 1} = MatMul (v{index}, v0)" for index in range(length))
    return ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[96,96] v0) => (float[96,96] y) '
        f"{{ {body} y = Relu (v{length}) }}"
    )


def test_a_longer_chain_is_slower() -> None:
    found = benchmark(chain(2), chain(20), seconds=0.3)
    assert found.is_slower()
    assert found.speeds[1].median < 0.5
    assert found.speeds[0].median == 1.0


def test_the_same_model_twice_is_not_slower() -> None:
    assert not benchmark(chain(10), chain(10), seconds=0.5).is_slower()


def test_noise_is_not_called_slower() -> None:
    latency = Latency(1.0, 0.9, 1.1)
    noisy = Benchmark(("a", "b"), (latency, latency), (Speed(1, 1, 1), Speed(0.95, 0.8, 1.1)), 10, 1, "cpu")
    steady = Benchmark(("a", "b"), (latency, latency), (Speed(1, 1, 1), Speed(0.95, 0.94, 0.96)), 10, 1, "cpu")
    assert not noisy.is_slower()
    assert steady.is_slower()


def test_quartiles_enclose_the_median_and_json_is_plain() -> None:
    import json

    found = benchmark(chain(2), chain(3), names=("short", "long"), seconds=0.1)
    for latency in found.latencies:
        assert 0 < latency.low <= latency.median <= latency.high
    document = json.loads(json.dumps(found.to_json()))
    assert [model["name"] for model in document["models"]] == ["short", "long"]
    assert "interleaved rounds" in str(found)


def test_nothing_to_time_and_wrong_inputs() -> None:
    with pytest.raises(DataError, match="no model"):
        benchmark()
    with pytest.raises(DataError, match="shape"):
        benchmark(chain(2), inputs={"v0": np.zeros((1, 2, 3), np.float32)})


def test_verify_judges_exactness_and_tolerance() -> None:
    model, close, far = with_weight(16), with_weight(16), with_weight(16)
    weight = model.graph.initializers["w"].const_value.numpy()
    close.graph.initializers["w"].const_value = ir.tensor(weight * np.float32(1.001), name="w")
    far.graph.initializers["w"].const_value = ir.tensor(-weight, name="w")
    assert verify(model, model).passed
    assert not verify(model, close).passed
    assert verify(model, close, tolerance=0.01).passed
    assert not verify(model, far, tolerance=0.01).passed
    assert "different" in str(verify(model, far))


def test_verify_refuses_models_with_another_interface() -> None:
    with pytest.raises(DataError, match="different inputs"):
        verify(with_weight(16), chain(2))


def test_models_may_be_files_and_names_must_fit(tmp_path: Path) -> None:
    path = save(chain(2), tmp_path / "m.onnx")
    assert benchmark(path, str(path), seconds=0.1, inputs=np.eye(96, dtype=np.float32)).rounds > 0
    with pytest.raises(DataError, match="1 names for 2 models"):
        benchmark(path, path, names=["one"])


def test_public_calls_take_what_optimize_takes(tmp_path: Path) -> None:
    path = save(with_weight(16), tmp_path / "m.onnx")
    x = np.ones((1, 16), np.float32)
    for inputs in (x, (x,), {"x": x}, [x, {"x": x}], None):
        assert graphopt.compare(path, str(path), inputs).error < 1e-6
    assert not graphopt.diff(path, onnx.load(path))
    for call in (graphopt.load, lambda source: graphopt.diff(source, source), graphopt.benchmark):
        with pytest.raises(graphopt.LoadError, match="NoneType"):
            call(None)
    with pytest.raises(graphopt.WriteError, match="ModelProto cannot be saved"):
        save(onnx.load(path), tmp_path / "n.onnx")  # type: ignore[arg-type]
