from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError
from graphopt.inputs import calibration
from graphopt.inputs.calibration import Calibration
from graphopt.inputs.source import FirstSamples
from graphopt.ir.session import open_session

ONE = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }')
TWO = ir.from_onnx_text(
    '<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] a, int64[n] b) => (float[n, 2] y) { y = Relu(a) }'
)
ROW = np.ones((3, 2), np.float32)


class FakeTensor:
    """What a torch tensor offers: detach, cpu and numpy."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def detach(self) -> FakeTensor:
        return self

    def cpu(self) -> FakeTensor:
        return self

    def numpy(self) -> np.ndarray:
        return self.array


@pytest.mark.parametrize("item", [ROW, (ROW,), [ROW], {"x": ROW}, FakeTensor(ROW), ROW.tolist()])
def test_forms_of_an_item(item: Any) -> None:
    if item == ROW.tolist() if isinstance(item, list) and not isinstance(item[0], np.ndarray) else False:
        with pytest.raises(DataError, match="3 entries"):
            list(Calibration(ONE, [item]))
        return
    (feeds,) = Calibration(ONE, [item])
    np.testing.assert_array_equal(feeds["x"], ROW)


def test_streams_and_counts() -> None:
    data = Calibration(ONE, [ROW, ROW, ROW[:1]])
    assert data.samples is None
    assert len(list(data)) == len(list(data)) == 3
    assert data.samples == 7
    assert len(list(Calibration(ONE, [ROW] * 5, limit=2))) == 2


def test_generators_are_recorded_once() -> None:
    def stream() -> Iterator[np.ndarray]:
        for value in range(3):
            yield np.full((1, 2), value, np.float32)

    data = Calibration(ONE, stream())
    first = [feeds["x"][0, 0] for feeds in data]
    assert first == [feeds["x"][0, 0] for feeds in data] == [0, 1, 2]


def test_generators_have_a_memory_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "RECORDED_BYTES", 100)
    data = Calibration(ONE, (ROW for _ in range(9)))
    with pytest.raises(DataError, match="one-pass iterator"):
        list(data)


def test_a_half_read_generator_goes_on() -> None:
    data = Calibration(ONE, (ROW * number for number in range(9)))
    next(iter(data))
    assert [feeds["x"][0, 0] for feeds in data] == list(range(9))
    assert data.samples == 27


def test_a_generator_that_failed_does_not_end_quietly() -> None:
    data = Calibration(ONE, iter([ROW, ROW[0]]))
    for message in ("calibration item 1", "failed before"):
        with pytest.raises(DataError, match=message):
            list(data)


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        (ONE, [], "empty"),
        (ONE, [(ROW, np.zeros(3))], r"2 entries, the model has 1 inputs"),
        (ONE, [ROW[0]], r"shape is \[2\]"),
        (ONE, [np.ones((3, 5), np.float32)], r"shape is \[3, 5\]"),
        (ONE, [ROW.astype(np.int64)], "dtype is int64"),
        (ONE, [ROW.astype(np.uint8)], "dtype is uint8"),
        (ONE, [ROW * np.nan], "NaN"),
        (ONE, [{"z": ROW}], "lacks input 'x'"),
        (ONE, [{"x": ROW, "z": ROW}], "unknown input 'z'"),
        (ONE, [object()], "not an array"),
        (TWO, [ROW], "the model has 2 inputs"),
        (TWO, [(ROW, np.ones(3, np.float32))], "dtype is float32"),
    ],
)
def test_misfits_say_what_and_where(model: ir.Model, source: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(Calibration(model, source))
    if source:
        assert "calibration item 0" in str(caught.value)
    assert caught.value.help


def test_the_misfit_item_and_input_are_named() -> None:
    with pytest.raises(DataError, match=r"calibration item 2, input 'x'"):
        list(Calibration(ONE, [ROW, ROW, ROW[:, :1]]))


@pytest.mark.parametrize("source", [ROW, {"x": ROW}, 3, "text"])
def test_what_is_no_iterable_of_items_is_refused(source: Any) -> None:
    with pytest.raises(DataError):
        Calibration(ONE, source)


def test_safe_casts_are_noted() -> None:
    data = Calibration(TWO, [(ROW.astype(np.float64), np.arange(3, dtype=np.int32))] * 2)
    feeds = next(iter(data))
    assert feeds["a"].dtype == np.float32
    assert feeds["b"].dtype == np.int64
    assert data.notes == ["input 'a': cast from float64 to float32", "input 'b': cast from int32 to int64"]


def test_labels_beside_a_tuple_of_inputs_are_explained() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n,2] a, float[n,2] b) => (float[n,2] y) { y = Add (a, b) }'
    )
    pair = (np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32))
    with pytest.raises(DataError, match="tuple of 2 arrays") as caught:
        next(iter(Calibration(model, [(pair, np.zeros(1, np.int64))])))
    assert "without labels" in str(caught.value)


def test_another_batch_than_the_fixed_one_is_explained() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[1,2] x) => (float[1,2] y) { y = Relu (x) }'
    )
    with pytest.raises(DataError, match="dynamic_shapes"):
        next(iter(Calibration(model, [np.zeros((16, 2), np.float32)])))


def test_what_is_no_array_of_numbers_is_named() -> None:
    for item, message in (([None], "but None"), ([np.array([[1, None]], object)], r"an array of objects, \[1, 2\]")):
        with pytest.raises(DataError, match=message) as caught:
            list(Calibration(ONE, item))
        assert "calibration item 0, input 'x'" in str(caught.value)


def test_an_item_without_samples_is_refused_but_an_empty_cache_is_not() -> None:
    with pytest.raises(DataError, match=r"no sample in it: the shape is \[0, 2\]") as caught:
        list(Calibration(ONE, [ROW, ROW[:0]]))
    assert "calibration item 1, input 'x'" in str(caught.value)
    assert caught.value.help
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n, past_length] x) => (float[n, past_length] y) '
        "{ y = Relu(x) }"
    )
    assert next(iter(Calibration(model, [ROW[:, :0]])))["x"].shape == (3, 0)


def test_the_item_that_onnxruntime_cannot_run_is_named() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] a, int64[m] b) => (float[n, 2] y) '
        "<float[3, 2] table = {1, 2, 3, 4, 5, 6}> { e = Gather(table, b) y = Add(a, e) }"
    )
    session = open_session(model, optimized=False)
    good = (ROW, np.zeros(3, np.int64))
    for wrong in ((ROW, np.zeros(2, np.int64)), (ROW, np.full(3, 7, np.int64))):
        for samples in (6, 5):  # whole items, and a last one that is cut
            batches = FirstSamples(model, Calibration(model, [good, wrong]), samples)
            with pytest.raises(DataError, match="onnxruntime cannot run") as caught:
                list(map(session.run_feeds, batches))
            assert "calibration item 1, a: float32" in str(caught.value)
            assert "leave the item out" in str(caught.value.help)
            assert "--input" not in str(caught.value.help)
