"""Factorisations as maths: full rank is the layer, errors are what they say, ranks are found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import GraphoptError
from graphopt.factorizations import (
    FORMS,
    Budget,
    Layer,
    Metric,
    Option,
    candidate_ranks,
    cheapest_within,
    composed,
    curve,
    factorization,
    rounded_up,
    variational,
    variational_rank,
)
from graphopt.inputs.moments import SecondMoments

SHAPES = [
    (1, (6, 9)),
    (1, (7, 5, 1, 1)),
    (2, (8, 3, 3, 3)),
    (6, (12, 1, 5, 3)),
    (1, (5, 4, 3)),
    (1, (4, 6, 3, 1, 2)),
    (1, (6, 8, 3, 3)),
]
CASES = [(groups, shape, name) for groups, shape in SHAPES for name in FORMS]


def layer_and_metric(groups: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Layer, Metric]:
    random = np.random.default_rng(seed)
    sizes = (9, 8, 7)[: len(shape) - 2]
    layer = Layer(random.standard_normal(shape), groups, sizes, sizes)
    rows = random.standard_normal((groups, 40, layer.columns)) * random.random(layer.columns) + 0.5
    moments = SecondMoments.empty(groups, layer.columns, 0)
    moments.add(rows, np.zeros((40, 0)))
    metric = Metric.of(moments)
    assert metric is not None
    return layer, metric


def lost(layer: Layer, factors: object, metric: Metric) -> float:
    change = layer.weight - composed(layer, factors)  # type: ignore[arg-type]
    return metric.power(change.reshape(layer.matrices.shape)) / metric.power(layer.matrices)


@pytest.mark.parametrize(("groups", "shape", "name"), CASES)
def test_full_rank_is_the_layer_and_errors_are_what_they_say(groups: int, shape: tuple[int, ...], name: str) -> None:
    form = factorization(name)
    layer, metric = layer_and_metric(groups, shape)
    if form.refusal(layer) is not None:
        with pytest.raises(GraphoptError, match="does not fit the layer"):
            form.factorize(layer, (1,))
        return
    full = form.full(layer)
    for weighting in (metric, None):
        chain = form.factorize(layer, full, weighting)
        np.testing.assert_allclose(composed(layer, chain), layer.weight, atol=1e-7)
        assert [factor.weight.shape for factor in chain] == [one.weight_shape for one in form.shapes(layer, full)]
    fit, plain = form.fit(layer, metric), form.fit(layer, Metric.identity(groups, layer.columns))
    for rank in {tuple(max(1, round(share * one)) for one in full) for share in (0.25, 0.6)}:
        true = lost(layer, fit.factors(rank), metric)
        if name == "tucker":  # the factors of one rank are improved beyond the curve
            assert true <= fit.error(rank) + 1e-9
        else:
            assert true == pytest.approx(fit.error(rank), abs=1e-6)
        assert true <= lost(layer, plain.factors(rank), metric) + (0.02 if name == "cp" else 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["svd", "channel-svd", "spatial-svd", "tucker", "cp"]),
    st.integers(1, 2),
    st.integers(1, 3),
)
def test_a_layer_of_known_rank_is_found_exactly(seed: int, name: str, groups: int, rank: int) -> None:
    """A layer that is a chain is taken apart without loss at the rank of that chain, whatever the metric."""
    form = factorization(name)
    shape = (4 * groups, 5, 1, 1) if name == "svd" else (4 * groups, 5, 3, 3)
    layer, metric = layer_and_metric(groups, shape, seed)
    wanted = (min(rank, 4),) * len(form.full(layer))
    if name == "cp":
        wanted = (1,)  # for more the alternation need not find the one solution
    random = np.random.default_rng(seed)
    chain = [
        type(one)(one.shape, random.standard_normal(one.weight.shape)) for one in form.factorize(layer, wanted, metric)
    ]
    known = Layer(composed(layer, chain), groups, layer.before, layer.after)
    fit = form.fit(known, metric)
    assert fit.error(wanted) < 1e-9
    np.testing.assert_allclose(
        composed(known, fit.factors(wanted)), known.weight, atol=1e-6 * np.abs(known.weight).max()
    )
    if name in ("svd", "channel-svd", "spatial-svd", "tucker"):
        assert variational(form, known) == wanted


@pytest.mark.parametrize("shape", [(40, 40), (30, 90), (90, 30), (64, 576)])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_variational_bayes_finds_the_rank(shape: tuple[int, int], noise: float) -> None:
    random = np.random.default_rng(1)
    for rank in (1, 4, 9):
        matrix = random.standard_normal((shape[0], rank)) @ random.standard_normal((rank, shape[1]))
        matrix += noise * random.standard_normal(shape)
        values = np.linalg.svd(matrix, compute_uv=False)
        assert variational_rank(values, shape) == rank
        if noise:
            assert variational_rank(values, shape, noise**2) == rank


def test_variational_bayes_finds_nothing_in_noise() -> None:
    noise = np.random.default_rng(0).standard_normal((50, 80))
    assert variational_rank(np.linalg.svd(noise, compute_uv=False), noise.shape) == 0
    assert variational_rank(np.zeros(3), (3, 7)) == 0
    assert variational_rank(np.array([2.0]), (1, 5)) == 1
    with pytest.raises(GraphoptError, match="singular values are not those"):
        variational_rank(np.ones(4), (3, 7))


def test_candidates_fill_blocks_and_stay_below_break_even() -> None:
    random = np.random.default_rng(0)
    layer = Layer(random.standard_normal((64, 128, 3, 3)), before=(14, 14), after=(7, 7))
    for name in ("channel-svd", "spatial-svd", "tucker", "cp"):
        form = factorization(name)
        ranks = candidate_ranks(form, layer)
        costs = [form.macs(layer, rank) for rank in ranks]
        assert costs == sorted(costs)
        assert costs[-1] < layer.macs
        assert all(one % 16 == 0 for rank in ranks for one in rank)
    # r (C k k + M) < M C k k, the rule of the channel form
    most = 64 * 128 * 9 / (128 * 9 + 64)
    assert candidate_ranks(factorization("channel-svd"), layer, 1)[-1][0] == int(most)
    assert rounded_up((17,), candidate_ranks(factorization("channel-svd"), layer)) == (32,)
    assert rounded_up((49,), candidate_ranks(factorization("channel-svd"), layer)) is None
    with pytest.raises(GraphoptError, match="round_to"):
        candidate_ranks(factorization("svd"), Layer(np.ones((4, 4))), 0)


def test_curves_fall_and_the_cheapest_within_an_error_is_found() -> None:
    layer, metric = layer_and_metric(1, (24, 20, 3, 3))
    for name in ("channel-svd", "spatial-svd", "tucker"):
        ranks, errors, macs = curve(layer, name, metric, round_to=2)
        fit = factorization(name).fit(layer, metric)
        found = cheapest_within(fit, ranks, 0.3)
        assert found == next((rank for rank, error in zip(ranks, errors, strict=True) if error <= 0.3), None)
        assert found is not None
        assert cheapest_within(fit, ranks, -1.0) is None
        assert (np.diff(macs) >= 0).all()
        if name != "tucker":
            assert (np.diff(errors) <= 1e-12).all()


def test_a_budget_is_met_with_the_least_error() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        options = {}
        for layer in "abc":
            errors = np.cumsum(np.sort(random.random(4)))  # convex: each step of one unit costs more
            options[layer] = [Option("svd", (9 - one,), float(errors[one]), one + 1.0) for one in range(4)]
        for wanted in (1.0, 5.0, 9.0, 12.0):
            chosen = Budget(options).choose(wanted)
            assert sum(one.saved for one in chosen.values()) >= wanted
            best = min(
                sum(one.error for one in picks if one)
                for picks in itertools.product(*([None, *each] for each in options.values()))
                if sum(one.saved for one in picks if one) >= wanted
            )
            assert sum(one.error for one in chosen.values()) == pytest.approx(best)
    assert Budget(options).most == 12.0
    assert sum(one.saved for one in Budget(options).choose(100.0).values()) == 12.0


def test_bad_layers_and_ranks_are_refused() -> None:
    with pytest.raises(GraphoptError, match="not finite"):
        Layer(np.full((4, 4), np.nan))
    with pytest.raises(GraphoptError, match="is none of a layer with 3 groups"):
        Layer(np.ones((4, 4, 3, 3)), 3, (4, 4), (4, 4))
    with pytest.raises(GraphoptError, match=r"no rank \(5,\)[^$]*from 1 to 4"):
        factorization("svd").factorize(Layer(np.ones((4, 6))), (5,))
    with pytest.raises(GraphoptError, match="did you mean 'tucker'"):
        factorization("tuker")
    with pytest.raises(GraphoptError, match="its kernel is larger than 1"):
        curve(Layer(np.ones((4, 4, 3, 3)), 1, (4, 4), (4, 4)), "svd")


def test_inputs_that_say_nothing_give_no_metric() -> None:
    moments = SecondMoments.empty(1, 3, 0)
    assert Metric.of(moments) is None
    moments.add(np.zeros((1, 5, 3)), np.zeros((5, 0)))
    assert Metric.of(moments) is None
    moments.add(np.full((1, 5, 3), np.inf), np.zeros((5, 0)))
    with np.errstate(invalid="ignore"):
        assert Metric.of(moments) is None


def test_the_bias_takes_up_the_mean() -> None:
    layer, metric = layer_and_metric(2, (8, 3, 3, 3))
    chain = factorization("channel-svd").factorize(layer, (2,), metric)
    change = (layer.weight - composed(layer, chain)).reshape(layer.matrices.shape)
    np.testing.assert_allclose(
        metric.bias(change), np.concatenate([one @ mean for one, mean in zip(change, metric.mean, strict=True)])
    )
