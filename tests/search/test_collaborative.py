"""Collaborative compression: the maths against brute force on small layers, and the whole on small nets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.criteria.contract import Knowledge
from graphopt.errors import DataError, GraphoptError, TargetMissedError
from graphopt.ir.channels import Selection, channel_groups
from graphopt.ir.cost import cost
from graphopt.ir.removal import remove_channels
from graphopt.ir.session import open_session
from graphopt.search import Candidate, CostModel
from graphopt.search.collaborative import Collaboration, Collaborative, Collaborator
from graphopt.search.collaborative_layers import Layer, macs
from graphopt.search.collaborative_rates import GlobalRates
from graphopt.search.collaborative_states import CovarianceState, ElementwiseState
from graphopt.search.collaborative_steps import Stride
from graphopt.search.collaborative_surrogates import Gradient, Magnitude, SecondOrder, Surrogate
from tests.search.pruning_nets import conv_net, weighted

NUMBERS = np.random.default_rng(7)
NONE = np.zeros(0, np.int64)
SIZES = {"n": 1}


def collaborator(
    model: ir.Model, kind: str | Surrogate, *, step: int = 1, feeds: Any = None, **more: Any
) -> Collaborator:
    groups = channel_groups(model)
    candidates = [
        Candidate(group, np.ones(group.units), step=step)
        for group in groups
        if group.prunable and group.units > 1 and group.role != "residual stream"
    ]
    return Collaborator(Knowledge(model, groups, feeds), candidates, CostModel(model, groups, SIZES), kind, **more)


def images(count: int = 24, channels: int = 3) -> list[dict[str, np.ndarray]]:
    numbers = np.random.default_rng(1)
    mix = numbers.standard_normal((channels, channels))
    return [{"x": np.einsum("ab,nbhw->nahw", mix, numbers.standard_normal((count, channels, 8, 8))).astype(np.float32)}]


def array(model: ir.Model, name: str) -> np.ndarray:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy().astype(np.float64)


def singles(channels: int) -> np.ndarray:
    return np.arange(channels)[:, None]


# Scores -------------------------------------------------------------------------------------------------------


def test_without_gradients_and_look_ahead_scores_are_norms_and_singular_values() -> None:
    weight = NUMBERS.standard_normal((5, 6, 9))
    state = ElementwiseState(weight, None, singles(6), True)
    values = np.linalg.svd(weight.reshape(5, -1), compute_uv=False)
    np.testing.assert_allclose(state.unit_scores(0.0), np.square(weight).sum(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(state.term_scores(0.0), values**2, rtol=1e-12)


class Elementwise:
    """I and every removal written out, one decomposition for each."""

    def __init__(self, weight: np.ndarray, metric: np.ndarray) -> None:
        self.whole, self.metric = weight, metric

    def loss(self, weight: np.ndarray) -> float:
        return float((self.metric * np.square(weight - self.whole)).sum())

    def without(self, weight: np.ndarray, channels: set[int], rank: int) -> list[tuple[np.ndarray, set[int], int]]:
        after: list[tuple[np.ndarray, set[int], int]] = []
        for channel in sorted(channels):
            other = weight.copy()
            other[:, channel] = 0
            after.append((other, channels - {channel}, rank))
        left, values, right = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)
        for term in range(rank):
            gone = (values[term] * np.outer(left[:, term], right[term])).reshape(weight.shape)
            after.append((weight - gone, channels, rank - 1))
        return after


@pytest.mark.parametrize("plain", [True, False])
def test_look_ahead_is_the_mean_over_all_next_removals(plain: bool) -> None:
    for seed in range(5):
        numbers = np.random.default_rng(seed)
        weight = numbers.standard_normal((8, 8, 1))
        metric = np.ones_like(weight) if plain else np.square(numbers.standard_normal(weight.shape))
        brute = Elementwise(weight, metric)
        state = ElementwiseState(weight, None if plain else metric, singles(8), True)
        state.remove(np.array([2]), NONE)
        state.term_scores(0.0)
        state.remove(NONE, np.array([state.rank - 1]))
        now, channels = state._weight, set(range(8)) - {2}  # pyright: ignore[reportPrivateUsage]
        expected = np.array(
            [
                np.mean([brute.loss(one) for one, *_ in brute.without(after, left, rank)])
                for after, left, rank in brute.without(now, channels, state.rank)
            ]
        )
        left = sorted(channels)
        units = state.unit_scores(1.0)[left] - state.unit_scores(0.0)[left]
        terms = state.term_scores(1.0) - state.term_scores(0.0)
        np.testing.assert_allclose(terms, expected[7:], rtol=1e-9)
        np.testing.assert_allclose(units, expected[:7], rtol=1e-9 if plain else 0.12)  # what is approximated


def reduced_rank(weight: np.ndarray, covariance: np.ndarray, kept: Sequence[int], rank: int) -> float:
    """min tr((W~ - W) C (W~ - W)^T) over W~ of that rank on some columns, in closed form."""
    best = weight @ covariance[:, kept] @ np.linalg.inv(covariance[np.ix_(kept, kept)])
    rest = weight.copy()
    rest[:, kept] -= best
    energy = best @ covariance[np.ix_(kept, kept)] @ best.T
    return float(np.trace(rest @ covariance @ rest.T) + np.linalg.eigvalsh(energy)[: len(energy) - rank].sum())


def correlated(outputs: int, channels: int, taps: int) -> tuple[np.ndarray, np.ndarray]:
    mix = NUMBERS.standard_normal((channels * taps, channels * taps))
    return NUMBERS.standard_normal((outputs, 1, channels * taps)), mix @ mix.T / channels + 0.1 * np.eye(len(mix))


def test_covariance_losses_are_the_least_that_is_possible() -> None:
    weight, covariance = correlated(6, 5, 2)
    blocks = np.array([[0, 1], [2, -1], [3, 4]])  # units of two channels and of one
    state = CovarianceState(weight, covariance, blocks, True, taps=2)
    scores = state.unit_scores(0.0)
    state.remove(np.array([1]), NONE)
    kept = [0, 1, 2, 3, 6, 7, 8, 9]
    assert scores[1] == pytest.approx(state.loss)
    assert state.loss == pytest.approx(reduced_rank(weight[:, 0], covariance, kept, 6))
    dense, cut = state.snapshot().losses([2, 4])
    assert dense == pytest.approx(state.loss)
    np.testing.assert_allclose(cut, [reduced_rank(weight[:, 0], covariance, kept, rank) for rank in (2, 4)])
    state.remove(NONE, np.argsort(state.term_scores(0.0))[:2])
    assert state.loss == pytest.approx(cut[1])
    state.remove(np.array([0]), NONE)  # channels behind terms: the terms that are left are those of before
    assert state.loss >= reduced_rank(weight[:, 0], covariance, [6, 7, 8, 9], 4) - 1e-9
    rows = np.array([0, 3, 4])
    alone = CovarianceState(weight[rows], covariance, blocks, True, taps=2)
    again = CovarianceState(weight, covariance, blocks, True, taps=2)
    for one in (alone, again):
        one.remove(np.array([2]), NONE)
    np.testing.assert_allclose(again.snapshot().losses([1, 2], rows)[1], alone.snapshot().losses([1, 2])[1])


def test_covariance_look_ahead() -> None:
    for seed in range(5):
        numbers = np.random.default_rng(seed)
        weight, samples = numbers.standard_normal((8, 1, 8)), numbers.standard_normal((8, 16))
        covariance = samples @ samples.T / 16 + 1e-3 * np.eye(8)
        state = CovarianceState(weight, covariance, singles(8), True)
        units = state.unit_scores(1.0) - state.unit_scores(0.0)
        terms = state.term_scores(1.0) - state.term_scores(0.0)

        def ahead(units_out: np.ndarray, terms_out: np.ndarray) -> float:
            state = CovarianceState(weight, covariance, singles(8), True)  # noqa: B023
            state.term_scores(0.0)
            state.remove(units_out, terms_out)
            return float(np.concatenate([state.unit_scores(0.0)[state.alive], state.term_scores(0.0)]).mean())

        np.testing.assert_allclose(terms, [ahead(NONE, np.array([term])) for term in range(8)], rtol=1e-9)
        exact = np.array([ahead(np.array([unit]), NONE) for unit in range(8)])
        np.testing.assert_allclose(units, exact, rtol=0.25)  # what is approximated


def test_folded_outputs_score_the_same() -> None:
    weight, covariance = correlated(12, 4, 1)
    states = [CovarianceState(weight, covariance, singles(4), True, fold=fold) for fold in (False, True)]
    for state in states:
        state.remove(np.array([3]), NONE)
    np.testing.assert_allclose(states[0].unit_scores(0.9), states[1].unit_scores(0.9))
    np.testing.assert_allclose(states[0].term_scores(0.9), states[1].term_scores(0.9))


# Gradients ----------------------------------------------------------------------------------------------------

SMALL = """<ir_version: 10, opset_import: ["": 21]>
    g (float[n,3] x, float[3,4] w0, float[4,2] w1) => (float[n,2] y)
    { h = MatMul(x, w0) r = Relu(h) y = MatMul(r, w1) }"""


def test_gradients_of_a_loss_are_averaged_then_squared() -> None:
    torch = pytest.importorskip("torch")
    model = weighted(SMALL)
    batches = [(NUMBERS.standard_normal((5, 3)).astype(np.float32), np.zeros((5, 2), np.float32)) for _ in range(2)]
    found = collaborator(model, Gradient(loss=torch.nn.functional.mse_loss, data=batches))
    weights = [array(model, name) for name in ("w0", "w1")]

    def loss(second: np.ndarray) -> float:
        return float(np.mean([np.square(np.maximum(x @ weights[0], 0) @ second).mean() for x, _ in batches]))

    second = next(layer for layer in found.layers if layer.inputs == 4)
    state = found.states[second.name]()
    moved = weights[1].copy()
    moved[1, 0] += 1e-4
    slope = (loss(moved) - loss(weights[1])) / 1e-4
    assert isinstance(state, ElementwiseState)
    assert state._metric is not None  # pyright: ignore[reportPrivateUsage]
    assert state._metric[0, 1, 0] == pytest.approx(slope**2, rel=0.02)  # pyright: ignore[reportPrivateUsage]


def test_without_labels_the_metric_is_the_divergence_of_a_changed_weight() -> None:
    pytest.importorskip("torch")
    model = weighted(SMALL)
    x = NUMBERS.standard_normal((200, 3)).astype(np.float32)
    found = collaborator(model, Gradient(projections=400), feeds=[{"x": x}])
    first, second = array(model, "w0"), array(model, "w1")
    layer = next(layer for layer in found.layers if layer.inputs == 4)
    state = found.states[layer.name]()
    assert isinstance(state, ElementwiseState)
    hidden = np.maximum(x @ first, 0)
    divergence = np.square(hidden[:, 1]).mean() / 2 / (hidden @ second).var()  # of one of two outputs moved by 1
    assert state._metric is not None  # pyright: ignore[reportPrivateUsage]
    assert state._metric[0, 1, 0] == pytest.approx(divergence, rel=0.25)  # pyright: ignore[reportPrivateUsage]


# The whole ----------------------------------------------------------------------------------------------------


def low_rank_net(rank: int, dead: int) -> ir.Model:
    """The second of two convolutions has that rank, and reads nothing of the first `dead` channels."""
    model = conv_net((3, 16, 16))
    value = model.graph.initializers["w1"]
    assert value.const_value is not None
    weight = value.const_value.numpy().copy()
    weight[:, :dead] = 0
    left, values, right = np.linalg.svd(weight.reshape(16, -1), full_matrices=False)
    weight = ((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(weight.shape).astype(np.float32)
    value.const_value = ir.Tensor(weight, name="w1")
    return model


@pytest.mark.parametrize("kind", [Magnitude(), SecondOrder()])
@pytest.mark.parametrize("search", ["tables", "rates"])
def test_what_is_not_there_goes_first_and_costs_nothing(kind: Surrogate, search: str) -> None:
    model = low_rank_net(5, 4)
    given = collaborator(model, kind, feeds=images())
    second = next(layer for layer in given.layers if layer.inputs == 16)
    group = given.candidates[0].name
    goal = given.costing.total({group: 4}, {second.name: 5})
    found = given.solve(goal / given.costing.total({}, {}) + 1e-9, Collaborative(search=search, round_to=1))
    if search == "tables":  # the rates of two items are a compromise of two fits
        assert found.loss == pytest.approx(0, abs=1e-6)
        assert sorted(found.selection[group]) == [0, 1, 2, 3]
        assert found.ranks == {second.name: 5}
    descent = next(one for one in given.descents(Stride()) if one.item.name == group)
    free = [step for step in descent.steps if step.loss < 1e-6]
    assert max(step.units for step in free) == 4
    assert min(step.ranks[second.name] for step in free) == 5
    pruned = remove_channels(model, {group: [0, 1, 2, 3]})
    assert cost(pruned, SIZES).macs == given.costing.total({group: 4}, {})
    left, values, right = np.linalg.svd(array(pruned, "w1").reshape(16, -1), full_matrices=False)
    cut = ((left[:, :5] * values[:5]) @ right[:5]).reshape(16, 12, 3, 3).astype(np.float32)
    pruned.graph.initializers["w1"].const_value = ir.Tensor(cut, name="w1")
    before, after = (open_session(one).run_feeds(images()[0])[0] for one in (model, pruned))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


@pytest.fixture(scope="module")
def trio() -> Collaborator:
    return collaborator(conv_net((3, 16, 24, 8)), "second-order", step=4, feeds=images())


@pytest.mark.parametrize("mode", ["joint", "prune", "decompose", "sequence"])
@pytest.mark.parametrize("search", ["tables", "rates"])
def test_targets_are_met_and_counts_are_true(trio: Collaborator, mode: str, search: str) -> None:
    found = trio.solve(0.7, Collaborative(mode=mode, search=search, round_to=2))
    assert 0.55 < found.share <= 0.7 * 1.01
    assert Collaboration.from_json(found.to_json()) == found
    whole = conv_net((3, 16, 24, 8))
    selection: Selection = {name: units for name, units in found.selection.items()}  # noqa: C416
    pruned = remove_channels(whole, selection) if selection else whole
    for layer in trio.layers:
        assert all(0 < rank < layer.full_rank for name, rank in found.ranks.items() if name == layer.name)
    removed = {name: len(units) for name, units in found.selection.items()}
    assert cost(pruned, SIZES).macs == trio.costing.total(removed, {})
    assert mode != "prune" or not found.ranks
    assert mode != "decompose" or not found.selection
    assert mode in str(found)


def test_joining_is_never_worse_than_either_alone(trio: Collaborator) -> None:
    for share in (0.6,):
        losses = {
            mode: trio.solve(share, Collaborative(mode=mode, round_to=2)).loss
            for mode in ("joint", "prune", "sequence")
        }
        assert losses["joint"] <= min(losses.values()) + 1e-9


def test_tables_find_nearly_what_trying_everything_finds(trio: Collaborator) -> None:
    how = Collaborative(round_to=4)
    tables, costing = trio.tables(how), trio.costing
    names = list(tables.widths)
    best: dict[float, float] = dict.fromkeys((0.75, 0.5), np.inf)
    whole = costing.total({}, {})
    for gone in itertools.product(*tables.widths.values()):
        removed = dict(zip(names, gone, strict=True))
        options: list[list[tuple[float, float]]] = []
        for layer in tables.layers:
            dense, cut = tables.losses(layer, removed)
            pairs = [(dense, costing.layer(layer, removed))]
            pairs += [
                (loss, costing.layer(layer, removed, rank))
                for loss, rank in zip(cut, tables.ranks[layer.name], strict=True)
            ]
            options.append(pairs)
        for taken in itertools.product(*options):
            spent = sum(cost for _, cost in taken) + costing.others(removed)
            for share in best:
                if spent <= share * whole:
                    best[share] = min(best[share], sum(loss for loss, _ in taken))
    for share, least in best.items():
        found = trio.solve(share, how)
        assert least - 1e-9 <= found.loss <= 1.1 * least


def test_closed_form_meets_the_constraint(trio: Collaborator) -> None:
    rates = GlobalRates(trio.descents(Stride()), trio.costing)
    for share in (0.2, 0.4):
        found = rates.rates(share)
        assert ((found > 0) & (found < 0.95)).any()
        assert float(rates.costs @ found) / float(rates.costs.sum()) == pytest.approx(share, abs=1e-3)
    np.testing.assert_allclose(rates.rates(0.95), 0.95)


BRANCHES = """<ir_version: 10, opset_import: ["": 21]>
    g (float[n,4] x, float[4,6] w0, float[6,4] w1, float[6,4] w2) => (float[n,4] y)
    { h = MatMul(x, w0) r = Relu(h) a = MatMul(r, w1) b = MatMul(r, w2) y = Add(a, b) }"""


def test_a_group_with_two_readers_sums_their_scores() -> None:
    model = weighted(BRANCHES)
    given = collaborator(model, "magnitude")
    readers = [layer for layer in given.layers if layer.reads]
    assert len(readers) == 2
    descent = next(one for one in given.descents(Stride(gamma=0.0, kinds=("units",))) if one.item.candidate is not None)
    norms = sum(np.square(layer.weight()).sum(axis=(0, 2)) for layer in readers)
    np.testing.assert_array_equal(descent.order, np.argsort(norms))


def test_a_cost_of_ones_own_takes_the_place_of_macs(trio: Collaborator) -> None:
    def staircase(layer: Layer, inputs: int, outputs: int, rank: int | None) -> float:
        return macs(layer, -(-inputs // 8) * 8, -(-outputs // 8) * 8, None if rank is None else -(-rank // 8) * 8)

    given = collaborator(conv_net((3, 16, 24, 8)), "magnitude", step=8, layer_cost=staircase, fixed=1000.0)
    found = given.solve(0.6)
    removed = {name: len(units) for name, units in found.selection.items()}
    total = sum(
        min(
            staircase(layer, layer.kept_inputs(removed), layer.kept_outputs(removed), rank)
            for rank in {None, found.ranks.get(layer.name)}
        )
        for layer in given.layers
    )
    assert found.after == pytest.approx(total + 1000.0)
    assert found.after <= 0.6 * found.before * 1.01


def test_bad_input() -> None:
    model = conv_net((3, 16, 8))
    with pytest.raises(DataError, match="needs inputs"):
        collaborator(model, "second-order")
    given = collaborator(model, "magnitude", step=4)
    with pytest.raises(TargetMissedError, match="is left with all gone"):
        given.solve(0.01)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(GraphoptError, match="a share of"):
            given.solve(share)
    with pytest.raises(GraphoptError, match="unknown mode"):
        Collaborative(mode="both")
    with pytest.raises(GraphoptError, match="no surrogate"):
        Collaborative(surrogate="guess")
    with pytest.raises(GraphoptError, match="no collaboration"):
        Collaboration.from_json("[]")
    with pytest.raises(GraphoptError, match="kinds"):
        Stride(kinds=("everything",))


def test_units_that_share_columns_lose_them_once() -> None:
    rows_and_columns = np.array([[0, 1], [2, 3], [0, 2], [1, 3]])
    state = CovarianceState(np.ones((2, 1, 4)), np.eye(4), rows_and_columns, False)
    state.remove(np.array([0, 2]), np.zeros(0, np.int64))
    assert state.loss == pytest.approx(6)
    assert state.unit_scores(0.0)[[1, 3]] == pytest.approx(8)
    state.remove(np.array([1]), np.zeros(0, np.int64))
    assert state.loss == pytest.approx(8)
