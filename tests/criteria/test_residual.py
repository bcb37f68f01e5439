"""Criterion "residual": its elimination against the exact formula, and what it says of small graphs."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.criteria import Knowledge, criterion, elimination
from graphopt.criteria.elimination import Losses, Reader, eliminate, errors_in_order
from graphopt.criteria.residual import Residual, residual_curves
from graphopt.errors import DataError, GraphoptError
from graphopt.ir.channels import channel_groups
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context
from graphopt.passes.prune_channels import PruneChannels
from graphopt.search import Candidate, CostModel, Problem, Sensitivity, Target
from graphopt.search.sensitivity import convex_curve
from tests.criteria.networks import CONVNET, SEPARABLE, convnet, graph, group_with, images, score

MLP = """<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,3] y) {
    hidden = MatMul (x, a)
    active = Relu (hidden)
    y = MatMul (active, b)
}"""


def problem(
    seed: int, units: int, taps: int, *, others: int = 0, rows: int = 3, ridge: float = 1e-3
) -> tuple[np.ndarray, np.ndarray, Reader]:
    """Covariance of the columns of all units and some others, the weight of the former, and their reader."""
    rng = np.random.default_rng(seed)
    size = units * taps + others
    factor = rng.standard_normal((size, size)) * rng.uniform(0.1, 2, size)
    covariance, weight = factor.T @ factor / size, rng.standard_normal((rows, size))
    own = units * taps
    inverse = np.linalg.inv(covariance + ridge * np.eye(size))[:own, :own]
    return covariance, weight, Reader(inverse, weight[:, :own], np.full(own, ridge), units)


def exact(covariance: np.ndarray, weight: np.ndarray, gone: np.ndarray, ridge: float) -> float:
    """E(P) as the definition has it."""
    kept = np.setdiff1d(np.arange(len(covariance)), gone)
    across = covariance[np.ix_(gone, kept)]
    inside = np.linalg.solve(covariance[np.ix_(kept, kept)] + ridge * np.eye(len(kept)), across.T)
    left = covariance[np.ix_(gone, gone)] - across @ inside
    return float(np.trace(weight[:, gone] @ left @ weight[:, gone].T))


def columns(units: tuple[int, ...] | np.ndarray, taps: int) -> np.ndarray:
    return (np.array(units)[:, None] * taps + np.arange(taps)).reshape(-1)


@pytest.mark.parametrize(("taps", "packets"), [(1, False), (3, False), (1, True), (3, True)])
def test_what_the_elimination_costs_is_the_exact_loss(
    taps: int, packets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packets:
        monkeypatch.setattr(elimination, "_EXACT", 0)
        monkeypatch.setattr(elimination, "_ROUNDS", 3)
    first, second = problem(0, 7, taps, others=2), problem(1, 7, taps, rows=9, ridge=0.1)
    alone = np.random.default_rng(2).uniform(0, 0.5, 7)
    losses = Losses((first[2], second[2]), alone)
    order, errors = eliminate(losses)
    assert sorted(order.tolist()) == list(range(7))
    for count in range(1, 8):
        gone = columns(order[:count], taps)
        expected = exact(first[0], first[1], gone, 1e-3) + exact(second[0], second[1], gone, 0.1)
        assert errors[count - 1] == pytest.approx(expected + alone[order[:count]].sum(), rel=1e-8)
    np.testing.assert_allclose(errors_in_order(losses, order), errors, rtol=1e-8)


def test_greedy_against_all_subsets() -> None:
    covariance, weight, reader = problem(3, 6, 2, ridge=1e-9)
    losses = Losses((reader,), np.zeros(6))
    order, errors = eliminate(losses)
    assert (np.diff(errors) > 0).all()
    for count in range(1, 6):
        every = {
            subset: exact(covariance, weight, columns(subset, 2), 1e-9)
            for subset in itertools.combinations(range(6), count)
        }
        for subset, expected in every.items():
            assert errors_in_order(losses, np.array(subset))[-1] == pytest.approx(expected, rel=1e-8)
        assert errors[count - 1] >= min(every.values()) * (1 - 1e-8)
        assert errors[count - 1] <= np.median(list(every.values()))
        # one step is the best one
        before = tuple(order[: count - 1].tolist())
        best = min(every[tuple(sorted((*before, unit)))] for unit in range(6) if unit not in before)
        assert errors[count - 1] == pytest.approx(best, rel=1e-8)


def test_packets_see_that_two_units_stand_in_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "_EXACT", 0)
    monkeypatch.setattr(elimination, "_ROUNDS", 2)
    covariance = np.diag([9.0, 9.0, 1.0, 2.0, 8.0, 7.0])
    covariance[0, 1] = covariance[1, 0] = 9.0
    reader = Reader(np.linalg.inv(covariance + 1e-6 * np.eye(6)), np.ones((1, 6)), np.full(6, 1e-6), 6)
    order, errors = eliminate(Losses((reader,), np.zeros(6)))
    assert order[0] in (0, 1)
    assert order[1:3].tolist() == [2, 3]
    assert errors[2] == pytest.approx(3, abs=1e-4)


# Graphs ---------------------------------------------------------------------------------------------------------


def mlp(seed: int = 0, units: int = 6) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {"a": rng.standard_normal((4, units)), "b": rng.standard_normal((units, 3))}
    x = rng.standard_normal((400, 4)).astype(np.float32)
    return {name: array.astype(np.float32) for name, array in weights.items()}, x


def test_scores_are_shares_of_the_output_that_least_squares_leaves() -> None:
    weights, x = mlp()
    found = score("residual", graph(MLP, weights), "a", 1, [{"x": x[:150]}, {"x": x[150:]}], ridge=1e-9)
    hidden = np.maximum(x @ weights["a"], 0).astype(np.float64)
    y = hidden @ weights["b"]
    order = np.argsort(found)
    for count in range(1, 7):
        design = np.column_stack([np.delete(hidden, order[:count], axis=1), np.ones(len(x))])
        left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        assert found[order[count - 1]] == pytest.approx(np.square(left).sum() / (y.var(axis=0).sum() * 400), rel=1e-3)


def test_a_convolution_with_its_kernel_and_padding() -> None:
    weights = convnet(filters=4)
    text = CONVNET.replace("Conv (hidden, u)", "Conv <pads = [1, 0, 1, 0], strides = [2, 1]> (hidden, u)")
    feeds = images(60)
    found = score("residual", graph(text, weights), "w", 0, feeds, ridge=1e-9)
    session = open_session(graph(text, weights), optimized=False, extra_outputs=["hidden", "read"])
    returned = [session.run(None, feed) for feed in feeds]
    hidden, read = (np.concatenate([np.asarray(each[index], np.float64) for each in returned]) for index in (1, 2))
    y = np.moveaxis(read, 1, -1).reshape(-1, 5)
    padded = np.pad(hidden, ((0, 0), (0, 0), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2]
    patches = np.moveaxis(windows, 1, 3).reshape(-1, 4, 9)
    order = np.argsort(found)
    for count in (1, 2, 3):
        kept = np.delete(patches, order[:count], axis=1).reshape(len(patches), -1)
        design = np.column_stack([kept, np.ones(len(patches))])
        left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        expected = np.square(left).sum() / (y.var(axis=0).sum() * len(y))
        assert found[order[count - 1]] == pytest.approx(expected, rel=1e-3)


def test_channels_that_others_stand_in_for_and_dead_ones_go_first() -> None:
    weights, x = mlp(units=8)
    weights["a"][:, 5] = weights["a"][:, 2] * 100  # large, and the same
    weights["a"][:, 7] = 0  # dead
    weights["b"][7] = 50
    found = score("residual", graph(MLP, weights), "a", 1, [{"x": x}], ridge=1e-8)
    assert found[7] == 0
    assert set(np.argsort(found)[:2]) < {2, 5, 7}
    assert min(found[2], found[5]) < 1e-6
    assert max(found[2], found[5]) > 0.1
    l2 = score("l2", graph(MLP, weights), "a", 1)
    assert np.argmax(l2) == 5


def test_a_constant_channel_costs_nothing() -> None:
    weights = convnet(filters=6)
    weights["gamma"][1], weights["beta"][1] = 0, 40
    text = CONVNET.replace("pads = [1, 1, 1, 1]", "pads = [0, 0, 0, 0]")
    found = score("residual", graph(text, weights), "w", 0, images(30))
    assert found[1] == 0
    assert np.count_nonzero(found) == 5


def test_scores_move_with_the_units() -> None:
    weights, x = mlp(units=9)
    turn = np.random.default_rng(1).permutation(9)
    turned = {"a": weights["a"][:, turn], "b": weights["b"][turn]}
    before, after = (score("residual", graph(MLP, each), "a", 1, [{"x": x}]) for each in (weights, turned))
    np.testing.assert_allclose(after, before[turn], rtol=1e-4)
    assert len(np.unique(before)) == 9


READ_BY_TWO = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3,6,6] x) => (float[n,4,6,6] y, float[n,2,6,6] z) {
    wide = Conv (x, a)
    active = Relu (wide)
    one = Conv (active, b)
    normal = BatchNormalization (one, gamma, beta, mean, variance)
    skip = Conv (x, s)
    y = Add (normal, skip)
    z = Conv (active, c)
}"""


