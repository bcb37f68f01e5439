"""The rank of a noisy matrix by empirical variational Bayes, in closed form.

V = B A^T + noise of variance s^2 with Gaussian priors on both factors. The empirical variational Bayes solution shrinks
and cuts the singular values g of V [L, M], L <= M, and is known globally (Nakajima, Sugiyama, Babacan, Tomioka 2013,
"Global Analytic Solution of Fully-observed Variational Bayesian Matrix Factorization", JMLR 14). With a = L / M,

    a singular value stays where g > s sqrt(M x),   x = (1 + t)(1 + a / t),   t > 0 the zero of f(t) + f(t / a),
    f(z) = log(z + 1) / z - 1 / 2,

and the noise variance is the minimum, in one variable, of the free energy

    sum over h of  y_h - log y_h + [y_h > x] (log(u_h + 1) + a log(u_h / a + 1) - u_h),    y_h = g_h^2 / (M s^2),
    u_h = (y_h - (1 + a) + sqrt((y_h - (1 + a))^2 - 4 a)) / 2.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize

from graphopt.errors import GraphoptError

_GRID = 200
"""Points at which the free energy is looked at before the best one is refined: it may have several minima."""


def variational_rank(values: np.ndarray, shape: tuple[int, int], noise: float | None = None) -> int:
    """How many singular values stand out of the noise.

    Args:
        values: all singular values, float64 [min(shape)], falling.
        shape: of the matrix.
        noise: variance of the noise of an element where it is known; None estimates it.

    Returns:
        The rank, from 0 on. Singular values within rounding of 0 never count.

    Raises:
        GraphoptError: there are not min(shape) finite values.

    Example:
        >>> random = np.random.default_rng(0)
        >>> matrix = random.standard_normal((60, 5)) @ random.standard_normal((5, 90))
        >>> noisy = matrix + 0.1 * random.standard_normal(matrix.shape)
        >>> [variational_rank(np.linalg.svd(one, compute_uv=False), one.shape) for one in (matrix, noisy)]
        [5, 5]
    """
    less, more = sorted(shape)
    values = np.asarray(values, np.float64)
    if values.shape != (less,) or not np.isfinite(values).all():
        raise GraphoptError(
            f"{values.shape} singular values are not those of a matrix {list(shape)}", help="pass all, and finite ones"
        )
    if not values.any():
        return 0
    zero = float(values[0]) * np.finfo(np.float64).eps * more
    numeric = int((values > zero).sum())
    threshold = _threshold(less / more)
    if noise is None:
        if less == 1:
            return 1
        if numeric < less:  # without noise the energy falls without end: what is not rounding stands out
            return numeric
        noise = _noise(np.square(values), less, more, threshold)
    return min(int((np.square(values) > more * threshold * noise).sum()), numeric)


def _threshold(share: float) -> float:
    """x: the smallest square of a singular value, over M s^2, that stays; `share` is a = L / M."""

    def balance(t: float) -> float:
        return _falling(t) + _falling(t / share)

    zero = float(scipy.optimize.brentq(balance, 1e-6 * share, 1e6))  # pyright: ignore[reportArgumentType]
    return (1 + zero) * (1 + share / zero)


def _falling(z: float) -> float:
    return (math.log1p(z) / z if z > 1e-12 else 1.0) - 0.5


def _noise(squares: np.ndarray, less: int, more: int, threshold: float) -> float:
    """The variance with the least free energy."""
    share = less / more
    most = min(math.ceil(less / (1 + share)) - 1, less - 1)
    tail = float(squares[most:].mean())
    low = max(float(squares[most]) / (more * threshold), tail / more)
    high = float(squares.sum()) / (less * more)

    def energy(logarithm: float) -> float:
        y = squares / (more * math.exp(logarithm))
        above = y > threshold
        shifted = y[above] - (1 + share)
        u = (shifted + np.sqrt(np.maximum(np.square(shifted) - 4 * share, 0.0))) / 2
        gains = np.log1p(u) + share * np.log1p(u / share) - u
        return float((y - np.log(y)).sum() + gains.sum())

    if not low < high:
        return low
    grid = np.linspace(math.log(low), math.log(high), _GRID)
    best = int(np.argmin([energy(float(one)) for one in grid]))
    bounds = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    found = scipy.optimize.minimize_scalar(energy, bounds=bounds, method="bounded")
    return math.exp(float(found.x))  # pyright: ignore[reportAttributeAccessIssue]
