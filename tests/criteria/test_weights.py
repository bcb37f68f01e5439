"""The criteria of weights against their definitions, written out plainly."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.criteria import Knowledge, criterion
from graphopt.criteria.distance import nearness, squared_distances
from graphopt.errors import GraphoptError
from graphopt.ir.channels import channel_groups
from graphopt.passes import FoldBatchnorm
from tests.criteria.networks import CONVNET, RESIDUAL, SEPARABLE, convnet, graph, score
from tests.zoo.models import zoo_model

EPSILON = 1e-5


def residual(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4), "b": (4, 5), "c": (5, 4), "s": (4,), "d": (4, 2)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def separable(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (5, 3, 1, 1), "k": (5, 1, 3, 3), "b": (2, 5, 3, 3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


# Size ---------------------------------------------------------------------------------------------------------


def test_norms_of_the_filters_that_make_a_channel() -> None:
    weights = convnet()
    filters = weights["w"].reshape(6, -1).astype(np.float64)
    model = graph(CONVNET, weights)
    np.testing.assert_allclose(score("l1", model, "w", 0), np.abs(filters).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(score("l2", model, "w", 0), np.linalg.norm(filters, axis=1), rtol=1e-6)


@pytest.mark.parametrize(("combine", "function"), [("sum", np.sum), ("mean", np.mean), ("max", np.max)])
def test_members_of_a_coupled_unit_are_combined(combine: str, function: object) -> None:
    weights = residual()
    parts = [np.abs(weights[name]).sum(axis=0) for name in ("a", "c")]
    found = score("l1", graph(RESIDUAL, weights), "a", 1, combine=combine)
    np.testing.assert_allclose(found, function(parts, axis=0), rtol=1e-6)


def test_the_norm_of_members_is_that_of_all_their_weights() -> None:
    weights = residual()
    everything = np.concatenate([weights["a"], weights["c"]])
    found = score("l2", graph(RESIDUAL, weights), "a", 1)
    np.testing.assert_allclose(found, np.linalg.norm(everything, axis=0), rtol=1e-6)


def test_depthwise_filters_count() -> None:
    weights = separable()
    expected = np.abs(weights["a"]).sum(axis=(1, 2, 3)) + np.abs(weights["k"]).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(score("l1", graph(SEPARABLE, weights), "a", 0), expected, rtol=1e-6)


def test_folded_norm_is_the_norm_after_folding() -> None:
    model = graph(CONVNET, convnet())
    before = score("folded-norm", model, "w", 0)
    FoldBatchnorm()(model)
    assert "BatchNormalization" not in {node.op_type for node in model.graph}
    np.testing.assert_allclose(before, score("l2", model, "w", 0), rtol=1e-5)
    np.testing.assert_allclose(score("folded-norm", model, "w", 0), score("l2", model, "w", 0), rtol=1e-12)


def test_a_constant_factor_counts_like_gamma() -> None:
    weights = {"w": np.array([[1.0, 2.0, 3.0]]), "s": np.array([5.0, -1.0, 0.0]), "u": np.ones((3, 1))}
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,1] x) => (float[n,1] y) {
        p = MatMul (x, w) r = Mul (p, s) t = Relu (r) y = MatMul (t, u) }"""
    assert score("folded-norm", graph(text, weights), "w", 1).tolist() == [5.0, 2.0, 0.0]


def test_batchnorm_scale_is_the_absolute_gamma() -> None:
    weights = convnet()
    np.testing.assert_allclose(score("batchnorm-scale", graph(CONVNET, weights), "w", 0), np.abs(weights["gamma"]))


def test_without_batchnorm_other_scales_stand_in_and_then_the_norm() -> None:
    weights = residual()
    model = graph(RESIDUAL, weights)
    np.testing.assert_allclose(score("batchnorm-scale", model, "a", 1), np.abs(weights["s"]))
    np.testing.assert_allclose(score("batchnorm-scale", model, "b", 1), score("l2", model, "b", 1))


@pytest.mark.parametrize("name", ["batchnorm-scale", "folded-norm", "coupled-path"])
def test_a_gamma_of_zero_scores_zero(name: str) -> None:
    weights = convnet()
    weights["gamma"][[1, 4]] = 0
    found = score(name, graph(CONVNET, weights), "w", 0)
    assert np.flatnonzero(found == 0).tolist() == [1, 4]