def read_by_two(seed: int = 0) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (7, 3, 1, 1), "b": (4, 7, 1, 1), "s": (4, 3, 1, 1), "c": (2, 7, 1, 1)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("gamma", "beta", "mean", "variance"):
        weights[name] = rng.uniform(0.1, 3, 4).astype(np.float32)
    return weights, [{"x": rng.standard_normal((4, 3, 6, 6)).astype(np.float32)} for _ in range(4)]


def test_folding_batchnorm_changes_nothing_and_branches_count_by_their_sum() -> None:
    weights, feeds = read_by_two()
    found = score("residual", graph(READ_BY_TWO, weights), "a", 0, feeds)
    factor = weights["gamma"] / np.sqrt(weights["variance"] + 1e-5)
    folded = dict(weights, b=weights["b"] * factor[:, None, None, None], f=weights["beta"] - weights["mean"] * factor)
    for name in ("gamma", "beta", "mean", "variance"):
        del folded[name]
    text = READ_BY_TWO.replace("(active, b)", "(active, b, f)").replace("(normal, skip)", "(one, skip)")
    text = "\n".join(line for line in text.splitlines() if "BatchNormalization" not in line)
    np.testing.assert_allclose(score("residual", graph(text, folded), "a", 0, feeds), found, rtol=1e-4)
    # a much larger skip: what the branch loses is nothing beside it, and only `c` counts
    drowned = score("residual", graph(READ_BY_TWO, dict(weights, s=weights["s"] * 1e4)), "a", 0, feeds)
    without = score("residual", graph(READ_BY_TWO, dict(weights, b=weights["b"] * 0)), "a", 0, feeds)
    np.testing.assert_allclose(drowned, without, rtol=1e-3, atol=1e-6)
    assert not np.allclose(found, without, rtol=0.1)


