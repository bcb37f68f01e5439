"""Reconstruction where it is easily wrong: graphs, types and samples that are a little unusual."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.inputs.rebatch import rebatched
from graphopt.ir.origin import Origin, remember_origin, set_origin
from graphopt.ir.rewrite import DeclinedError
from graphopt.ir.session import open_session
from graphopt.passes import Context, FoldReconstruction, PruneChannels

Feeds = dict[str, np.ndarray]


def model_of(
    body: str, shapes: dict[str, tuple[int, ...]], dtype: type = np.float32, twins: Sequence[tuple[str, int]] = ()
) -> ir.Model:
    """A model with random weights; the second half of each axis in `twins` equals the first."""
    generator = np.random.default_rng(0)
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g {body}')
    for name, shape in shapes.items():
        array = generator.standard_normal(shape) * np.sqrt(2 / shape[0])
        for _, axis in (twin for twin in twins if twin[0] == name):
            half = shape[axis] // 2
            array = np.concatenate([array.take(range(half), axis)] * 2, axis)
        value = ir.Value(name=name, const_value=ir.tensor(array.astype(dtype), name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))), ir.Shape(shape)
        model.graph.register_initializer(value)
        for graph in model.graphs():
            for node in graph:
                for index, read in enumerate(node.inputs):
                    if read is not None and read.name == name and read is not value:
                        node.replace_input_with(index, value)
    return graphopt.load(ir.to_proto(model))


def batches(count: int = 4, shape: tuple[int, ...] = (32, 8), dtype: type = np.float32, seed: int = 1) -> list[Feeds]:
    generator = np.random.default_rng(seed)
    return [{"x": generator.standard_normal(shape).astype(dtype)} for _ in range(count)]


def halved(model: ir.Model, weight: str, axis: int) -> ir.Model:
    """The model without the second half of the channels along one axis of a weight."""
    groups = graphopt.channel_groups(model)
    group = next(one for one in groups if (weight, axis) in one.members)
    selection = {group.name: list(range(group.units // 2, group.units))}
    origin = remember_origin(model)
    small = graphopt.remove_channels(model, selection, groups=groups)
    set_origin(small, origin.without(groups, selection))
    return small


def distance(first: ir.Model, second: ir.Model, feeds: list[Feeds]) -> float:
    left, right = open_session(first), open_session(second)
    pairs = [(left.run_feeds(one)[0].astype(float), right.run_feeds(one)[0].astype(float)) for one in feeds]
    error = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return float(np.sqrt(error / sum(float(np.square(a - a.mean()).sum()) for a, _ in pairs)))


def rebuilt(model: ir.Model, feeds: list[Feeds], **options: object) -> tuple[ir.Model, list[str]]:
    copy, context = model.clone(), Context(calibration=feeds)
    FoldReconstruction(source="calibration", **options).rebuild(copy, context)  # type: ignore[arg-type]
    return copy, [str(remark) for remark in context.remarks if remark.kind == "missed"]


LAYERS = """(float[n,8] x) => (float[n,4] y) {
    a = MatMul (x, w1) r = Relu (a) b = MatMul (r, w2) q = Relu (b) c = MatMul (q, w3) s = Relu (c)
    y = MatMul (s, w4) }"""
WIDTHS: dict[str, tuple[int, ...]] = {"w1": (8, 16), "w2": (16, 16), "w3": (16, 16), "w4": (16, 4)}


def test_matmuls_without_bias_get_exactly_one_and_are_solved_again_with_it() -> None:
    model, feeds = model_of(LAYERS, WIDTHS), batches()
    PruneChannels(ratio=0.4, round_to=1).rewrite(small := model.clone(), Context())
    plain, _ = rebuilt(small, feeds, refits=0)
    again, missed = rebuilt(small, feeds, refits=3)
    assert not missed
    assert sum(node.op_type == "Add" for node in again.graph) == 4  # the first layer is solved again too
    assert distance(model, again, feeds) < 0.9 * distance(model, plain, feeds) < 0.9 * distance(model, small, feeds)


def test_matmul_directly_behind_matmul() -> None:
    body = """(float[n,8] x) => (float[n,4] y) {
        a = MatMul (x, w1) r = Relu (a) b = MatMul (r, w2) c = MatMul (b, w3) s = Relu (c) y = MatMul (s, w4) }"""
    model, feeds = model_of(body, WIDTHS), batches()
    PruneChannels(ratio=0.4, round_to=1).rewrite(small := model.clone(), Context())
    again, missed = rebuilt(small, feeds)
    assert not missed
    assert distance(model, again, feeds) < 0.6 * distance(model, small, feeds)


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_other_float_types_are_solved_twice_as_well(kind: str, dtype: type) -> None:
    body = LAYERS.replace("float[", f"{kind}[")
    model, feeds = model_of(body, WIDTHS, dtype), batches(dtype=dtype)
    PruneChannels(ratio=0.4, round_to=1).rewrite(small := model.clone(), Context())
    plain, _ = rebuilt(small, feeds, refits=0)
    again, missed = rebuilt(small, feeds, refits=3)
    assert not missed
    assert {value.dtype for value in again.graph.initializers.values()} == {ir.DataType.from_numpy(np.dtype(dtype))}
    assert distance(model, again, feeds) < 0.9 * distance(model, plain, feeds)


def test_a_path_that_spreads_its_values_is_not_solved_again() -> None:
    body = """(float[n,1,8] x) => (float[n,5,4] y) {
        a = MatMul (x, w1) h = Add (a, p) r = Relu (h) y = MatMul (r, w2) }"""
    model = model_of(body, {"w1": (8, 16), "p": (5, 16), "w2": (16, 4)}, twins=[("w1", 1), ("p", 1)])
    small, feeds = halved(model, "w1", 1), batches(shape=(32, 1, 8))
    again, missed = rebuilt(small, feeds, ridge=0.0)
    assert any("is spread from" in remark for remark in missed)
    assert distance(model, again, feeds) < 1e-4 < distance(model, small, feeds)


def test_a_branch_that_is_broadcast_is_no_target() -> None:
    body = """(float[n,3,6,6] x) => (float[n,4,6,6] y) {
        a = Conv (x, w1) r = Relu (a) b = Conv (r, w2) p = GlobalAveragePool (x) c = Conv (p, w3) y = Add (b, c) }"""
    shapes = {"w1": (16, 3, 1, 1), "w2": (4, 16, 1, 1), "w3": (4, 3, 1, 1)}
    model = model_of(body, shapes, twins=[("w1", 0)])
    small, feeds = halved(model, "w1", 0), batches(shape=(16, 3, 6, 6))
    again, missed = rebuilt(small, feeds, ridge=0.0)
    assert not missed
    assert distance(model, again, feeds) < 1e-4 < distance(model, small, feeds)


def test_damage_reaches_through_values_that_subgraphs_capture() -> None:
    body = """(float[n,8] x, bool t) => (float[n,4] y) {
        a = MatMul (x, w1) r = Relu (a)
        i = If (t) <then_branch = first () => (float[n,16] o) { o = Neg (r) },
                    else_branch = other () => (float[n,16] u) { u = Tanh (r) }>
        y = MatMul (i, w2) }"""
    model = model_of(body, {"w1": (8, 16), "w2": (16, 4)}, twins=[("w1", 1)])
    feeds = [{**one, "t": np.array(number % 2 == 0)} for number, one in enumerate(batches())]
    again, missed = rebuilt(small := halved(model, "w1", 1), feeds, ridge=0.0)
    assert not missed
    assert distance(model, again, feeds) < 1e-4 < distance(model, small, feeds)


def test_operators_inside_of_subgraphs_are_declined_by_name() -> None:
    body = """(float[n,8] x, bool t) => (float[n,4] y) {
        a = MatMul (x, w1) r = Relu (a)
        y = If (t) <then_branch = first () => (float[n,4] o) { o = MatMul (r, w2) },
                    else_branch = other () => (float[n,4] u) { u = MatMul (r, w3) }> }"""
    model = model_of(body, {"w1": (8, 16), "w2": (16, 4), "w3": (16, 4)})
    feeds = [{**one, "t": np.array(True)} for one in batches()]
    _, missed = rebuilt(halved(model, "w1", 1), feeds)
    assert [remark for remark in missed if "inside of its subgraphs" in remark]


def test_few_samples_are_not_learnt_by_heart() -> None:
    shapes: dict[str, tuple[int, ...]] = {"w1": (32, 96), "w2": (96, 96), "w3": (96, 96), "w4": (96, 4)}
    model = model_of(LAYERS.replace("[n,8]", "[n,32]"), shapes)
    PruneChannels(ratio=0.4, round_to=1).rewrite(small := model.clone(), Context())
    seen, unseen = batches(4, (32, 32)), batches(2, (256, 32), seed=2)
    plain, _ = rebuilt(small, seen, refits=0)
    again, _ = rebuilt(small, seen, refits=3)
    assert (
        distance(model, again, unseen) < 1.03 * distance(model, plain, unseen) < 1.03 * distance(model, small, unseen)
    )


def test_channels_on_an_axis_of_run_time_length_are_declined() -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]> g (float[n] x) => (float[n] y) { y = Relu(x) }')
    origin = Origin(model, {"y": (np.array([True, False, True, False]),)})
    assert origin.cut("y", np.arange(4.0)).tolist() == [0, 2]
    for length in (2, 8):
        with pytest.raises(DeclinedError, match="run-time length"):
            origin.cut("y", np.arange(float(length)))


@pytest.mark.parametrize("samples", [1, 12])
def test_heads_that_are_a_part_of_the_batch(samples: int) -> None:
    body = """(float[n,5,8] x) => (float[n,5,6] y)
        <int64[4] s1 = {0,5,4,4}, int64[3] s2 = {-1,5,4}, int64[4] s3 = {-1,4,5,4}, int64[3] s4 = {0,5,16}> {
        a = MatMul (x, w1) b = Reshape (a, s1) c = Transpose <perm = [0,2,1,3]> (b) d = Reshape (c, s2)
        e = MatMul (d, w2) f = Tanh (e) h = Reshape (f, s3) i = Transpose <perm = [0,2,1,3]> (h) j = Reshape (i, s4)
        y = MatMul (j, w3) }"""
    model = model_of(body, {"w1": (8, 16), "w2": (4, 4), "w3": (16, 6)}, twins=[("w1", 1)])
    small, feeds = halved(model, "w1", 1), batches(4, (samples, 5, 8))
    again, missed = rebuilt(small, feeds)
    assert any("run-time length" in remark for remark in missed)
    assert distance(model, again, feeds) < distance(model, small, feeds)


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e30])
def test_numbers_that_are_not_finite_are_declined(number: float) -> None:
    model = model_of(LAYERS, WIDTHS)
    small, feeds = halved(model, "w1", 1), batches()
    feeds[1]["x"][0] = number
    again, missed = rebuilt(small, feeds)
    assert all("not finite" in remark for remark in missed)
    assert missed
    assert distance(small, again, batches()) == 0


def test_sizes_that_the_model_needs_are_known_when_a_plan_is_applied() -> None:
    body = """(float[n,6,w] x) => (float[n,4] y) <int64[2] s = {-1,60}> {
        z = Reshape (x, s) a = Gemm (z, w1) r = Relu (a) y = Gemm (r, w2) }"""
    model = model_of(body, {"w1": (60, 16), "w2": (16, 4)})
    feeds = batches(4, (16, 6, 10))
    context = Context(sizes={"n": 4, "w": 10}, calibration=feeds)
    PruneChannels(ratio=0.4, round_to=1, compensation="least-squares").rewrite(small := model.clone(), context)
    assert distance(model, small, feeds) < 0.6


def test_feeds_that_the_model_does_not_take_are_left_out() -> None:
    model = model_of(LAYERS, WIDTHS)
    given: list[Feeds] = [{"x": np.zeros((1, 8), np.float32), "unknown": np.array(1, np.float32)}] * 3
    assert [{name: array.shape for name, array in feeds.items()} for feeds in rebatched(model, given)] == [
        {"x": (3, 8)}
    ]