def test_random_scores_depend_on_the_seed_and_the_group_alone() -> None:
    model = zoo_model("resnet")
    groups = [group for group in channel_groups(model) if group.prunable]
    known = channel_groups(model)
    draw = criterion("random").scores
    first, again = (draw(Knowledge(model, known, seed=3), chosen) for chosen in (groups, groups[::-1]))
    other = draw(Knowledge(model, known, seed=4), groups)
    assert all((first[name] == again[name]).all() for name in first)
    assert all((first[name] != other[name]).any() for name in first)
    assert len({values.tobytes() for values in first.values()}) == len(first)


@pytest.mark.parametrize("zoo", ["shufflenet-v1", "unet-groupnorm"])
def test_groups_of_one_unit_have_a_score(zoo: str) -> None:
    model = zoo_model(zoo)
    groups = channel_groups(model)
    single = [group for group in groups if group.units == 1]
    assert single
    for name in ("l1", "l2", "folded-norm", "batchnorm-scale", "fpgm", "k-reciprocal", "coupled-path", "random"):
        for found in criterion(name).scores(Knowledge(model, groups), single).values():
            assert found.shape == (1,)
            assert np.isfinite(found).all()
            assert found >= 0


# Redundancy ---------------------------------------------------------------------------------------------------


def distances(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows[:, None] - rows[None], axis=2)


def test_fpgm_sums_distances() -> None:
    weights = residual()
    rows = np.concatenate([weights["a"], weights["c"]]).T.astype(np.float64)
    np.testing.assert_allclose(score("fpgm", graph(RESIDUAL, weights), "a", 1), distances(rows).sum(axis=1), rtol=1e-6)


def test_distances_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((11, 7))
    monkeypatch.setattr("graphopt.criteria.distance._BLOCK_BYTES", 8 * 11 * 3)
    blocks = list(squared_distances([rows[:, :3], rows[:, 3:]], 11))
    assert [len(block) for block in blocks] == [3, 3, 3, 2]
    np.testing.assert_allclose(np.concatenate(blocks), distances(rows) ** 2, atol=1e-12)
    monkeypatch.undo()
    whole = nearness([rows], 11)
    monkeypatch.setattr("graphopt.criteria.distance._BLOCK_BYTES", 8 * 11 * 2)
    np.testing.assert_array_equal(whole, nearness([rows], 11))


def reciprocal(rows: np.ndarray, wanted: int) -> tuple[set[int], set[int]]:
    """R_k and R_(k-1) of the paper for the smallest k >= wanted with |R_k| >= wanted, by intersecting sets."""
    near = np.argsort(distances(rows), axis=1, kind="stable")
    previous: set[int] = set()
    for k in range(1, len(rows) + 1):
        common = set.intersection(*(set(row[:k].tolist()) for row in near))
        if k >= wanted and len(common) >= wanted:
            return common, previous
        previous = common
    raise AssertionError("R_N has all filters")


@pytest.mark.parametrize("seed", range(8))
def test_k_reciprocal_keeps_what_the_sets_of_the_paper_say(seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((14, 5))
    scores = nearness([rows[:, :2], rows[:, 2:]], 14)
    for wanted in range(1, 15):
        kept = set(np.argsort(scores, kind="stable")[14 - wanted :].tolist())
        inside, earlier = reciprocal(rows, wanted)
        assert len(kept) == wanted
        assert earlier <= kept <= inside


def test_k_reciprocal_keeps_the_cluster_and_drops_the_outliers() -> None:
    rng = np.random.default_rng(0)
    cluster = np.tile(rng.standard_normal(8), (6, 1))
    outliers = 100 * rng.standard_normal((4, 8))
    rows = np.concatenate([outliers[:2], cluster, outliers[2:]])
    assert set(np.argsort(nearness([rows], 10))[4:].tolist()) == set(range(2, 8))


def test_equal_filters_score_equally() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 300)).repeat(2, axis=0)
    scores = nearness([rows], 12)
    np.testing.assert_array_equal(scores[::2], scores[1::2])


# Paths --------------------------------------------------------------------------------------------------------


def test_paths_through_one_channel() -> None:
    weights = convnet()
    produced = np.abs(weights["w"]).sum(axis=(1, 2, 3)).astype(np.float64)
    scale = np.abs(weights["gamma"]) / np.sqrt(weights["variance"] + EPSILON)
    read = np.abs(weights["u"]).sum(axis=(0, 2, 3))
    np.testing.assert_allclose(
        score("coupled-path", graph(CONVNET, weights), "w", 0), read * scale * produced, rtol=1e-5
    )


