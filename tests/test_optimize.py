"""The one call: torch and ONNX in, the interface kept, data used and refused, and every bad input explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import graphopt
from graphopt.errors import DataError, GraphoptError, InvalidGraphError, LoadError, TraceError, WriteError
from graphopt.ir.compare import compare_arrays, within_exact
from graphopt.ir.session import open_session
from tests.zoo.models import zoo_feeds, zoo_model

X = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="module")
def resnet() -> ir.Model:
    return zoo_model("resnet")


@pytest.mark.torch
def test_onnx_in_every_form(resnet: ir.Model, tmp_path: Path) -> None:
    path = graphopt.save(resnet, tmp_path / "m.onnx")
    texts = set()
    for source in (path, str(path), path.read_bytes(), onnx.load(path), resnet):
        result = graphopt.optimize(source, recipe="exact", quiet=True)
        texts.add(str([(node.op_type, node.name) for node in result.model.graph]))
        assert "fold-batchnorm" in str(result.report)
    assert len(texts) == 1


@pytest.mark.torch
def test_the_interface_is_kept(resnet: ir.Model) -> None:
    result = graphopt.optimize(resnet, recipe="int8", quiet=True)
    for kind in ("inputs", "outputs"):
        before = [(v.name, v.type, str(v.shape)) for v in getattr(resnet.graph, kind)]
        assert [(v.name, v.type, str(v.shape)) for v in getattr(result.model.graph, kind)] == before


@pytest.mark.torch
def test_the_users_model_is_not_changed(resnet: ir.Model) -> None:
    before = ir.to_onnx_text(resnet)
    graphopt.optimize(resnet, recipe="int8", quiet=True)
    assert ir.to_onnx_text(resnet) == before


@pytest.mark.torch
def test_a_saved_result_computes_the_same(resnet: ir.Model, tmp_path: Path) -> None:
    result = graphopt.optimize(resnet, recipe="exact", quiet=True)
    session = onnxruntime.InferenceSession(result.save(tmp_path / "o.onnx"), providers=["CPUExecutionProvider"])
    feeds = zoo_feeds(resnet)
    expected = open_session(resnet, optimized=False).run_feeds(feeds)
    assert within_exact(expected, session.run(None, feeds))
    assert within_exact(session.run(None, feeds), result.session().run(None, feeds))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["resnet", "mobilenet-v2", "vit", "bert", "llama", "recurrent"])
def test_int8_of_the_zoo_stays_near_the_original(name: str) -> None:
    model = zoo_model(name)
    result = graphopt.optimize(model, recipe="default", quiet=True)
    assert not [step for step in result.report.steps if step.reason and "the pass failed" in step.reason]
    assert result.report.error is not None
    assert result.report.error.rms_error <= 0.1
    feeds = zoo_feeds(model, seed=3)
    for a, b in zip(
        open_session(model, optimized=False).run_feeds(feeds), result.session().run(None, feeds), strict=True
    ):
        assert compare_arrays(a, b).rms_error < 0.2


@pytest.mark.torch
def test_a_module_with_dynamic_batch() -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
    example = torch.randn(2, 8)
    result = graphopt.optimize(module, (example,), dynamic_shapes=({0: "batch"},), recipe="exact", quiet=True)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 8)
        found = result.session().run(None, {result.model.graph.inputs[0].name: x.numpy()})
        assert within_exact([module(x).detach().numpy()], found)


@pytest.mark.torch
def test_a_module_in_train_mode_is_noted_and_left_in_train_mode() -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))
    result = graphopt.optimize(module, (torch.randn(2, 8),), recipe="exact", quiet=True)
    assert module.training
    assert any("train" in sentence for sentence in result.report.notes)


def small() -> ir.Model:
    return ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,4] y) { a = Neg (x) y = Relu (a) }'
    )


def test_calibration_is_counted() -> None:
    data = [np.zeros((2, 4), np.float32), np.ones((3, 4), np.float32)]
    result = graphopt.optimize(small(), recipe="int8", calibration=data, quiet=True)
    assert result.report.data in ("5 calibration samples", "calibration data")


def test_nan_weights_are_reported_not_fatal(resnet: ir.Model) -> None:
    model = resnet.clone()
    name = next(key for key in model.graph.initializers if key.endswith("weight"))
    broken = model.graph.initializers[name].const_value.numpy().copy()
    broken.reshape(-1)[0] = np.nan
    model.graph.initializers[name].const_value = ir.tensor(broken, name=name)
    result = graphopt.optimize(model, recipe="int8", quiet=True)
    assert any("NaN" in sentence and name in sentence for sentence in result.report.notes)


BAD: list[tuple[str, Any, dict[str, Any], type[GraphoptError], str]] = [
    ("no file", "missing.onnx", {}, LoadError, "no such file"),
    ("no model", b"nonsense", {}, LoadError, "not an ONNX model|no ONNX graph"),
    ("a number", 3, {}, DataError, "cannot optimize a int"),
    ("dynamic_shapes with ONNX", small(), {"dynamic_shapes": {}}, DataError, "for torch modules"),
    ("wrong dtype", small(), {"args": np.zeros((2, 4), np.int64)}, DataError, "x"),
    ("wrong rank", small(), {"args": np.zeros((2, 4, 1), np.float32)}, DataError, "x"),
    ("wrong size", small(), {"args": np.zeros((2, 5), np.float32)}, DataError, "x"),
    ("too many", small(), {"args": (np.zeros((2, 4)), np.zeros(2))}, DataError, "2 example inputs"),
    ("unknown name", small(), {"args": {"z": np.zeros((2, 4), np.float32)}}, DataError, "lacks input 'x'"),
    ("not an array", small(), {"args": "hello"}, DataError, "x"),
    ("empty calibration", small(), {"calibration": []}, DataError, "empty|no "),
    ("misfit calibration", small(), {"calibration": [np.zeros((2, 5), np.float32)]}, DataError, "x"),
    ("calibration of pairs", small(), {"calibration": [(np.zeros((2, 4), np.float32), 1)]}, DataError, "2|label"),
    ("calibration no iterable", small(), {"calibration": 5}, DataError, "iterable|iterate"),
    ("evaluate no function", small(), {"evaluate": 3}, DataError, "not callable"),
    ("max_drop alone", small(), {"max_drop": 0.1}, DataError, "needs `evaluate`"),
    ("negative tolerance", small(), {"tolerance": -1.0}, DataError, "at least 0"),
    ("NaN tolerance", small(), {"tolerance": float("nan")}, DataError, "at least 0"),
    ("unknown target", small(), {"target": "tpu"}, GraphoptError, "unknown target"),
    ("unknown recipe", small(), {"recipe": "magic"}, GraphoptError, "unknown recipe"),
]


@pytest.mark.parametrize(("model", "options", "kind", "message"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_bad_input_is_explained(model: Any, options: dict[str, Any], kind: type[GraphoptError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        graphopt.optimize(model, quiet=True, **{"recipe": "int8", **options})
    assert caught.value.help or caught.value.where


def test_cuda_without_cuda_is_explained() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    with pytest.raises(GraphoptError, match="needs CUDAExecutionProvider"):
        graphopt.optimize(small(), target="cuda", quiet=True)


@pytest.mark.torch
def test_a_module_without_args_is_explained() -> None:
    import torch

    with pytest.raises(DataError):
        graphopt.optimize(torch.nn.Linear(2, 2), quiet=True)


@pytest.mark.torch
def test_a_module_that_cannot_be_exported_names_the_line() -> None:
    import torch

    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:  # the line to be named
                return x
            return -x

    with pytest.raises(TraceError, match="depends on the values") as caught:
        graphopt.optimize(Branch(), (torch.randn(3),), quiet=True)
    assert "test_optimize.py" in str(caught.value)


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    result = graphopt.optimize(small(), recipe="exact", quiet=True)
    with pytest.raises(WriteError, match="folder does not exist"):
        result.save(tmp_path / "no" / "such" / "m.onnx")
    with pytest.raises(WriteError, match="is a directory"):
        result.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_custom_operator_is_explained() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21, "com.acme": 1]> g (float[4] x) => (float[4] y) '
        "{ y = com.acme.Warp (x) }"
    )
    with pytest.raises(InvalidGraphError, match="Warp"):
        graphopt.optimize(model, quiet=True)
