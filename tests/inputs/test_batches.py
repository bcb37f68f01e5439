"""Batches of probes: sizes, counts, and that they are the same ones again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError
from graphopt.inputs import batches
from graphopt.inputs.batches import (
    ProbeBatches,
    SampleCounter,
    batch_dimensions,
    free_batch,
    resized,
    usual_samples,
)
from graphopt.inputs.probes import InputSpec, symbolic_sizes


def model(inputs: str, body: str = "y = Relu(x)", output: str = "float[m] y") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({output}) {{ {body} }}')


SMALL = model("float[n, 3, 32, 32] x", output="float[n, 3, 32, 32] y")


@pytest.mark.parametrize(
    ("inputs", "samples", "shapes"),
    [
        ("float[n, 3, 32, 32] x", 100, [64, 36]),
        ("float[n, 3, 224, 224] x", 20, [8, 8, 4]),
        ("float[n, 3, 32, 32] x", 1, [1]),
        ("float[2, 3, 32, 32] x", 5, [2, 2, 2]),
        ("float[3, 64, 64] x", 3, [3, 3, 3]),
    ],
)
def test_batches_are_of_sensible_size(inputs: str, samples: int, shapes: list[int]) -> None:
    made = model(inputs)
    found = ProbeBatches(made, symbolic_sizes(made), samples)
    assert [feeds["x"].shape[0] for feeds in found] == shapes
    assert len(found) == len(shapes)
    assert found.samples >= samples


def test_batches_are_the_same_again_kept_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ProbeBatches(SMALL, {"n": 1}, 70, seed=3)
    first = list(kept)
    assert next(iter(kept))["x"] is first[0]["x"]
    monkeypatch.setattr(batches, "_KEPT_BYTES", 0)
    again = ProbeBatches(SMALL, {"n": 1}, 70, seed=3)
    for _ in range(2):
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one["x"], other["x"])
    assert next(iter(again))["x"] is not next(iter(again))["x"]
    assert not np.array_equal(first[0]["x"], next(iter(ProbeBatches(SMALL, {"n": 1}, 70, seed=4)))["x"])


def test_batches_do_not_follow_a_model_that_changes() -> None:
    text = "float[7, 4] table, int64[n, 5] x"
    made = model(text, "y = Gather(table, x)", "float[n, 5, 4] y")
    table = made.graph.inputs.pop(0)
    table.const_value = ir.tensor(np.zeros((7, 4), np.float32))
    made.graph.register_initializer(table)
    found = ProbeBatches(made, {"n": 1}, 64)
    made.graph.node(0).replace_input_with(1, None)
    assert max(feeds["x"].max() for feeds in found) == 6


def test_specs_hold_in_every_batch() -> None:
    found = ProbeBatches(SMALL, {"n": 1}, 70, specs={"x": InputSpec(low=0, high=255)})
    for feeds in found:
        assert feeds["x"].min() >= 0
        assert feeds["x"].max() > 128


def test_how_many_samples_are_usual() -> None:
    assert usual_samples(SMALL) == 512
    assert usual_samples(model("float[n, 3, 224, 224] x")) == 256
    assert usual_samples(model("float[n, 3, 224, 224] x"), most=128, least=32) == 32
    assert usual_samples(model("float[64, 3, 32, 32] x")) == 512
    assert usual_samples(model("float[n, 3, 96, 96] x"), {"n": 50}) == 256


def test_which_dimensions_count_samples() -> None:
    assert batch_dimensions(model("float[seq, batch, 8] x, float[batch, 4] z")) == {"batch"}
    assert batch_dimensions(model("float[2, 3] x")) == frozenset()
    twice = model("float[batch, 3] x, float[other, 3] z")
    twice.graph.inputs[1].shape = ir.Shape(["2*batch", 3])
    assert resized(twice, symbolic_sizes(twice), 5) == {"batch": 5, "2*batch": 10}


def test_samples_are_counted_on_the_batch_axis() -> None:
    assert SampleCounter(model("float[seq, batch, 8] x"))({"x": (16, 5, 8)}) == 5
    assert SampleCounter(model("float[4, 8] x"))({"x": (4, 8)}) == 4
    assert SampleCounter(model("float[3, 64, 64] x"))({"x": (3, 64, 64)}) == 1
    assert SampleCounter(model("float t, float[4, 8] x"))({"t": (), "x": (4, 8)}) == 4
    assert SampleCounter(model("float x"))({"x": ()}) == 1


def test_a_batch_is_free_only_where_another_one_runs() -> None:
    assert free_batch(SMALL, {"n": 4}) == ({"n": 4}, True)
    bound = model("float[n, 6] x, float[2, 6] w", "y = Add(x, w)", "float[n, 6] y")
    assert free_batch(bound, {"n": 2, "k": 1})[1] is False
    assert free_batch(model("float[2, 3] x")) == ({}, False)


def test_sizes_that_do_not_run_are_replaced_or_refused() -> None:
    strict = model("float[3, n] x, float[3, 32] w", "y = Add(x, w)", "float[3, n] y")
    sizes, free = free_batch(strict, {"n": 7})
    assert (sizes["n"], free) == (32, False)
    with pytest.raises(DataError, match="no usual size"):
        free_batch(model("float[3, n] x, float[31, 3] w", "y = MatMul(x, w)", "float[3, 3] y"), {"n": 7})