def test_paths_of_a_residual_stream_are_all_pairs_of_producer_and_consumer_behind_it() -> None:
    weights = {name: np.abs(array).astype(np.float64) for name, array in residual().items()}
    expected = np.zeros(4)
    for unit in range(4):
        a, c = weights["a"][:, unit].sum(), weights["c"][:, unit].sum()
        b, d = weights["b"][unit].sum(), weights["d"][unit].sum()
        expected[unit] = a * b + a * weights["s"][unit] * d + c * weights["s"][unit] * d  # c comes behind b
    np.testing.assert_allclose(score("coupled-path", graph(RESIDUAL, residual()), "a", 1), expected, rtol=1e-6)


def test_a_depthwise_filter_is_a_factor_on_the_path() -> None:
    weights = separable()
    a, k, b = (np.abs(weights[name]).astype(np.float64) for name in ("a", "k", "b"))
    expected = a.sum(axis=(1, 2, 3)) * k.sum(axis=(1, 2, 3)) * b.sum(axis=(0, 2, 3))
    np.testing.assert_allclose(score("coupled-path", graph(SEPARABLE, weights), "a", 0), expected, rtol=1e-6)


def test_paths_through_a_flattened_image() -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 2, 1, 1)), "u": rng.standard_normal((36, 3))}
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,2,3,3] x) => (float[n,3] y) {
        h = Conv (x, w) a = Relu (h) f = Flatten (a) y = MatMul (f, u) }"""
    expected = np.abs(weights["w"]).sum(axis=(1, 2, 3)) * np.abs(weights["u"]).reshape(4, 9, 3).sum(axis=(1, 2))
    np.testing.assert_allclose(score("coupled-path", graph(text, weights), "w", 0), expected, rtol=1e-5)


def test_a_layer_scaled_up_and_the_next_one_scaled_down_keeps_its_paths() -> None:
    weights = convnet()
    before = score("coupled-path", graph(CONVNET, weights), "w", 0)
    weights["gamma"], weights["u"] = 8 * weights["gamma"], weights["u"] / 8
    np.testing.assert_allclose(score("coupled-path", graph(CONVNET, weights), "w", 0), before, rtol=1e-6)


# By name ------------------------------------------------------------------------------------------------------


def test_unknown_names_and_options_are_refused_with_the_way_out() -> None:
    with pytest.raises(GraphoptError, match="do you mean 'folded-norm'"):
        criterion("folded_norms")
    with pytest.raises(GraphoptError, match="there is no criterion 3"):
        criterion(3)  # type: ignore[arg-type]
    with pytest.raises(GraphoptError, match="has no option 'mode'"):
        criterion("l1", mode="sum")
    with pytest.raises(GraphoptError, match="no combination 'median'"):
        criterion("l2", combine="median")
    with pytest.raises(GraphoptError, match="set them where the criterion is made"):
        criterion(criterion("l1"), combine="max")
    with pytest.raises(GraphoptError, match="no criteria are given"):
        criterion("unanimous")
    for wrong in ("l1", 3, criterion("l1")):
        with pytest.raises(GraphoptError, match="one criterion a task"):
            criterion("unanimous", criteria=wrong)
    with pytest.raises(GraphoptError, match="there is no criterion 3"):
        criterion("unanimous", criteria=["l1", 3])
    with pytest.raises(GraphoptError, match="there is no criterion None"):
        criterion("unanimous", criteria=[{"combine": "max"}])


def test_unanimous_takes_names_and_tables() -> None:
    found = criterion("unanimous", criteria=["l1", {"name": "l2", "combine": "max"}])
    assert found == criterion("unanimous", criteria=(criterion("l1"), criterion("l2", combine="max")))


def test_a_criterion_is_a_value() -> None:
    assert criterion("l1", combine="max") == criterion("l1", combine="max") != criterion("l1")
    assert hash(criterion("apoz")) == hash(criterion("apoz"))
    kept = criterion("fpgm")
    assert criterion(kept) is kept


def test_unanimous_keeps_what_any_criterion_holds_high() -> None:
    weights = convnet()
    model = graph(CONVNET, weights)
    members = ("l1", "batchnorm-scale")
    votes = [score(name, model, "w", 0) for name in members]
    found = score("unanimous", model, "w", 0, criteria=tuple(criterion(name) for name in members))
    np.testing.assert_allclose(found, np.maximum(*(vote / vote.sum() for vote in votes)))
    alone = score("unanimous", model, "w", 0, criteria=(criterion("l1"),))
    np.testing.assert_array_equal(np.argsort(alone), np.argsort(votes[0]))
