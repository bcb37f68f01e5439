"""Rounding in a metric of the inputs: nearest, and with feedback of the errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.inputs.moments import SecondMoments
from graphopt.passes.reconstruct_rounding import (
    best_rounding,
    input_metric,
    round_nearest,
    round_with_feedback,
)


def random_problem(seed: int, groups: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight and a metric of correlated inputs, of which some vary much more than others."""
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((groups, 3 * columns, columns)) @ generator.standard_normal(
        (groups, columns, columns)
    )
    inputs *= np.exp(generator.standard_normal(columns))
    metric = inputs.swapaxes(1, 2) @ inputs / (3 * columns) + 1e-3 * np.eye(columns)
    return generator.standard_normal((groups, rows, columns)), metric


def limits_of(bits: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    high = np.full(channels, 2.0 ** (bits - 1) - 1)
    return -high, high


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    groups=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 12),
    bits=st.integers(2, 8),
    shared=st.booleans(),
)
def test_feedback_is_never_worse_than_the_nearest(
    seed: int, groups: int, rows: int, columns: int, bits: int, shared: bool
) -> None:
    weight, metric = random_problem(seed, groups, rows, columns)
    limits = limits_of(bits, groups * rows)
    found = best_rounding(weight, metric, limits, shared=shared)
    scales = np.abs(weight).max(axis=2) / limits[1].reshape(groups, rows)
    scales = np.full_like(scales, scales.max()) if shared else scales
    bounds = tuple(limit.reshape(groups, rows) for limit in limits)
    nearest = round_nearest(weight, scales, (bounds[0], bounds[1])) * scales[:, :, None]
    change = nearest - weight
    plain = ((change @ metric) * change).sum(axis=2).reshape(-1)
    error = found.error(weight, metric)
    assert error.sum() <= plain.sum() * (1 + 1e-9)
    assert shared or (error <= plain * (1 + 1e-9)).all()
    assert (found.integers == np.rint(found.integers)).all()
    assert np.abs(found.integers).max() <= limits[1][0]
    assert (found.scales > 0).all()
    assert not shared or len(set(found.scales.tolist())) == 1


def test_feedback_is_a_lot_better_than_the_nearest_where_inputs_are_correlated() -> None:
    weight, metric = random_problem(0, 1, 16, 40)
    limits = limits_of(4, 16)
    found = best_rounding(weight, metric, limits).error(weight, metric).sum()
    scales = np.abs(weight).max(axis=2) / 7
    change = round_nearest(weight, scales, (-7 + 0 * scales, 7 + 0 * scales)) * scales[:, :, None] - weight
    assert found < 0.5 * ((change @ metric) * change).sum()


def gptq(weight: np.ndarray, metric: np.ndarray, scale: np.ndarray, high: float) -> np.ndarray:
    """The published form of the recursion: first column first, the error spread by the inverse of the metric."""
    order = np.argsort(-np.diag(metric), kind="stable")
    left = weight[:, order].copy()
    inverse = np.linalg.inv(metric[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    integers = np.zeros_like(left)
    for column in range(left.shape[1]):
        integers[:, column] = np.clip(np.rint(left[:, column] / scale), -high, high)
        error = (left[:, column] - scale * integers[:, column]) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
    result = np.empty_like(integers)
    result[:, order] = integers
    return result


@pytest.mark.parametrize("columns", [5, 64, 130])
def test_feedback_is_the_published_recursion(columns: int) -> None:
    weight, metric = random_problem(7, 2, 3, columns)
    scales = np.abs(weight).max(axis=2) / 7
    found = round_with_feedback(weight, metric, scales, (-7 + 0 * scales, 7 + 0 * scales))
    for group in range(2):
        assert (found[group] == gptq(weight[group], metric[group], scales[group], 7.0)).all()


def test_uncorrelated_inputs_leave_the_nearest() -> None:
    weight, _ = random_problem(3, 2, 4, 9)
    metric = np.stack([np.diag(np.arange(1.0, 10.0))] * 2)
    scales = np.abs(weight).max(axis=2) / 7
    bounds = (-7 + 0 * scales, 7 + 0 * scales)
    assert (round_with_feedback(weight, metric, scales, bounds) == round_nearest(weight, scales, bounds)).all()


@pytest.mark.parametrize("shared", [False, True])
def test_many_bits_are_the_identity(shared: bool) -> None:
    weight, metric = random_problem(1, 2, 3, 20)
    found = best_rounding(weight, metric, limits_of(40, 6), shared=shared)
    assert np.abs(found.weight() - weight).max() < 1e-9


def test_scales_do_not_fall_below_the_smallest() -> None:
    weight, metric = random_problem(2, 1, 3, 6)
    assert (best_rounding(weight, metric, limits_of(8, 3), smallest=5.0).scales >= 5.0).all()


def test_dead_inputs_and_channels_of_zeros_are_rounded() -> None:
    moments = SecondMoments.empty(1, 4, 2)
    moments.add(np.zeros((1, 10, 4), np.float32), np.zeros((10, 2), np.float32))
    weight = np.array([[[1.0, 2.0, -3.0, 0.5], [0.0, 0.0, 0.0, 0.0]]])
    found = best_rounding(weight, input_metric(moments, 1e-3), limits_of(8, 2))
    assert np.abs(found.weight() - weight).max() < 0.02
    assert np.isfinite(found.scales).all()


def test_an_infinite_ridge_still_gives_a_metric() -> None:
    moments = SecondMoments.empty(1, 2, 1)
    moments.add(np.array([[[0.0, 1.0], [1.0, 0.0]]], np.float32), np.zeros((2, 1), np.float32))
    assert np.isfinite(np.linalg.cholesky(input_metric(moments, np.inf))).all()
