"""Running a graph piece by piece gives what running it whole gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError
from graphopt.ir.pieces import Pieces
from graphopt.ir.session import open_session
from tests.zoo.models import CORE, zoo_feeds, zoo_model

CHAIN = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3] x) => (float[n,3] z)
    <float[3] w = {1, 2, 3}> { a = Mul (x, w) b = Relu (a) c = Add (a, b) z = Neg (c) }"""


def values_of(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for node in model.graph for value in node.outputs}


@pytest.mark.parametrize("name", CORE)
def test_the_same_as_in_one_piece(name: str) -> None:
    model = zoo_model(name)
    feeds = zoo_feeds(model)
    outputs = [value for value in model.graph.outputs if value.producer() is not None]
    expected = open_session(model, optimized=False).run([value.name or "" for value in outputs], dict(feeds))
    pieces = Pieces(model, [feeds], optimized=False, memory=1)  # everything through files
    floats = [node.outputs[0] for node in model.graph if node.outputs[0].dtype == ir.DataType.FLOAT]
    stops = [value for value in floats if value.uses()][::5]
    for value in stops:
        pieces.compute([value])
        pieces.release([value])
    pieces.compute(outputs)
    for value, array in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(pieces.array(value, 0), array, rtol=1e-5, atol=1e-6)


def test_weights_may_change_before_their_readers_run() -> None:
    model = ir.from_onnx_text(CHAIN)
    values = values_of(model)
    pieces = Pieces(model, [{"x": np.ones((1, 3), np.float32)}])
    pieces.compute([values["a"]])
    model.graph.initializers["w"].const_value = ir.tensor(np.zeros(3, np.float32), name="w")
    pieces.compute([values["z"]])
    np.testing.assert_array_equal(pieces.array(values["z"], 0), [[-2, -4, -6]])


def test_redo_runs_nodes_again_with_new_weights() -> None:
    model = ir.from_onnx_text(CHAIN)
    values = values_of(model)
    pieces = Pieces(model, [{"x": np.ones((1, 3), np.float32)}])
    pieces.hold([model.graph.inputs[0]])
    pieces.compute([values["b"]])
    model.graph.initializers["w"].const_value = ir.tensor(np.array([5, 5, 5], np.float32), name="w")
    pieces.redo(model.graph[:2])
    pieces.compute([values["z"]])
    np.testing.assert_array_equal(pieces.array(values["z"], 0), [[-10, -10, -10]])


def test_what_nobody_reads_any_more_is_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    model = ir.from_onnx_text(CHAIN)
    values = values_of(model)
    pieces = Pieces(model, [{"x": np.ones((4, 3), np.float32)}] * 3)
    pieces.compute([values["b"]])
    pieces.release([values["b"]])
    pieces.compute([values["z"]])
    with pytest.raises(KeyError):
        pieces.array(values["b"], 0)
    pieces.compute([values["z"]])  # known already


def test_held_twice_is_released_twice() -> None:
    model = ir.from_onnx_text(CHAIN)
    values = values_of(model)
    pieces = Pieces(model, [{"x": np.ones((1, 3), np.float32)}])
    pieces.hold([values["b"]])
    pieces.compute([values["b"]])
    pieces.release([values["b"]])
    pieces.compute([values["z"]])
    assert pieces.array(values["b"], 0).shape == (1, 3)


def test_pending() -> None:
    model = ir.from_onnx_text(CHAIN)
    values = values_of(model)
    pieces = Pieces(model, [{"x": np.ones((1, 3), np.float32)}])
    assert {node.op_type for node in pieces.pending(values["c"])} == {"Mul", "Relu", "Add"}
    pieces.compute([values["a"]])
    assert {node.op_type for node in pieces.pending(values["c"])} == {"Relu", "Add"}
    assert pieces.pending(values["a"]) == set()


def test_bad_feeds() -> None:
    model = ir.from_onnx_text(CHAIN)
    with pytest.raises(DataError, match="lacks input 'x'"):
        Pieces(model, [{}])
    with pytest.raises(DataError, match="not a single set"):
        Pieces(model, [])
