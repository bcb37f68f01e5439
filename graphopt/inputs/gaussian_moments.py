"""Mean and covariance of the channels of a value, and how they pass linear maps, nonlinear maps and pooling.

The algebra behind `graphopt.inputs.gaussian`, without graphs. A value is either taken for Gaussian (a *root*: what a
linear operator computes, by the central limit theorem) or a function of each channel of a root (its *profile*: the
function on a grid of standard deviations). Covariances are computed when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST_CHANNELS = 4096
"""Channels up to which a full covariance is kept; above, each channel has its variance only."""
GRID = np.linspace(-8.0, 8.0, 801)
"""Where profiles are known, in standard deviations of the root. Kinks may lie between: the error is 2e-5."""
ORDER = 24
"""Terms of the Hermite series; what is left is bounded and carried as one further term."""
_MOST_LAGS = 48
"""Distance up to which the spatial autocorrelation is followed; beyond, it is taken to stay what it is there."""


def _weights() -> np.ndarray:
    density = np.exp(-0.5 * GRID**2)
    return density / density.sum()


def _hermite() -> np.ndarray:
    """Orthonormal Hermite polynomials of degree 0 to ORDER on the grid, [points, ORDER + 1]."""
    columns = [np.ones_like(GRID), GRID]
    for degree in range(2, ORDER + 1):
        columns.append((GRID * columns[-1] - np.sqrt(degree - 1) * columns[-2]) / np.sqrt(degree))
    return np.stack(columns, axis=1)


WEIGHTS = _weights()
"""Probability of each point of the grid; the rule is exact to rounding for smooth functions."""
_WEIGHTED_HERMITE = _hermite() * WEIGHTS[:, None]


class Second(NamedTuple):
    """Second moments of a value.

    Attributes:
        covariance: float64 [C, C], None above `MOST_CHANNELS`.
        variance: float64 [C].
        lags: autocorrelation over space, the same for all channels: one odd axis a spatial axis, lag 0 in the
            middle (where it is 1); None where neighbours are taken for independent.
    """

    covariance: np.ndarray | None
    variance: np.ndarray
    lags: np.ndarray | None

    def rescaled(self, deviation: np.ndarray) -> Second:
        """The same correlations with other standard deviations, [C]; a negative one turns the sign of its channel."""
        if self.covariance is None:
            return Second(None, deviation**2, self.lags)
        covariance = correlation(self.covariance) * np.outer(deviation, deviation)
        return Second(covariance, deviation**2, self.lags)


def independent(variance: np.ndarray, lags: np.ndarray | None = None) -> Second:
    """Channels without correlation, variance [C]."""
    return Second(np.diag(variance) if len(variance) <= MOST_CHANNELS else None, variance, lags)


class Moments:
    """Mean and covariance of the channels of a value over samples and positions.

    Attributes:
        axis: the channel axis of the value, counted from the front.
        mean: float64 [C].
        variance: float64 [C].
        covariance: float64 [C, C], None where there are more than `MOST_CHANNELS` channels.
        lags: spatial autocorrelation, see `Second`.
    """

    def __init__(
        self,
        axis: int,
        mean: np.ndarray,
        second: Callable[[], Second],
        parents: Sequence[Moments] = (),
        variance: np.ndarray | None = None,
    ) -> None:
        self.axis, self.mean = axis, mean
        self._compute, self._parents, self._variance = second, tuple(parents), variance
        self._second: Second | None = None
        self._alias: Moments | None = None
        self._profile: tuple[Moments, np.ndarray] | None = None

    @property
    def second(self) -> Second:
        """All second moments. What they are computed from comes first, without recursion: graphs are deep."""
        pending: list[Moments] = [self]
        while pending:
            current = pending[-1]
            missing = [parent for parent in current._parents if parent._second is None]
            if current._second is None and missing:
                pending.extend(missing)
                continue
            if current._second is None:
                current._second = current._compute()
            pending.pop()
        assert self._second is not None
        return self._second

    @property
    def variance(self) -> np.ndarray:
        """Variance of each channel, [C]."""
        return self.second.variance if self._variance is None else self._variance

    @property
    def covariance(self) -> np.ndarray | None:
        """Covariance of the channels, [C, C]; None where there are too many."""
        return self.second.covariance

    @property
    def lags(self) -> np.ndarray | None:
        """Spatial autocorrelation."""
        return self.second.lags

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return len(self.mean)

    def profile(self) -> tuple[Moments, np.ndarray]:
        """The root, and this value on the grid of its standard deviations: [points, C]."""
        if self._profile is not None:
            return self._profile
        if self._alias is not None:
            return self._alias.profile()
        return self, self.mean + np.sqrt(self.variance) * GRID[:, None]

    def forget_profile(self) -> None:
        """Free the grid once nothing computes with it any more; the moments stay."""
        self._profile = None

    def moved(
        self,
        axis: int,
        lags: Callable[[np.ndarray | None], np.ndarray | None] = lambda lags: lags,
        *,
        same: bool = True,
    ) -> Moments:
        """The same channels along another axis, with other spatial axes; not the `same` where positions moved."""

        def second() -> Second:
            return self.second._replace(lags=lags(self.lags))

        moved = Moments(axis, self.mean, second, [self], self._variance)
        if same:
            moved._alias, moved._profile = self, self._profile
        elif self._profile is not None:
            root, values = self._profile
            moved._profile = Moments(axis, root.mean, lambda: root.second, [root], root.variance), values
        return moved

    def __repr__(self) -> str:
        return f"Moments(axis={self.axis}, channels={self.channels})"


def correlation(covariance: np.ndarray) -> np.ndarray:
    """Correlations of a covariance [C, C]; channels that do not vary are correlated with nothing, 1 with themselves."""
    deviation = np.sqrt(np.diag(covariance).clip(min=0))
    inverse = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    found = (covariance * np.outer(inverse, inverse)).clip(-1, 1)
    np.fill_diagonal(found, 1.0)
    return found


# Functions of one channel -----------------------------------------------------------------------------------


def of_profile(axis: int, root: Moments, values: np.ndarray) -> Moments:
    """A function of each channel of `root`, given on the grid: [points, C].

    E[f(x) g(y)] of two standard normal numbers of correlation r is the sum of a_k b_k r^k over the Hermite
    coefficients of f and g (Mehler 1866).
    """
    mean = WEIGHTS @ values
    variance = WEIGHTS @ (values - mean) ** 2
    coefficients = (values.T @ _WEIGHTED_HERMITE)[:, 1:]
    tail = np.sqrt((variance - (coefficients**2).sum(axis=1)).clip(min=0))
    coefficients = np.concatenate([coefficients, tail[:, None]], axis=1)

    def second() -> Second:
        before = root.second
        powers = (coefficients**2).sum(axis=0)
        lags = before.lags
        if lags is not None and powers.sum() > 0:
            lags = _series(powers / powers.sum(), lags)
        if before.covariance is None:
            return Second(None, variance, lags)
        of_root = correlation(before.covariance)
        found = np.zeros_like(of_root)
        for column in coefficients.T[::-1]:
            found += np.outer(column, column)
            found *= of_root
        return Second(found, variance, lags)

    moments = Moments(axis, mean, second, [root], variance)
    moments._profile = (root, values)  # pyright: ignore[reportPrivateUsage]
    return moments


def _series(powers: np.ndarray, lags: np.ndarray) -> np.ndarray:
    found = np.zeros_like(lags)
    for power in powers[::-1]:
        found = (found + power) * lags
    return found


def mean_of_relu(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """E[max(x, 0)] of Gaussian x, elementwise: mean and standard deviation of any one shape, float64.

    Example:
        >>> round(float(mean_of_relu(np.array(0.0), np.array(1.0))), 6)
        0.398942
    """
    from scipy.special import ndtr

    safe = np.where(deviation > 0, deviation, 1.0)
    ratio = mean / safe
    smooth = mean * ndtr(ratio) + safe * np.exp(-0.5 * ratio**2) / np.sqrt(2 * np.pi)
    return np.where(deviation > 0, smooth, np.maximum(mean, 0))


def largest_of(count: int, correlated: float) -> tuple[float, float]:
    """Mean and variance of the largest of `count` standard normal numbers of one pairwise correlation, in [0, 1]."""
    from scipy.special import ndtr

    edges = np.concatenate([[-np.inf], (GRID[1:] + GRID[:-1]) / 2, [np.inf]])
    probability = np.diff(ndtr(edges) ** count)
    mean = float(probability @ GRID)
    variance = float(probability @ (GRID - mean) ** 2)
    return np.sqrt(1 - correlated) * mean, correlated + (1 - correlated) * variance


# Space ------------------------------------------------------------------------------------------------------


def correlation_at(lags: np.ndarray | None, offsets: np.ndarray) -> np.ndarray:
    """The autocorrelation at integer offsets [spatial axes, ...]; at its border beyond it."""
    if lags is None or lags.ndim != len(offsets):
        return (offsets == 0).all(axis=0).astype(np.float64)
    middle = [size // 2 for size in lags.shape]
    index = tuple(
        np.clip(offset + center, 0, 2 * center) for offset, center in zip(offsets.astype(np.int64), middle, strict=True)
    )
    return lags[index]


def lag_grid(sizes: Sequence[int]) -> np.ndarray:
    """All lags within an extent: int64 [axes, 2 L + 1, ...], L one less than the size and at most 48."""
    reach = [min(size - 1, _MOST_LAGS) for size in sizes]
    return np.stack(np.meshgrid(*(np.arange(-most, most + 1) for most in reach), indexing="ij"))


def filtered_lags(
    lags: np.ndarray | None, taps: np.ndarray, power: np.ndarray, strides: Sequence[int], sizes: Sequence[int]
) -> np.ndarray | None:
    """Autocorrelation behind a filter.

    Args:
        lags: before the filter.
        taps: int64 [K, spatial axes], where each tap reads.
        power: float64 [K, K], covariance that two taps contribute at correlation 1, summed over the channels.
        strides: of the filter.
        sizes: spatial extent behind it.
    """
    if not len(sizes):
        return None
    differences, of_pair = np.unique(
        (taps[None] - taps[:, None]).reshape(-1, taps.shape[1]), axis=0, return_inverse=True
    )
    weights = np.bincount(of_pair.reshape(-1), power.reshape(-1), len(differences))
    grid = lag_grid(sizes)
    steps = np.reshape(strides, (-1,) + (1,) * len(sizes))
    found = np.zeros(grid.shape[1:])
    for difference, weight in zip(differences, weights, strict=True):
        found += weight * correlation_at(lags, grid * steps + difference.reshape(steps.shape))
    middle = found[tuple(size // 2 for size in found.shape)]
    return found / middle if middle > 0 else None


def mixed_lags(lags: Sequence[np.ndarray | None], powers: Sequence[float]) -> np.ndarray | None:
    """Autocorrelation of a sum of independent values; None counts as no correlation between neighbours."""
    shapes = [each.shape for each in lags if each is not None]
    if not shapes or {len(shape) for shape in shapes} not in [{rank} for rank in range(1, 4)] or not sum(powers):
        return None
    grid = lag_grid([max(sizes) // 2 + 1 for sizes in zip(*shapes, strict=True)])
    found = sum((power * correlation_at(each, grid) for each, power in zip(lags, powers, strict=True)), np.zeros(()))
    return np.asarray(found / sum(powers))


# Linear maps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taps:
    """Where a linear operator reads.

    Attributes:
        offsets: int64 [K, spatial axes], in steps of the input; [1, 0] for a matrix.
        reached: float64 [K, K], share of the output positions at which both taps are inside the input.
        strides: of the operator.
        sizes: spatial extent of the result.
    """

    offsets: np.ndarray
    reached: np.ndarray
    strides: tuple[int, ...]
    sizes: tuple[int, ...]


def linear_moments(
    axis: int, data: Moments, weight: np.ndarray, bias: np.ndarray, taps: Taps, *, keeps_space: bool = False
) -> Moments:
    """Moments of W x + b over samples and positions, zeros beyond the border included.

    Args:
        axis: channel axis of the result.
        data: moments of x.
        weight: float64 [groups, M / groups, C / groups, K].
        bias: float64 [M].
        taps: where the K taps read.
        keeps_space: whether the result has the positions of x (a matrix).

    Exact for the assumed model: the covariance of two channels at two positions is that at one position times an
    autocorrelation that all channels share.
    """
    groups, rows, columns, count = weight.shape
    share = np.diag(taps.reached)
    by_tap = np.einsum("gmck,gc->gmk", weight, data.mean.reshape(groups, columns)).reshape(-1, count)
    mean = by_tap @ share + bias

    def second() -> Second:
        before = data.second
        pairs = taps.offsets[None] - taps.offsets[:, None]
        tap_correlation = correlation_at(before.lags, np.moveaxis(pairs, -1, 0))
        values, vectors = np.linalg.eigh(taps.reached * tap_correlation)
        spread = by_tap @ (taps.reached - np.outer(share, share))
        variance = (spread * by_tap).sum(axis=1)
        full = before.covariance is not None and groups * rows <= MOST_CHANNELS
        covariance = spread @ by_tap.T if full else None
        for value, vector in zip(values, vectors.T, strict=True):
            if value > 1e-10 * values[-1]:
                mixed = (weight @ vector) * np.sqrt(value)
                if covariance is not None and before.covariance is not None:
                    covariance += _sandwich(mixed, before.covariance)
                else:
                    variance = variance + _sandwich_diagonal(mixed, before)
        if covariance is not None:
            covariance = (covariance + covariance.T) / 2
            variance = np.diag(covariance)
        variance = variance.clip(min=0)
        if keeps_space:
            return Second(covariance, variance, before.lags)
        lags = filtered_lags(before.lags, taps.offsets, _power(weight, before), taps.strides, taps.sizes)
        return Second(covariance, variance, lags)

    return Moments(axis, mean, second, [data])


def _sandwich(weight: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """W C W^T for a block-diagonal W given as [groups, m, c]."""
    groups, rows, columns = weight.shape
    total = groups * columns
    half = (weight @ covariance.reshape(groups, columns, total)).reshape(-1, total)
    return (weight @ np.ascontiguousarray(half.T).reshape(groups, columns, -1)).reshape(groups * rows, -1).T


def _blocks(covariance: np.ndarray, groups: int) -> np.ndarray:
    """The diagonal blocks of a covariance, [groups, c, c]."""
    columns = len(covariance) // groups
    index = np.arange(groups)
    return covariance.reshape(groups, columns, groups, columns)[index, :, index, :]


def _sandwich_diagonal(weight: np.ndarray, before: Second) -> np.ndarray:
    """The diagonal of W C W^T, [groups · m]."""
    groups = len(weight)
    if before.covariance is None:
        return np.einsum("gmc,gc->gm", weight**2, before.variance.reshape(groups, -1)).reshape(-1)
    return ((weight @ _blocks(before.covariance, groups)) * weight).sum(axis=2).reshape(-1)


def _power(weight: np.ndarray, before: Second, most_rows: int = 64) -> np.ndarray:
    """Covariance that each pair of taps contributes, summed over (evenly chosen) output channels: [K, K]."""
    groups, rows, _, count = weight.shape
    if count == 1:
        return np.ones((1, 1))
    if groups == 1 and rows > most_rows:
        weight = weight[:, np.linspace(0, rows - 1, most_rows).astype(np.int64)]
    ordered = np.moveaxis(weight, -1, 1)  # [groups, K, m, c]
    if before.covariance is None:
        spread = ordered * before.variance.reshape(groups, 1, 1, -1)
    else:
        spread = ordered @ _blocks(before.covariance, groups)[:, None]
    return np.einsum("gkmc,glmc->kl", spread, ordered, optimize=True)
