"""The metric in which an error of a weight counts: what it does to the outputs, on inputs with known second moments.

    E |(W - W_r) p|^2 = tr( (W - W_r) C (W - W_r)^T ),    C = E[p p^T] of the patches p that the layer reads

With C = Cov(p) it is the error that is left once the bias takes up the mean, b + (W - W_r) E[p].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from graphopt.inputs.moments import SecondMoments

DAMPING = 1e-3
"""Share of the mean variance of an input that each direction has at least: what inputs never showed is not free."""


@dataclass(frozen=True, eq=False)
class Metric:
    """Second moments of what a layer reads, one matrix a group.

    Attributes:
        matrices: float64 [G, K, K], positive definite; None for the identity.
        mean: float64 [G, K], what the bias makes up for; zeros where it does not.

    Example:
        >>> metric = Metric(np.array([[[4.0, 0.0], [0.0, 1.0]]]), np.zeros((1, 2)))
        >>> metric.power(np.array([[[1.0, 2.0]]]))
        8.0
    """

    matrices: np.ndarray | None
    mean: np.ndarray

    @classmethod
    def identity(cls, groups: int, columns: int) -> Metric:
        """All inputs alike: what is least then is the change of the weight itself."""
        return cls(None, np.zeros((groups, columns)))

    @classmethod
    def of(cls, moments: SecondMoments, *, centred: bool = True, damping: float = DAMPING) -> Metric | None:
        """The metric of moments of patches.

        Args:
            moments: of what the layer reads.
            centred: whether a bias takes up the mean, so that only the variance counts.
            damping: see `DAMPING`.

        Returns:
            None where the moments say nothing: they are not finite, or every input is 0.
        """
        if not moments.is_usable:
            return None
        mean = moments.inputs / moments.count
        matrices = moments.input_covariance() if centred else moments.inner / moments.count
        level = np.einsum("gkk->gk", moments.inner / moments.count).mean(axis=1)
        if not level.max() > 0:
            return None
        index = np.arange(matrices.shape[-1])
        # a group whose inputs are always 0 is as harmless as rounding, and still a metric
        matrices[:, index, index] += damping * np.maximum(level, 1e-12 * level.max())[:, None]
        return cls(matrices, mean if centred else np.zeros_like(mean))

    def applied(self, group: int, matrix: np.ndarray) -> np.ndarray:
        """A matrix [M, K] times that of a group."""
        return matrix if self.matrices is None else matrix @ self.matrices[group]

    def power(self, weights: np.ndarray) -> float:
        """tr(W C W^T), summed over groups: of float64 [G, M, K]."""
        return float(sum(np.vdot(self.applied(group, one), one) for group, one in enumerate(weights)))

    def bias(self, change: np.ndarray) -> np.ndarray:
        """What the bias makes up for where weights [G, M / G, K] lose `change`: float64 [M]."""
        return np.einsum("gmk,gk->gm", change, self.mean).reshape(-1)


class Regression:
    """Least squares of the outputs on features of the patches, for every number of leading features at once.

        min over B:  tr( (W - B T) C (W - B T)^T ),    T [F, K] the features

    One Cholesky factor of T C T^T holds those of its leading blocks, so that the error of the first f features is a
    cumulative sum.

    Args:
        gram: T C T^T, float64 [F, F].
        cross: W C T^T, float64 [M, F].

    Example:
        >>> weight = np.array([[3.0, 4.0]])
        >>> found = Regression(np.eye(2), weight)
        >>> found.explained.round(6).tolist(), found.solution(1).round(6).tolist()
        ([9.0, 25.0], [[3.0]])
    """

    def __init__(self, gram: np.ndarray, cross: np.ndarray) -> None:
        gram = (gram + gram.T) / 2
        level = float(np.trace(gram)) / len(gram)
        for jitter in (1e-13, 1e-10, 1e-7):  # features may depend on each other
            regular = gram + jitter * level * np.eye(len(gram))
            try:
                self._lower = scipy.linalg.cholesky(regular, lower=True)
                break
            except np.linalg.LinAlgError:
                continue
        else:
            self._lower = np.linalg.cholesky(np.eye(len(gram)) * max(level, 1.0))
        self.shadows = scipy.linalg.solve_triangular(self._lower, cross.T, lower=True)
        """What each feature adds to each output: float64 [F, M]."""
        self.explained = np.cumsum(np.square(self.shadows).sum(axis=1))
        """Power of the outputs that the first f features hold, at f - 1."""

    def solution(self, features: int) -> np.ndarray:
        """B of the first features: float64 [M, features]."""
        lower = self._lower[:features, :features]
        return scipy.linalg.solve_triangular(lower, self.shadows[:features], lower=True, trans=1).T
