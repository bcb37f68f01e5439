"""Closed forms of reconstruction by name: what each computes from rows."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.errors import GraphoptError
from graphopt.passes.reconstruct_chain import Rows, quantized_rows
from graphopt.passes.reconstruct_closed import FORMS, ClosedForm
from graphopt.passes.reconstruct_forms import (
    Lbyl,
    MomentMatch,
    NeuronMerging,
    Ridge,
    closed_form,
    scales_of_rounded,
    solve_rows,
)

RNG = np.random.default_rng


def random_rows(units: int = 10, width: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Rows]:
    rng = RNG(seed)
    filters, biases = rng.normal(0, 1, (units, width)), rng.normal(0, 1, units)
    return filters, biases, Rows.of_filters(filters, biases, rng.uniform(0.3, 3, units))


WANTED, KEPT = np.array([7, 8, 9]), np.arange(7)
ZERO = np.zeros((3, 7))


def loss(s: np.ndarray, filters: np.ndarray, biases: np.ndarray, row: int, alpha1: float, alpha2: float) -> float:
    apart = filters[row] - filters[KEPT].T @ s
    return float(apart @ apart + alpha1 * (biases[row] - biases[KEPT] @ s) ** 2 + alpha2 * s @ s)


def test_the_gradient_of_the_ridge_is_zero_and_its_loss_is_no_worse_than_pruning() -> None:
    filters, biases, rows = random_rows()
    found = Ridge().combine(rows, WANTED, KEPT, ZERO)
    pull = 0.008 * (filters[KEPT] ** 2).sum(axis=1).mean()
    for row, s in zip(WANTED, found, strict=True):
        gradient = (
            -2 * filters[KEPT] @ (filters[row] - filters[KEPT].T @ s)
            - 2 * 0.01 * biases[KEPT] * (biases[row] - biases[KEPT] @ s)
            + 2 * pull * s
        )
        np.testing.assert_allclose(gradient, 0, atol=1e-10)
        assert loss(s, filters, biases, row, 0.01, pull) <= loss(np.zeros(7), filters, biases, row, 0.01, pull)


def test_lbyl_is_the_raw_space_problem_folded() -> None:
    filters, biases, rows = random_rows()
    gain, form = rows.gain, Lbyl(lambda1=0.3, lambda2=0.7)
    raw = filters / gain[:, None]
    for row, s in zip(WANTED, form.combine(rows, WANTED, KEPT, ZERO), strict=True):
        r, k = gain[row], gain[row] / gain[KEPT]
        a, of_row = -biases[KEPT] / gain[KEPT], -biases[row]
        system = raw[KEPT] @ raw[KEPT].T + 0.3 * r**2 * np.outer(a, a) + 0.7 * np.diag(k**2)
        solved = np.linalg.solve(system, raw[KEPT] @ raw[row] + 0.3 * r * of_row * a)
        np.testing.assert_allclose(s, k * solved, rtol=1e-9)
        ridge = solve_rows(
            rows.gram[np.ix_(KEPT, KEPT)], rows.gram[np.ix_(KEPT, [row])], rows.columns[KEPT], rows.columns[[row]],
            alpha1=np.array([0.3 * r**2]), alpha2=np.array([0.7 * r**2]), prior=ZERO[:1],
        )  # fmt: skip
        np.testing.assert_allclose(s, ridge[0], rtol=1e-9)


def test_a_gain_of_zero_divides_nothing() -> None:
    filters, biases, rows = random_rows()
    gain = rows.gain.copy()
    gain[[2, 8]] = 0.0
    filters[[2, 8]] = 0.0
    dead = Rows.of_filters(filters, biases, gain)
    for form in (Lbyl(), Lbyl(lambda2=0.0), Ridge(), Ridge(alpha2=0.0), NeuronMerging()):
        found = form.combine(dead, WANTED, KEPT, ZERO)
        assert np.isfinite(found).all()
        if not isinstance(form, Ridge):  # the ridge may use the bias of a dead channel for the bias of another
            np.testing.assert_allclose(found[1], 0, atol=1e-9)
        else:
            assert np.abs(filters[KEPT].T @ found[1]).max() < 0.5


@pytest.mark.parametrize("form", [Ridge(alpha2=0.0), Lbyl(lambda2=0.0), NeuronMerging(), MomentMatch(shrinkage=0.0)])
def test_duplicates_are_found_by_every_form(form: ClosedForm) -> None:
    filters, biases, _ = random_rows()
    filters[7], biases[7] = 2.5 * filters[3], 2.5 * biases[3]
    filters[5], biases[5] = filters[3], biases[3]  # and a singular system
    rows = Rows.of_filters(filters, biases)
    covariance = filters @ filters.T
    rows = Rows(rows.gram, rows.columns, rows.gain, rows.shift, covariance=covariance)
    found = form.combine(rows, WANTED, KEPT, ZERO)[0]
    expected = np.where(np.isin(KEPT, [3, 5]), found, 0)
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert found[3] + found[5] == pytest.approx(2.5)


def test_neuron_merging_knows_what_has_no_neighbour() -> None:
    filters, biases = np.eye(10, 12), np.zeros(10)
    filters[7, 2] = 1.0  # cosine 0.7 with unit 2, all others are orthogonal
    found = NeuronMerging().combine(Rows.of_filters(filters, biases), WANTED, KEPT, ZERO)
    assert np.flatnonzero(found[0]).tolist() == [2]
    assert found[0, 2] == pytest.approx(np.sqrt(2))
    assert not found[1:].any()


def test_neuron_merging_weighs_direction_against_bias() -> None:
    filters = np.array([[1.0, 0.0], [0.98, 0.2], [1.0, 0.0]])
    biases = np.array([5.0, 0.0, 0.0])
    rows, wanted, kept, prior = Rows.of_filters(filters, biases), np.array([2]), np.array([0, 1]), np.zeros((1, 2))
    assert np.flatnonzero(NeuronMerging(balance=1.0).combine(rows, wanted, kept, prior)).tolist() == [0]
    assert np.flatnonzero(NeuronMerging(balance=0.5).combine(rows, wanted, kept, prior)).tolist() == [1]


def test_many_weights_give_what_each_alone_gives() -> None:
    _, _, rows = random_rows()
    alpha1, alpha2 = np.array([0.1, 0.0, 2.0]), np.array([0.5, 0.01, np.inf])
    prior = RNG(3).normal(0, 1, (3, 7))
    gram, right = rows.gram[np.ix_(KEPT, KEPT)], rows.gram[np.ix_(KEPT, WANTED)]
    columns, targets = RNG(4).normal(0, 1, (7, 2)), RNG(5).normal(0, 1, (3, 2))
    together = solve_rows(gram, right, columns, targets, alpha1=alpha1, alpha2=alpha2, prior=prior)
    for row in range(3):
        one = slice(row, row + 1)
        alone = solve_rows(
            gram, right[:, one], columns, targets[one], alpha1=alpha1[one], alpha2=alpha2[one], prior=prior[one]
        )
        np.testing.assert_allclose(together[one], alone, rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(together[2], prior[2])


def test_a_dictionary_of_rounded_rows_becomes_the_identity_with_enough_bits() -> None:
    filters, biases, _ = random_rows(width=6)
    everything = np.arange(10)
    for bits, apart in ((32, 1e-6), (4, None)):
        both = np.concatenate([filters, quantized_rows(filters, bits)])
        rows = Rows.of_filters(both, np.concatenate([biases, biases]))
        found = Ridge().combine(rows, everything, everything + 10, np.eye(10))
        if apart is not None:
            np.testing.assert_allclose(found, np.eye(10), atol=apart)
        else:
            dictionary = both[10:]
            assert np.linalg.norm(filters - found @ dictionary) < np.linalg.norm(filters - dictionary)
    np.testing.assert_array_equal(
        Ridge(alpha2=np.inf).combine(rows, everything, everything + 10, np.eye(10)), np.eye(10)
    )


def test_one_factor_a_channel_for_rounded_weights() -> None:
    filters, biases, _ = random_rows()
    rounded = quantized_rows(filters, 3)
    found = scales_of_rounded(filters, biases, rounded, biases, alpha1=0.5)
    for row in range(len(filters)):
        trials = found[row] + np.array([-1e-3, 0.0, 1e-3])
        losses = [
            ((filters[row] - t * rounded[row]) ** 2).sum() + 0.5 * (biases[row] - t * biases[row]) ** 2 for t in trials
        ]
        assert int(np.argmin(losses)) == 1
    np.testing.assert_allclose(scales_of_rounded(filters, biases, filters, biases), 1)
    nothing = np.zeros_like(filters)
    assert scales_of_rounded(filters, 0 * biases, nothing, 0 * biases).tolist() == [1.0] * 10


def test_forms_by_name() -> None:
    assert closed_form("lbyl") == Lbyl()
    assert sorted(FORMS) == ["lbyl", "moments", "neuron-merging", "ridge"]
    with pytest.raises(GraphoptError, match="did you mean 'ridge'"):
        closed_form("rigde")
    with pytest.raises(GraphoptError, match="needs the covariance"):
        MomentMatch().combine(random_rows()[2], WANTED, KEPT, ZERO)
