"""The latency table: kept, exchanged, refused, and interpolated on the staircase."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import GraphoptError, LoadError, WriteError
from graphopt.inputs.measurements import Measurements
from graphopt.latency.kernels import profile_kernels
from graphopt.latency.staircase import Point, interpolate
from graphopt.latency.table import Key, LatencyTable, Machine, Row, key_of, this_machine

HERE = Machine("AMD EPYC, avx2 avx512f", "cpu", 1, "1.31.1")


def conv(into: int, out: int, *, group: int = 1, side: int = 8) -> Key:
    shapes = ((1, into, side, side), (out, into // group, 3, 3))
    attributes = f"group={group} kernel_shape=3,3"
    return Key("Conv", attributes, ("float", "float"), shapes, ("float",), ((1, out, side, side),), "CPU")


def stairs(into: int, out: int) -> float:
    """A bilinear staircase in blocks of 16."""
    i, o = math.ceil(into / 16), math.ceil(out / 16)
    return 7.0 + 2.0 * i + 3.0 * o + 5.0 * i * o


def filled(widths: list[tuple[int, int]]) -> LatencyTable:
    return LatencyTable(HERE, {conv(*pair): Row(stairs(*pair), 1.0, 2.0, 20) for pair in widths})


CORNERS = [(16, 16), (16, 128), (128, 16), (128, 128)]


def test_measured_points_are_exact_and_the_staircase_is_found_between_them() -> None:
    table = filled([*CORNERS, (48, 64)])
    for pair in [*CORNERS, (48, 64)]:
        found = table.estimate(conv(*pair))
        assert (found.microseconds, found.how) == (stairs(*pair), "measured")
    for pair in [(32, 32), (36, 52), (64, 100), (112, 24), (20, 128)]:
        found = table.estimate(conv(*pair))
        assert found.how == "interpolated"
        assert found.microseconds == pytest.approx(stairs(*pair))
    assert table.estimate(conv(32, 52)).microseconds == pytest.approx(table.estimate(conv(32, 64)).microseconds)


def test_what_was_not_measured_is_said() -> None:
    table = filled(CORNERS)
    assert table.estimate(conv(128, 256)).how == "outside"
    assert table.estimate(conv(63, 64)).how == "outside", "no multiple of 4 leaves the fast path"
    unknown = table.estimate(conv(32, 32, side=9))
    assert (unknown.how, unknown.points) == ("unknown", 0)
    assert math.isnan(unknown.microseconds)
    assert not unknown.is_known
    narrow = replace(HERE, device="AMD EPYC, avx2")
    assert LatencyTable(narrow, table.rows).estimate(conv(24, 24)).how == "interpolated"


def test_a_depthwise_convolution_is_known_by_its_own_kind() -> None:
    rows = {conv(width, width, group=width): Row(width / 16, 0.0, 0.0, 9) for width in (16, 64)}
    table = LatencyTable(HERE, rows | {conv(32, 32): Row(99.0, 0.0, 0.0, 9)})
    assert table.estimate(conv(48, 48, group=48)).microseconds == pytest.approx(3.0)


def test_measured_blocks_come_out_as_measured_where_nothing_is_bilinear() -> None:
    random = np.random.default_rng(0)
    points = [Point(16 * i, 16 * o, float(random.uniform(1, 100))) for i in range(1, 5) for o in range(1, 5)]
    for point in points:
        found = interpolate(points, point.into - 4, point.out - 2, block=16)
        assert found.microseconds == pytest.approx(point.microseconds)
    assert interpolate(points[:1], 128, 128, block=16).microseconds >= 0


def test_what_was_profiled_is_kept_and_comes_back(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[8,64] x, bool c) => (float[8,8] y) '
        "{ t = Transpose (x) h = MatMul (x, t) i = If (c) <then_branch = a () => (float[8,8] u) { u = Exp (h) },"
        " else_branch = b () => (float[8,8] v) { v = Tanh (h) }> y = Neg (i) }"
    )
    (found,) = profile_kernels(model, {"x": np.ones((8, 64), np.float32), "c": np.array(True)}, seconds=0.02)
    table = LatencyTable(this_machine())
    table.add(found)
    assert {key.operator for key in table.rows} == {"FusedMatMul", "Exp", "Neg"}, "not the If, nor what never ran"
    product = next(kernel for kernel in found.kernels if kernel.operator == "FusedMatMul")
    assert table.lookup(key_of(product)) == Row(product.microseconds, product.low, product.high, product.runs)
    assert LatencyTable.load(table.save(tmp_path / "table.json")) == table
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]
    store = Measurements(tmp_path / "cache")
    assert table.keep(store) == []
    assert LatencyTable.kept(table.machine, store) == table
    assert not LatencyTable.kept(this_machine(threads=2), store).rows
    with pytest.raises(GraphoptError, match="1 thread"):
        LatencyTable(this_machine(threads=2)).add(found)


@pytest.mark.parametrize("change", [{"device": "another"}, {"threads": 2}, {"onnxruntime": "1.0"}, {"target": "cuda"}])
def test_a_table_of_another_machine_is_refused(tmp_path: Path, change: dict[str, str | int]) -> None:
    other = replace(HERE, **change)  # type: ignore[arg-type]
    path = LatencyTable(other, filled(CORNERS).rows).save(tmp_path / "table.json")
    with pytest.raises(GraphoptError, match="another machine") as caught:
        LatencyTable.load(path, machine=HERE)
    assert str(other) in str(caught.value)
    assert str(HERE) in str(caught.value)
    assert str(other) != str(HERE)
    assert "accept=True" in (caught.value.help or "")
    assert LatencyTable.load(path, machine=HERE, accept=True).machine == other


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    good = filled(CORNERS).to_json()
    for text in ("", "[]", "{}", "[" * 100_000, json.dumps(good | {"version": 99})):
        path.write_text(text)
        with pytest.raises(LoadError):
            LatencyTable.load(path, machine=HERE)
    row = good["rows"][0]
    for change in (
        {"microseconds": "soon"},
        {"microseconds": -1.0},
        {"low": math.inf},
        {"input_shapes": [["n"]]},
        {"input_shapes": 3},
        {"dtypes": [1]},
        {"operator": 7},
        {"runs": None},
    ):
        with pytest.raises(LoadError, match="cannot be read"):
            LatencyTable.from_json(good | {"rows": [row | change]}, machine=HERE)
    with pytest.raises(LoadError, match="cannot be read"):
        LatencyTable.from_json(good | {"machine": {"device": "a"}}, machine=HERE)
    with pytest.raises(LoadError):
        LatencyTable.load(tmp_path / "missing.json")
    with pytest.raises(WriteError):
        filled(CORNERS).save(tmp_path / "no" / "table.json")
