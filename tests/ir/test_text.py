from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import GraphoptError, LoadError
from graphopt.ir.text import from_text, print_graph, tensor_digest, to_text, topological

MODEL = """<ir_version: 10, opset_import: ["": 21, "com.acme": 1]>
net (float[N,1,4,4] x, bool c) => (float[N,2,4,4] y)
  <float[2,1,3,3] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}, float[2] b = {0.1, -2.5}, int64[2] k = {0, -1}> {
    [first] h = Conv <pads = [1,1,1,1], auto_pad = "NOTSET"> (x, w, b)
    z = If (c) <then_branch = t () => (float[N,2,4,4] p) { p = Relu(h) },
                else_branch = e () => (float[N,2,4,4] q) { q = LeakyRelu <alpha = 0.125> (h) }>
    y = com.acme.Warp (z, , k)
}"""

PRINTED = """\
graph net (opset 21, com.acme 1)
  input  %x: f32[N,1,4,4]
  input  %c: bool[]
  weight %w: f32[2,1,3,3]
  weight %b: f32[2]
  weight %k: i64[2] {0,-1}
  %h = Conv(%x, %w, %b) {auto_pad="NOTSET", pads=[1,1,1,1]}
  %z = If(%c) {else_branch=graph(1), then_branch=graph(1)}
    else_branch:
      %q: f32[N,2,4,4] = LeakyRelu(%h) {alpha=0.125}
      output %q: f32[N,2,4,4]
    then_branch:
      %p: f32[N,2,4,4] = Relu(%h)
      output %p: f32[N,2,4,4]
  %y: f32[N,2,4,4] = com.acme::Warp(%z, _, %k)
  output %y: f32[N,2,4,4]"""


def test_print_graph_is_golden() -> None:
    assert print_graph(from_text(MODEL)) == PRINTED


def test_digests_tell_weights_apart() -> None:
    model = from_text(MODEL)
    before = print_graph(model, weights=True)
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(2))
    assert print_graph(model) == PRINTED
    assert print_graph(model, weights=True) != before
    assert re.search(r"%w: f32\[2,1,3,3\] #[0-9a-f]{12}\n", before)


def test_digest_is_of_the_content_whatever_holds_it() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = tensor_digest(ir.tensor(array))
    assert tensor_digest(ir.tensor(np.asfortranarray(array))) == expected
    assert tensor_digest(ir.from_proto(ir.to_proto(ir.tensor(array)))) == expected
    assert tensor_digest(ir.tensor(array + 1)) != expected


def test_nodes_are_printed_in_topological_order() -> None:
    model = from_text(MODEL)
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])
    assert list(model.graph) != nodes
    assert topological(model.graph) == nodes, "what a body captures counts as an operand"
    assert print_graph(model) == PRINTED


def test_same_text_in_two_processes() -> None:
    program = (
        "import sys; from graphopt.ir.text import from_text, print_graph, to_text; model = from_text(sys.stdin.read());"
        "print(print_graph(model, weights=True)); print(to_text(model))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=MODEL,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
    assert "0x" not in texts.pop()


def test_round_trip_is_a_fixpoint_and_keeps_values() -> None:
    model = from_text(MODEL)
    text = to_text(model)
    again = from_text(text)
    assert to_text(again) == text
    assert print_graph(again, weights=True) == print_graph(model, weights=True)
    assert again.graph.node(0).name == "first"


@pytest.mark.parametrize(
    "array",
    [
        np.array([1 / 3, np.nan, -np.inf, 1e-45, 16777217.0], np.float32),
        np.array([1 / 3, 1e-320, 1e308]),
        np.array([1 / 3, 65504], np.float16),
        np.array([1 / 3, 3e38], ml_dtypes.bfloat16),
        np.array([0.5, 448], ml_dtypes.float8_e4m3fn),
        np.array([-128, 127], np.int8),
        np.array([2**63 - 1, -(2**63)]),
        np.array([True, False]),
        np.zeros((0, 3), np.float32),
        np.array(7, np.int32),
        np.arange(5000, dtype=np.float32) / 7,
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_weights_come_back_bit_by_bit(array: np.ndarray) -> None:
    value = ir.Value(
        name="layer/0.weight 'a'", const_value=ir.Tensor(array), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
    )
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21}), ir_version=10)
    back = from_text(to_text(model)).graph.initializers[value.name].const_value
    assert back.dtype == value.const_value.dtype
    assert back.numpy().shape == array.shape
    assert back.tobytes() == value.const_value.tobytes()


def test_external_weights_are_written_out(tmp_path: Path) -> None:
    model = from_text(MODEL)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    loaded = ir.load(tmp_path / "m.onnx")
    assert print_graph(from_text(to_text(loaded)), weights=True) == print_graph(model, weights=True)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor), "the model is not changed"


def test_a_type_without_syntax_is_refused_and_named() -> None:
    value = ir.Value(
        name="w4", const_value=ir.Tensor(np.array([1, -2], ml_dtypes.int4)), type=ir.TensorType(ir.DataType.INT4)
    )
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21}), ir_version=10)
    with pytest.raises(GraphoptError, match="weight w4"):
        to_text(model)
    assert "%w4: i4[2]" in print_graph(model)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (MODEL.replace("(x, w, b)", "(x, w, b"), r"line 5, column \d+"),
        (MODEL.replace("[first] h =", "[first] h"), "line 4"),
        ("", "line 1"),
        ("hello", "line 1.*hello"),
        (MODEL[:-40], r"line \d"),
    ],
)
def test_bad_text_names_the_line(text: str, where: str) -> None:
    with pytest.raises(LoadError, match="not an ONNX model") as caught:
        from_text(text)
    assert re.search(where, str(caught.value)), str(caught.value)
    assert "\\n" not in str(caught.value)


def test_odd_names_are_quoted() -> None:
    value = ir.Value(name="a, %b\n", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None]))
    model = ir.Model(ir.Graph([value], [value], nodes=[], opset_imports={"": 21}), ir_version=10)
    assert 'input  %"a, %b\\n": f32[?]' in print_graph(model)
