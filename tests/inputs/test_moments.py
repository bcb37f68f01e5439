"""Second moments and the least squares in their metric."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.inputs.moments import SecondMoments, choose_ridge


def moments_of(patches: np.ndarray, targets: np.ndarray, pieces: int = 3) -> SecondMoments:
    groups, _, columns = patches.shape
    moments = SecondMoments.empty(groups, columns, targets.shape[1] // groups)
    for rows in np.array_split(np.arange(patches.shape[1]), pieces):
        moments.add(patches[:, rows], targets[rows])
    return moments


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    mixed = generator.standard_normal((2, 5, 5))
    patches = generator.standard_normal((2, 200, 5)) @ mixed + 1.5
    truth = generator.standard_normal((2, 3, 5))
    rows = np.concatenate(list(patches @ truth.transpose(0, 2, 1)), axis=1)
    return patches, rows + 0.1 * generator.standard_normal(rows.shape) + 2.0


def test_without_a_ridge_it_is_ordinary_least_squares(problem: tuple[np.ndarray, np.ndarray]) -> None:
    patches, targets = problem
    weight, bias = moments_of(patches, targets).solve(np.zeros((2, 3, 5)), 0.0)
    for group in range(2):
        design = np.concatenate([patches[group], np.ones((200, 1))], axis=1)
        expected = np.linalg.lstsq(design, targets[:, 3 * group : 3 * group + 3], rcond=None)[0].T
        np.testing.assert_allclose(weight[group], expected[:, :-1], atol=1e-8)
        np.testing.assert_allclose(bias[3 * group : 3 * group + 3], expected[:, -1], atol=1e-8)


def test_the_error_is_that_of_the_rows(problem: tuple[np.ndarray, np.ndarray]) -> None:
    patches, targets = problem
    moments = moments_of(patches, targets)
    generator = np.random.default_rng(1)
    weight, bias = generator.standard_normal((2, 3, 5)), generator.standard_normal(6)
    made = np.concatenate(list(patches @ weight.transpose(0, 2, 1)), axis=1) + bias
    assert moments.error(weight, bias) == pytest.approx(float(np.square(targets - made).sum(1).mean()))


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_the_solution_is_the_minimum(problem: tuple[np.ndarray, np.ndarray], ridge: float) -> None:
    patches, targets = problem
    moments = moments_of(patches, targets)
    prior = np.random.default_rng(2).standard_normal((2, 3, 5))
    weight, bias = moments.solve(prior, ridge)
    scale = np.array([np.mean(np.diagonal(one)) for one in moments.input_covariance()])[:, None, None]

    def objective(one: np.ndarray) -> float:
        return moments.error(one, moments.bias(one)) + float((ridge * scale * np.square(one - prior)).sum())

    best = objective(weight)
    for seed in range(20):
        step = 1e-3 * np.random.default_rng(seed).standard_normal(weight.shape)
        assert objective(weight + step) > best
    np.testing.assert_allclose(bias, moments.bias(weight))


def test_an_infinite_ridge_keeps_the_weight_and_corrects_the_mean(problem: tuple[np.ndarray, np.ndarray]) -> None:
    patches, targets = problem
    prior = np.random.default_rng(2).standard_normal((2, 3, 5))
    weight, bias = moments_of(patches, targets).solve(prior, np.inf)
    np.testing.assert_array_equal(weight, prior)
    made = np.concatenate(list(patches @ weight.transpose(0, 2, 1)), axis=1) + bias
    np.testing.assert_allclose(made.mean(axis=0), targets.mean(axis=0))


@pytest.mark.parametrize("ridge", [0.0, 1e-30, 1e-3])
def test_directions_without_variance_keep_the_prior(ridge: float) -> None:
    generator = np.random.default_rng(0)
    patches = generator.standard_normal((1, 50, 4))
    patches[..., 1] = 7.0  # a constant input
    patches[..., 3] = 0.0  # a dead one
    prior = generator.standard_normal((1, 2, 4))
    targets = patches[0, :, [0, 2]].T @ np.array([[1.0, 2.0], [3.0, 4.0]])
    weight, bias = moments_of(patches, targets).solve(prior, ridge)
    np.testing.assert_allclose(weight[0, :, [1, 3]], prior[0, :, [1, 3]], atol=1e-9)
    assert np.isfinite(bias).all()


def test_nothing_varies_at_all() -> None:
    prior = np.ones((1, 1, 2))
    moments = moments_of(np.full((1, 8, 2), 3.0), np.full((8, 1), 5.0))
    weight, bias = moments.solve(prior, 1e-3)
    np.testing.assert_array_equal(weight, prior)
    np.testing.assert_allclose(bias, [-1.0])


def test_duplicates_share_the_weight_without_blowing_up() -> None:
    generator = np.random.default_rng(0)
    single = generator.standard_normal((1, 100, 1))
    moments = moments_of(np.concatenate([single, single], axis=2), 2 * single[0])
    for ridge in (0.0, 1e-6):
        weight, _ = moments.solve(np.zeros((1, 1, 2)), ridge)
        np.testing.assert_allclose(weight, [[[1.0, 1.0]]], atol=1e-4)


def test_the_smallest_ridge_where_rows_abound(problem: tuple[np.ndarray, np.ndarray]) -> None:
    patches, targets = problem
    halves = moments_of(patches[:, ::2], targets[::2]), moments_of(patches[:, 1::2], targets[1::2])
    assert choose_ridge(halves, np.zeros((2, 3, 5)), 1e-3) == 1e-3


def test_a_large_ridge_where_the_few_rows_say_nothing() -> None:
    generator = np.random.default_rng(0)
    prior = generator.standard_normal((1, 4, 64))
    patches = generator.standard_normal((1, 40, 64))
    targets = patches[0] @ prior[0].T + 5 * generator.standard_normal((40, 4))  # the prior is right, the rest noise
    halves = moments_of(patches[:, ::2], targets[::2]), moments_of(patches[:, 1::2], targets[1::2])
    assert choose_ridge(halves, prior, 1e-3) >= 1.0
    clean = patches[0] @ np.roll(prior[0], 1, axis=1).T  # the prior is wrong, and the rows say so
    halves = moments_of(patches[:, ::2], clean[::2]), moments_of(patches[:, 1::2], clean[1::2])
    assert choose_ridge(halves, prior, 1e-3) <= 1.0


def test_one_row_a_half_teaches_nothing_but_the_mean() -> None:
    half = moments_of(np.ones((1, 1, 3)), np.ones((1, 1)), pieces=1)
    assert choose_ridge((half, half), np.zeros((1, 1, 3)), 1e-3) == np.inf
