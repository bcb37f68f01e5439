"""The comparer is tested by what it must reject: an oracle that accepts everything is worse than none."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import DataError
from graphopt.export.verify import compare
from graphopt.ir.compare import compare_arrays, compare_outputs, compare_runs, within_exact

A = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)


def corrupted() -> dict[str, np.ndarray]:
    with_nan = A.copy()
    with_nan[1, 2] = np.nan
    with_infinity = A.copy()
    with_infinity[1, 2] = np.inf
    one_entry = A.copy()
    one_entry[0, 0] += 0.01
    return {
        "twice": 2 * A,
        "sign": -A,
        "two channels swapped": A[:, [1, 0, *range(2, 8)]],
        "transposed": A.reshape(8, 4).T.copy(),
        "one NaN": with_nan,
        "one infinity": with_infinity,
        "one entry": one_entry,
        "zeros": np.zeros_like(A),
        "dtype": A.astype(np.float64),
        "shape": A[:, :7],
        "rank": A[None],
        "shifted": A + 1e-3,
    }


@pytest.mark.parametrize("kind", sorted(corrupted()))
def test_the_comparer_rejects(kind: str) -> None:
    assert not within_exact([A], [corrupted()[kind]])


def test_the_comparer_rejects_a_missing_output() -> None:
    assert not within_exact([A, A], [A])
    assert compare_outputs([A, A], [A]) == float("inf")


@pytest.mark.parametrize("kind", ["one NaN", "one infinity", "dtype", "shape", "rank"])
def test_what_cannot_be_compared_is_infinitely_far(kind: str) -> None:
    assert compare_outputs([A], [corrupted()[kind]]) == float("inf")


def test_equal_is_zero_and_rounding_is_accepted() -> None:
    assert compare_outputs([A], [A.copy()]) == 0.0
    assert within_exact([A], [(A.astype(np.float64) * (1 + 1e-6)).astype(np.float32)])


def test_nan_where_the_reference_has_nan_is_equal() -> None:
    with_nan = corrupted()["one NaN"]
    assert compare_outputs([with_nan], [with_nan.copy()]) == 0.0
    assert compare_outputs([with_nan], [A]) == float("inf")


def test_infinity_of_the_other_sign_is_far() -> None:
    assert compare_outputs([np.array([np.inf])], [np.array([-np.inf])]) == float("inf")


def test_error_is_relative_to_the_scale_of_the_reference() -> None:
    assert compare_arrays(np.array([10.0, 0.0]), np.array([10.0, 1.0])).error == pytest.approx(0.1)
    assert compare_arrays(np.zeros(3), np.array([0.0, 1e-30, 0.0])).error == float("inf")
    assert compare_arrays(np.zeros(3), np.zeros(3)).error == 0.0


def test_integers_count_the_entries_that_differ() -> None:
    assert compare_arrays(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])).error == 0.25
    assert compare_arrays(np.array([True, False]), np.array([True, True])).error == 0.5
    assert not within_exact([np.arange(10)], [np.arange(10)[::-1]])


def test_bfloat16_is_a_float() -> None:
    a = A.astype(ml_dtypes.bfloat16)
    assert 0.9 < compare_arrays(a, (2 * A).astype(ml_dtypes.bfloat16)).error < 1.1


def test_empty_outputs_are_equal() -> None:
    assert compare_outputs([np.zeros((0, 3))], [np.zeros((0, 3))]) == 0.0


def test_the_worst_run_of_each_output_counts() -> None:
    comparison = compare_runs(["a", "b"], [[A, A], [A, A]], [[A, A], [A, 2 * A]])
    assert [output.error for output in comparison.outputs] == [0.0, pytest.approx(1.0)]
    assert comparison.worst is not None
    assert comparison.worst.name == "b"


@given(st.floats(0.01, 10), st.integers(0, 31))
def test_a_change_of_one_entry_is_measured_exactly(change: float, index: int) -> None:
    b = A.astype(np.float64).copy()
    b.reshape(-1)[index] += change
    expected = change / np.abs(A).max()
    assert compare_arrays(A.astype(np.float64), b).error == pytest.approx(expected)


def test_compare_runs_both_models() -> None:
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[n] x) => (float[n] y) {{ y = {op} (x) }}'
    relu, neg = (ir.from_onnx_text(text.format(op=op)) for op in ("Relu", "Neg"))
    x = {"x": np.array([1.0, 2.0], np.float32)}
    assert compare(relu, relu, [x]).error == 0.0
    assert compare(relu, neg, [x]).error == pytest.approx(2.0)
    with pytest.raises(DataError, match="no inputs"):
        compare(relu, relu, [])
    with pytest.raises(DataError, match="lacks input"):
        compare(relu, relu, {"z": x["x"]})
    for form in (x, x["x"], (x["x"],), [x, x]):
        assert compare(relu, neg, form).error == pytest.approx(2.0)
    assert compare(relu, relu).error == 0.0
