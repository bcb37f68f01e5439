"""Inputs moved by gradient: nearer to what they are to match, in range, repeatable, for inputs of every shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError
from graphopt.inputs import synthesis
from graphopt.inputs.probes import InputSpec
from graphopt.inputs.source import Probes
from graphopt.inputs.synthetic import Synthesis, Synthetic, UnavailableError, find_aim, find_movables
from graphopt.ir.session import open_session
from graphopt.passes import ALL_PASSES
from graphopt.passes.contract import Context
from tests.inputs.nets import built, conv_net
from tests.zoo.models import zoo_model

pytestmark = pytest.mark.torch

BatchedFeeds = Any
MATCHED = Synthetic().matched
CONFIDENT = Synthetic().confident
LINEAR = {"w": np.random.default_rng(0).standard_normal((4, 3))}


def statistic_error(net: ir.Model, batches: BatchedFeeds) -> float:
    """Independent of torch: how far the moments of each recorded value are from the recorded ones."""
    statistics = find_aim(net).statistics
    names = [statistic.value for statistic in statistics]
    session = open_session(net, optimized=False, extra_outputs=names)
    runs = [session.run(names, dict(feeds)) for feeds in batches]
    errors = []
    for layer, statistic in enumerate(statistics):
        all_samples = np.concatenate([np.asarray(run[layer]) for run in runs])
        seen = np.moveaxis(all_samples, 1, -1).reshape(-1, statistic.mean.size)
        errors.append(np.mean(np.square((seen.mean(axis=0) - statistic.mean) / statistic.std)))
        errors.append(np.mean(np.square(seen.std(axis=0) / statistic.std - 1)))
    return float(np.mean(errors))


def folded(net: ir.Model) -> ir.Model:
    ALL_PASSES["fold-batchnorm"]().run(net, Context())
    assert all(node.op_type != "BatchNormalization" for node in net.graph)
    return net


@pytest.mark.parametrize("kind", ["batchnorm", "folded", "fixed batch"])
def test_statistics_are_matched(kind: str) -> None:
    net = conv_net("1" if kind == "fixed batch" else "n")
    net = folded(net) if kind == "folded" else net
    assert len(find_aim(net).statistics) == 2
    made = Synthetic().feeds(net, samples=24)
    assert len(made) == (24 if kind == "fixed batch" else 1)
    start = statistic_error(net, Probes().feeds(net, samples=24))
    assert start > 0.1
    assert statistic_error(net, made) < start / 5


def test_answers_become_confident_and_evenly_spread() -> None:
    net = conv_net(normalized=False)
    assert find_aim(net).statistics == ()

    def probabilities(batches: BatchedFeeds) -> np.ndarray:
        session = open_session(net, optimized=False)
        logits = np.concatenate([np.asarray(session.run(None, dict(feeds))[0]) for feeds in batches])
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    before = probabilities(Probes().feeds(net, samples=40))
    settings = replace(CONFIDENT, steps=120, learning_rate=0.1, variation_weight=0.0)
    after = probabilities(Synthetic(confident=settings).feeds(net, samples=40))
    assert after.max(axis=1).mean() > before.max(axis=1).mean() + 0.2
    drawn = np.bincount(after.argmax(axis=1), minlength=5)
    assert drawn.min() >= 4


def test_outputs_become_unlike_where_there_are_no_classes() -> None:
    filters = {"w": np.random.default_rng(0).standard_normal((2, 3, 3, 3))}
    net = built("(float[n, 3, 8, 8] x) => (float[n, 2, 6, 6] y)", "h = Conv(x, w) y = Relu(h)", filters)
    assert find_aim(net).logits is None
    session = open_session(net, optimized=False)

    def likeness(batches: BatchedFeeds) -> float:
        rows = np.concatenate([np.asarray(session.run(None, dict(feeds))[0]) for feeds in batches])
        rows = rows.reshape(len(rows), -1)
        products = np.square(np.corrcoef(rows - rows.mean(axis=0)))
        return float((products.sum() - len(rows)) / (len(rows) * (len(rows) - 1)))

    settings = replace(CONFIDENT, diversity_weight=100.0, steps=30)
    made = Synthetic(confident=settings).feeds(net, samples=10)
    assert likeness(made) < 0.8 * likeness(Probes().feeds(net, samples=10))


def test_the_range_is_kept() -> None:
    net = conv_net()
    specs = {"x": InputSpec(low=0.0, high=1.0)}
    (feeds,) = Synthetic(matched=replace(MATCHED, steps=10)).feeds(net, samples=8, specs=specs)
    assert feeds["x"].min() >= 0
    assert feeds["x"].max() <= 1
    assert feeds["x"].std() > 0.05


def test_images_of_any_scale_move_alike() -> None:
    specs = {"x": InputSpec(mean=120.0, std=60.0)}
    (start,) = Probes().feeds(conv_net(), samples=4, specs=specs)
    (feeds,) = Synthetic(matched=replace(MATCHED, steps=10)).feeds(conv_net(), samples=4, specs=specs)
    assert 5 < np.abs(feeds["x"] - start["x"]).max() < 60


@pytest.mark.parametrize(("mean", "std", "low", "high"), [(115, 60, 20, 90), (0.45, 0.25, 0.1, 0.5), (0, 1, 0.6, 2)])
def test_the_scale_of_images_is_told_by_the_statistics(mean: float, std: float, low: float, high: float) -> None:
    net = conv_net(mean=mean, std=std)
    quick = Synthetic(matched=replace(MATCHED, steps=10))
    (feeds,) = quick.feeds(net, samples=16)
    assert low < feeds["x"].std() < high
    (stated,) = quick.feeds(net, samples=16, specs={"x": InputSpec(mean=0.0, std=1.0)})
    assert 0.5 < stated["x"].std() < 3


def test_fixed_batches_run_together_where_the_graph_allows_it(capfd: pytest.CaptureFixture[str]) -> None:
    def joins(body: str, output: str = "float[1, 3] y") -> bool:
        net = built(f"(float[1, 4] x) => ({output})", body, {**LINEAR, "b": np.ones(3)})
        network = synthesis._network(net, find_aim(net), "cpu")
        return synthesis._joins(network, list(Probes().feeds(net, samples=3)))

    assert joins("h = MatMul(x, w) y = Add(h, b)")
    assert not joins("s = Constant<value = int64[1] {3}>() h = MatMul(x, w) y = Reshape(h, s)", "float[3] y")
    assert not joins(
        "z = Constant<value = int64[1] {0}>() h = MatMul(x, w) m = ReduceMax(h, z) d = Mul(m, m) y = Add(h, d)"
    )


def test_fixed_batches_that_cannot_run_together_share_statistics_all_the_same() -> None:
    body = (
        "s = Constant<value = int64[4] {1, 3, 12, 12}>() r = Reshape(x, s) c = Conv(r, w) "
        "n = BatchNormalization(c, one, zero, mean, var) y = Relu(n)"
    )
    filters = np.random.default_rng(0).standard_normal((5, 3, 3, 3))
    known = {"one": np.ones(5), "zero": np.zeros(5), "mean": np.linspace(-2, 2, 5), "var": np.linspace(20, 60, 5)}
    net = built("(float[1, 432] x) => (float[1, 5, 10, 10] y)", body, {"w": filters, **known})
    assert not synthesis._joins(synthesis._network(net, find_aim(net), "cpu"), list(Probes().feeds(net, samples=2)))
    made = Synthetic(matched=replace(MATCHED, steps=100)).feeds(net, samples=4)
    assert len(made) == 4
    assert statistic_error(net, made) < statistic_error(net, Probes().feeds(net, samples=4)) / 5


def test_the_same_seed_gives_the_same_inputs() -> None:
    quick = Synthetic(matched=replace(MATCHED, steps=3))
    one, again, other = (quick.feeds(conv_net(), samples=70, seed=seed) for seed in (0, 0, 1))
    assert [feeds["x"].shape[0] for feeds in one] == [64, 6]
    for first, second in zip(one, again, strict=True):
        np.testing.assert_array_equal(first["x"], second["x"])
    assert not np.array_equal(one[0]["x"], other[0]["x"])


def test_samples_move_in_groups_that_fit_into_memory() -> None:
    steps: list[tuple[int, int, str]] = []
    quick = Synthetic(matched=replace(MATCHED, steps=2, batch=16))
    made = quick.feeds(conv_net(), samples=40, progress=lambda *step: steps.append(step))
    assert sorted(feeds["x"].shape[0] for feeds in made) == [8, 16, 16]
    assert [step[:2] for step in steps] == [(done, 6) for done in range(1, 7)]
    tiny = Synthetic(matched=replace(MATCHED, steps=1, memory=200_000)).feeds(conv_net(), samples=6)
    assert 1 < len(tiny) <= 6
    assert sum(feeds["x"].shape[0] for feeds in tiny) == 6


def test_work_bounds_the_number_of_samples() -> None:
    quick = Synthetic(matched=replace(MATCHED, steps=1, work=3 * 10 * 144 * (8 * 27 + 8 * 72)))
    made = quick.feeds(conv_net(), samples=100)
    assert 5 <= sum(feeds["x"].shape[0] for feeds in made) <= 10


def test_work_bounds_the_steps_first() -> None:
    told: list[tuple[int, int, str]] = []
    quick = Synthetic(matched=replace(MATCHED, steps=20, least_steps=3, work=3 * 100 * 144 * (8 * 27 + 8 * 72)))
    made = quick.feeds(conv_net(), samples=16, progress=lambda *step: told.append(step))
    assert sum(feeds["x"].shape[0] for feeds in made) == 16
    assert len(told) == told[-1][1]
    assert 3 < len(told) <= 6


def test_the_rate_falls_along_half_a_cosine() -> None:
    # Adam's first step is as long as the learning rate; with a constant slope all steps are.
    net = built("(float[n, 4] x) => (float[n, 3] y)", "y = MatMul(x, w)", LINEAR)
    lengths = []
    for final in (1.0, 0.0):
        settings = replace(CONFIDENT, steps=2, learning_rate=1e-3, final_rate=final)
        (start,) = Probes().feeds(net, samples=8)
        (feeds,) = Synthetic(confident=settings).feeds(net, samples=8)
        lengths.append(np.abs(feeds["x"] - start["x"]).mean() / start["x"].std())
    assert lengths[0] == pytest.approx(2e-3, rel=0.05)
    assert lengths[1] == pytest.approx(1.5e-3, rel=0.05)


def test_torch_is_left_as_it_was() -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    Synthetic(matched=replace(MATCHED, steps=1)).feeds(conv_net(), samples=2, threads=threads + 1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads


def test_what_cannot_move_is_left() -> None:
    interface, ones = "(float[n, 4] x) => (float[n, 3] y)", {"w": np.ones((4, 3))}
    with pytest.raises(UnavailableError, match="no gradient"):
        Synthetic().feeds(built(interface, "r = Floor(x) y = MatMul(r, w)", ones), samples=4)
    with pytest.raises(UnavailableError, match="not finite"):
        Synthetic().feeds(built(interface, "a = Abs(x) b = Neg(a) c = Log(b) y = MatMul(c, w)", ones), samples=4)
    with pytest.raises(UnavailableError, match="nothing is known"):
        Synthetic().feeds(built("(float[4] x) => (float[4] y)", "y = Relu(x)", {}), samples=4)


def test_a_loss_that_is_not_finite_sends_the_descent_back() -> None:
    # The logarithm is NaN below zero, where a learning rate of three deviations throws the inputs.
    net = built("(float[n, 4] x) => (float[n, 3] y)", "a = Log(x) y = MatMul(a, w)", LINEAR)
    steps: list[int] = []
    (feeds,) = Synthetic(confident=replace(CONFIDENT, learning_rate=3.0)).feeds(
        net, samples=8, specs={"x": InputSpec(mean=20.0, std=2.0)}, progress=lambda done, *_: steps.append(done)
    )
    assert np.isfinite(open_session(net).run(None, feeds)[0]).all()
    assert len(np.unique(feeds["x"])) == 32
    # Ten if it did not go back: the steps to the first loss that is not finite, and those that are allowed to fail.
    assert 12 < len(steps) <= 40


def test_a_slope_that_is_not_finite_is_left_out() -> None:
    # The square root has an infinite slope at 0, where the range begins.
    net = built("(float[n, 4] x) => (float[n, 3] y)", "a = Sqrt(x) y = MatMul(a, w)", LINEAR)
    specs = {"x": InputSpec(low=0.0, high=1.0, mean=0.0)}
    (start,) = Probes().feeds(net, samples=8, specs=specs)
    assert (start["x"] == 0).any()
    (feeds,) = Synthetic().feeds(net, samples=8, specs=specs)
    assert np.isfinite(feeds["x"]).all()
    assert np.abs(feeds["x"] - start["x"]).max() > 0.01


@pytest.mark.parametrize(
    ("body", "output", "logits", "classes"),
    [
        ("h = MatMul(x, w) y = Softmax<axis = -1>(h)", "float[n, 3] y", "h", 3),
        ("h = MatMul(x, w) y = LogSoftmax<axis = 1>(h)", "float[n, 3] y", "h", 3),
        ("h = MatMul(x, w) y = Softmax<axis = 0>(h)", "float[n, 3] y", "y", 3),
        ("y = MatMul(x, w)", "float[n, 3] y", "y", 3),
        ("y = MatMul(x, w) h = Mul(y, y) z = Softmax(h)", "float[n, 3] y, float[n, 3] z", "h", 3),
        ("h = MatMul(x, w) y = Slice(h, zero, one, one)", "float[n, 1] y", None, 0),
        ("h = MatMul(x, w) y = Transpose(h)", "float[3, n] y", None, 0),
    ],
)  # fmt: skip
def test_class_logits_are_found(body: str, output: str, logits: str | None, classes: int) -> None:
    constants = "zero = Constant<value = int64[1] {0}>() one = Constant<value = int64[1] {1}>() "
    made = built(f"(float[n, 4] x) => ({output})", constants + body, {"w": np.ones((4, 3))})
    found = find_aim(made)
    assert (found.logits, found.classes) == (logits, classes)


def test_which_inputs_move() -> None:
    inputs = "float[n, 8, 8, 3] image, float[n, 1, 400] sound, float[n, 8] code, float[n, 4] mask, int64[n] i, float t"
    made = built(f"({inputs}) => (float[n, 8] y)", "y = Relu(code)", {})
    found = {movable.name: (movable.channel_axis, movable.axes) for movable in find_movables(made)}
    assert found == {"image": (3, (1, 2)), "sound": (None, (2,)), "code": (None, ())}


def test_dead_channels_are_judged_by_their_layer() -> None:
    net = conv_net()
    variance = net.graph.initializers["var1"]
    assert variance.const_value is not None
    dead = variance.const_value.numpy().copy()
    dead[3] = 0.0
    variance.const_value = ir.tensor(dead)
    (statistic, _) = find_aim(net).statistics
    assert statistic.std[3] == pytest.approx(0.05 * np.sqrt(np.mean(dead)))
    (feeds,) = Synthetic(matched=replace(MATCHED, steps=3)).feeds(net, samples=4)
    assert np.isfinite(feeds["x"]).all()


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_float_types(dtype: str) -> None:
    net = built(f"({dtype}[n, 4] x) => (float[n, 3] y)", "c = Cast<to = 1>(x) y = MatMul(c, w)", LINEAR)
    (feeds,) = Synthetic(confident=replace(CONFIDENT, steps=2)).feeds(net, samples=4)
    assert feeds["x"].dtype == {"float16": np.float16, "double": np.float64}[dtype]


@pytest.mark.parametrize(
    "name", ["recurrent", "conv-1d-3d", "channels-last", "raft", "vit", "scan-weights", "gated-conv", "two-outputs"]
)
def test_models_of_every_kind(name: str) -> None:
    net = zoo_model(name)
    quick = Synthetic(matched=replace(MATCHED, steps=2), confident=replace(CONFIDENT, steps=2))
    session = open_session(net, optimized=False)
    start = Probes().feeds(net, samples=6)
    made = quick.feeds(net, samples=6)
    movables = [movable.name for movable in find_movables(net)]
    for feeds, before in zip(made, start, strict=True):
        assert all(np.isfinite(output).all() for output in session.run(None, feeds))
        for key, array in feeds.items():
            assert array.dtype == before[key].dtype
            assert array.shape == before[key].shape
            assert np.array_equal(array, before[key]) == (key not in movables)


@pytest.mark.parametrize(
    "wrong", [{"steps": -1}, {"learning_rate": 0}, {"temperature": 0}, {"batch": 0}, {"variation_weight": float("nan")}]
)
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        Synthesis(**wrong)  # type: ignore[arg-type]
