"""Reading models, good and bad: every bad one is refused with what, where and the way out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import InvalidGraphError, LoadError
from graphopt.ir.compare import within_exact
from graphopt.ir.load import load, read
from graphopt.ir.opset import CANONICAL_OPSET
from graphopt.ir.session import open_session


def small_conv(opset: int = 17, *, as_inputs: bool = False) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu; with `as_inputs` the initializers are graph inputs too."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((4, 3, 3, 3)),
        "scale": rng.random(4) + 0.5,
        "shift": rng.standard_normal(4),
        "mean": rng.standard_normal(4),
        "variance": rng.random(4) + 0.5,
    }
    initializers = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])]
    if as_inputs:
        inputs += [
            helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims) for tensor in initializers
        ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 8, 8])]
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21])
@pytest.mark.parametrize("as_inputs", [False, True])
def test_every_opset_comes_out_canonical_and_equal(opset: int, as_inputs: bool) -> None:
    proto = small_conv(opset, as_inputs=as_inputs)
    model = load(proto)
    assert model.opset_imports[""] == CANONICAL_OPSET
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert [node.op_type for node in model.graph] == ["Conv", "BatchNormalization", "Relu"]
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8), dtype=np.float32)
    expected = open_session(ir.from_proto(proto), optimized=False).run(None, {"x": x})
    assert within_exact(expected, open_session(model).run(None, {"x": x}))


def test_sources_agree(tmp_path: Path) -> None:
    proto = small_conv()
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    texts = {ir.to_onnx_text(load(source)) for source in (path, str(path), path.read_bytes(), proto, read(path))}
    assert len(texts) == 1


def test_the_callers_model_is_not_changed() -> None:
    model = ir.from_proto(small_conv(9))
    before = ir.to_onnx_text(model)
    load(model)
    assert ir.to_onnx_text(model) == before


def test_external_data_is_read(tmp_path: Path) -> None:
    onnx.save(
        small_conv(),
        str(tmp_path / "m.onnx"),
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    model = load(tmp_path / "m.onnx")
    assert model.graph.initializers["w"].const_value.numpy().shape == (4, 3, 3, 3)


def test_external_data_missing(tmp_path: Path) -> None:
    onnx.save(
        small_conv(),
        str(tmp_path / "m.onnx"),
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    os.remove(tmp_path / "m.data")
    with pytest.raises(LoadError, match=r"m\.data.* is missing"):
        load(tmp_path / "m.onnx")


def test_external_data_truncated(tmp_path: Path) -> None:
    onnx.save(
        small_conv(),
        str(tmp_path / "m.onnx"),
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(LoadError, match="too short"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "sub/../../secret.bin"])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(b"\0" * 4096)
    proto = small_conv()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(LoadError, match="outside the model's folder"):
        load(folder / "m.onnx")


def test_external_data_behind_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    onnx.save(small_conv(), str(folder / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=0)
    (folder / "m.data").rename(tmp_path / "elsewhere.data")
    (folder / "m.data").symlink_to(tmp_path / "elsewhere.data")
    with pytest.raises(LoadError, match="outside the model's folder"):
        load(folder / "m.onnx")


def test_bytes_with_external_data(tmp_path: Path) -> None:
    onnx.save(
        small_conv(),
        str(tmp_path / "m.onnx"),
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    with pytest.raises(LoadError, match="bytes have no folder"):
        load((tmp_path / "m.onnx").read_bytes())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file"):
        load(tmp_path / "none.onnx")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello, this is no model", "not an ONNX model|no ONNX graph"),
        (bytes(range(256)) * 8, "not an ONNX model|no ONNX graph"),
        (small_conv().SerializeToString()[:200], "not an ONNX model|truncated"),
        (small_conv().graph.node[0].SerializeToString(), "not an ONNX model|no ONNX graph"),
        (TensorProto(name="t").SerializeToString(), "not an ONNX model|no ONNX graph"),
    ],
)
def test_what_is_no_model(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=message):
        load(path)


def test_cycle() -> None:
    proto = small_conv()
    proto.graph.node[0].input[0] = "y"
    with pytest.raises(InvalidGraphError, match=r"cycle|sorted"):
        load(proto)


def test_dangling_name() -> None:
    proto = small_conv()
    proto.graph.node[2].input[0] = "nowhere"
    with pytest.raises(InvalidGraphError, match="'nowhere', which nothing produces"):
        load(proto)


def test_dangling_output() -> None:
    proto = small_conv()
    proto.graph.output[0].name = "nowhere"
    with pytest.raises(InvalidGraphError, match="nowhere"):
        load(proto)


def test_type_error() -> None:
    proto = small_conv()
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(InvalidGraphError, match="type"):
        load(proto)


def test_unknown_operator_of_the_standard_domain() -> None:
    proto = small_conv()
    proto.graph.node[2].op_type = "Reluu"
    with pytest.raises(InvalidGraphError, match="Reluu"):
        load(proto)


@pytest.mark.parametrize(("opset", "message"), [(6, "older than 7"), (99, "newer than")])
def test_opset_out_of_range(opset: int, message: str) -> None:
    proto = small_conv()
    proto.opset_import[0].version = opset
    with pytest.raises(InvalidGraphError, match=message):
        load(proto)


def test_custom_operator_is_kept() -> None:
    proto = small_conv()
    proto.graph.node[2].op_type = "Warp"
    proto.graph.node[2].domain = "com.acme"
    proto.opset_import.append(helper.make_opsetid("com.acme", 1))
    assert [node.op_type for node in load(proto).graph] == ["Conv", "BatchNormalization", "Warp"]


def test_nodes_out_of_order_are_sorted() -> None:
    proto = small_conv()
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    assert [node.op_type for node in load(proto).graph] == ["Conv", "BatchNormalization", "Relu"]


def test_errors_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "none.onnx")
    assert caught.value.where == str(tmp_path / "none.onnx")
    assert caught.value.help


@pytest.mark.parametrize("amount", [2**31 - 1, -(2**31), 2**62])
def test_absurd_padding_is_refused_before_onnx_aborts_on_it(amount: int) -> None:
    proto = small_conv()
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 0, amount, 0, 0, 0, 0]), "pads"))
    proto.graph.node.insert(2, helper.make_node("Pad", ["b", "pads"], ["p"]))
    proto.graph.node[3].input[0] = "p"
    with pytest.raises(InvalidGraphError, match="Pad asks for"):
        load(proto)
