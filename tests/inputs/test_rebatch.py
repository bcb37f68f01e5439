"""The same samples in other batches."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.inputs.rebatch import rebatched

FREE = '<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }'
FIXED = FREE.replace("[n, 2]", "[3, 2]")


def numbered(*sizes: int) -> list[dict[str, np.ndarray]]:
    ends = np.cumsum(sizes)
    rows = np.arange(2 * ends[-1], dtype=np.float32).reshape(-1, 2)
    return [{"x": piece} for piece in np.split(rows, ends[:-1])]


@pytest.mark.parametrize("sizes", [(1,) * 130, (200,), (3, 90, 1, 64), (64, 64), (5,)])
def test_nothing_is_lost_and_the_order_stays(sizes: tuple[int, ...]) -> None:
    batches = rebatched(ir.from_onnx_text(FREE), numbered(*sizes))
    joined = np.concatenate([feeds["x"] for feeds in batches])
    np.testing.assert_array_equal(joined, np.concatenate([feeds["x"] for feeds in numbered(*sizes)]))
    assert all(len(feeds["x"]) == 64 for feeds in batches[:-1])
    assert len(batches[-1]["x"]) <= 64


def test_a_fixed_batch_stays() -> None:
    assert [len(feeds["x"]) for feeds in rebatched(ir.from_onnx_text(FIXED), numbered(3, 3))] == [3, 3]


def test_samples_of_different_sizes_stay() -> None:
    text = FREE.replace("[n, 2]", "[n, m]")
    given = [{"x": np.zeros((1, 2), np.float32)}, {"x": np.zeros((1, 5), np.float32)}]
    assert [feeds["x"].shape for feeds in rebatched(ir.from_onnx_text(text), given)] == [(1, 2), (1, 5)]


def test_a_model_that_runs_with_its_own_batch_only_keeps_it() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] x) => (float[3, 2] y)
        <int64[2] size = {3, 2}> { y = Reshape (x, size) }"""
    assert [len(feeds["x"]) for feeds in rebatched(ir.from_onnx_text(text), numbered(3, 3, 3))] == [3, 3, 3]


def test_no_batches() -> None:
    assert rebatched(ir.from_onnx_text(FREE), []) == []