def test_depthwise_operators_are_no_readers() -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 3, 1, 1), "k": (5, 1, 3, 3), "b": (2, 5, 3, 3)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds = [{"x": rng.standard_normal((40, 3, 6, 6)).astype(np.float32)}]
    found = score("residual", graph(SEPARABLE, weights), "a", 0, feeds)
    scale = np.array([0.1, 1, 10, 3, 0.5], np.float32)[:, None, None, None]
    scaled = dict(weights, k=weights["k"] * scale, b=weights["b"] / scale[:, 0])
    other = score("residual", graph(SEPARABLE, scaled), "a", 0, feeds, ridge=1e-8)
    same = score("residual", graph(SEPARABLE, weights), "a", 0, feeds, ridge=1e-8)
    np.testing.assert_allclose(other, same, rtol=1e-2)
    assert 0 < found.min() < found.max() <= 1.01


def test_grouped_convolutions_solve_each_block_for_itself() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,3,1,1] x) => (float[n,4,1,1] y) {
        wide = Conv <group = 1> (x, a)
        active = Relu (wide)
        y = Conv <group = 2> (active, b)
    }"""
    rng = np.random.default_rng(4)
    weights = {"a": rng.standard_normal((10, 3, 1, 1)), "b": rng.standard_normal((4, 5, 1, 1))}
    model = graph(text, {name: array.astype(np.float32) for name, array in weights.items()})
    x = rng.standard_normal((500, 3, 1, 1)).astype(np.float32)
    groups = channel_groups(model)
    group = group_with(model, "b", 1)
    known = groups.named(group.name)
    found = Residual(ridge=1e-9).scores(Knowledge(model, groups, [{"x": x}]), [known])[group.name]
    assert known.units == 5
    hidden = np.maximum(x[:, :, 0, 0] @ weights["a"][:, :, 0, 0].T, 0)
    order = np.argsort(found)
    for count in (1, 2, 4):
        lost, size = 0.0, 0.0
        gone = [
            int(index) for unit in order[:count] for axis, index in _pairs(known.slices(int(unit))["a"]) if axis == 0
        ]
        for block in range(2):
            own = hidden[:, 5 * block : 5 * block + 5]
            y = own @ weights["b"][2 * block : 2 * block + 2, :, 0, 0].T
            kept = [channel for channel in range(5) if channel + 5 * block not in gone]
            design = np.column_stack([own[:, kept], np.ones(500)])
            lost += np.square(y - design @ np.linalg.lstsq(design, y, rcond=None)[0]).sum()
            size += y.var(axis=0).sum() * 500
        assert found[order[count - 1]] == pytest.approx(lost / size, rel=1e-3, abs=1e-6)


def _pairs(slices: list[tuple[int, np.ndarray]]) -> list[tuple[int, int]]:
    return [(axis, int(index)) for axis, indices in slices for index in indices]


def test_weights_that_the_graph_transposes_count_and_the_model_stays_as_it_is() -> None:
    weights, x = mlp()
    text = MLP.replace("y = MatMul (active, b)", "t = Transpose <perm = [1, 0]> (b)\n    y = MatMul (active, t)")
    model = graph(text, dict(weights, b=weights["b"].T))
    groups = channel_groups(model)
    before, uses = ir.to_proto(model).SerializeToString(), [len(node.outputs[0].uses()) for node in model.graph]
    (group,) = [group for group in groups if ("a", 1) in group.members]
    found = Residual().scores(Knowledge(model, groups, [{"x": x}]), [group])[group.name]
    assert ir.to_proto(model).SerializeToString() == before
    assert [len(node.outputs[0].uses()) for node in model.graph] == uses
    np.testing.assert_allclose(found, score("residual", graph(MLP, weights), "a", 1, [{"x": x}]), rtol=1e-6)


def test_units_that_no_weight_reads_go_by_their_variance() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,n] y) {
        queries = MatMul (x, a)
        keys = MatMul (x, b)
        turned = Transpose <perm = [1, 0]> (keys)
        y = MatMul (queries, turned)
    }"""
    weights, x = mlp()
    model = graph(text, {"a": weights["a"], "b": weights["a"] * np.float32(0.5)})
    found = score("residual", model, "a", 1, [{"x": x}])
    variance = score("activation-variance", model, "a", 1, [{"x": x}])
    order = np.argsort(variance)
    np.testing.assert_allclose(found[order], np.cumsum(variance[order]) / variance.sum(), rtol=1e-9)


