"""The cache on disk: what is found, what is not, and that nothing that is wrong with it breaks a run."""

from __future__ import annotations

import io
import sqlite3
import subprocess
import sys
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.inputs import database as database_module
from graphopt.inputs import store as store_module
from graphopt.inputs.database import cache_folder
from graphopt.inputs.store import Store, model_digest, storage_key
from graphopt.ir.statistics import BATCHNORM_STATISTICS
from tests.inputs.nets import conv_net

BATCHES = [
    {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "t": np.array(5)},
    {"x": np.ones((1, 3)), "t": np.array(6)},
]


def same(one: list[dict[str, np.ndarray]] | None, other: list[dict[str, np.ndarray]]) -> bool:
    assert one is not None
    for feeds, expected in zip(one, other, strict=True):
        assert set(feeds) == set(expected)
        for name, array in expected.items():
            assert feeds[name].dtype == array.dtype
            np.testing.assert_array_equal(feeds[name], array)
    return True


def test_what_is_written_is_read() -> None:
    store = Store()
    assert store.read("a") is None
    store.write("a", BATCHES)
    assert same(Store().read("a"), BATCHES)
    assert Store().read("b") is None
    store.write("a", BATCHES[:1])
    assert same(store.read("a"), BATCHES[:1])
    assert store.notes == []


@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "bool", "bfloat16", "float8_e4m3fn"])
def test_every_type(dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype)) if hasattr(ml_dtypes, dtype) else np.dtype(dtype)
    batches = [{"x": np.array([[0.0, 1.0]]).astype(kind)}]
    Store().write("a", batches)
    assert same(Store().read("a"), batches)


def test_the_folder_is_that_of_the_variable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store().write("a", BATCHES)
    assert [file.name for file in cache.iterdir()] == ["inputs.sqlite3"]
    monkeypatch.setenv("GRAPHOPT_CACHE", "")
    assert cache_folder().name == "graphopt"


def test_the_oldest_goes_first_and_the_file_shrinks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = [{"x": np.zeros(25_000, np.float32)}]
    store = Store(largest_bytes=250_000)
    for now, key in enumerate("abc"):
        monkeypatch.setattr(store_module.time, "time", lambda now=now: float(now))
        store.write(key, large)
    assert store.read("a") is None
    assert same(store.read("b"), large)
    assert same(store.read("c"), large)
    assert (cache / "inputs.sqlite3").stat().st_size < 300_000


def test_what_is_too_large_is_not_kept() -> None:
    store = Store(largest_bytes=10)
    store.write("a", BATCHES)
    assert store.read("a") is None
    assert "more than the cache holds" in store.notes[0]


def test_a_file_that_is_no_database_is_put_aside(cache: Path) -> None:
    cache.mkdir()
    (cache / "inputs.sqlite3").write_bytes(b"no database at all" * 100)
    store = Store()
    assert store.read("a") is None
    assert "not a database" in store.notes[0]
    assert (cache / "inputs.sqlite3.damaged").exists()
    store.write("a", BATCHES)
    assert same(store.read("a"), BATCHES)


def test_a_database_that_is_cut_off_is_put_aside(cache: Path) -> None:
    large = [{"x": np.random.default_rng(0).standard_normal(100_000)}]
    Store().write("a", large)
    file = cache / "inputs.sqlite3"
    file.write_bytes(file.read_bytes()[:50_000])
    store = Store()
    assert store.read("a") is None
    assert store.notes
    store.write("a", large)
    assert same(Store().read("a"), large)


def test_a_flipped_bit_is_noticed(cache: Path) -> None:
    Store().write("a", [{"x": np.full(1000, 7, np.uint8)}])
    file = cache / "inputs.sqlite3"
    content = bytearray(file.read_bytes())
    content[content.index(bytes([7] * 100)) + 50] ^= 1
    file.write_bytes(content)
    store = Store()
    assert store.read("a") is None
    assert "checksum" in store.notes[0]


