"""Each allocation against what its paper says, by brute force where there is a closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphopt.errors import DataError, GraphoptError
from graphopt.ir.removal import mask_channels
from graphopt.ir.session import open_session
from graphopt.search import ALLOCATIONS, CrossLayer, GlobalRanking, Sensitivity, Target, Uniform, allocation
from graphopt.search.contract import Allocation, Candidate, Problem
from graphopt.search.cross_layer import CrossLayerRanking, layer_factors, made_by
from graphopt.search.sensitivity import (
    Exponential,
    closed_form,
    exponential_rates,
    first_samples,
    fit_exponential,
    measured_curves,
)
from tests.search.pruning_nets import conv_net, mlp, problem

FEEDS = [{"x": np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)}]
HALF = Target("units", 0.5)


def everything(model_seed: int = 0) -> Problem:
    return problem(mlp((6, 24, 40, 8, 3), seed=model_seed), HALF, feeds=FEEDS)


# What holds for all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@pytest.mark.parametrize("least", [1, 5])
def test_paths_begin_at_nothing_never_fall_and_leave_enough(name: str, least: int) -> None:
    given = problem(mlp((6, 24, 40, 8, 3)), HALF, least=least, feeds=FEEDS)
    path = allocation(name).path(given)
    points = [path(pressure) for pressure in np.linspace(0, 1, 41)]
    assert all(count == pytest.approx(0, abs=1e-9) for count in points[0].values())
    for candidate in given.candidates:
        counts = [point[candidate.name] for point in points]
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(counts))
        assert counts[-1] <= candidate.units - least
        assert counts[-1] > 0


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_ratio_is_the_share_of_all_units(name: str) -> None:
    given = everything()
    found = allocation(name)
    removed = found.at_ratio(found.path(given), given, 0.4)
    assert sum(removed.values()) == pytest.approx(0.4 * 72, abs=0.6)


def test_registry_names_what_is_near() -> None:
    assert allocation(Uniform()) == Uniform()
    with pytest.raises(GraphoptError, match="did you mean 'uniform'"):
        allocation("unifrom")
    with pytest.raises(GraphoptError, match="did you mean 'normalise'"):
        allocation("global", normalize="max")
    with pytest.raises(GraphoptError, match="options"):
        allocation(Uniform(), limit=0.5)
    with pytest.raises(GraphoptError, match="no allocation 3"):
        allocation(3)  # type: ignore[arg-type]
    with pytest.raises(GraphoptError, match="bad option"):
        allocation("global", limit="much")


@pytest.mark.parametrize(
    "make",
    [
        lambda: GlobalRanking(normalise="L7"),
        lambda: GlobalRanking(gain="second"),
        lambda: GlobalRanking(limit=0),
        lambda: CrossLayer(exponent=-1),
        lambda: CrossLayer(exponent=float("nan")),
        lambda: CrossLayer(exponent=None, sparsity=1.5),
        lambda: CrossLayer(sparsity=0.5),
        lambda: Sensitivity(shares=(0.5, 1.0)),
        lambda: Sensitivity(shares=()),
        lambda: Sensitivity(samples=0),
        lambda: Sensitivity(objective="speed"),
        lambda: Sensitivity(curves={"a": ((0.5,), (float("nan"),))}),
        lambda: Sensitivity(curves={"a": ((0.5, 0.6), (1.0,))}),
        lambda: Sensitivity(curves={"a": 3}),  # type: ignore[dict-item]
        lambda: Target("joules", 0.5),
        lambda: Target("macs", 0.0),
        lambda: Target("macs", 1.01),
        lambda: Target("macs", float("nan")),
        lambda: problem(mlp((2, 4, 2)), HALF, scores=lambda group, model: np.full(group.units, np.nan)),
        lambda: problem(mlp((2, 4, 2)), HALF, scores=lambda group, model: np.ones(3)),
    ],
)
def test_bad_input_is_refused(make: object) -> None:
    with pytest.raises(GraphoptError):
        make()  # type: ignore[operator]


# Uniform and global -------------------------------------------------------------------------------------------


def test_uniform_takes_the_same_share_everywhere() -> None:
    given = everything()
    removed = Uniform().at_ratio(Uniform().path(given), given, 0.25)
    assert removed == {candidate.name: 0.25 * candidate.units for candidate in given.candidates}


def by_hand(given: Problem, scores: dict[str, np.ndarray], count: int) -> dict[str, int]:
    """The `count` lowest scores of all, by group."""
    ranked = sorted((score, name) for name, values in scores.items() for score in values)
    names = [name for _, name in ranked[:count]]
    return {candidate.name: names.count(candidate.name) for candidate in given.candidates}


@pytest.mark.parametrize("normalise", ["none", "max", "mean", "norm", "sum"])
def test_global_ranking_takes_the_lowest_of_all(normalise: str) -> None:
    given = everything()
    divide = {
        "none": lambda scores: 1.0,
        "max": np.max,
        "mean": np.mean,
        "norm": lambda scores: float(np.sqrt(np.square(scores).sum())),
        "sum": np.sum,
    }[normalise]
    scores = {candidate.name: candidate.scores / divide(candidate.scores) for candidate in given.candidates}
    kind = GlobalRanking(normalise=normalise, limit=1.0)
    count = sum(candidate.most for candidate in given.candidates) // 3
    pressure = count / sum(candidate.most for candidate in given.candidates)
    assert kind.path(given)(pressure) == by_hand(given, scores, count)


def test_global_ranking_by_gain_prefers_what_saves_more() -> None:
    given = everything()
    scores: dict[str, np.ndarray] = {}
    for candidate in given.candidates:
        (first, second) = [value.shape for value, _ in candidate.group.origin.members]
        scores[candidate.name] = candidate.scores / (int(first[0]) + int(second[1]))  # of a MatMul: parameters a unit
    kind = GlobalRanking(normalise="none", gain="parameter", limit=1.0)
    total = sum(candidate.most for candidate in given.candidates)
    assert kind.path(given)(20 / total) == by_hand(given, scores, 20)
    assert kind.path(given)(20 / total) != GlobalRanking(normalise="none", limit=1.0).path(given)(20 / total)


def test_limit_keeps_a_layer_from_ruin() -> None:
    given = problem(mlp((6, 20, 20, 3), scales=(1e-4, 1.0, 1.0)), HALF)
    for kind in (GlobalRanking(normalise="none", limit=0.5), CrossLayer(exponent=0, limit=0.5)):
        removed = kind.path(given)(0.999)
        assert max(removed.values()) <= 10


# Cross-layer ranking ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_kept_weights_are_as_many_as_the_threshold_says(sparsity: float, exponent: float) -> None:
    numbers = np.random.default_rng(3)
    weights = [np.sort(np.abs(numbers.standard_normal(size)).astype(np.float32)) for size in (1000, 37, 512)]
    factors = np.array([1.0, 18.2, 0.3])
    ranking = CrossLayerRanking(weights, factors, exponent)
    worth = np.concatenate([w.astype(np.float64) / c**exponent for w, c in zip(weights, factors, strict=True)])
    kept = int(len(worth) * (1 - sparsity))
    assert sum(size * (1 - p) for size, p in zip((1000, 37, 512), ranking.sparsities(sparsity), strict=True)) == (
        pytest.approx(kept)
    )
    if 0 < kept < len(worth):
        tau = np.sort(worth)[::-1][kept - 1]
        expected = [np.mean(w.astype(np.float64) / c**exponent < tau) for w, c in zip(weights, factors, strict=True)]
        np.testing.assert_allclose(ranking.sparsities(sparsity), expected, atol=1e-12)


def test_ties_keep_more_than_asked_for() -> None:
    ranking = CrossLayerRanking([np.array([1, 2, 2, 2, 3], np.float32)], np.ones(1), 0.0)
    assert ranking.sparsities(0.5).tolist() == [
        0.2
    ]  # int(2.5) = 2 are to stay, the second largest is 2, as are two more


def test_exponent_zero_is_global_magnitude() -> None:
    given = everything()
    weights = [made_by(given, candidate) for candidate in given.candidates]
    threshold = np.sort(np.concatenate(weights))[::-1][int(sum(map(len, weights)) * 0.5) - 1]
    removed = CrossLayer(exponent=0.0, limit=1.0).path(given)(0.5)
    for candidate, weight in zip(given.candidates, weights, strict=True):
        expected = min(np.mean(weight < threshold) * candidate.units, candidate.most)
        assert removed[candidate.name] == pytest.approx(expected)


def test_factors_are_macs_over_those_of_the_first_layer() -> None:
    given = problem(conv_net((3, 16, 32, 8)), HALF)
    np.testing.assert_allclose(layer_factors(given), [1.0, 16 * 32 / (3 * 16)])
    sizes = [made_by(given, candidate).size for candidate in given.candidates]
    assert sizes == [16 * 3 * 9, 32 * 16 * 9]


def test_a_larger_exponent_takes_more_where_macs_are() -> None:
    given = problem(conv_net((3, 16, 32, 8)), HALF)
    shares = [CrossLayer(exponent=exponent).path(given)(0.3) for exponent in (0.0, 0.3, 1.0)]
    heavy = given.candidates[1].name
    assert shares[0][heavy] < shares[1][heavy] < shares[2][heavy]


def test_exponent_is_searched_for_the_target() -> None:
    given = problem(conv_net((3, 32, 64, 48, 8)), Target("macs", 0.63))
    removed = CrossLayer(exponent=None, sparsity=0.3).path(given)(0.3)
    left = given.costs.remaining({name: round(count) for name, count in removed.items()}, "macs")
    assert left == pytest.approx(0.63, abs=0.01)


# Sensitivity --------------------------------------------------------------------------------------------------

FITS = [Exponential(0.1, 3.0), Exponential(0.01, 8.0), Exponential(0.4, 1.5)]
COSTS = np.array([3.0, 1.0, 2.0])


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_closed_form_is_the_best_of_all(share: float) -> None:
    found = closed_form(FITS, COSTS, share)
    assert found @ COSTS / COSTS.sum() == pytest.approx(share, abs=1e-3)

    def error(rates: np.ndarray) -> np.ndarray:
        scale, rate = np.array([fit.scale for fit in FITS]), np.array([fit.rate for fit in FITS])
        return (COSTS * scale * np.exp(rate * rates)).sum(axis=-1)

    axis = np.linspace(0, 0.95, 191)
    first, second = np.meshgrid(axis, axis)
    third = (share * COSTS.sum() - first * COSTS[0] - second * COSTS[1]) / COSTS[2]
    inside = (third >= 0) & (third <= 0.95)
    grid = np.stack([first[inside], second[inside], third[inside]], axis=-1)
    assert error(found) <= error(grid).min() * (1 + 1e-6)
    assert error(found) >= error(grid).min() * (1 - 1e-2)


def test_equal_curves_give_equal_shares() -> None:
    np.testing.assert_allclose(closed_form([Exponential(0.3, 2.0)] * 4, np.array([1.0, 9.0, 2.0, 5.0]), 0.35), 0.35)


def test_shares_grow_with_x() -> None:
    rates = np.stack([exponential_rates(FITS, x, 0.95) for x in np.linspace(-5, 8, 50)])
    assert (np.diff(rates, axis=0) >= 0).all()
    assert rates[0].max() == 0
    assert rates[-1].min() == 0.95


def test_a_share_above_the_limit_is_refused() -> None:
    with pytest.raises(GraphoptError, match="limit"):
        closed_form(FITS, COSTS, 0.99)


def test_fit_finds_the_exponential_and_survives_odd_curves() -> None:
    shares = np.array([0.1, 0.3, 0.5, 0.9])
    fit = fit_exponential(shares, 0.02 * np.exp(4.0 * shares))
    assert (fit.scale, fit.rate) == (pytest.approx(0.02), pytest.approx(4.0))
    odd = (np.zeros(4), np.ones(4), np.array([1.0, 0.5, 0.2, 0.1]), np.array([0.0, 0.0, 0.0, 1e6]))
    for errors in odd:
        fit = fit_exponential(shares, errors)
        assert fit.scale > 0
        assert np.isfinite([fit.scale, fit.rate]).all()
        assert fit.rate > 0
    assert np.isfinite(fit_exponential(np.array([0.5]), np.array([0.3])).scale)


def test_curves_are_the_relative_squared_error_of_the_masked_model() -> None:
    model = mlp((6, 20, 12, 3))
    given = problem(model, HALF, feeds=FEEDS)
    curves = measured_curves(model, given.candidates, (0.25, 0.5), FEEDS, groups=given.groups)
    (expected,) = open_session(model, optimized=False).run_feeds(FEEDS[0])
    for candidate in given.candidates:
        assert curves[candidate.name][0] == (0.25, 0.5)
        units = np.argsort(candidate.scores)[: candidate.units // 2]
        masked = mask_channels(model, {candidate.name: units.tolist()})
        (found,) = open_session(masked, optimized=False).run_feeds(FEEDS[0])
        error = np.square(expected - found).sum() / np.square(expected).sum()
        assert curves[candidate.name][1][1] == pytest.approx(error, rel=1e-4)
        assert curves[candidate.name][1][1] > curves[candidate.name][1][0] > 0


def test_sensitive_groups_lose_less() -> None:
    given = everything()
    curves = {candidate.name: ((0.2, 0.4, 0.6), (0.01, 0.03, 0.1)) for candidate in given.candidates}
    first = given.candidates[0].name
    curves[first] = ((0.2, 0.4, 0.6), (0.1, 0.9, 5.0))
    kind = Sensitivity(curves=curves, objective="error")
    removed = kind.at_ratio(kind.path(given), given, 0.3)
    shares = {candidate.name: removed[candidate.name] / candidate.units for candidate in given.candidates}
    assert shares[first] < 0.5 * min(share for name, share in shares.items() if name != first)


def test_given_curves_need_no_inputs_and_missing_ones_do() -> None:
    given = problem(mlp((6, 20, 12, 3)), HALF)
    curves = {candidate.name: ((0.5,), (0.1,)) for candidate in given.candidates}
    kind: Allocation = Sensitivity(curves=curves)
    assert hash(kind) == hash(Sensitivity(curves=tuple(curves.items())))
    kind.path(given)
    curves.pop(given.candidates[0].name)
    with pytest.raises(DataError, match="inputs"):
        Sensitivity(curves=curves).path(given)
    empty = problem(mlp((6, 20, 12, 3)), HALF, feeds=[])
    with pytest.raises(DataError, match="not a single input"):
        Sensitivity().path(empty)


def test_samples_bound_what_is_read() -> None:
    read: list[int] = []

    def endless() -> object:
        for index in itertools.count():
            read.append(index)
            yield {"x": np.zeros((4, 2)), "scalar": np.float32(1)}

    assert len(first_samples(endless(), 10)) == 3  # type: ignore[arg-type]
    assert len(read) == 3


def test_candidates_order_ties_by_index() -> None:
    group = next(group for group in everything().groups if group.prunable)
    candidate = Candidate(group, np.array([2.0, 1.0, 1.0, 3.0] * (group.units // 4)))
    assert candidate.lowest(2) == (1, 2)
    assert candidate.lowest(0) == ()