def test_limits_of_columns() -> None:
    weights = convnet(filters=6)
    feeds = images(40)
    whole = score("residual", graph(CONVNET, weights), "w", 0, feeds, columns=54)
    np.testing.assert_allclose(whole, score("residual", graph(CONVNET, weights), "w", 0, feeds))
    channels = score("residual", graph(CONVNET, weights), "w", 0, feeds, columns=53)
    assert not np.allclose(channels, whole, rtol=1e-3)
    alone = score("residual", graph(CONVNET, weights), "w", 0, feeds, columns=5)
    session = open_session(graph(CONVNET, weights), optimized=False, extra_outputs=["hidden", "read"])
    runs = [session.run(None, feed) for feed in feeds]
    hidden, read = (np.concatenate([np.asarray(run[index], np.float64) for run in runs]) for index in (1, 2))
    windows = np.lib.stride_tricks.sliding_window_view(hidden, (3, 3), axis=(2, 3))
    energy = windows.var(axis=(0, 2, 3)).mean(axis=(1, 2)) * np.square(weights["u"]).sum(axis=(0, 2, 3))
    order = np.argsort(energy)
    expected = np.cumsum(energy[order]) / read.var(axis=(0, 2, 3)).sum()
    np.testing.assert_allclose(alone[order], expected, rtol=1e-3)


def test_few_rows_do_not_explain_everything() -> None:
    rng = np.random.default_rng(0)
    weights = {"a": np.eye(12, dtype=np.float32), "b": rng.standard_normal((12, 3)).astype(np.float32)}
    text = MLP.replace("float[n,4] x", "float[n,12] x").replace("active = Relu (hidden)", "active = Tanh (hidden)")
    few = rng.standard_normal((8, 12)).astype(np.float32)  # independent columns: nothing can be made up for
    found = np.sort(score("residual", graph(text, weights), "a", 1, [{"x": few}]))
    many = np.sort(
        score("residual", graph(text, weights), "a", 1, [{"x": rng.standard_normal((5000, 12), np.float32)}])
    )
    assert found[5] > many[5] / 3


