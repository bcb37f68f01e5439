"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import WriteError
from graphopt.export import write
from graphopt.export.write import save, weight_bytes, write_text
from graphopt.ir.load import load


def with_weight(size: int = 64) -> ir.Model:
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[1,{size}] x, float[{size},{size}] w) => (float[1,{size}] y)'
        " { y = MatMul (x, w) }"
    )
    weight = model.graph.inputs.pop(1)
    weight.const_value = ir.tensor(np.random.default_rng(0).random((size, size), np.float32), name="w")
    model.graph.register_initializer(weight)
    return model


def test_a_saved_file_is_the_model(tmp_path: Path) -> None:
    model = with_weight()
    save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    again = load(tmp_path / "m.onnx")
    assert np.array_equal(again.graph.initializers["w"].const_value.numpy(), model.graph.initializers["w"].const_value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("dtype", ["float16", "int4", "uint2", "bool"])
def test_a_file_says_what_a_proto_says(tmp_path: Path, dtype: str) -> None:
    """Large weights are appended to the file one by one; whoever reads it sees the proto of the whole model."""
    model = with_weight()
    element = ir.DataType[dtype.upper()]
    array = np.random.default_rng(1).integers(0, 2, (33, 101)).astype(element.numpy())
    tensor = ir.Tensor(array, dtype=element, name="t", doc_string="told", metadata_props={"key": "kept"})
    model.graph.register_initializer(ir.Value(name="t", const_value=tensor))
    save(model, tmp_path / "m.onnx")
    found, expected = onnx.load(tmp_path / "m.onnx"), ir.to_proto(model)
    weights = {entry.name: entry for entry in found.graph.initializer}
    assert weights == {entry.name: entry for entry in expected.graph.initializer}
    for proto in (found, expected):
        del proto.graph.initializer[:]
    assert found == expected


def test_large_models_get_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_LARGEST_PROTO", 4096)
    model = with_weight()
    save(model, tmp_path / "m.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    again = load(tmp_path / "m.onnx")
    assert isinstance(again.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert np.array_equal(again.graph.initializers["w"].const_value.numpy(), model.graph.initializers["w"].const_value)
    assert not isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_a_model_over_its_own_data_file_can_be_saved_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_LARGEST_PROTO", 4096)
    model = with_weight()
    save(model, tmp_path / "m.onnx")
    again = load(tmp_path / "m.onnx")
    save(again, tmp_path / "m.onnx")
    final = load(tmp_path / "m.onnx")
    assert np.array_equal(final.graph.initializers["w"].const_value.numpy(), model.graph.initializers["w"].const_value)


def test_external_weights_come_back_into_one_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ir.save(with_weight(), tmp_path / "in" / "m.onnx", external_data="m.data")
    save(load(tmp_path / "in" / "m.onnx"), tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    assert not onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer[0].external_data


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")

    def full_disk(model: ir.Model, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_write", full_disk)
    with pytest.raises(WriteError, match="No space left"):
        save(with_weight(), target)
    assert target.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(WriteError, match="cannot be written"):
        save(with_weight(), tmp_path / "m.onnx")


def test_text_is_whole_or_absent(tmp_path: Path) -> None:
    assert write_text("hello", tmp_path / "t.txt").read_text() == "hello"
    with pytest.raises(WriteError):
        write_text("hello", tmp_path / "no" / "t.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["t.txt"]


def test_weight_bytes() -> None:
    assert weight_bytes(with_weight(8)) == 8 * 8 * 4
