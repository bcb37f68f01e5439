"""Second moments of what a linear operator reads and should make, streamed, and the least squares in their metric.

    min over W, b:  E |T - W p - b|^2 + l tr((W - W0) D (W - W0)^T)

with patches p, targets T and D = mean(diag Cov(p)) I has the closed form

    W = W0 + (Cov(T, p) - W0 Cov(p)) (Cov(p) + l D)^-1,    b = E T - W E p.

Memory does not grow with the number of samples: K^2 numbers a group for K inputs of an output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.linalg

from graphopt.ir.linear_rows import split_rows

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What `choose_ridge` tries."""
_ENOUGH_ROWS = 20
"""Rows an input from which on the smallest ridge is right: there is nothing to overfit."""
_MANY_COLUMNS = 512
"""Inputs of an output from which on a solve takes seconds, and `choose_ridge` tries less."""
_TINY = 1e-12
_ROUNDING = 1e-5
"""Relative error of sums of float32 products."""
_SMALLEST_RIDGE = 1e-9
"""A ridge near rounding does not make a singular covariance regular: directions without variance are left out then."""


Factor = Callable[[np.ndarray], np.ndarray]
"""Divides [M, K] by a covariance."""


@dataclass
class SecondMoments:
    """Sums over rows; `add` streams them in.

    Attributes:
        count: number of rows.
        inputs: sum of p, float64 [G, K].
        targets: sum of T, float64 [G, M / G].
        inner: sum of p p^T, float64 [G, K, K].
        cross: sum of T p^T, float64 [G, M / G, K].
        energy: sum of T^2, float64 [G, M / G].

    Example:
        >>> moments = SecondMoments.empty(1, 2, 1)
        >>> p = np.array([[[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]])
        >>> moments.add(p, np.array([[1.0], [2.0], [3.0]]))
        >>> weight, bias = moments.solve(np.zeros((1, 1, 2)), 0.0)
        >>> weight.round(6).tolist(), bias.round(6).tolist()
        ([[[2.0, 1.0]]], [0.0])
    """

    count: int
    inputs: np.ndarray
    targets: np.ndarray
    inner: np.ndarray
    cross: np.ndarray
    energy: np.ndarray
    _factors: dict[float, list[Factor]] = field(default_factory=dict["float", "list[Factor]"], repr=False)
    _lacking: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    """The last prior, and the covariance of the inputs with what it leaves of the targets."""

    @classmethod
    def empty(cls, groups: int, columns: int, rows: int) -> SecondMoments:
        """No rows yet; `rows` is M / G."""
        return cls(
            0,
            np.zeros((groups, columns)),
            np.zeros((groups, rows)),
            np.zeros((groups, columns, columns)),
            np.zeros((groups, rows, columns)),
            np.zeros((groups, rows)),
        )

    def add(self, patches: np.ndarray, targets: np.ndarray, *, inner: bool = True) -> None:
        """Add patches [G, R, K] with targets [R, M]; `inner` False leaves out what does not depend on the targets."""
        groups = split_rows(targets, len(patches))
        self.targets += groups.sum(axis=1, dtype=np.float64)
        self.cross += groups.transpose(0, 2, 1) @ patches
        self.energy += np.square(groups).sum(axis=1, dtype=np.float64)
        self._lacking = None
        if inner:
            self._factors = {}
            self.count += patches.shape[1]
            self.inputs += patches.sum(axis=1, dtype=np.float64)
            self.inner += patches.transpose(0, 2, 1) @ patches

    @property
    def is_usable(self) -> bool:
        """Whether there are rows, and all of them finite and not too large for float32."""
        sums = (self.inputs, self.targets, self.inner, self.cross, self.energy)
        return self.count > 0 and all(np.isfinite(one).all() for one in sums)

    def with_targets_of(self, other: SecondMoments) -> SecondMoments:
        """The same inputs with other targets."""
        return replace(self, targets=other.targets, cross=other.cross, energy=other.energy, _lacking=None)

    def plus(self, other: SecondMoments) -> SecondMoments:
        """The sums over both sets of rows."""
        names = ("count", "inputs", "targets", "inner", "cross", "energy")
        return SecondMoments(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def varies(self) -> bool:
        """Whether any input varies beyond the rounding of its sums."""
        squares = np.einsum("gkk->gk", self.inner) / max(self.count, 1)
        variance = squares - np.square(self.inputs / max(self.count, 1))
        return bool((variance > _ROUNDING * squares).any())

    def input_covariance(self) -> np.ndarray:
        """Cov(p), float64 [G, K, K]."""
        mean = self.inputs / self.count
        return self.inner / self.count - mean[:, :, None] * mean[:, None, :]

    def cross_covariance(self) -> np.ndarray:
        """Cov(T, p), float64 [G, M / G, K]."""
        mean = self.inputs / self.count
        return self.cross / self.count - (self.targets / self.count)[:, :, None] * mean[:, None, :]

    def solve(self, prior: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        """The weight [G, M / G, K] and bias [M] of least squares, drawn towards `prior` by the ridge.

        An infinite ridge leaves the prior and corrects the mean. Directions in which the inputs do not vary keep
        the prior.
        """
        weight = prior.astype(np.float64)
        if np.isfinite(ridge):
            if self._lacking is None or self._lacking[0] is not prior:
                self._lacking = prior, self.cross_covariance() - self._product(weight)
            pairs = zip(self._lacking[1], self._factored(ridge), strict=True)
            weight = weight + np.stack([factor(one) for one, factor in pairs])
        return weight, self.bias(weight)

    def _product(self, weight: np.ndarray) -> np.ndarray:
        """weight · Cov(p)."""
        mean = self.inputs / self.count
        return weight @ self.inner / self.count - (weight @ mean[:, :, None]) * mean[:, None, :]

    def _factored(self, ridge: float) -> list[Factor]:
        """Division by the regular covariance of each group; kept, since the same inputs are solved for many targets."""
        if ridge not in self._factors:
            self._factors[ridge] = [_factor(one, ridge) for one in self.input_covariance()]
        return self._factors[ridge]

    def bias(self, weight: np.ndarray) -> np.ndarray:
        """The bias [M] with which the mean of W p + b is that of the targets."""
        mean = self.inputs / self.count
        return ((self.targets / self.count) - np.einsum("gmk,gk->gm", weight, mean)).reshape(-1)

    def error(self, weight: np.ndarray, bias: np.ndarray) -> float:
        """Mean over rows of |T - W p - b|^2, summed over outputs."""
        offset = bias.reshape(self.targets.shape)
        quadratic = np.einsum("gmk,gmk->gm", weight @ self.inner, weight)
        linear = np.einsum("gmk,gmk->gm", weight, self.cross)
        mean = np.einsum("gmk,gk->gm", weight, self.inputs)
        total = self.energy - 2 * linear + quadratic
        total += 2 * offset * (mean - self.targets) + self.count * np.square(offset)
        return float(total.sum() / self.count)


def choose_ridge(halves: tuple[SecondMoments, SecondMoments], prior: np.ndarray, least: float) -> float:
    """The ridge that does best on the half of the rows that it was not solved on; `least` where rows abound.

    Args:
        halves: moments of two halves of the samples.
        prior: the weight [G, M / G, K] that the ridge draws to.
        least: the smallest ridge.
    """
    columns = prior.shape[-1]
    if min(half.count for half in halves) >= _ENOUGH_ROWS * columns / 2:
        return least
    if min(half.count for half in halves) < 2:
        return np.inf
    fine = columns <= _MANY_COLUMNS
    candidates = sorted({least, *(ridge for ridge in (RIDGES if fine else RIDGES[2::2]) if ridge > least), np.inf})
    folds = (halves, halves[::-1]) if fine else (halves,)
    errors = [sum(other.error(*half.solve(prior, ridge)) for half, other in folds) for ridge in candidates]
    return candidates[int(np.argmin(errors))]


def _factor(covariance: np.ndarray, ridge: float) -> Factor:
    """The function W -> W · (covariance + ridge · mean diagonal · I)^-1."""
    scale = float(np.mean(np.diagonal(covariance)))
    if not scale > 0:
        return np.zeros_like
    if ridge > _SMALLEST_RIDGE:
        regular = covariance.copy()
        np.fill_diagonal(regular, np.diagonal(regular) + ridge * scale)
        try:
            factor = scipy.linalg.cho_factor(regular, overwrite_a=True)
        except np.linalg.LinAlgError:
            pass  # sums of float32 products may be indefinite by rounding
        else:
            return lambda wanted: scipy.linalg.cho_solve(factor, wanted.T).T
    values, vectors = np.linalg.eigh(covariance)
    kept = values > _TINY * values.max() * len(values)
    inside, divisors = vectors[:, kept], values[kept] + ridge * scale
    return lambda wanted: (wanted @ inside / divisors) @ inside.T
