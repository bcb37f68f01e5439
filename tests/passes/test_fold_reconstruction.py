"""Reconstruction by least squares: exact where it can be, never worse on what it saw, and it says what it declined."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import GraphoptError
from graphopt.ir.origin import Origin, origin_of, remember_origin, set_origin
from graphopt.ir.session import open_session
from graphopt.passes import Context, FoldReconstruction, PruneChannels
from graphopt.passes.fold_reconstruction import RECONSTRUCTIONS
from tests.zoo.models import CORE, zoo_model

Feeds = dict[str, np.ndarray]


def convolutional(seed: int = 0, *, batchnorm: bool = True, activation: str = "r = Relu (n)") -> ir.Model:
    """Conv, BatchNormalization, activation, Conv, a shortcut, Relu, pooling, Gemm; with random weights."""
    generator = np.random.default_rng(seed)
    normal = "n = BatchNormalization (a, gamma, beta, mean, var)" if batchnorm else "n = Identity (a)"
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[batch,3,8,8] x) => (float[batch,5] y) {{
          s = Conv <pads = [1,1,1,1]> (x, ws) t = Relu (s)
          a = Conv <pads = [1,1,1,1]> (t, wa)
          {normal} {activation}
          b = Conv <pads = [1,1,1,1]> (r, wb) c = Add (b, t) d = Relu (c)
          p = GlobalAveragePool (d) f = Flatten (p) y = Gemm (f, wy, by)
        }}""")
    shapes = {"ws": (8, 3, 3, 3), "wa": (16, 8, 3, 3), "wb": (8, 16, 3, 3), "wy": (8, 5), "by": (5,)}
    shapes |= {"gamma": (16,), "beta": (16,), "mean": (16,), "var": (16,)} if batchnorm else {}
    for name, shape in shapes.items():
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        array = generator.standard_normal(shape) * np.sqrt(2 / fan)
        array = np.abs(array) + 0.5 if name in ("var", "gamma") else array
        value = ir.Value(name=name, const_value=ir.tensor(array.astype(np.float32), name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        model.graph.register_initializer(value)
        for node in model.graph:
            for index, read in enumerate(node.inputs):
                if read is not None and read.name == name and read is not value:
                    node.replace_input_with(index, value)
    return graphopt.load(ir.to_proto(model))


def batches(count: int = 4, size: int = 16) -> list[Feeds]:
    generator = np.random.default_rng(1)
    return [{"x": generator.standard_normal((size, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def pruned(model: ir.Model, units: list[int], group: str = "r") -> ir.Model:
    """The model without units of the group that `wa` makes."""
    groups = graphopt.channel_groups(model)
    chosen = next(one for one in groups if ("wa", 0) in one.members)
    origin = remember_origin(model)
    small = graphopt.remove_channels(model, {chosen.name: units}, groups=groups)
    set_origin(small, origin.without(groups, {chosen.name: units}))
    return small


def distance(first: ir.Model, second: ir.Model, feeds: list[Feeds]) -> float:
    left, right = open_session(first), open_session(second)
    pairs = [(left.run_feeds(one)[0], right.run_feeds(one)[0]) for one in feeds]
    error = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return float(np.sqrt(error / sum(float(np.square(a - a.mean(axis=0)).sum()) for a, _ in pairs)))


def rebuilt(model: ir.Model, feeds: list[Feeds], **options: object) -> ir.Model:
    copy = model.clone()
    FoldReconstruction(source="calibration", **options).rebuild(copy, Context(calibration=feeds))  # type: ignore[arg-type]
    return copy


def test_duplicates_are_folded_without_a_change() -> None:
    model = convolutional()
    for name in ("wa", "gamma", "beta", "mean", "var"):
        array = model.graph.initializers[name].const_value.numpy().copy()  # type: ignore[union-attr]
        array[8:] = array[:8]
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    small, feeds = pruned(model, list(range(8, 16))), batches()
    assert distance(model, small, feeds) > 0.05
    assert distance(model, rebuilt(small, feeds, ridge=0.0, hinges=0, refits=0), feeds) < 1e-4
    unseen = [{"x": one["x"][:, :, ::-1].copy()} for one in batches(1)]
    assert distance(model, rebuilt(small, feeds, ridge=0.0, hinges=0, refits=0), unseen) < 1e-3


def test_nothing_damaged_nothing_changed() -> None:
    model = convolutional()
    copy = model.clone()
    set_origin(copy, Origin(model))
    done = FoldReconstruction(source="calibration").rebuild(copy, Context(calibration=batches()))
    assert done.solved == ()
    for name, value in model.graph.initializers.items():
        assert copy.graph.initializers[name].const_value is value.const_value


def test_without_an_origin_it_says_so() -> None:
    context = Context()
    model = convolutional()
    assert not FoldReconstruction().run(model, context).modified
    assert "no pass before" in context.remarks[0].why


@pytest.mark.parametrize("form", ["mean", "ridge", "moments"])
def test_closed_forms_say_how_many_operators_they_rebuilt(form: str) -> None:
    context, small = Context(), pruned(convolutional(), [1, 2])
    before = {name: value.const_value for name, value in small.graph.initializers.items()}
    done = FoldReconstruction(form=form).rebuild(small, context)
    readers = [
        node
        for node in small.graph
        if node.op_type in ("Conv", "Gemm", "MatMul")
        and any(
            value and value.is_initializer() and before.get(value.name or "") is not value.const_value
            for value in node.inputs
        )
    ]
    assert done.count == len(readers) > 0
    assert f"{done.count} operators by {form}, no inputs needed" in [remark.why for remark in context.remarks]
    assert f"{form}, {done.count} operators" in str(done)


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "HardSwish", "Gelu", "LeakyRelu", "Clip6", "SiLU"])
def test_each_step_brings_the_output_nearer(activation: str) -> None:
    written = {
        "Clip6": "lo = Constant <value = float {0}> () hi = Constant <value = float {1}> () r = Clip (n, lo, hi)",
        "SiLU": "q = Sigmoid (n) r = Mul (n, q)",
    }.get(activation, f"r = {activation} (n)")
    model = convolutional(activation=written)
    small, seen = pruned(model, [0, 3, 5, 7, 9, 11, 12]), batches(8)
    unseen = [{"x": one["x"] + 0.1} for one in batches(1, 64)]
    plain = distance(model, small, unseen)
    solved = distance(model, rebuilt(small, seen, refits=0), unseen)
    refitted = distance(model, rebuilt(small, seen, refits=3), unseen)
    assert solved < 0.7 * plain
    assert refitted < solved


@pytest.mark.parametrize("batchnorm", [True, False])
def test_every_operator_behind_the_damage_is_solved(batchnorm: bool) -> None:
    model = convolutional(batchnorm=batchnorm)
    small = pruned(model, [1, 2, 3])
    done = FoldReconstruction(source="calibration").rebuild(small, Context(calibration=batches()))
    assert len(done.solved) == 2  # the Conv that lost inputs, and the Gemm behind the residual stream
    assert all(one.after <= one.before for one in done.solved)
    assert str(done).count("->") == 2


def test_an_infinite_ridge_corrects_the_mean_alone() -> None:
    model = convolutional()
    small, feeds = pruned(model, [1, 2, 3]), batches()
    copy = rebuilt(small, feeds, ridge=np.inf, hinges=0, refits=0)
    before, after = (one.graph.initializers["wb"].const_value for one in (small, copy))
    np.testing.assert_array_equal(before.numpy(), after.numpy())  # type: ignore[union-attr]
    names = ["c"]
    wanted = open_session(model, extra_outputs=names, optimized=False)
    made = open_session(copy, extra_outputs=names, optimized=False)
    means = [np.mean([one.run(names, feed)[0].mean((0, 2, 3)) for feed in feeds], 0) for one in (wanted, made)]
    np.testing.assert_allclose(means[0], means[1], atol=1e-4)


def test_dead_channels_and_gamma_zero_do_no_harm() -> None:
    model = convolutional()
    gamma = model.graph.initializers["gamma"].const_value.numpy().copy()  # type: ignore[union-attr]
    gamma[[0, 5]] = 0.0
    model.graph.initializers["gamma"].const_value = ir.tensor(gamma, name="gamma")
    beta = model.graph.initializers["beta"].const_value.numpy().copy()  # type: ignore[union-attr]
    beta[[0, 1]] = -100.0
    model.graph.initializers["beta"].const_value = ir.tensor(beta, name="beta")
    small, feeds = pruned(model, [2, 5, 8]), batches()
    copy = rebuilt(small, feeds)
    assert distance(model, copy, feeds) < distance(model, small, feeds)
    assert all(np.isfinite(v.const_value.numpy()).all() for v in copy.graph.initializers.values())  # type: ignore[union-attr]


def test_one_sample_is_not_overfitted() -> None:
    model = convolutional()
    small = pruned(model, [1, 2, 3])
    unseen = batches(2, 64)
    copy = rebuilt(small, [{"x": batches()[0]["x"][:1]}])
    assert distance(model, copy, unseen) < 1.05 * distance(model, small, unseen)


def test_more_data_than_memory_of_batches_gives_the_same() -> None:
    model = convolutional()
    small, feeds = pruned(model, [1, 2, 3]), batches(2, 32)
    single = [{"x": one["x"][index : index + 1]} for one in feeds for index in range(32)]
    whole, split = rebuilt(small, feeds), rebuilt(small, single)
    for name in ("wb", "wy"):
        first, second = (one.graph.initializers[name].const_value.numpy() for one in (whole, split))  # type: ignore[union-attr]
        np.testing.assert_allclose(first, second, atol=1e-4)


def test_a_shared_weight_is_left_and_said() -> None:
    model = convolutional()
    small = pruned(model, [1, 2, 3])
    weight = small.graph.initializers["wb"]
    other = ir.node("Neg", [weight])
    other.outputs[0].name = "unused"
    small.graph.insert_before(small.graph[-1], other)
    context = Context(calibration=batches())
    FoldReconstruction(source="calibration").rebuild(small, context)
    assert any("read by other operators" in remark.why for remark in context.remarks)


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("form", ["least-squares", "ridge", "mean"])
def test_models_of_every_structure(name: str, form: str) -> None:
    model = zoo_model(name)
    small, context = model.clone(), Context()
    try:
        PruneChannels(ratio=0.25, round_to=1).run(small, context)
    except GraphoptError as error:
        assert "nothing may be pruned" in error.what  # noqa: PT017
        return
    if origin_of(small) is None:  # a quarter of its few units rounds to none
        assert [node.op_type for node in small.graph] == [node.op_type for node in model.graph]
        return
    done = FoldReconstruction(form=form, source="probes", samples=8, refits=1).rebuild(small, context)
    open_session(small)
    assert all(one.after <= one.before * 1.01 + 1e-6 for one in done.solved)


def test_options_are_checked() -> None:
    for options in (
        {"form": "magic"},
        {"source": "somewhere"},
        {"ridge": -1.0},
        {"ridge": float("nan")},
        {"samples": 0},
        {"hinges": -1},
        {"refits": 1.5},
    ):
        with pytest.raises(GraphoptError):
            FoldReconstruction(**options)  # type: ignore[arg-type]
    assert RECONSTRUCTIONS[0] == FoldReconstruction().form


def test_calibration_of_the_wrong_shape_is_refused() -> None:
    small = pruned(convolutional(), [1, 2, 3])
    from graphopt.inputs.calibration import Calibration

    wrong = Calibration(small, [np.zeros((2, 4, 8, 8), np.float32)])
    with pytest.raises(GraphoptError, match="shape"):
        FoldReconstruction(source="calibration").rebuild(small, Context(calibration=wrong))


def test_pruned_twice_the_origin_is_still_the_first() -> None:
    model = convolutional()
    small = pruned(model, [1, 2, 3])
    groups = graphopt.channel_groups(small)
    chosen = next(one for one in groups if ("wa", 0) in one.members)
    smaller = graphopt.remove_channels(small, {chosen.name: [0]}, groups=groups)
    origin = origin_of(small)
    assert origin is not None
    set_origin(smaller, origin.without(groups, {chosen.name: [0]}))
    left = origin_of(smaller)
    assert left is not None
    kept = left.kept["r"][1]
    assert kept is not None
    assert np.flatnonzero(~kept).tolist() == [0, 1, 2, 3]
    feeds = batches()
    assert distance(model, rebuilt(smaller, feeds), feeds) < distance(model, smaller, feeds)
    context = Context()
    FoldReconstruction(form="ridge").rebuild(smaller, context)
    assert any("one run of prune-channels" in remark.why for remark in context.remarks)


@pytest.mark.parametrize("feeds", ["constant", "single"])
def test_inputs_that_say_nothing_change_nothing(feeds: str) -> None:
    model = graphopt.load(
        ir.to_proto(
            ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 21]> g (float[n,2] x) => (float[n,1] y)
            <float[2,3] a = {1,2,3,4,5,6}, float[3,1] b = {1,1,1}>
            { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }""")
        )
    )
    small = model.clone()
    PruneChannels(ratio=0.34, round_to=1).run(small, Context())
    given = np.zeros((64, 2), np.float32) if feeds == "constant" else np.ones((1, 2), np.float32)
    context = Context(calibration=[{"x": given}])
    before = small.graph.initializers["b"].const_value
    done = FoldReconstruction(source="calibration").rebuild(small, context)
    assert done.solved == ()
    assert small.graph.initializers["b"].const_value is before
    assert any("say too little" in remark.why for remark in context.remarks)