def test_pickles_are_not_read(cache: Path) -> None:
    Store().write("a", [{"x": np.zeros(3)}])
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with sqlite3.connect(cache / "inputs.sqlite3") as database:
        database.execute(
            "UPDATE inputs SET array = ?, checksum = ?, dtype = 'object'",
            (buffer.getvalue(), zlib.crc32(buffer.getvalue())),
        )
    database.close()
    store = Store()
    assert store.read("a") is None
    assert "pickle" in store.notes[0].lower()


def test_a_locked_cache_is_left_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store().write("a", BATCHES)
    monkeypatch.setattr(database_module, "_PATIENCE_SECONDS", 0.05)
    other = sqlite3.connect(cache / "inputs.sqlite3", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    store = Store()
    store.write("b", BATCHES)
    assert store.read("a") is None
    other.execute("ROLLBACK")
    other.close()
    assert all("locked" in line for line in store.notes)
    assert len(store.notes) == 2
    assert same(store.read("a"), BATCHES)
    assert not (cache / "inputs.sqlite3.damaged").exists()


def test_a_folder_that_cannot_be_made_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "below")
    store.write("a", BATCHES)
    assert store.read("a") is None
    assert len(store.notes) == 1


def test_two_processes_write_at_once(cache: Path) -> None:
    code = """
import sys, numpy as np
from graphopt.inputs.store import Store
store = Store()
for number in range(5):
    store.write(f"shared {number % 3}", [{"x": np.full(1000, 1.0)}, {"x": np.full(10, 2.0)}])
    store.write(f"own {sys.argv[1]} {number}", [{"x": np.full(100, float(number))}])
    assert [feeds["x"].size for feeds in store.read(f"shared {number % 3}")] == [1000, 10]
assert not store.notes, store.notes
"""
    started = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [process.wait(timeout=60) for process in started] == [0, 0]
    store = Store()
    for name in "ab":
        for number in range(5):
            assert same(store.read(f"own {name} {number}"), [{"x": np.full(100, float(number))}])


def test_a_digest_is_of_everything_that_counts() -> None:
    def changed(edit: str) -> ir.Model:
        model = conv_net()
        node = next(iter(model.graph))
        if edit == "weight":
            weight = model.graph.initializers["w1"].const_value
            assert weight is not None
            array = weight.numpy().copy()
            array[0, 0, 0, 0] += 1e-6
            model.graph.initializers["w1"].const_value = ir.tensor(array)
        elif edit == "attribute":
            node.attributes["pads"] = ir.AttrInt64s("pads", [1, 1, 1, 2])
        elif edit == "statistics":
            node.outputs[0].meta[BATCHNORM_STATISTICS] = (np.zeros(8), np.ones(8))
        elif edit == "shape":
            model.graph.inputs[0].shape = ir.Shape(["n", 3, 12, 13])
        elif edit == "documentation":
            model.graph.doc_string = "hello"
        return model

    original = model_digest(conv_net())
    assert model_digest(changed("nothing")) == model_digest(changed("documentation")) == original
    others = {model_digest(changed(edit)) for edit in ("weight", "attribute", "statistics", "shape")}
    assert len(others | {original}) == 5


def test_a_digest_looks_into_subgraphs() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (bool c, float[2] x) => (float[2] y) { y = If (c) <
        then_branch = a () => (float[2] t) { t = Relu (x) }, else_branch = b () => (float[2] e) { e = Tanh (x) }> }"""
    assert model_digest(ir.from_onnx_text(text)) == model_digest(ir.from_onnx_text(text))
    assert model_digest(ir.from_onnx_text(text)) != model_digest(ir.from_onnx_text(text.replace("Tanh", "Sigmoid")))


def test_a_key_is_of_all_its_parts() -> None:
    keys = {storage_key(digest, [part]) for digest in ("a", "b") for part in (1, "1", (1,))}
    assert len(keys) == 6