def test_what_it_cannot_do_without() -> None:
    weights, x = mlp()
    model = graph(MLP, weights)
    for options in ({"ridge": 0.0}, {"ridge": float("nan")}, {"columns": 0}, {"columns": 2.5}):
        with pytest.raises(GraphoptError):
            criterion("residual", **options)
    with pytest.raises(DataError, match="needs inputs"):
        score("residual", model, "a", 1)
    with pytest.raises(DataError):
        score("residual", model, "a", 1, [])
    with pytest.raises(DataError, match="NaN"):
        score("residual", model, "a", 1, [{"x": np.where(x > 2, np.inf, x)}])


# Curves ---------------------------------------------------------------------------------------------------------


def test_curves_are_those_of_the_ranking() -> None:
    weights, feeds = read_by_two()
    model = graph(READ_BY_TWO, weights)
    groups = channel_groups(model)
    (group,) = [group for group in groups if group.prunable]
    knowledge = Knowledge(model, groups, feeds)
    scores = Residual().scores(knowledge, [group])
    greedy, same = residual_curves(knowledge, [group]), residual_curves(knowledge, [group], scores)
    shares, errors = greedy[group.name]
    np.testing.assert_allclose(shares, np.arange(1, 7) / 7)
    np.testing.assert_allclose(errors, np.sort(scores[group.name])[:6], rtol=1e-6)
    np.testing.assert_allclose(same[group.name][1], errors, rtol=1e-6)
    worst = residual_curves(knowledge, [group], {group.name: -scores[group.name]})[group.name][1]
    assert (worst >= errors * (1 - 1e-9)).all()
    assert worst[0] > errors[0] * 1.5


def test_convex_curves() -> None:
    rng = np.random.default_rng(0)
    shares, errors = np.arange(1, 20) / 20, np.cumsum(rng.uniform(0, 1, 19) ** 3)
    corners, heights = convex_curve((tuple(shares), tuple(errors)), 0.9)
    assert corners[0] == heights[0] == 0
    assert corners[-1] == pytest.approx(0.9)
    assert (np.diff(np.diff(heights) / np.diff(corners)) > 0).all()
    kept = shares <= 0.9 + 1e-9
    assert (np.interp(shares[kept], corners, heights) <= errors[kept] + 1e-12).all()
    assert convex_curve(((0.8,), (1.0,)), 0.5)[0].tolist() == [0.0]


TWO_LAYERS = """<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,3] y) {
    hidden = MatMul (x, a)
    active = Relu (hidden)
    middle = MatMul (active, b)
    again = Relu (middle)
    y = MatMul (again, c)
}"""


@pytest.mark.parametrize("ranking", ["residual", "l2"])
def test_sensitivity_takes_where_it_costs_least(ranking: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 12), "b": (12, 12), "c": (12, 3)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights["a"][:, 6:] = weights["a"][:, :6] * 2  # half of the first layer is there twice
    x = rng.standard_normal((600, 4)).astype(np.float32)
    model = graph(TWO_LAYERS, weights)
    groups = channel_groups(model)
    candidates = [group for group in groups if group.prunable]
    feeds = [{"x": x}]
    knowledge = Knowledge(model, groups, feeds)
    curves = residual_curves(knowledge, candidates, criterion(ranking).scores(knowledge, candidates))
    first, second = (np.concatenate([[0], curves[group.name][1]]) for group in candidates)
    kind = PruneChannels(
        ratio=0.25,
        criterion=ranking,
        allocation=Sensitivity(objective="residual"),
        round_to=1,
        source="calibration",
    )
    plan = kind.plan(model, Context(calibration=feeds))
    taken = [len(plan.selection.get(group.name, ())) for group in candidates]
    assert sum(taken) == 6
    error = first[taken[0]] + second[taken[1]]
    assert error < first[3] + second[3]
    if ranking == "residual":  # greedy curves are convex but for rounding: no other split is better
        assert error <= min(first[count] + second[6 - count] for count in range(7)) * (1 + 1e-6)


def test_the_path_along_curves_is_steady() -> None:
    model = graph(READ_BY_TWO, read_by_two()[0])
    groups = channel_groups(model)
    (group,) = [group for group in groups if group.prunable]
    candidate = Candidate(group, np.arange(7.0))
    given = Problem(model, groups, (candidate,), Target("macs", 0.5), CostModel(model, groups))
    curve = ((1 / 7, 3 / 7, 5 / 7), (0.0, 0.1, 0.7))
    path = Sensitivity(objective="residual", curves={group.name: curve}).path(given)
    found = [path(pressure)[group.name] for pressure in np.linspace(0, 1, 31)]
    assert found[0] == 0
    assert found[-1] == pytest.approx(5)
    assert (np.diff(found) > 0).all()
    assert max(np.diff(found)) < 0.21
